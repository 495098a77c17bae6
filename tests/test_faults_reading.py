"""I rely on: what real folders hold is read right, or left out and named.

Faults that users of such tools report, rebuilt as small inputs; every expected value
follows from how its input was made, or is pydicom's own reading.
"""

import gzip
import importlib.util
import io
import math
import os

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from test_masks import nifti

import cspine
from cspine import StudyError, Volume, read_mask, read_volume
from dicom_files import AXIAL, BIG, EXPLICIT, IMPLICIT, dicom_bytes, item
from lossless_jpeg_encoder import dicom_file

SLICES, ROWS, COLUMNS = 20, 6, 8


def noise(seed=0, slices=SLICES, low=0, high=2000, shape=(ROWS, COLUMNS)):
    """Stored values (Z, Y, X)."""
    rng = np.random.default_rng(seed)
    return rng.integers(low, high, (slices, *shape)).astype(np.int64)


def places(count=SLICES, start=0.0):
    """Positions of slices 1 mm apart; the first lies nearest to the head."""
    return [(0.0, 0.0, start - k) for k in range(count)]


# ---- Byte orders ----


@pytest.mark.parametrize("implicit, little", [(False, False), (False, True), (True, True)])
def test_a_file_without_meta_has_the_values_that_pydicom_reads(tmp_path, implicit, little):
    stored = noise()
    for k, image in enumerate(stored):
        data = pydicom.dcmread(io.BytesIO(dicom_bytes(
            image, places()[k], syntax=EXPLICIT if little else BIG, number=k + 1)))
        del data.file_meta
        bare = Dataset({element.tag: element for element in data})
        path = tmp_path / f"{k}.dcm"
        pydicom.dcmwrite(path, bare, implicit_vr=implicit, little_endian=little)
        assert path.read_bytes()[128:132] != b"DICM"  # neither preamble nor meta
    assert np.array_equal(read_volume(tmp_path).hu, stored - 1024)


# ---- Passes ----

PASSES = {
    "acquisition": [dict(AcquisitionNumber=1), dict(AcquisitionNumber=2)],
    "kernel": [dict(ConvolutionKernel="BONE"), dict(ConvolutionKernel="SOFT")],
    "image type": [
        dict(ImageType=["ORIGINAL", "PRIMARY", "AXIAL", kind]) for kind in ("A", "B")],
    "time": [dict(ContentTime="101500"), dict(ContentTime="102500")],
}


@pytest.mark.parametrize("apart", [0.0, 0.01, 0.3, 0.5])
@pytest.mark.parametrize("name", PASSES)
def test_one_of_two_passes_in_one_series_is_taken_whole(write_series, name, apart):
    """Files named as by uid: those of both passes come in any order."""
    passes = noise(1), noise(2)
    names = np.random.default_rng(4).permutation(2 * SLICES) + 100
    for k, tags in enumerate(PASSES[name]):
        at = places(start=apart * k)
        numbers = names[k * SLICES : (k + 1) * SLICES]
        folder = write_series(passes[k], positions=at, numbers=numbers, **tags)
    volume = read_volume(folder)
    assert volume.hu.shape == (SLICES, ROWS, COLUMNS)
    assert any(np.array_equal(volume.hu, stored - 1024) for stored in passes)
    assert any("20 images" in problem for problem in volume.problems)


def test_the_pass_that_covers_more_places_is_taken(write_series):
    long, short = noise(1), noise(2, 17)
    write_series(short, positions=places(17), numbers=range(1, 18), AcquisitionNumber=1)
    folder = write_series(long, positions=places(), numbers=range(30, 50),
                          AcquisitionNumber=2)
    assert np.array_equal(read_volume(folder).hu, long - 1024)


def test_what_another_pass_adds_beyond_the_first_or_in_its_hole_stays(write_series):
    """Two slabs that adjoin, and a rescan of what was left out."""
    whole = noise(1, 40)
    at = places(40)
    hole = range(8, 12)
    first = [k for k in range(24) if k not in hole]
    write_series(whole[first], positions=[at[k] for k in first], numbers=range(1, 21),
                 AcquisitionNumber=1)
    rest = [*hole, *range(24, 40)]
    folder = write_series(whole[rest], positions=[at[k] for k in rest],
                          numbers=range(101, 121), AcquisitionNumber=2)
    assert np.array_equal(read_volume(folder).hu, whole - 1024)


def test_two_passes_without_a_word_that_tells_them_apart_are_not_woven(write_series):
    """The earlier numbers win, at every place."""
    first, second = noise(1), noise(2)
    at = places(start=0.01)
    write_series(second, positions=at, numbers=range(21, 41), name="a{}.dcm")
    folder = write_series(first, positions=places(), name="b{}.dcm")
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, first - 1024)


@pytest.mark.parametrize("apart", [0.06, 0.1, 0.24])
def test_two_untold_passes_a_little_apart_are_not_woven(apart, write_series):
    """Nor brought to the finest of their distances, which would make thousands of planes."""
    first, second = noise(1, 40), noise(2, 40)
    write_series(second, positions=places(40, -apart), numbers=range(41, 81))
    volume = read_volume(write_series(first, positions=places(40)))
    assert np.array_equal(volume.hu, first - 1024)


