"""I rely on: every slice file's pixels come out exactly as stored, or as a StudyError.

Oracles: the images that went into tests/tools/lossless_jpeg_encoder.py (written from ITU-T T.81, shares
no code with the decoder), values pinned from pydicom 3.0.2 with pylibjpeg on pydicom's own test
files, and pylibjpeg itself where it is installed. All comparisons are exact unless they say so.
"""

import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pydicom
import pytest
from lossless_jpeg_encoder import dicom_file, encode, random_table
from pydicom.data import get_testdata_file

import cspine
from cspine import StudyError, decode_lossless_jpeg, decode_pixels

IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
LOSSLESS, SV1 = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"
J2K_LOSSLESS = "1.2.840.10008.1.2.4.90"


def images(rng, bits, shape=(13, 17)):
    """Images by name, uint16 below 2**bits: random, smooth, and the worst for a difference coder."""
    top = 2**bits - 1
    y, x = np.indices(shape)
    chessboard = (x + y) % 2 * top
    return {
        "random": rng.integers(0, top + 1, shape).astype(np.uint16),
        "smooth": ((x * 3 + y * 5) * top // 200 % (top + 1)).astype(np.uint16),
        "zero": np.zeros(shape, np.uint16),
        "full": np.full(shape, top, np.uint16),
        "half": np.full(shape, (top + 1) // 2, np.uint16),  # differences 0 or 32768
        "chessboard": chessboard.astype(np.uint16),
        "stripes": (x % 2 * ((top + 1) // 2)).astype(np.uint16),  # differences of +-32768
        "columns": (x % 2 * top).astype(np.uint16),
        "rows": (y % 2 * top).astype(np.uint16),
    }


def noisy_slice(seed=0, size=96):
    """A round body of 40 HU in air, noise of 30 HU, as 12-bit stored values."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((size, size)) - size / 2
    body = np.where(x**2 + y**2 < size**2 / 8, 1064, 24)
    return np.clip(body + rng.normal(0, 30, body.shape), 0, 4095).astype(np.uint16)


def bundled(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = get_testdata_file(name, download=False)
        return path and pydicom.dcmread(path)


# ---- JPEG Lossless ----

@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("bits", [2, 3, 8, 10, 12, 15, 16])
def test_a_stream_of_any_predictor_and_depth_comes_back_exactly(predictor, bits):
    rng = np.random.default_rng(100 * predictor + bits)
    for name, image in images(rng, bits).items():
        for table in (None, "optimal", random_table(rng)):
            restart_rows = int(rng.choice([0, 0, 1, 5]))
            stream = encode(image, bits, predictor, restart_rows=restart_rows, table=table)
            assert np.array_equal(decode_lossless_jpeg(stream), image), (name, restart_rows)


@pytest.mark.parametrize("shift", [1, 2, 4, 7])
def test_a_point_transform_drops_only_the_lowest_bits(shift):
    rng = np.random.default_rng(shift)
    for predictor in range(1, 8):
        image = rng.integers(0, 4096, (9, 11)).astype(np.uint16)
        stream = encode(image, 12, predictor, shift=shift, restart_rows=4)
        assert np.array_equal(decode_lossless_jpeg(stream), image >> shift << shift), predictor


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 20), (20, 1), (2, 20), (20, 3)])
def test_images_of_a_single_row_or_column_come_back_exactly(shape):
    rng = np.random.default_rng(sum(shape))
    for predictor in range(1, 8):
        for name, image in images(rng, 16, shape).items():
            for restart_rows in (0, 1):
                stream = encode(image, 16, predictor, restart_rows=restart_rows)
                assert np.array_equal(decode_lossless_jpeg(stream), image), (predictor, name)


def test_hundreds_of_random_streams_come_back_exactly():
    for seed in range(150):
        rng = np.random.default_rng(seed)
        bits, shape = int(rng.integers(2, 17)), tuple(rng.integers(1, 40, 2))
        shift = int(rng.integers(0, bits)) if seed % 3 == 0 else 0
        image = rng.integers(0, 2 ** rng.integers(1, bits + 1), shape).astype(np.uint16)
        stream = encode(image, bits, int(rng.integers(1, 8)), shift, int(rng.integers(0, shape[0])),
                        random_table(rng), fill=b"\xff" * int(rng.integers(0, 4)))
        assert np.array_equal(decode_lossless_jpeg(stream), image >> shift << shift), seed


def test_the_longest_codes_and_differences_fit_the_jumps():
    """Sixteen bits of code and fifteen of difference for nearly every sample."""
    deep = {category: (f"{category:016b}", category) for category in range(17)}
    image = np.random.default_rng(0).choice([0, 2**15 - 1], (40, 50)).astype(np.uint16)
    for predictor in range(1, 8):
        stream = encode(image, 16, predictor, table=deep)
        assert np.array_equal(decode_lossless_jpeg(stream), image), predictor


def test_a_stream_longer_than_one_chunk_comes_back_exactly():
    image = np.random.default_rng(0).integers(0, 65536, (300, 257)).astype(np.uint16)
    for predictor, restart_rows in ((1, 0), (4, 0), (7, 250)):
        stream = encode(image, 16, predictor, restart_rows=restart_rows)
        assert len(stream) > 4 * 2**15
        assert np.array_equal(decode_lossless_jpeg(stream), image), predictor


def test_several_tables_of_which_the_scan_names_one():
    rng = np.random.default_rng(1)
    image = noisy_slice(1, 20)
    stream = encode(image, 12, table="optimal", extra_tables=[random_table(rng), random_table(rng)])
    assert np.array_equal(decode_lossless_jpeg(stream), image)


@pytest.mark.parametrize("change", [{"sof": 0xC0}, {"sof": 0xC7}, {"components": 3}, {"predictor": 0}])
def test_streams_that_are_not_one_component_lossless_are_refused(change):
    image = np.zeros((4, 4), np.uint16)
    stream = encode(image, 12, **{key: value for key, value in change.items() if key != "predictor"})
    if "predictor" in change:
        stream = stream.replace(b"\xff\xda\0\x08\x01\x01\0\x01", b"\xff\xda\0\x08\x01\x01\0\0")
    with pytest.raises(StudyError):
        decode_lossless_jpeg(stream)


@pytest.mark.parametrize("size", [(0, 9), (9, 0), (65535, 65535), (4097, 1), (4096, 4096)])
def test_absurd_sizes_in_a_jpeg_are_refused(size):
    stream = encode(np.zeros((9, 9), np.uint16), 12)
    at = stream.index(b"\xff\xc3") + 5
    broken = stream[:at] + b"".join(n.to_bytes(2, "big") for n in size) + stream[at + 4:]
    with pytest.raises(StudyError):
        decode_lossless_jpeg(broken)


def test_every_cut_of_a_stream_is_refused():
    """Only the end marker may be missing: without it all samples are still there."""
    image = np.random.default_rng(3).integers(0, 4096, (6, 7)).astype(np.uint16)
    for restart_rows in (0, 2):
        stream = encode(image, 12, 1, restart_rows=restart_rows)
        for length in range(len(stream) - 2):
            with pytest.raises(StudyError):
                decode_lossless_jpeg(stream[:length])
        assert np.array_equal(decode_lossless_jpeg(stream[:-2]), image)


def test_bit_flips_raise_nothing_but_study_errors():
    image, tables = noisy_slice(2, 24), [None, "optimal"]
    for seed in range(300):
        rng = np.random.default_rng(seed)
        stream = bytearray(encode(image, 12, seed % 7 + 1, restart_rows=seed % 3 * 8,
                                  table=tables[seed % 2]))
        for at in rng.integers(0, len(stream) if seed % 2 else 80, rng.integers(1, 6)):
            stream[at] ^= 1 << rng.integers(8)
        try:
            samples = decode_lossless_jpeg(bytes(stream))
        except StudyError:
            continue
        assert samples.dtype == np.uint16 and samples.ndim == 2, seed


def test_runs_of_fill_bytes_do_not_take_quadratic_time():
    stream = encode(np.zeros((9, 9), np.uint16), 12)
    with pytest.raises(StudyError):
        decode_lossless_jpeg(stream[:-30] + b"\xff" * 2**22 + b"\x01")
    with pytest.raises(StudyError):
        decode_lossless_jpeg(b"\xff" * 2**20)


def test_many_restart_intervals_do_not_take_long_to_unpredict():
    """One wavefront an interval took minutes for a large image; all go at once."""
    image = np.random.default_rng(0).integers(0, 256, (512, 64)).astype(np.uint16)
    for predictor in (1, 7):
        stream = encode(image, 8, predictor, restart_rows=1)
        assert np.array_equal(decode_lossless_jpeg(stream), image), predictor


def test_our_decoder_agrees_with_libjpeg():
    libjpeg = pytest.importorskip("libjpeg")
    rng = np.random.default_rng(7)
    for predictor in range(1, 8):
        for bits in (8, 12, 16):
            image = images(rng, bits)["random" if bits == 8 else "smooth"]
            stream = encode(image, bits, predictor, restart_rows=predictor % 2 * 4, table="optimal")
            theirs = np.asarray(libjpeg.decode(stream)).reshape(image.shape)
            assert np.array_equal(decode_lossless_jpeg(stream), theirs), (predictor, bits)


# ---- DICOM files of every transfer syntax ----

def stored_values(bits, signed, shape=(12, 15), seed=0):
    rng = np.random.default_rng(seed)
    low = -(2 ** (bits - 1)) if signed else 0
    values = rng.integers(low, low + 2**bits, shape)
    values.flat[:2] = low, low + 2**bits - 1
    size = 8 if bits <= 8 else 16 if bits <= 16 else 32
    return values.astype(f"{'int' if signed else 'uint'}{size}")


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 13, 16, 32])
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
def test_uncompressed_values_come_back_exactly(syntax, bits, signed):
    values = stored_values(bits, signed)
    order = ">" if syntax == BIG and bits > 8 else "<"
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    decoded = decode_pixels(dicom_file(pixels, syntax, values.shape, bits, signed))
    assert decoded.shape == (1, 12, 15) and np.array_equal(decoded[0], values)
    assert decoded.dtype.kind == ("i" if signed else "u") and decoded.dtype.itemsize in (2, 4)


@pytest.mark.parametrize("signed", [False, True])
def test_overlay_bits_above_the_stored_ones_are_ignored(signed):
    values = stored_values(12, signed)
    dirty = (values.astype(np.uint16) & 0x0FFF) | 0xA000
    decoded = decode_pixels(dicom_file(dirty.tobytes(), EXPLICIT, values.shape, 16, signed, stored=12))
    assert np.array_equal(decoded[0], values)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", [LOSSLESS, SV1])
def test_lossless_jpeg_files_come_back_exactly(syntax, bits, signed):
    values = stored_values(bits, signed, (3, 12, 15))
    raw = values.astype(np.int64).astype(np.uint16) & (2**bits - 1)
    for predictor in (1, 6):
        streams = [encode(frame.astype(np.uint16), bits, predictor) for frame in raw]
        for fragments in (1, 3):
            for offset_table in (True, False):
                dataset = dicom_file(streams, syntax, values.shape, bits, signed,
                                     fragments=fragments, offset_table=offset_table)
                assert np.array_equal(decode_pixels(dataset), values)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_rle_files_come_back_exactly(bits, signed):
    values = stored_values(bits, signed, (2, 12, 15)) // 3
    dataset = dicom_file(values.tobytes(), EXPLICIT, values.shape, bits, signed)
    dataset.compress(RLE, encoding_plugin="pydicom")
    assert np.array_equal(decode_pixels(dataset), values)


def jpeg_2000(values, bits, signed, boxed=False):
    """Our own values as OpenCV encodes them, 16 bits unsigned, the header rewritten.

    A sample of b bits, unsigned, is x - 2**(b-1) to the wavelet; OpenCV writes 8 or 16 bits, so
    that b other than these is had by coding x - 2**(b-1) + 2**15 and then naming b in SIZ, where
    the quantisation's exponents stay valid upper bounds.
    """
    container = 8 if bits <= 8 else 16
    half = 0 if signed else 2 ** (bits - 1)
    lifted = (values.astype(np.int64) - half + 2 ** (container - 1)).astype(f"uint{container}")
    ok, encoded = cv2.imencode(".jp2", lifted, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    encoded = bytearray(encoded.tobytes())
    at = encoded.index(b"\xff\x4f\xff\x51")
    encoded[at + 42] = bits - 1 | 128 * signed
    return bytes(encoded if boxed else encoded[at:])


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("codestream_signed", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 13, 16])
def test_jpeg_2000_comes_back_whatever_its_sign_flag_says(bits, signed, codestream_signed, boxed):
    """Two's complement of `bits` bits, in a codestream that calls them signed or unsigned."""
    values = stored_values(bits, signed, (2, 40, 33))
    numbers = values.astype(np.int64)
    if codestream_signed != signed:
        numbers = numbers % 2**bits
        numbers -= 2**bits * (numbers >= 2 ** (bits - 1)) * codestream_signed
    streams = [jpeg_2000(frame, bits, codestream_signed, boxed) for frame in numbers]
    allocated = {"BitsAllocated": 8 if bits <= 8 else 16}
    dataset = dicom_file(streams, J2K_LOSSLESS, values.shape, bits, signed, fragments=2, **allocated)
    assert np.array_equal(decode_pixels(dataset), values)


# ---- Files that pydicom brings along; values pinned with pydicom 3.0.2 and pylibjpeg 2.1 ----

MR_SMALL = (1, 64, 64), "int16", 2125338, 638863772
RT_DOSE = (15, 10, 10), "uint32", 1519910000, 1329677288
BUNDLED = {  # shape, type, sum, CRC-32
    "CT_small.dcm": ((1, 128, 128), "int16", 14826310, 2126523256),
    "MR_small.dcm": MR_SMALL,
    "MR_small_implicit.dcm": MR_SMALL,
    "MR_small_padded.dcm": MR_SMALL,
    "MR_small_bigendian.dcm": MR_SMALL,
    "MR_small_expb.dcm": MR_SMALL,
    "MR_small_RLE.dcm": MR_SMALL,
    "MR_small_jp2klossless.dcm": MR_SMALL,
    "image_dfl.dcm": ((1, 512, 512), "uint16", 33322688, 1243993060),
    "examples_overlay.dcm": ((1, 300, 484), "uint16", 27833052, 818238277),
    "JPEG2000.dcm": ((1, 1024, 256), "int16", 3527976, 2923584017),
    "693_J2KI.dcm": ((1, 512, 512), "int16", -2181784, 1434430702),
    "J2K_pixelrep_mismatch.dcm": ((1, 512, 512), "int16", -172605258, 868202610),
    "rtdose.dcm": RT_DOSE,
    "rtdose_expb.dcm": RT_DOSE,
    "rtdose_rle.dcm": RT_DOSE,
}


@pytest.mark.parametrize("name", BUNDLED)
def test_files_bundled_with_pydicom_read_as_pinned(name):
    dataset = bundled(name)
    if dataset is None:
        pytest.skip("not shipped with this pydicom")
    decoded = decode_pixels(dataset)
    found = decoded.shape, str(decoded.dtype), int(decoded.sum()), zlib.crc32(decoded.tobytes())
    assert found == BUNDLED[name]


@pytest.mark.parametrize("name, reason", [
    ("MR_truncated.dcm", "smaller"),
    ("SC_rgb_rle.dcm", "3 samples"),
    ("ExplVR_BigEnd.dcm", "3 samples"),
    ("liver_1frame.dcm", "1 bits in 1"),
    ("test-SR.dcm", "Rows"),
])
def test_bundled_files_that_are_no_ct_slice_are_refused_with_the_reason(name, reason):
    dataset = bundled(name)
    if dataset is None:
        pytest.skip("not shipped with this pydicom")
    with pytest.raises(StudyError, match=reason):
        decode_pixels(dataset)


def test_the_jpeg_2000_files_agree_with_openjpeg():
    pytest.importorskip("openjpeg")
    for name in ("JPEG2000.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm"):
        dataset = bundled(name)
        assert np.array_equal(decode_pixels(dataset)[0], dataset.pixel_array), name


# ---- Headers that lie ----

@pytest.mark.parametrize("tags", [
    {"Rows": 0}, {"Columns": 0}, {"Rows": 65535}, {"Columns": 4097}, {"Rows": None},
    {"NumberOfFrames": 5000}, {"NumberOfFrames": -1}, {"NumberOfFrames": 2},
    {"SamplesPerPixel": 3}, {"BitsAllocated": 1}, {"BitsAllocated": 12}, {"BitsAllocated": 64},
    {"BitsAllocated": None}, {"BitsStored": 17}, {"Rows": 41}, {"Columns": 34},
])
@pytest.mark.parametrize("syntax", [EXPLICIT, SV1, J2K_LOSSLESS])
def test_a_header_that_does_not_fit_its_pixels_is_refused(syntax, tags):
    values = stored_values(16, False, (40, 33))
    frames = {EXPLICIT: values.tobytes(), SV1: [encode(values)],
              J2K_LOSSLESS: [jpeg_2000(values, 16, False)]}[syntax]
    with pytest.raises(StudyError):
        decode_pixels(dicom_file(frames, syntax, values.shape, 16, **tags))


@pytest.mark.parametrize("missing", ["Rows", "Columns", "BitsAllocated", "PixelData"])
def test_a_missing_tag_is_refused(missing):
    values = stored_values(16, False)
    dataset = dicom_file(values.tobytes(), EXPLICIT, values.shape)
    delattr(dataset, missing)
    with pytest.raises(StudyError, match=missing):
        decode_pixels(dataset)


def test_optional_tags_may_be_missing():
    values = stored_values(16, False)
    dataset = dicom_file(values.tobytes(), EXPLICIT, values.shape)
    for name in ("SamplesPerPixel", "BitsStored", "HighBit", "PixelRepresentation",
                 "PhotometricInterpretation"):
        delattr(dataset, name)
    with pytest.raises(StudyError, match="may be negative"):
        decode_pixels(dataset)
    positive = values % 2**15
    dataset.PixelData = positive.tobytes()
    assert np.array_equal(decode_pixels(dataset)[0], positive)


def test_values_that_do_not_stand_at_the_lowest_bits_are_refused():
    """As some converters write 12 bits: at the top of 16."""
    values = stored_values(12, False)
    dataset = dicom_file((values << 4).tobytes(), EXPLICIT, values.shape, stored=12)
    dataset.HighBit = 15
    with pytest.raises(StudyError, match="highest bit 15 of 12"):
        decode_pixels(dataset)


def test_a_private_transfer_syntax_is_refused_by_its_number():
    dataset = dicom_file([b"\0" * 100], EXPLICIT, (12, 15))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.2.840.113619.5.2")
    with pytest.raises(StudyError, match="unknown transfer syntax 1.2.840.113619.5.2"):
        decode_pixels(dataset)


def test_where_a_plug_in_fails_our_own_decoder_reads_on(monkeypatch):
    def fails(*given, **named):
        raise ValueError("the plug-in has a fault")
    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda syntax: SimpleNamespace(is_available=True))
    monkeypatch.setattr(pydicom.pixels, "pixel_array", fails)
    values = stored_values(16, False)
    dataset = dicom_file([encode(values)], pydicom.uid.JPEGLosslessSV1, values.shape)
    assert np.array_equal(decode_pixels(dataset)[0], values)


def test_one_thread_at_a_time_decodes_lossless_jpeg(monkeypatch):
    """Several would wait for Python's lock at every call of NumPy. A damaged one frees the rest."""
    at_once, most = [], []
    split = cspine.split_scan

    def counted(scan):
        at_once.append(scan)
        most.append(len(at_once))
        time.sleep(0.01)
        at_once.pop()
        return split(scan)

    monkeypatch.setattr(cspine, "split_scan", counted)
    values = stored_values(16, False)
    streams = [encode(values), b"damaged", encode(values), encode(values)]
    datasets = [dicom_file([one], LOSSLESS, values.shape) for one in streams]
    with ThreadPoolExecutor(4) as pool:
        whole, damaged, *rest = [pool.submit(decode_pixels, one) for one in datasets]
    assert max(most) == 1 and isinstance(damaged.exception(), StudyError)
    assert all(np.array_equal(one.result()[0], values) for one in (whole, *rest))


def test_an_unknown_transfer_syntax_is_refused_by_name():
    dataset = dicom_file([b"\0" * 100], "1.2.840.10008.1.2.4.100", (12, 15))
    with pytest.raises(StudyError, match="MPEG2"):
        decode_pixels(dataset)


@pytest.mark.skipif(sys.platform != "linux", reason="measures by /proc")
def test_a_few_random_mutations_of_all_inputs_do_no_harm():
    """The whole run is `python tests/studies/fuzz.py --n 2000`; it counts what must not happen."""
    fuzz = pytest.importorskip("fuzz")
    assert fuzz.run(n=40, seed=1)["bad"] == []


def test_a_jpeg_2000_without_its_end_marker_is_whole_and_a_cut_one_is_not():
    values = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
    how = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    stream = cv2.imencode(".jp2", values, how)[1].tobytes()
    stream = stream[stream.index(b"\xff\x4f\xff\x51"):]
    assert stream.endswith(b"\xff\xd9")
    assert np.array_equal(cspine.decode_jpeg_2000(stream), values)
    assert np.array_equal(cspine.decode_jpeg_2000(stream[:-2]), values)
    with pytest.raises(StudyError, match="damaged JPEG 2000"):
        cspine.decode_jpeg_2000(stream[: len(stream) // 2])


def test_plug_ins_for_jpeg_are_advised_for_jpeg_alone():
    dataset = dicom_file([b"\0\1" * 40], pydicom.uid.RLELossless, (12, 15))
    with pytest.raises(StudyError, match="RLE Lossless: ") as error:
        decode_pixels(dataset)
    assert "pylibjpeg" not in str(error.value)


def test_more_bits_than_are_there_are_refused():
    values = stored_values(16, False, (40, 33))
    data = dicom_file(values.tobytes(), EXPLICIT, values.shape, 16, BitsStored=17, HighBit=16)
    with pytest.raises(cspine.StudyError, match="17 bits in 16"):
        cspine.decode_pixels(data)


@pytest.mark.parametrize("name", ["NumberOfFrames", "BitsStored", "HighBit", "SamplesPerPixel"])
def test_optional_tags_may_be_empty(name):
    values = stored_values(16, False)
    data = dicom_file(values.tobytes(), EXPLICIT, values.shape)
    setattr(data, name, None)
    assert np.array_equal(cspine.decode_pixels(data)[0], values)


def test_restarts_within_a_row_are_refused():
    """By the standard an interval is of whole rows; two rows of seven are 14 samples."""
    image = np.arange(42).reshape(6, 7).astype(np.uint16)
    stream = encode(image, 12, restart_rows=2)
    broken = stream.replace(b"\xff\xdd\0\4\0\x0e", b"\xff\xdd\0\4\0\x0f")
    assert broken != stream
    with pytest.raises(cspine.StudyError):
        cspine.decode_lossless_jpeg(broken)
