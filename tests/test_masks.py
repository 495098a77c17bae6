"""I rely on: a mask lies on its vertebra.

Oracles: nibabel where it is installed, and affines pinned from nibabel 5 for the same headers
everywhere; balls at known LPS millimetres. NIfTI counts millimetres to the right, the front and
the head (RAS), DICOM to the left, the back and the head (LPS).
"""

import gzip
import struct

import numpy as np
import pandas as pd
import pytest

import cspine
from cspine import StudyError, Volume, read_mask, read_volume

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # to and from RAS
CODES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4",
         1024: "i8", 1280: "u8"}
SHAPE = (7, 9, 11)
LABELS = np.random.default_rng(0).integers(0, 20, SHAPE)
SFORM = [[0.1, -0.4, 0.2, 12.5], [0.45, 0.1, -0.1, -30.0], [0.05, 0.2, 0.9, 4.0]]


def nifti(data, code=2, order="<", sform=None, sform_code=None, qform=None, qform_code=None,
          zooms=(0.5, 0.6, 1.2), qfac=1.0, slope=0.0, intercept=0.0, magic=b"n+1\0", start=352.0,
          dim=None, size=348):
    """The bytes of a NIfTI-1 file by the offsets of nifti1.h."""
    header = bytearray(352)
    dim = dim or [3, *data.shape, 1, 1, 1, 1]
    sform_code = int(sform is not None) if sform_code is None else sform_code
    qform_code = int(qform is not None) if qform_code is None else qform_code
    fields = [(0, "i", [size]), (40, "8h", dim), (70, "h", [code]),
              (72, "h", [8 * np.dtype(CODES.get(code, "u1")).itemsize]),
              (76, "4f", [qfac, *zooms]), (108, "f", [start]), (112, "2f", [slope, intercept]),
              (252, "2h", [qform_code, sform_code]), (256, "6f", qform or [0] * 6),
              (280, "12f", np.ravel(sform if sform is not None else [0] * 12))]
    for offset, kind, values in fields:
        struct.pack_into(order + kind, header, offset, *values)
    header[344:348] = magic
    pixels = np.asarray(data).astype(order + CODES.get(code, "u1"))
    return bytes(header) + pixels.tobytes(order="F")


def volume_at(affine, shape):
    return Volume("uid", np.zeros(shape, np.int16), (1.0, 1.0, 1.0), np.asarray(affine, float))