@pytest.mark.parametrize("gaps", [
    [0.5] * 20 + [3.0] * 20, [0.7, 0.3] * 20, [1.0, 1.0, 4.0] * 13 + [1.0], [0.3] * 40])
def test_uneven_slices_of_one_pass_are_all_kept(gaps):
    mm = np.cumsum([0, *gaps])
    assert np.array_equal(cspine.places_of(mm), range(41))


def test_thick_slices_among_thin_ones_are_left_out(write_series):
    """Two reconstructions in one series; the last digits of a header make no other."""
    thin = noise(1, 60)
    for k in range(60):
        write_series(thin[k : k + 1], positions=places(60)[k : k + 1], numbers=[k + 1],
                     SliceThickness=1 + k % 2 / 1000)
    volume = read_volume(write_series(noise(2), positions=[(0.0, 0.0, -3.0 * k) for k in range(20)],
                                      numbers=range(101, 121), SliceThickness=5))
    assert np.array_equal(volume.hu, thin - 1024)


@pytest.mark.parametrize("seconds", ["one after the other", "in turns", "at random"])
def test_one_pass_may_be_stamped_in_any_order(write_series, seconds):
    """Several computers reconstruct; a series is sent on; a minute passes."""
    neck = noise(1, 40)
    order = dict(zip(
        ("one after the other", "in turns", "at random"),
        (range(40), [k % 4 * 10 for k in range(40)], np.random.default_rng(0).permutation(40))))
    for k, second in enumerate(order[seconds]):
        stamp = f"1015{30 + second}.25" if second < 30 else f"1016{second - 30:02}.25"
        folder = write_series(neck[k : k + 1], positions=places(40)[k : k + 1],
                              numbers=[k + 1], ContentTime=stamp)
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, neck - 1024) and not volume.problems


@pytest.mark.parametrize("tags", [
    [dict(AcquisitionTime="101000"), dict(AcquisitionTime="101020")],
    [dict(AcquisitionTime="101000"), {}]])
def test_passes_soon_after_each_other_are_told_apart_by_their_acquisition(write_series, tags):
    """An early and a late phase."""
    passes = noise(1), noise(2)
    for k, named in enumerate(tags):
        numbers = range(1 + 40 * k, 21 + 40 * k)
        folder = write_series(passes[k], positions=places(start=0.4 * k), numbers=numbers, **named)
    volume = read_volume(folder)
    assert any(np.array_equal(volume.hu, stored - 1024) for stored in passes)


# ---- Series ----


@pytest.mark.parametrize("series", ["1.2.3.1", "1.2.3.7"])
def test_a_bolus_series_of_many_images_at_one_place_loses(write_series, series):
    """Whether it is a series of its own or part of the neck's."""
    neck = noise(1)
    write_series(neck, positions=places(), AcquisitionNumber=2)
    times = noise(2, 30)
    folder = write_series(times, positions=[(0.0, 0.0, -5.0)] * 30, numbers=range(101, 131),
                          series=series, AcquisitionNumber=1)
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, neck - 1024)
    assert any("30 images" in problem for problem in volume.problems)


def test_a_perfusion_series_of_few_places_and_many_times_loses(write_series):
    neck = noise(1)
    write_series(neck, positions=places())
    at = places(17) * 3
    times = noise(2, 51)
    folder = write_series(times, positions=at, numbers=range(101, 152), series="1.2.3.7")
    assert np.array_equal(read_volume(folder).hu, neck - 1024)


def test_a_dose_beside_the_neck_is_no_ct_image(write_series):
    neck = noise(1)
    write_series(neck, positions=places(), Modality="CT")
    dose = noise(2, 40)  # more images at more places, in one file
    frames = [item(PlanePositionSequence=[item(ImagePositionPatient=list(at))])
              for at in places(40)]
    folder = write_series(dose[None], positions=places(1), numbers=[99], Modality="RTDOSE",
                          series="1.2.3.7", PerFrameFunctionalGroupsSequence=frames)
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, neck - 1024)
    assert any("RTDOSE" in problem for problem in volume.problems)


@pytest.mark.parametrize("what", ["orientation", "spacing"])
def test_a_header_that_differs_in_its_last_digits_loses_no_slice(tmp_path, what):
    """Rounding has values on both sides of a border (once 0.01395 and 0.41075 mm)."""
    stored, rng = noise(), np.random.default_rng(3)
    turned = np.array([0.999392, 0.034875, 0, -0.034875, 0.999392, 0])
    for k, image in enumerate(stored):
        jitter = rng.uniform(-4e-6, 4e-6, 6).round(6)
        directions = turned + jitter if what == "orientation" else AXIAL
        spacing = 0.41075 + jitter[:2] if what == "spacing" else (0.4, 0.4)
        directions, spacing = np.round(directions, 6), np.round(spacing, 6)
        header = places()[k], list(directions), list(spacing)
        data = dicom_bytes(image, *header, number=k + 1)
        (tmp_path / f"{k}.dcm").write_bytes(data)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.hu, stored - 1024) and not volume.problems


