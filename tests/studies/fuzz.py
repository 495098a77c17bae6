"""Random mutations of every kind of input; none may hang, crash, eat memory or raise oddly.

    python tests/studies/fuzz.py --n 2000 --seed 0

Bit flips, byte bursts, cuts, insertions and spliced headers of small DICOM files of all transfer
syntaxes, raw JPEG Lossless streams and NIfTI files, given to read_volume, decode_lossless_jpeg
and read_mask. Prints one line; exit status 1 if anything but a StudyError or UserError came out.
"""

import argparse
import gzip
import io
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pydicom

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "tools")]

from lossless_jpeg_encoder import dicom_file, encode  # noqa: E402

import cspine  # noqa: E402

SECONDS = 60  # longest time for one input, on a machine busy with other work
MEMORY = 2**30  # bytes of address space that one input may add
SLICES = 24  # files of a study: 16 are one, so that most with a few hurt are still read


class Hang(BaseException):
    """An input took too long; no `except Exception` may swallow it."""


def dicom_bytes(number, kind):
    """One 32x40 slice as a DICOM file of the given kind."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 2000, (32, 40)).astype(np.uint16)
    tags = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.1", "Modality": "CT",
            "FrameOfReferenceUID": "1.2.3.2", "InstanceNumber": number + 1,
            "ImagePositionPatient": [0, 0, float(number)], "PixelSpacing": [0.5, 0.5],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "SliceThickness": 1.0,
            "RescaleSlope": 1, "RescaleIntercept": -1024}
    syntax = KINDS[kind]
    if kind == "look-up table":
        lut = pydicom.Dataset()
        lut.add_new("LUTDescriptor", "US", [2000, 0, 16])
        lut.add_new("LUTData", "US", [*range(2000)])
        tags["ModalityLUTSequence"] = [lut]
    elif kind == "padding":
        tags |= {"PixelPaddingValue": 1900, "PixelPaddingRangeLimit": 1999}
    elif kind == "jpeg 2000 of signed":  # whose stream says unsigned
        tags["PixelRepresentation"] = 1
    elif kind == "passes":
        tags |= {"AcquisitionNumber": number % 2 + 1, "ContentTime": f"1015{number:02d}"}
        tags["ImagePositionPatient"] = [0, 0, number // 2 + number % 2 / 100]
    if kind.startswith("jpeg 2000"):
        stream = cv2.imencode(".jp2", pixels, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1]
        stream = stream.tobytes()
        frames = [stream if "boxed" in kind else stream[stream.index(b"\xff\x4f\xff\x51"):]]
    elif kind.startswith("jpeg lossless"):
        frames = [encode(pixels, 12, number % 7 + 1, restart_rows=number % 2 * 4, table="optimal")]
    else:
        frames = pixels.astype(">u2" if kind.startswith("big") else "<u2").tobytes()
    if kind == "rle":
        dataset = dicom_file(frames, KINDS["explicit"], (32, 40), **tags)
        dataset.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
    else:
        dataset = dicom_file(frames, syntax, (32, 40), fragments=number % 3 + 1,
                             offset_table=number % 2 == 0, **tags)
    buffer = io.BytesIO()
    if kind == "big endian without meta":
        bare = pydicom.Dataset({element.tag: element for element in dataset})
        pydicom.dcmwrite(buffer, bare, implicit_vr=False, little_endian=False)
        return buffer.getvalue()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


KINDS = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "big endian": "1.2.840.10008.1.2.2",
    "big endian without meta": "1.2.840.10008.1.2.2",
    "look-up table": "1.2.840.10008.1.2.1",
    "padding": "1.2.840.10008.1.2.1",
    "passes": "1.2.840.10008.1.2.1",
    "deflated": "1.2.840.10008.1.2.1.99",
    "rle": "1.2.840.10008.1.2.5",
    "jpeg lossless": "1.2.840.10008.1.2.4.70",
    "jpeg lossless 57": "1.2.840.10008.1.2.4.57",
    "jpeg 2000": "1.2.840.10008.1.2.4.90",
    "jpeg 2000 of signed": "1.2.840.10008.1.2.4.90",
    "jpeg 2000 boxed": "1.2.840.10008.1.2.4.91",
}


def nifti_bytes(number):
    """A 40x32x16 NIfTI-1 mask of some type and byte order; every other one compressed,
    of these every other one in two members."""
    order = "<>"[number // 2 % 2]
    code, kind = [(2, "u1"), (4, "i2"), (8, "i4"), (16, "f4"), (64, "f8"), (512, "u2")][number % 6]
    header = bytearray(348)
    struct.pack_into(order + "i", header, 0, 348)
    struct.pack_into(order + "8h", header, 40, 3, 40, 32, 16, 1, 1, 1, 1)
    struct.pack_into(order + "2h", header, 70, code, 8 * int(kind[1]))
    struct.pack_into(order + "8f", header, 76, 1, 0.5, 0.5, 1, 1, 1, 1, 1)
    struct.pack_into(order + "3f", header, 108, 352, 1, 0)
    struct.pack_into(order + "2h", header, 252, number % 3 == 1, number % 3 == 0)
    struct.pack_into(order + "12f", header, 280, -0.5, 0, 0, 0, 0, -0.5, 0, 0, 0, 0, 1, 0)
    header[344:348] = b"n+1\0"
    labels = np.random.default_rng(number).integers(0, 8, 40 * 32 * 16).astype(order + kind)
    data = bytes(header) + bytes(4) + labels.tobytes()
    if number % 2 == 0:
        return data
    cut = len(data) // 2 if number % 4 == 1 else len(data)
    return gzip.compress(data[:cut], 1, mtime=0) + gzip.compress(data[cut:], 1, mtime=0)


def mutate(data, rng, donors):
    """One to three random injuries to the bytes, most of them where headers are."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        near_start = rng.random() < 0.6
        at = int(rng.integers(0, max(1, min(len(data), 1200) if near_start else len(data))))
        what = rng.integers(7)
        if what <= 1:
            for place in rng.integers(at, at + 40, rng.integers(1, 8)):
                if place < len(data):
                    data[place] ^= 1 << int(rng.integers(8))
        elif what == 2:
            data[at:at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(1, 9)))
        elif what == 3:
            value = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
            data[at:at + 4] = bytes([value]) * int(rng.integers(1, 5))
        elif what == 4:
            del data[at:at + int(rng.integers(1, 200))]
        elif what == 5:
            donor = donors[int(rng.integers(len(donors)))]
            start = int(rng.integers(0, len(donor)))
            data[at:at + 1] = donor[start:start + int(rng.integers(1, 400))]
        elif rng.random() < 0.5:
            del data[at:]
    return bytes(data)