# Headers, and the RAS affine that nibabel 5.4.2 reads from them.
GEOMETRY = {
    "sform": dict(sform=SFORM, qform=[0, 0, 1, 1, 2, 3]),
    "sform of code 4": dict(sform=SFORM, sform_code=4),
    "qform": dict(qform=[0.1, -0.2, 0.3, 5.0, -6.0, 7.0]),
    "qform mirrored": dict(qform=[0.5, -0.5, 0.5, 5.0, -6.0, 7.0], qfac=-1.0),
    "qform of half a turn": dict(qform=[0.6, 0.0, 0.8, 1.0, 2.0, 3.0]),
    "qform without qfac": dict(qform=[0.1, 0.7, -0.3, 1.0, 2.0, 3.0], qfac=0.0),
    "sform not in use": dict(sform=SFORM, sform_code=0, qform=[0, 0, 1, 1.0, 2.0, 3.0]),
    "neither": {},
}
PINNED = {
    "sform": [
        [0.1, -0.4, 0.2, 12.5],
        [0.45, 0.1, -0.1, -30.0],
        [0.05, 0.2, 0.9, 4.0],
        [0.0, 0.0, 0.0, 1.0]],
    "sform of code 4": [
        [0.1, -0.4, 0.2, 12.5],
        [0.45, 0.1, -0.1, -30.0],
        [0.05, 0.2, 0.9, 4.0],
        [0.0, 0.0, 0.0, 1.0]],
    "qform": [
        [0.37, -0.35785, -0.373134, 5.0],
        [0.258209, 0.48, -0.366567, -6.0],
        [0.215472, 0.039283, 1.08, 7.0],
        [0.0, 0.0, 0.0, 1.0]],
    "qform mirrored": [
        [0.0, -0.6, 0.0, 5.0],
        [0.0, 0.0, 1.2, -6.0],
        [0.5, 0.0, 0.0, 7.0],
        [0.0, 0.0, 0.0, 1.0]],
    "qform of half a turn": [
        [-0.14, 0.0, 1.152, 1.0],
        [0.0, -0.6, 0.0, 2.0],
        [0.48, 0.0, 0.336, 3.0],
        [0.0, 0.0, 0.0, 1.0]],
    "qform without qfac": [
        [-0.08, 0.314512, 1.003725, 1.0],
        [-0.122094, 0.48, -0.657675, 2.0],
        [-0.478219, -0.175163, 0.0, 3.0],
        [0.0, 0.0, 0.0, 1.0]],
    "sform not in use": [
        [-0.5, 0.0, 0.0, 1.0],
        [0.0, -0.6, 0.0, 2.0],
        [0.0, 0.0, 1.2, 3.0],
        [0.0, 0.0, 0.0, 1.0]],
    "neither": [
        [-0.5, 0.0, 0.0, 1.5],
        [0.0, 0.6, 0.0, -2.4],
        [0.0, 0.0, 1.2, -6.0],
        [0.0, 0.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", GEOMETRY)
def test_a_header_places_the_mask_where_nibabel_does(tmp_path, name, order):
    """A volume whose voxels lie where nibabel says that the mask's lie gets each of its labels."""
    path = tmp_path / "mask.nii"
    path.write_bytes(nifti(LABELS, order=order, **GEOMETRY[name]))
    assert np.array_equal(read_mask(path, volume_at(LPS @ np.array(PINNED[name]), SHAPE)), LABELS)


@pytest.mark.parametrize("name", GEOMETRY)
def test_nibabel_itself_reads_the_pinned_affines(tmp_path, name):
    """Tolerance: the header holds 32-bit floats."""
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / "mask.nii"
    path.write_bytes(nifti(LABELS, **GEOMETRY[name]))
    image = nibabel.load(path)
    assert np.allclose(image.affine, PINNED[name], atol=1e-5)
    assert np.array_equal(np.asarray(image.dataobj), LABELS)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("code", CODES)
def test_every_type_and_byte_order_gives_the_same_labels(tmp_path, code, order, compressed):
    path = tmp_path / ("mask.nii.gz" if compressed else "mask.nii")
    data = nifti(LABELS, code, order, sform=SFORM)
    path.write_bytes(gzip.compress(data, 1) if compressed else data)
    mask = read_mask(path, volume_at(LPS @ [*SFORM, [0, 0, 0, 1]], SHAPE))
    assert mask.dtype == np.uint8 and np.array_equal(mask, LABELS)


@pytest.mark.parametrize("code, slope, intercept, stored", [
    (4, 0.5, -1.0, LABELS * 2 + 2), (16, 2.0, 0.0, LABELS / 2), (2, 0.0, 5.0, LABELS),
    (64, float("nan"), 3.0, LABELS), (4, 1.0, 0.0, LABELS), (4, 1.0, -7.0, LABELS + 7),
    (16, 0.1, 0.0, LABELS * 10), (256, -1.0, 0.0, -LABELS)])
def test_the_scale_of_the_header_is_applied_unless_it_is_zero_or_nan(
        tmp_path, code, slope, intercept, stored):
    path = tmp_path / "mask.nii"
    path.write_bytes(nifti(stored, code, sform=SFORM, slope=slope, intercept=intercept))
    assert np.array_equal(read_mask(path, volume_at(LPS @ [*SFORM, [0, 0, 0, 1]], SHAPE)), LABELS)


def test_values_that_are_no_label_are_background(tmp_path):
    stored = LABELS.astype(float)
    stored[0, 0, :5] = np.nan, np.inf, -3, 1e9, -np.inf
    path = tmp_path / "mask.nii"
    path.write_bytes(nifti(stored, 16, sform=SFORM))
    expected = LABELS.copy()
    expected[0, 0, :5] = 0
    assert np.array_equal(read_mask(path, volume_at(LPS @ [*SFORM, [0, 0, 0, 1]], SHAPE)), expected)


def test_voxels_begin_where_the_header_says(tmp_path):
    data = nifti(LABELS, sform=SFORM, start=400.0)
    path = tmp_path / "mask.nii"
    path.write_bytes(data[:352] + b"\7" * 48 + data[352:])
    assert np.array_equal(read_mask(path, volume_at(LPS @ [*SFORM, [0, 0, 0, 1]], SHAPE)), LABELS)


def test_a_fourth_axis_of_one_is_allowed(tmp_path):
    path = tmp_path / "mask.nii"
    path.write_bytes(nifti(LABELS, sform=SFORM, dim=[4, *SHAPE, 1, 1, 1, 1]))
    assert np.array_equal(read_mask(path, volume_at(LPS @ [*SFORM, [0, 0, 0, 1]], SHAPE)), LABELS)


def test_a_mask_of_another_size_and_tilt_gives_each_voxel_its_nearest_label(tmp_path):
    """Reference: a plain loop in double precision. Voxels nearer than 0.001 to the edge between
    two mask voxels may go either way."""
    path = tmp_path / "mask.nii"
    path.write_bytes(nifti(LABELS, sform=SFORM))
    affine = np.array([[0.05, 0.02, 0.3, -16.0], [0.02, 0.35, 0.0, 25.0],
                       [-0.7, 0.05, 0.1, 14.0], [0, 0, 0, 1]])
    mask = read_mask(path, volume_at(affine, (19, 23, 21)))
    to_label = np.linalg.inv(LPS @ np.float32([*SFORM, [0, 0, 0, 1]]).astype(float)) @ affine
    inside = 0
    for index in np.ndindex(*mask.shape):
        at = (to_label @ [*index, 1])[:3]
        if np.abs(at - np.floor(at) - 0.5).min() < 1e-3:
            continue
        at = np.rint(at).astype(int)
        there = (at >= 0).all() and (at < SHAPE).all()
        inside += there
        assert mask[index] == (LABELS[tuple(at)] if there else 0), index
    assert 500 < inside < mask.size - 500, "the grids should overlap in part"


# ---- Masks stored like the real ones on studies of either order ----

CENTRES = np.array([[12.0, 3.0, 10.0], [14.0, -2.0, -6.0], [5.0, 6.0, -24.0]])  # LPS mm
RADII = (7.0, 5.0, 6.0)


def ball_labels(lps):
    """1, 2, 3 inside the balls, 0 elsewhere; lps (..., 3)."""
    out = np.zeros(lps.shape[:-1], int)
    for number, (centre, radius) in enumerate(zip(CENTRES, RADII), 1):
        out[np.linalg.norm(lps - centre, axis=-1) < radius] = number
    return out


def grid_mm(affine, shape):
    return np.moveaxis(np.indices(shape), 0, -1) @ np.asarray(affine)[:3, :3].T \
        + np.asarray(affine)[:3, 3]


def write_mask(path, voxel_mm=(0.61, 0.53, 0.47), shape=(84, 96, 138)):
    """The balls in a file whose axes go to the left, the front and the head, as RSNA's do."""
    affine = np.diag([-voxel_mm[0], voxel_mm[1], voxel_mm[2], 1.0])
    affine[:3, 3] = 18, -26, -40
    labels = ball_labels(grid_mm(LPS @ affine, shape))
    path.write_bytes(nifti(labels, sform=affine[:3]))
    return path


STUDIES = {  # how the slices of the same balls are stored
    "head to foot": dict(step=-1.25, origin=(-15.0, -22.0, 24.0)),
    "foot to head": dict(step=1.25, origin=(-15.0, -22.0, -38.5)),
    "shuffled": dict(step=1.25, origin=(-15.0, -22.0, -38.5), shuffled=True),
    # 68 rows of 0.7 mm just hold the balls, which lie between 17 and -30 mm
    "sagittal": dict(step=-1.25, origin=(-25.0, -25.0, 17.2), directions=(0, 1, 0, 0, 0, -1)),
    "feet first": dict(step=1.25, origin=(30.0, -22.0, 24.0), directions=(-1, 0, 0, 0, 1, 0)),
    "oblique": dict(step=1.25, origin=(-15.0, -27.0, -40.0),
                    directions=(1, 0, 0, 0, 0.9659258, 0.258819)),
}


@pytest.mark.parametrize("name", STUDIES)
def test_the_mask_lies_on_its_balls_however_the_study_is_stored(tmp_path, write_series, name):
    """Tolerances: nearest neighbour moves a centre of mass of hundreds of voxels by far less than
    0.3 mm; the edge of a ball, a shell of some 15 %, may fall on either side."""
    how = dict(STUDIES[name])
    directions, spacing = how.get("directions", (1, 0, 0, 0, 1, 0)), (0.7, 0.8)
    order = np.random.default_rng(0).permutation(51) if how.pop("shuffled", 0) else np.arange(51)
    row, column = np.reshape(directions, (2, 3)).astype(float)
    normal = how["step"] * np.cross(row, column)
    affine = np.eye(4)
    affine[:3] = np.c_[normal, column * spacing[0], row * spacing[1], how["origin"]]
    stored = 1024 + 500 * (ball_labels(grid_mm(affine, (51, 68, 57))) > 0)
    volume = read_volume(write_series(stored, numbers=order, spacing=spacing, **how))
    mask = read_mask(write_mask(tmp_path / "mask.nii"), volume)
    assert mask.shape == volume.hu.shape
    for number, (centre, radius) in enumerate(zip(CENTRES, RADII), 1):
        index = np.argwhere(mask == number)
        mm = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
        assert np.linalg.norm(mm.mean(0) - centre) < 0.3, number
        size = len(index) * np.prod(volume.spacing)
        assert size == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.05), number
        assert (volume.hu[mask == number] == 500).mean() > 0.9, number


def test_masks_of_phantoms_lie_on_bone_in_the_order_of_the_neck(phantom_data):
    """Whatever numbering, sign and padding the phantoms were given."""
    uids = pd.read_csv(phantom_data / "train.csv").StudyInstanceUID
    for uid in uids:
        volume = read_volume(phantom_data / "train_images" / uid)
        mask = read_mask(phantom_data / "segmentations" / f"{uid}.nii", volume)
        seen = [v for v in range(1, 8) if (mask == v).sum() > 50]
        assert len(seen) >= 3, uid
        centres = [np.argwhere(mask == v)[:, 0].mean() for v in seen]
        assert centres == sorted(centres), uid
        inside = np.isin(mask, seen)
        around = volume.hu[:, volume.hu.shape[1] // 4 :][~inside[:, volume.hu.shape[1] // 4 :]]
        assert volume.hu[inside].mean() > around.mean() + 150, uid


def test_the_cubes_labels_are_the_mask_at_the_centres_of_its_cells(tmp_path):
    """Cells of 2 x 3 x 4 voxels; a label is 1 + the number of its cell along z, then y, then x."""
    z, y, x = np.indices((16, 24, 32))
    labels = 1 + z // 2 + y // 3 % 3 * 10 + x // 4 % 4 * 40
    path = tmp_path / "mask.nii"
    ras = np.array([[0, 0, -0.5, 3.0], [0, -0.5, 0, 4.0], [-1.0, 0, 0, 5.0]])
    path.write_bytes(nifti(labels, sform=ras))
    cube = read_mask(path, volume_at(LPS @ [*ras, [0, 0, 0, 1]], (16, 24, 32)), (8, 8, 8))
    assert cube.dtype == np.uint8 and np.array_equal(cube, labels[::2, ::3, ::4])


@pytest.mark.parametrize("spacing", [1.0, 0.1, 0.3, 1 / 3, 0.488281])
def test_where_a_cells_middle_lies_between_voxels_most_of_them_decide(spacing, tmp_path):
    """As with 512 pixels in 128 cells: rounding would give a mask other labels by its spacing."""
    labels = np.random.default_rng(0).choice([0, 3, 5], (8, 16, 16), p=[0.6, 0.3, 0.1])
    path = tmp_path / "mask.nii"
    ras = np.c_[np.diag([-spacing, -spacing, -spacing]), [0.7, 20.3, 5.1]]
    path.write_bytes(nifti(labels, sform=ras))
    cube = read_mask(path, volume_at(LPS @ [*ras, [0, 0, 0, 1]], labels.shape), (4, 8, 8))
    voxels = labels.reshape(4, 2, 8, 2, 8, 2).transpose(0, 2, 4, 1, 3, 5).reshape(4, 8, 8, 8)
    votes = np.stack([(voxels == value).sum(3) for value in (0, 3, 5)])
    clear = votes.max(0) > 4
    expected = np.array([0, 3, 5])[votes.argmax(0)]
    assert clear.sum() > 100 and np.array_equal(cube[clear], expected[clear])
    assert np.isin(cube[~clear], [0, 3, 5]).all()


# ---- What is no mask ----

GOOD = nifti(LABELS, sform=SFORM)
BAD = {
    "nifti-2": struct.pack("<i", 540) + b"n+2\0\r\n\x1a\n" + bytes(1000),
    "header and image apart": nifti(LABELS, sform=SFORM, magic=b"ni1\0"),
    "analyze": nifti(LABELS, sform=SFORM, magic=b"\0\0\0\0"),
    "cut in the header": GOOD[:200],
    "cut in the voxels": GOOD[:-1],
    "empty": b"",
    "text": b"x" * 2000,
    "zeros": bytes(2000),
    "damaged gzip": gzip.compress(GOOD)[:-60],
    "gzip of nothing": gzip.compress(b""),
    "gzip's first bytes": b"\x1f\x8b",
    "complex": nifti(LABELS, 32, sform=SFORM),
    "colours": nifti(LABELS, 128, sform=SFORM),
    "unknown type": nifti(LABELS, 3, sform=SFORM),
    "a film": nifti(LABELS, sform=SFORM, dim=[4, 7, 9, 1, 11, 1, 1, 1]),
    "a plane": nifti(LABELS, sform=SFORM, dim=[2, 7, 9, 11, 1, 1, 1, 1]),
    "rank 0": nifti(LABELS, sform=SFORM, dim=[0, *SHAPE, 1, 1, 1, 1]),
    "negative axis": nifti(LABELS, sform=SFORM, dim=[3, -7, -9, 11, 1, 1, 1, 1]),
    "vast axes": nifti(LABELS, sform=SFORM, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
    "flat affine": nifti(LABELS, sform=np.zeros((3, 4))),
    "no number in the affine": nifti(LABELS, sform=np.full((3, 4), np.nan)),
    "voxels before the header": nifti(LABELS, sform=SFORM, start=-8.0),
    "voxels nowhere": nifti(LABELS, sform=SFORM, start=float("nan")),
    "voxels at infinity": nifti(LABELS, sform=SFORM, start=float("inf")),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_nifti_1_mask_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / "mask.nii"
    path.write_bytes(BAD[name])
    with pytest.raises(StudyError, match="mask.nii.*NIfTI-1") as error:
        read_mask(path, volume_at(np.eye(4), SHAPE))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_a_missing_mask_and_a_folder_are_refused_in_one_line(tmp_path, make):
    make(tmp_path / "mask.nii")
    with pytest.raises(StudyError, match="mask.nii"):
        read_mask(tmp_path / "mask.nii", volume_at(np.eye(4), SHAPE))


def test_a_gzip_bomb_is_refused_before_memory_is_taken(tmp_path):
    """64 MiB of zeros in 0.3 MB; the header asks for 8 GB."""
    bomb = gzip.compress(nifti(np.zeros((1, 1, 1)), dim=[3, 2000, 2000, 2000, 1, 1, 1, 1])
                         + bytes(2**26), 1)
    (tmp_path / "mask.nii.gz").write_bytes(bomb)
    with pytest.raises(StudyError):
        read_mask(tmp_path / "mask.nii.gz", volume_at(np.eye(4), SHAPE))


def test_zooms_below_0_are_taken_as_lengths(tmp_path):
    """As nibabel does; pixdim[0] alone mirrors."""
    data, qform = np.ones((2, 3, 4)), [0, 0, 1.0, 0, 0, 0]
    affines = []
    for zooms in ((0.5, 0.6, 1.2), (0.5, 0.6, -1.2)):
        path = tmp_path / "ct.nii"
        path.write_bytes(nifti(data, qform=qform, zooms=zooms))
        affines.append(cspine.read_nifti(path)[3])
    np.testing.assert_array_equal(*affines)


@pytest.mark.parametrize("unit, to_mm", [(0, 1), (1, 1000), (2, 1), (3, 0.001), (2 + 8, 1)])
def test_metres_and_microns_are_brought_to_mm(unit, to_mm, tmp_path):
    raw = bytearray(nifti(np.ones((2, 3, 4)), sform=np.eye(4)[:3] / to_mm))
    raw[123] = unit  # with the unit of time
    (tmp_path / "ct.nii").write_bytes(raw)
    voxel_from_lps = cspine.read_nifti(tmp_path / "ct.nii")[3]
    np.testing.assert_allclose(voxel_from_lps, np.diag([-1, -1, 1, 1]), atol=1e-6)


def test_an_orientation_that_is_guessed_is_told(tmp_path, capsys):
    path = tmp_path / "ct.nii"
    path.write_bytes(nifti(np.ones((2, 3, 4))))
    cspine.read_nifti(path)
    assert "ct.nii: no orientation in its header" in capsys.readouterr().err
    path.write_bytes(nifti(np.ones((2, 3, 4)), qform=[0, 0, 1.0, 0, 0, 0]))
    cspine.read_nifti(path)
    assert not capsys.readouterr().err


def test_sizes_beyond_the_rank_mean_nothing(tmp_path):
    """Some programs leave there what they like."""
    path = tmp_path / "mask.nii"
    path.write_bytes(nifti(LABELS, dim=[3, *SHAPE, 5, 0, -1, 9], sform=SFORM))
    assert np.array_equal(cspine.read_nifti(path)[0], LABELS)


@pytest.mark.parametrize("unit, to_mm", [(1, 1000), (2, 1), (3, 0.001)])
def test_the_origin_is_brought_to_mm_as_the_axes_are(unit, to_mm, tmp_path):
    sform = np.c_[np.eye(3), [10, 20, 30]] / to_mm
    raw = bytearray(nifti(np.ones((2, 3, 4)), sform=sform))
    raw[123] = unit
    (tmp_path / "mask.nii").write_bytes(raw)
    lps_from_voxel = np.linalg.inv(cspine.read_nifti(tmp_path / "mask.nii")[3])
    assert lps_from_voxel[:3, 3] == pytest.approx([-10, -20, 30], abs=1e-3)