def test_series_of_clearly_different_spacing_are_not_mixed(write_series):
    coarse, fine = noise(1), noise(2, 17)
    write_series(coarse, positions=places(), spacing=(0.5, 0.5))
    folder = write_series(fine, positions=places(17, -0.5), numbers=range(31, 48),
                          spacing=(0.25, 0.25))
    volume = read_volume(folder)
    assert volume.spacing[1] == 0.5 and np.array_equal(volume.hu, coarse - 1024)


# ---- Values ----


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG])
def test_padding_at_the_top_of_the_range_is_air(write_series, syntax):
    stored = noise()
    stored[:, 0] = 65535
    folder = write_series(stored.astype(np.uint16), positions=places(), syntax=syntax,
                          PixelPaddingValue=65535)
    hu = read_volume(folder).hu
    assert (hu[:, 0] == cspine.AIR_HU).all()
    assert np.array_equal(hu[:, 1:], stored[:, 1:] - 1024)


@pytest.mark.parametrize("ends", [(65000, 65535), (65535, 65000)])
def test_a_range_of_padding_is_air_and_its_neighbours_are_not(write_series, ends):
    stored = noise()
    stored[:, 0, :4] = 65000, 65300, 65535, 64999
    folder = write_series(stored.astype(np.uint16), positions=places(), intercept=-34000,
                          PixelPaddingValue=ends[0], PixelPaddingRangeLimit=ends[1])
    hu = read_volume(folder).hu
    assert hu[0, 0, :4].tolist() == [-1024, -1024, -1024, 30999]


def test_padding_below_zero_of_signed_values_is_air(write_series):
    stored = noise(low=-1000, high=1000)
    stored[:, 0] = -2000
    folder = write_series(stored.astype(np.int16), positions=places(), signed=True,
                          intercept=3000, PixelPaddingValue=-2000)
    hu = read_volume(folder).hu
    assert (hu[:, 0] == cspine.AIR_HU).all()
    assert np.array_equal(hu[:, 1:], stored[:, 1:] + 3000)


def unsigned_stream(numbers, bits):
    """A lossless JPEG 2000 codestream that calls two's complement of `bits` unsigned."""
    unsigned = numbers % 2**bits
    lifted = unsigned - 2 ** (bits - 1) + 2**15  # as a stream of 16 bits codes it
    how = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    stream = cv2.imencode(".jp2", lifted.astype(np.uint16), how)[1].tobytes()
    stream = bytearray(stream[stream.index(b"\xff\x4f\xff\x51") :])
    stream[42] = bits - 1  # Ssiz: unsigned, of so many bits
    return bytes(stream)


@pytest.mark.parametrize("bits", [12, 13, 16])
def test_the_sign_of_an_unsigned_jpeg_2000_stream_lies_at_its_own_precision(bits):
    """The header says: signed, 16 bits stored; the stream: unsigned, of fewer."""
    values = noise(slices=2, low=-(2**11), high=2**11, shape=(40, 33))
    streams = [unsigned_stream(image, bits) for image in values]
    dataset = dicom_file(streams, pydicom.uid.JPEG2000Lossless, values.shape, 16, True)
    assert np.array_equal(cspine.decode_pixels(dataset), values)


def test_an_unsigned_jpeg_2000_stream_of_unsigned_values_keeps_them():
    values = noise(slices=2, high=2**12, shape=(40, 33))
    streams = [unsigned_stream(image, 12) for image in values]
    dataset = dicom_file(streams, pydicom.uid.JPEG2000Lossless, values.shape, 16, False)
    assert np.array_equal(cspine.decode_pixels(dataset), values)


def test_a_frames_own_zero_wins_against_a_left_over_tag(tmp_path):
    """The intercept of every frame is 0; above them a -1024 was left."""
    stored = noise()
    frames = [
        item(PlanePositionSequence=[item(ImagePositionPatient=list(at))],
             PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=0)])
        for at in places()]
    groups = dict(PerFrameFunctionalGroupsSequence=frames)
    data = dicom_bytes(stored, None, intercept=-1024, **groups)
    (tmp_path / "all.dcm").write_bytes(data)
    assert np.array_equal(read_volume(tmp_path).hu, stored)


def test_a_modality_lut_gives_the_values(write_series):
    """Entry k of the table is 3 k + 5, from stored value 10 on; its ends repeat."""
    table = [3 * k + 5 for k in range(1000)]
    lut = item(LUTDescriptor=[1000, 10, 16], LUTData=table, ModalityLUTType="HU")
    lut["LUTDescriptor"].VR = lut["LUTData"].VR = "US"
    stored = noise()
    folder = write_series(stored, positions=places(), slope=None, intercept=None,
                          ModalityLUTSequence=[lut])
    expected = np.take(table, (stored - 10).clip(0, 999))
    assert np.array_equal(read_volume(folder).hu, expected)


