"""A plain JPEG Lossless (ITU-T T.81 process 14) encoder and DICOM files to put streams
in."""

import io
import struct

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID

PREDICTORS = {  # from left a, above b, above left c (T.81 table H.1)
    1: lambda a, b, c: a,
    2: lambda a, b, c: b,
    3: lambda a, b, c: c,
    4: lambda a, b, c: a + b - c,
    5: lambda a, b, c: a + ((b - c) >> 1),
    6: lambda a, b, c: b + ((a - c) >> 1),
    7: lambda a, b, c: (a + b) >> 1,
}
FLAT_TABLE = {category: (f"{category:05b}", category) for category in range(17)}


def random_table(rng, categories=range(17)):
    """A random complete prefix code, {category: (bits, category)}, no code longer than 16
    bits.

    Repeatedly splits a random leaf; one leaf is left over, since all ones is forbidden.
    """
    lengths = [0]
    while len(lengths) < len(categories) + 1:
        leaf = lengths.pop(rng.integers(len(lengths)))
        if leaf == 16:
            lengths.append(leaf)
            continue
        lengths += [leaf + 1, leaf + 1]
    return canonical(sorted(lengths)[:-1], list(rng.permutation(list(categories))))


def optimal_table(differences):
    """The Huffman code of these differences (package of two rarest first), at most 16
    bits."""
    import heapq

    counts = np.bincount(
        [abs(int(d)).bit_length() for d in differences.ravel()], minlength=17
    )
    heap = [(int(n) + 1, [category]) for category, n in enumerate(counts)] + [(0, [-1])]
    heapq.heapify(heap)
    depth = dict.fromkeys(range(-1, 17), 0)
    while len(heap) > 1:
        (n, left), (m, right) = heapq.heappop(heap), heapq.heappop(heap)
        for category in left + right:
            depth[category] += 1
        heapq.heappush(heap, (n + m, left + right))
    categories = sorted(range(17), key=depth.get)
    lengths = [min(16, depth[category]) for category in categories]
    assert sum(2.0**-n for n in lengths) < 1
    return canonical(lengths, categories)


def canonical(lengths, categories):
    """{category: (bits, category)} of the canonical code with these ascending lengths."""
    code, before, table = 0, lengths[0], {}
    for length, category in zip(lengths, categories):
        code <<= length - before
        table[int(category)] = (f"{code:0{length}b}", int(category))
        code, before = code + 1, length
    return table


def predict(samples, predictor, first):
    """Predictions (rows, columns) of one restart interval: T.81 H.1.2.1."""
    samples = samples.astype(np.int64)
    padded = np.pad(samples, ((1, 0), (1, 0)))
    left, above, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    prediction = PREDICTORS[predictor](left, above, corner)
    prediction[:, 0] = above[:, 0]
    prediction[0] = left[0]
    prediction[0, 0] = first
    return prediction


def differences_of(samples, predictor, first):
    """Differences in -32767 ... 32768, the form that T.81 H.1.2.2 codes."""
    difference = (samples.astype(np.int64) - predict(samples, predictor, first)) % 65536
    return np.where(difference > 32768, difference - 65536, difference)


def encode_interval(differences, table):
    """Entropy-coded, padded with ones, stuffed bytes of one restart interval."""
    bits = []
    for difference in differences.ravel().tolist():
        category = abs(difference).bit_length() if difference != 32768 else 16
        bits.append(table[category][0])
        if 0 < category < 16:
            extra = difference if difference > 0 else difference + (1 << category) - 1
            bits.append(f"{extra:0{category}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    return (
        int("1" + text, 2)
        .to_bytes(len(text) // 8 + 1, "big")[1:]
        .replace(b"\xff", b"\xff\x00")
    )


def segment(marker, body):
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def encode(
    samples,
    bits=16,
    predictor=1,
    shift=0,
    restart_rows=0,
    table=None,
    extra_tables=(),
    sof=0xC3,
    components=1,
    fill=b"",
):
    """A JPEG Lossless stream of uint16 samples (rows, columns).

    `table` is {category: (bits, category)}, "optimal" or None for five bits a category;
    `fill` goes before every marker of the scan; `extra_tables` are written under other
    identifiers.
    """
    rows, columns = samples.shape
    stored = samples.astype(np.int64) >> shift
    bands = [
        stored[row : row + (restart_rows or rows)]
        for row in range(0, rows, restart_rows or rows)
    ]
    coded = [differences_of(band, predictor, 1 << (bits - shift - 1)) for band in bands]
    if table == "optimal":
        table = optimal_table(np.concatenate([band.ravel() for band in coded]))
    table = table or FLAT_TABLE
    out = b"\xff\xd8" + segment(0xFE, b"a comment \xff\xd9")
    for identifier, each in [*enumerate(extra_tables, 1), (0, table)]:
        entries = sorted(each.values(), key=lambda entry: (len(entry[0]), entry[0]))
        counts = np.bincount([len(code) for code, _ in entries], minlength=17)[1:]
        out += segment(
            0xC4, bytes([identifier, *counts, *(category for _, category in entries)])
        )
    out += segment(
        sof,
        struct.pack(">BHHB", bits, rows, columns, components)
        + b"".join(bytes([n + 1, 0x11, 0]) for n in range(components)),
    )
    if restart_rows:
        out += segment(0xDD, struct.pack(">H", restart_rows * columns))
    out += segment(0xDA, bytes([1, 1, 0, predictor, 0, shift]))
    for number, band in enumerate(coded):
        out += encode_interval(band, table)
        out += fill + (
            bytes([0xFF, 0xD0 + number % 8]) if number + 1 < len(coded) else b"\xff\xd9"
        )
    return out


def dicom_file(
    frames,
    syntax,
    shape,
    bits=16,
    signed=False,
    stored=None,
    fragments=1,
    offset_table=True,
    **tags,
):
    """A dataset read back from the bytes of a DICOM file that holds these frames of pixel
    data.

    `frames` is a list of encoded frames, or one bytes object of uncompressed pixels.
    """
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.2")
    meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3.4"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = shape[-2:]
    if len(shape) == 3:
        dataset.NumberOfFrames = shape[0]
    dataset.BitsAllocated = 8 if bits <= 8 else 16 if bits <= 16 else 32
    dataset.BitsStored = stored or bits
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(signed)
    for name, value in tags.items():
        setattr(dataset, name, value)
    if isinstance(frames, bytes):
        dataset.PixelData = frames
    else:
        dataset.PixelData = encapsulate(
            frames, fragments_per_frame=fragments, has_bot=offset_table
        )
        dataset["PixelData"].is_undefined_length = True
    dataset["PixelData"].VR = "OB" if dataset.BitsAllocated == 8 else "OW"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    buffer.seek(0)
    return pydicom.dcmread(buffer)