def guarded(action):
    """What became of an action: "read", "refused", or what must not happen, with its place."""
    def stop(*_):
        raise Hang
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        action()
        return "read"
    except cspine.UserError:  # StudyError is one
        return "refused"
    except Hang:
        return "hang: " + traceback.format_exc(limit=-2).replace("\n", " ")
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({place.name}:{place.lineno})"
    finally:
        signal.alarm(0)


def read_and_fit(path, volume):
    """What a training does with a mask; its share inside and on bone are shares."""
    shares = cspine.mask_fit(path, volume, cspine.read_mask(path, volume))
    assert all(0 <= share <= 1 for share in shares), shares


def limit_memory(extra):
    """Lets this process grow by `extra` bytes of address space; gives back the old limits."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, old[1]))
    return old


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(n, seed, workplace=None):
    """n mutations: {"counts": Counter by input and outcome, "bad": [...], "growth": bytes}.

    A study is SLICES files of one kind of pixels, of which one to all are mutated: it may be read
    or refused; what is read has passed the choice of stacks, passes and places, too.
    """
    folder = Path(workplace or tempfile.mkdtemp())
    inputs = {kind: [dicom_bytes(number, kind) for number in range(SLICES)] for kind in KINDS}
    streams = [encode(np.random.default_rng(i).integers(0, 4096, (32, 40)).astype(np.uint16), 12,
                      i % 7 + 1, restart_rows=i % 3 * 4, table="optimal") for i in range(14)]
    masks = [nifti_bytes(number) for number in range(12)]
    donors = [files[0] for files in inputs.values()] + streams[:2] + masks[:4]
    volume = SimpleNamespace(hu=np.zeros((16, 32, 40), np.int16), spacing=(1.0, 0.5, 0.5),
                             affine=np.diag([0.5, 0.5, 1.0, 1.0]))
    cspine.decode_lossless_jpeg(streams[0])  # whatever is loaded on first use is not growth
    counts, bad, before, old = Counter(), [], peak_bytes(), limit_memory(MEMORY)
    try:
        for number in range(n):
            rng = np.random.default_rng([seed, number])
            kind = [*KINDS, "stream", "stream", "mask", "mask"][number % (len(KINDS) + 4)]
            started = time.monotonic()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if kind == "stream":
                    data = mutate(streams[number % len(streams)], rng, donors)
                    outcome = guarded(lambda: cspine.decode_lossless_jpeg(data))
                elif kind == "mask":
                    which = number % len(masks)
                    path = folder / ("mask.nii.gz" if which % 2 else "mask.nii")
                    path.write_bytes(mutate(masks[which], rng, donors))
                    outcome = guarded(lambda: read_and_fit(path, volume))
                else:
                    study = folder / "study"
                    shutil.rmtree(study, ignore_errors=True)
                    study.mkdir()
                    hurt = SLICES if rng.random() < 0.5 else int(rng.integers(1, SLICES))
                    for place, data in enumerate(inputs[kind]):
                        data = mutate(data, rng, donors) if place < hurt else data
                        (study / f"{place + 1}.dcm").write_bytes(data)
                    outcome = guarded(lambda: cspine.read_volume(study))
            if time.monotonic() - started > SECONDS:
                outcome = f"took {time.monotonic() - started:.0f} s"
            counts[kind, outcome if outcome in ("read", "refused") else "bad"] += 1
            if outcome not in ("read", "refused"):
                bad.append(f"{kind}, seed {seed}, number {number}: {outcome}")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
        if workplace is None:
            shutil.rmtree(folder)
    growth = peak_bytes() - before
    if growth > MEMORY:
        bad.append(f"resident memory grew by {growth / 2**20:.0f} MiB")
    return {"counts": counts, "bad": bad, "growth": growth}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=2000, help="mutations (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default 0)")
    options = parser.parse_args()
    result = run(options.n, options.seed)
    for line in result["bad"]:
        print(line, file=sys.stderr)
    read = sum(count for (_, outcome), count in result["counts"].items() if outcome == "read")
    print(f"{options.n} mutations, seed {options.seed}: {read} read, "
          f"{options.n - read - len(result['bad'])} refused, {len(result['bad'])} bad, "
          f"memory grew by {result['growth'] / 2**20:.0f} MiB")
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