def extended_jpeg(values):
    """JPEG Extended of 12 bits: 8 x 8 blocks beside each other, each of one value."""
    bits, before = "", 2048  # a block's constant is coded as its step from the last one's
    for value in values:
        step = value - before
        size = abs(step).bit_length()
        extra = step if step > 0 else step + (1 << size) - 1
        extra = f"{extra:0{size}b}" if size else ""
        bits += f"{size:04b}" + extra + "0"  # no other frequency
        before = value
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    columns = bytes([0, 8 * len(values)])
    parts = [
        (0xDB, b"\0" + b"\x08" * 64),  # all steps 8: a constant is its value's own
        (0xC1, b"\x0c\0\x08" + columns + b"\x01\x01\x11\0"),
        (0xC4, b"\0" + bytes([0, 0, 0, 13] + [0] * 12) + bytes(range(13))),
        (0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\0"),
        (0xDA, b"\x01\x01\0\0\x3f\0"),
    ]
    head = b"".join(
        bytes([0xFF, kind, 0, len(content) + 2]) + content for kind, content in parts)
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


def extended_dataset(values=(3000, 100)):
    """A dataset of such a stream."""
    shape = (1, 8, 8 * len(values))
    stream = extended_jpeg(values)
    return dicom_file([stream], pydicom.uid.JPEGExtended12Bit, shape, 16, stored=12)


def test_what_needs_a_plug_in_names_one():
    """JPEG Extended of 12 bits: Pillow says that it decodes this syntax, and does not."""
    if importlib.util.find_spec("libjpeg"):
        pytest.skip("the plug-in is installed")
    with pytest.raises(StudyError, match="pip install pylibjpeg pylibjpeg-libjpeg"):
        cspine.decode_pixels(extended_dataset())


def test_with_the_plug_in_that_is_named_the_values_are_right():
    pytest.importorskip("pylibjpeg")
    pytest.importorskip("libjpeg")
    words = cspine.decode_pixels(extended_dataset())
    assert words.dtype == np.uint16
    assert np.array_equal(words[0], np.repeat([[3000, 100]], 8, 0).repeat(8, 1))


def test_a_file_whose_name_is_no_utf_8_is_read_or_named(write_series):
    stored = noise()
    folder = write_series(stored, positions=places())
    (folder / "3.dcm").rename(os.fsdecode(bytes(folder) + b"/\xff3.dcm"))
    with open(bytes(folder) + b"/\xfe.dcm", "wb") as file:
        file.write(b"no image")
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, stored - 1024)
    assert len(volume.problems) == 1 and "\udcfe.dcm" in volume.problems[0]


# ---- Masks ----

SHAPE = (20, 30, 40)  # Z, Y, X voxels of 1 mm
AFFINE = np.array([[0, 0, 1, -15], [0, 1, 0, -10], [-1, 0, 0, 105], [0, 0, 0, 1.0]])
LPS = np.diag([-1.0, -1, 1, 1])


def bony_study(mm=(0, 0, 0)):
    """(Volume, labels): soft tissue with two blocks of bone, moved by LPS mm."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:8, 10:18, 12:24] = 3
    labels[10:14, 10:18, 12:24] = 4
    hu = np.where(labels, 400, 40).astype(np.int16)
    affine = AFFINE.copy()
    affine[:3, 3] += mm
    return Volume("uid", hu, (1.0, 1.0, 1.0), affine), labels


def write_mask(path, labels, affine):
    """A NIfTI mask whose voxels lie at LPS mm = affine @ (z, y, x, 1)."""
    order = [2, 1, 0, 3]
    path.write_bytes(nifti(labels.T, sform=(LPS @ affine)[:3, order]))
    return path


def test_a_mask_of_several_gzip_members_is_read_whole(tmp_path):
    volume, labels = bony_study()
    raw = write_mask(tmp_path / "mask.nii", labels, volume.affine).read_bytes()
    parts = [gzip.compress(raw[k : k + 1000]) for k in range(0, len(raw), 1000)]
    assert len(parts) > 3
    path = tmp_path / "mask.nii.gz"
    path.write_bytes(b"".join(parts))
    assert np.array_equal(read_mask(path, volume), labels)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_mask_too_large_is_refused_by_its_size(tmp_path, compressed):
    raw = nifti(np.zeros((4, 4, 4)), dim=[3, 2000, 2000, 1000, 1, 1, 1, 1])
    path = tmp_path / "mask.nii"
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    with pytest.raises(StudyError, match="2000, 2000, 1000.*too large"):
        read_mask(path, bony_study()[0])


@pytest.mark.parametrize("moved_mm, share_inside, share_on_bone", [
    (0, 1, 1),
    (3, 1, 0.75),  # of the bone's 12 mm: three quarters of it lie on bone
    (22, 0.5, 0)])  # of 40 mm: 6 of each row's 12 labels leave the study's last column
def test_a_mask_moved_to_the_left_lies_inside_and_on_bone_by_its_share(
        moved_mm, share_inside, share_on_bone, tmp_path):
    volume, labels = bony_study()
    affine = volume.affine.copy()
    affine[0, 3] += moved_mm
    path = write_mask(tmp_path / "mask.nii", labels, affine)
    inside, on_bone = cspine.mask_fit(path, volume, read_mask(path, volume))
    assert inside == pytest.approx(share_inside) and on_bone == pytest.approx(share_on_bone)


# ---- Values ----


@pytest.mark.parametrize("tags, word", [
    (dict(slope=0), "slope"), (dict(slope="nan"), "slope"), (dict(intercept="inf"), "intercept")])
def test_a_slope_that_tells_nothing_is_refused(tags, word, write_series):
    with pytest.raises(StudyError, match=word):
        read_volume(write_series(noise(), positions=places(), **tags))


@pytest.mark.parametrize("signed, stored, padding, vr", [
    (False, 63536, -2000, "SS"), (True, -2000, 63536, "US")])
def test_a_padding_value_of_the_other_sign_is_found(signed, stored, padding, vr, tmp_path):
    """Some scanners write it as if pixels were signed, or not."""
    images = noise()
    images[:, 0, 0] = stored
    for k, image in enumerate(images):
        data = pydicom.dcmread(io.BytesIO(dicom_bytes(
            image, places()[k], number=k + 1, signed=signed, syntax=EXPLICIT)))
        data.add_new("PixelPaddingValue", vr, padding)
        data.save_as(tmp_path / f"{k}.dcm")
    hu = read_volume(tmp_path).hu
    assert (hu[:, 0, 0] == -1024).all() and np.array_equal(hu[:, 1:], images[:, 1:] - 1024)


def test_a_stream_of_other_rows_and_columns_than_its_header_is_refused():
    turned = np.arange(48, dtype=np.uint16).reshape(COLUMNS, ROWS)
    stream = dicom_bytes(turned, places()[0], syntax="1.2.840.10008.1.2.4.70")
    data = pydicom.dcmread(io.BytesIO(stream))
    data.Rows, data.Columns = ROWS, COLUMNS
    with pytest.raises(StudyError, match=r"\(8, 6\) pixels in place of \(6, 8\)"):
        cspine.decode_pixels(data)


def test_an_instance_number_of_letters_costs_no_slice(write_series):
    stored = noise()
    folder = write_series(stored, positions=places())
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.add_new("InstanceNumber", "LO", "A1")
        data.save_as(path)
    assert np.array_equal(read_volume(folder).hu, stored - 1024)


def test_the_reason_of_most_files_is_told_not_that_of_the_last(write_series):
    folder = write_series(noise(), positions=places(), Modality="MR")
    (folder / "zz_a_longer_name.zip").write_bytes(b"PK")
    with pytest.raises(StudyError, match="not a CT image but MR"):
        read_volume(folder)
    with pytest.raises(StudyError, match="no DICOM image"):
        cspine.read_slices(folder / "zz_a_longer_name.zip")


def test_images_of_two_patients_in_one_folder_are_said(write_series):
    write_series(noise(1), positions=places(), StudyInstanceUID="1.1", series="1.1.1")
    folder = write_series(noise(2, 30), positions=places(30), StudyInstanceUID="1.2",
                          series="1.2.1", numbers=range(101, 131))
    volume = read_volume(folder)
    assert len(volume.hu) == 30
    assert any("2 studies: give each its own folder" in one for one in volume.problems)


@pytest.mark.parametrize("thickness", [
    ("0.75", "0.7499999"), ("1.25", "1.250001"), ("1", ""), ("1", None), ("", None)])
def test_the_last_digits_of_a_thickness_or_its_lack_part_no_series(thickness, write_series):
    neck = noise(1, 40)
    for k in range(40):
        folder = write_series(neck[k : k + 1], positions=places(40)[k : k + 1],
                              numbers=[k + 1], SliceThickness=thickness[k % 2])
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, neck - 1024) and not volume.problems


def test_a_study_of_its_own_in_every_file_is_read_as_one(write_series):
    """As some anonymisers write, without series."""
    neck = noise(1)
    for k in range(SLICES):
        folder = write_series(neck[k : k + 1], positions=places()[k : k + 1], numbers=[k + 1],
                              series=None, StudyInstanceUID=f"1.9.{k}")
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, neck - 1024)
    assert any("images of 20 studies" in one for one in volume.problems)


def test_images_of_two_patients_without_a_series_are_not_woven(write_series):
    write_series(noise(1), positions=places(), StudyInstanceUID="1.1", series=None)
    folder = write_series(noise(2, 30), positions=places(30, 0.5), StudyInstanceUID="1.2",
                          series=None, numbers=range(101, 131))
    assert np.array_equal(read_volume(folder).hu, noise(2, 30) - 1024)


def test_a_prone_patient_without_an_orientation_is_refused(write_series):
    """It would be turned by half a circle."""
    folder = write_series(noise(), positions=places(), PatientPosition="HFP")
    read_volume(folder)
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        del data.ImageOrientationPatient
        data.save_as(path)
    with pytest.raises(StudyError, match="only 0 usable.*no usable position, orientation"):
        read_volume(folder)


def test_an_empty_file_is_no_dicom_image(tmp_path):
    (tmp_path / "1.dcm").write_bytes(b"")
    with pytest.raises(StudyError, match="no DICOM image$"):
        cspine.read_slices(tmp_path / "1.dcm")


@pytest.mark.parametrize("start", [b"", b"PK\3\4", b"\0\0\0\x18ftypmp42"])
def test_what_does_not_begin_as_dicom_is_named_at_once(start, write_series, monkeypatch):
    """A failed transfer, an archive, a film: pydicom would read every 8 bytes as a tag."""
    folder = write_series(noise(), positions=places())
    (folder / "other").write_bytes(start + bytes(4000))
    assert any("other: no DICOM image" in one for one in read_volume(folder).problems)
    monkeypatch.setattr(pydicom, "dcmread", None)
    with pytest.raises(StudyError, match="no DICOM image"):
        cspine.read_slices(folder / "other")


def test_of_series_at_the_same_places_the_one_in_hu_is_taken(write_series):
    """An iodine map beside the CT it was made of, which sorts first."""
    write_series(noise(1, high=100), positions=places(), intercept=0, series="1.2.3.1")
    folder = write_series(noise(2), positions=places(), numbers=range(101, 121), series="1.2.3.7")
    assert np.array_equal(read_volume(folder).hu, noise(2) - 1024)


def test_the_length_of_a_gap_that_is_filled_is_told(write_series):
    at = [(0.0, 0.0, -float(k if k < 10 else k + 11)) for k in range(SLICES)]
    found, = read_volume(write_series(noise(), positions=at)).problems
    assert found == "uneven positions: 20 slices, brought to 31, gaps of up to 12.0 mm filled"


def test_a_makers_own_copy_of_a_place_is_none_of_the_frame(tmp_path):
    frames = [item(PlanePositionSequence=[item(ImagePositionPatient=[0.0, 0.0, -float(k)])])
              for k in range(SLICES)]
    for frame in frames:
        own = item(ImagePositionPatient=[1.0, 2.0, 3.0], RescaleSlope=2)
        frame.private_block(0x2005, "A MAKER", create=True).add_new(0xF, "SQ", [own])
        frame.PlanePositionSequence[0].private_block(0x2005, "A MAKER", create=True).add_new(
            0xE, "SQ", [own])
    data = dicom_bytes(noise(), None, PerFrameFunctionalGroupsSequence=frames)
    (tmp_path / "all.dcm").write_bytes(data)
    assert np.array_equal(read_volume(tmp_path).hu, noise() - 1024)


def test_of_one_file_of_a_series_the_folder_is_asked_for(write_series):
    folder = write_series(noise(), positions=places())
    with pytest.raises(StudyError, match="only 1 usable.*: give the folder of its series"):
        read_volume(folder / "1.dcm")


@pytest.mark.parametrize("broken", [dict(PlanePositionSequence=[]), dict(
    PixelValueTransformationSequence=[item(RescaleSlope=0, RescaleIntercept=0)])])
def test_a_bad_frame_among_good_ones_is_left_out_and_named(broken, tmp_path):
    stored = noise()
    frames = [item(PlanePositionSequence=[item(ImagePositionPatient=[0.0, 0.0, -float(k)])])
              for k in range(SLICES)]
    for name, value in broken.items():
        setattr(frames[19], name, value)
    data = dicom_bytes(stored, None, PerFrameFunctionalGroupsSequence=frames)
    (tmp_path / "all.dcm").write_bytes(data)
    volume = read_volume(tmp_path)
    assert np.array_equal(volume.hu, stored[:19] - 1024)
    assert any(one.startswith("all.dcm, frame 20: no usable") for one in volume.problems)


def test_a_macs_hidden_files_are_not_spoken_of(write_series):
    folder = write_series(noise(), positions=places())
    (folder / "._1.dcm").write_bytes(b"of the Finder")
    assert not read_volume(folder).problems
    (folder / "1.dcm").rename(folder / ".1.dcm")
    assert np.array_equal(read_volume(folder).hu, noise() - 1024)


def test_a_study_that_may_not_be_looked_at_is_a_study_error(monkeypatch, tmp_path):
    def closed(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(cspine, "is_nifti", closed)
    with pytest.raises(StudyError, match="Permission denied"):
        read_volume(tmp_path)


def test_values_that_are_no_hu_are_said(write_series):
    volume = read_volume(write_series(noise(), positions=places(), intercept=0))
    assert "no CT in HU: values" in cspine.not_in_hu(volume.hu)


@pytest.mark.parametrize("code, intercept, word", [(128, 0, "datatype 128"), (2, math.nan, "")])
def test_odd_nifti_headers_have_a_reason_or_are_read_as_stored(code, intercept, word, tmp_path):
    labels = np.ones((4, 4, 4), np.uint8)
    path = tmp_path / "mask.nii"
    path.write_bytes(nifti(labels, code, slope=1.0, intercept=intercept, sform=np.eye(4)[:3]))
    if word:
        with pytest.raises(ValueError, match=word):
            cspine.read_nifti(path)
    else:
        stored, slope, shift, *_ = cspine.read_nifti(path)
        assert (stored * slope + shift == 1).all()


@pytest.mark.parametrize("studies", [1, 2])
def test_a_series_number_in_every_file_does_not_part_a_study(write_series, studies):
    """As some anonymisers write; images of two patients stay apart."""
    neck = noise(1)
    for k in range(SLICES):
        folder = write_series(neck[k : k + 1], positions=places()[k : k + 1], numbers=[k + 1],
                              series=f"1.2.{k + 1}", StudyInstanceUID=f"1.9.{k % studies}")
    if studies > 1:
        with pytest.raises(StudyError, match="only 1 usable"):
            read_volume(folder)
        return
    volume = read_volume(folder)
    assert np.array_equal(volume.hu, neck - 1024)
    assert any("SeriesInstanceUID is not looked at" in one for one in volume.problems)


def test_a_files_name_is_one_line_of_the_report(write_series):
    folder = write_series(noise(), positions=places())
    (folder / "Icon\r").write_bytes(b"of the Finder")
    assert any(one.startswith("Icon: ") for one in read_volume(folder).problems)


@pytest.mark.parametrize("moved", [range(20, 40), [20], [39]])
def test_slices_beside_their_place_are_told_and_are_no_tilt(moved, write_series):
    at = [(25.0 if k in moved else 0.0, 0.0, -float(k)) for k in range(40)]
    volume = read_volume(write_series(noise(slices=40), positions=at))
    text, = volume.problems
    assert "mm beside their place" in text and "tilt" not in text


@pytest.mark.parametrize("group, name, values", [
    ("FrameContentSequence", "FrameAcquisitionNumber", (1, 2)),
    ("FrameContentSequence", "TemporalPositionIndex", (1, 2)),
    ("CTImageFrameTypeSequence", "FrameType", (["ORIGINAL", "A"], ["ORIGINAL", "B"])),
    ("CTReconstructionSequence", "ConvolutionKernel", ("BONE", "SOFT"))])
def test_two_passes_in_one_file_of_frames_are_not_woven(group, name, values, tmp_path):
    """0.3 mm apart, told apart by their frames' own groups."""
    stored, frames = noise(slices=40), []
    for k in range(40):
        of_pass, z = divmod(k, 20)
        place = [item(ImagePositionPatient=[0.0, 0.0, -z - 0.3 * of_pass])]
        marks = {group: [item(**{name: values[of_pass]})]}
        frames.append(item(PlanePositionSequence=place, **marks))
    data = dicom_bytes(stored, None, PerFrameFunctionalGroupsSequence=frames)
    (tmp_path / "all.dcm").write_bytes(data)
    assert np.array_equal(read_volume(tmp_path).hu, stored[:20] - 1024)


def test_twice_the_pixel_data_that_the_header_tells_of_is_refused(write_series):
    """16-bit values under a header of 8 bits; a byte of padding is none of that."""
    folder = write_series(noise(), positions=places())
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit = 7
        data.save_as(path)
    with pytest.raises(StudyError, match="96 bytes: at least twice"):
        read_volume(folder)


def test_masks_are_nifti_files_and_no_copies_of_them(tmp_path):
    folder = tmp_path / "segmentations"
    folder.mkdir()
    for name in ("a.nii.gz", "b.nii", "b.nii.gz.part", "c.nii.gz.bak", "D.NII.GZ"):
        (folder / name).write_bytes(b"")
    masks = cspine.mask_files(tmp_path)
    assert masks == {"a": folder / "a.nii.gz", "b": folder / "b.nii", "D": folder / "D.NII.GZ"}


@pytest.mark.parametrize("modality", ["", "CT"])
def test_a_modality_may_be_left_empty(write_series, modality):
    stored = noise()
    volume = read_volume(write_series(stored, positions=places(), Modality=modality))
    assert np.array_equal(volume.hu, stored - 1024) and not volume.problems


@pytest.mark.parametrize("length", [0.8, 1.2])
def test_directions_that_are_not_of_unit_length_are_refused(write_series, length):
    """They would make every measure that much longer or shorter."""
    folder = write_series(noise(), positions=places(),
                          directions=(length, 0, 0, 0, length, 0))
    with pytest.raises(StudyError, match="no usable position, orientation or"):
        read_volume(folder)


def test_passes_of_the_fewest_slices_of_a_study_are_not_woven(write_series):
    passes = noise(1, 16), noise(2, 16)
    for k, stored in enumerate(passes):
        numbers = range(1 + 40 * k, 17 + 40 * k)
        folder = write_series(stored, positions=places(16, 0.3 * k), numbers=numbers,
                              AcquisitionNumber=k + 1)
    assert np.array_equal(read_volume(folder).hu, passes[0] - 1024)


def test_where_no_tag_parts_passes_the_earlier_times_win_over_the_numbers(write_series):
    """Every slice has a time of its own, so that none names a pass."""
    passes = noise(1), noise(2)
    for k, stored in enumerate(passes):
        for z, image in enumerate(stored):
            folder = write_series(
                image[None], positions=[(0.0, 0.0, 0.01 * k - z)],
                numbers=[z + 1 + 40 * (1 - k)], AcquisitionTime=f"1010{20 * k + z // 2:02}.{z:02}")
    assert np.array_equal(read_volume(folder).hu, passes[0] - 1024)


def test_of_two_series_of_as_many_slices_the_first_is_taken(write_series):
    """By the names of their files."""
    first, second = noise(1), noise(2)
    write_series(second, positions=places(), numbers=range(101, 121), series="1.2.3.1")
    folder = write_series(first, positions=places(), numbers=range(11, 31), series="1.2.3.7")
    assert np.array_equal(read_volume(folder).hu, first - 1024)


def test_a_slice_that_was_filled_in_names_the_nearest_file(write_series):
    mm = np.delete(np.arange(40.0), [20, 21])
    folder = write_series(noise(slices=38), positions=[(0.0, 0.0, at) for at in mm])
    volume = read_volume(folder)
    assert len(volume.sources) == 40
    for z, (file, _) in enumerate(volume.sources):
        own = volume.affine[2, 3] + volume.affine[2, 0] * z
        apart = abs(pydicom.dcmread(folder / file).ImagePositionPatient[2] - own)
        assert apart == pytest.approx(abs(mm - own).min(), abs=1e-6)


def test_a_slice_names_its_frame_counted_from_one(tmp_path):
    order = np.random.default_rng(2).permutation(SLICES).tolist()
    frames = [item(PlanePositionSequence=[item(ImagePositionPatient=[0.0, 0.0, -float(z)])])
              for z in order]
    data = dicom_bytes(noise(), None, PerFrameFunctionalGroupsSequence=frames)
    (tmp_path / "all.dcm").write_bytes(data)
    names = [f"all.dcm, frame {order.index(z) + 1}" for z in range(SLICES)]
    assert [file for file, _ in read_volume(tmp_path).sources] == names


def test_a_pass_that_took_its_places_twice_is_not_woven_with_another(write_series):
    """Of the places that are 0.01 mm apart, no step between slices is made."""
    twice, other = noise(1, 40), noise(2, 18)
    at = [(0.0, 0.0, -(k // 2) - 0.01 * (k % 2)) for k in range(40)]
    write_series(twice, positions=at, AcquisitionNumber=1)
    folder = write_series(other, positions=places(18, -0.4), numbers=range(101, 119),
                          AcquisitionNumber=2)
    assert np.array_equal(read_volume(folder).hu, twice[::2] - 1024)


def test_a_volume_too_large_is_refused_by_its_shape(write_series, monkeypatch):
    """A few close slices set the step, and a hole of 20 mm is filled with hundreds of planes."""
    at = [(0.0, 0.0, -0.1 * k - (20.0 if k > 10 else 0.0)) for k in range(SLICES)]
    folder = write_series(noise(), positions=at)
    monkeypatch.setattr(cspine, "MAX_VOXELS", 6 * 8 * 100)
    with pytest.raises(StudyError, match="damaged, or too large"):
        read_volume(folder)


def test_air_and_bone_without_anything_between_are_no_hu():
    planes = np.where(np.random.default_rng(0).random((20, 32, 32)) < 0.5, -1000, 1000)
    assert "0% soft tissue" in cspine.not_in_hu([*planes.astype(np.int16)])


def test_a_slice_3_mm_beside_its_place_is_told(write_series):
    at = [(3.0 if k == 20 else 0.0, 0.0, -float(k)) for k in range(40)]
    text, = read_volume(write_series(noise(slices=40), positions=at)).problems
    assert "up to 3 mm beside their place" in text


def test_t1_counts_nothing_in_how_a_mask_fits(tmp_path):
    """Off bone, as large as C3 and C4 together; many masks of the competition have it."""
    volume, labels = bony_study()
    labels[14:20, 10:18, 12:30] = 8
    path = write_mask(tmp_path / "mask.nii", labels, volume.affine)
    assert cspine.mask_fit(path, volume, read_mask(path, volume)) == pytest.approx((1, 1))


def test_a_mask_fits_by_its_scaled_values(tmp_path):
    """Stored as tens; half of it lies outside."""
    volume, labels = bony_study()
    affine = volume.affine.copy()
    affine[0, 3] += 22
    path = write_mask(tmp_path / "mask.nii", labels * 10, affine)
    raw = bytearray(path.read_bytes())
    raw[112:116] = np.float32(0.1).tobytes()  # scl_slope
    path.write_bytes(raw)
    inside, _ = cspine.mask_fit(path, volume, read_mask(path, volume))
    assert inside == pytest.approx(0.5)


def test_bone_is_looked_for_at_the_centres_of_cells(tmp_path):
    volume, labels = bony_study()
    path = write_mask(tmp_path / "mask.nii", labels, volume.affine)
    volume.hu[:] = 40
    volume.hu[1::2, 1::2, 1::2] = 400
    cells = read_mask(path, volume, tuple(n // 2 for n in labels.shape))
    assert cspine.mask_fit(path, volume, cells) == pytest.approx((1, 1))


@pytest.mark.parametrize("fit, words", [((0.4, 1.0), "40% of its mask"), ((1.0, 0.2), "20% on bone")])
def test_a_mask_must_lie_inside_and_on_bone(fit, words, tmp_path, monkeypatch):
    volume, labels = bony_study()
    path = write_mask(tmp_path / "mask.nii", labels, volume.affine)
    monkeypatch.setattr(cspine, "mask_fit", lambda *_: fit)
    with pytest.raises(StudyError, match=words):
        cspine.fitting_mask(path, volume, labels.shape)
