"""I rely on: the ninety images of a vertebra are the right ones, in the right order."""

import cv2
import numpy as np
import pytest

import cspine
from cspine import STEPS, interleave, vertebra_slices

LOW, HU_PER_GREY = -500, 2000 / 255  # BONE_WINDOW: level 500, width 2000
GAP = 3  # cells


def make_volume(hu, spacing=(1.0, 0.5, 0.5)):
    affine = np.diag([spacing[2], spacing[1], -spacing[0], 1.0])
    return cspine.Volume("1.2.3", hu.astype(np.int16), spacing, affine)


def numbered_volume(count=96, rows=64, columns=64, spacing=(1.0, 0.5, 0.5)):
    """Slice z is filled with what the bone window shows as the grey value z."""
    grey = np.arange(count)[:, None, None] * np.ones((1, rows, columns))
    return make_volume(np.rint(LOW + grey * HU_PER_GREY), spacing)


def block(v, z, y, x, edge=32, value=0.9):
    """A probability with vertebra v in the cells [z0, z1) x [y0, y1) x [x0, x1)."""
    probability = np.zeros((7, edge, edge, edge), np.float32)
    probability[v, slice(*z), slice(*y), slice(*x)] = value
    return probability


def test_interleave_puts_each_mask_after_its_five_images():
    images = np.arange(75, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 6), np.uint8)
    masks = 100 + np.arange(15, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 6), np.uint8)
    strip = interleave(images, masks)
    assert strip.shape == (15, 6, 4, 6) and strip.dtype == np.uint8
    for i in range(15):
        assert strip[i, :, 2, 3].tolist() == [5 * i, 5 * i + 1, 5 * i + 2, 5 * i + 3, 5 * i + 4,
                                              100 + i]


def test_the_result_has_the_shape_of_the_road():
    crops = vertebra_slices(numbered_volume(), block(2, (8, 16), (10, 20), (10, 20)))
    assert crops.shape == (7, 15, 6, 224, 224) and crops.dtype == np.uint8
    assert [bool(crop.any()) for crop in crops] == [v == 2 for v in range(7)]


@pytest.mark.parametrize("count", (96, 69, 250))
def test_slices_are_read_off_where_slice_z_is_filled_with_z(count):
    first, last = 8, 15  # cells of 32
    crops = vertebra_slices(numbered_volume(count), block(4, (first, last + 1), (9, 20), (9, 20)), 32)
    scale = count / 32
    first, last = first - 1, last + 1  # a margin of a cell (first place)
    centres = np.rint(np.linspace(first * scale, (last + 1) * scale - 1, 15)).astype(int)
    assert crops[4, :, :5, 16, 16].tolist() == [[z - 2, z - 1, z, z + 1, z + 2] for z in centres]
    assert np.ptp(crops[4, :, :5], (2, 3)).max() == 0  # nothing but slice z in the image of slice z


def test_every_slice_of_the_vertebra_is_seen():
    crops = vertebra_slices(numbered_volume(96), block(0, (8, 24), (9, 20), (9, 20)), 32)
    assert set(range(24, 72)) <= set(crops[0, :, :5].ravel().tolist())


def test_a_vertebra_at_the_first_and_last_slice_repeats_them():
    for cells, end in (((0, 4), 0), ((28, 32), 95)):
        crops = vertebra_slices(numbered_volume(), block(6, cells, (9, 20), (9, 20)), 32)
        shown = crops[6, :, :5, 16, 16].astype(int)
        assert shown.min() >= 0 and shown.max() <= 95
        step = shown[0] if end == 0 else shown[-1]
        assert step.tolist() == np.clip(np.arange(end - 2, end + 3), 0, 95).tolist()


def test_a_thin_vertebra_and_a_short_study_still_give_fifteen_steps():
    thin = vertebra_slices(numbered_volume(), block(1, (10, 11), (9, 20), (9, 20)), 32)
    seen = set(thin[1, :, 2, 16, 16].tolist())
    assert seen == set(range(27, 36))  # the three slices of its cell, and of either neighbour
    bare = vertebra_slices(numbered_volume(), block(1, (10, 11), (9, 20), (9, 20)), 32, z_margin=0)
    assert set(bare[1, :, 2, 16, 16].tolist()) == {30, 31, 32}
    short = vertebra_slices(numbered_volume(16), block(1, (10, 20), (9, 20), (9, 20)), 32)
    assert np.diff(short[1, :, 2, 16, 16].astype(int)).min() >= 0


@pytest.mark.parametrize("mask_of, offset", (("last", 2), ("center", 0)))
def test_the_mask_is_the_soft_one_of_the_slice_asked_for(mask_of, offset):
    count, edge = 96, 32
    probability = block(3, (6, 26), (9, 20), (9, 20))
    plane = np.arange(edge, dtype=np.float32)[:, None, None]
    probability[3] = np.where(probability[3] > 0, 0.25 + plane / 64, 0)  # rises by plane
    crops = vertebra_slices(numbered_volume(count), probability, 32, mask_of)
    for step in range(2, STEPS - 2):  # the first and last masks reach beyond the block
        z = int(crops[3, step, 2, 16, 16]) + offset
        expected = 255 * (0.25 + ((z + 0.5) * edge / count - 0.5) / 64)
        assert abs(int(crops[3, step, 5, 16, 16]) - expected) < 1, step


def blob(shape, centre_mm, radii_mm, spacing):
    grid = np.meshgrid(*[(np.arange(n) + 0.5) * s for n, s in zip(shape, spacing)], indexing="ij")
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre_mm, radii_mm)) < 1


def centre(image, threshold):
    moments = cv2.moments((image > threshold).astype(np.uint8), True)
    return np.array([moments["m10"], moments["m01"]]) / moments["m00"]


@pytest.mark.parametrize("shape, spacing", (
    ((60, 128, 128), (1.0, 0.5, 0.5)), ((90, 96, 160), (0.7, 0.6, 0.4)),
    ((40, 160, 100), (1.25, 0.4, 0.7))))
def test_mask_and_slices_show_the_same_place_in_its_true_shape(shape, spacing):
    extent = np.array(shape) * spacing
    where, radii = extent * (0.5, 0.4, 0.6), (9, 10, 14)  # wider than deep
    bone = blob(shape, where, radii, spacing)
    cells = blob((48, 48, 48), where, radii, extent / 48)
    probability = np.zeros((7, 48, 48, 48), np.float32)
    probability[5] = cells
    crops = vertebra_slices(make_volume(np.where(bone, 1500, -500), spacing), probability, 96)
    image, mask = crops[5, 7, 4], crops[5, 7, 5]
    assert np.abs(centre(image, 127) - centre(mask, 127)).max() < 1.5  # half a cell
    assert np.abs(centre(image, 127) - 47.5).max() < 2.5
    _, _, width, height = cv2.boundingRect((image > 127).astype(np.uint8))
    assert width / height == pytest.approx(1.4, abs=0.1)  # millimetres, whatever the spacing


def test_the_box_has_a_margin_and_stays_defined_beyond_the_image():
    crops = vertebra_slices(numbered_volume(), block(2, (8, 16), (12, 20), (12, 20)), 100)
    rows = np.flatnonzero(crops[2, 7, 5, :, 50] > 127)
    assert 0.74 <= len(rows) / 100 <= 0.86  # 8 of the 10 cells of the box
    corner = vertebra_slices(numbered_volume(), block(2, (8, 16), (0, 8), (24, 32)), 32)
    assert np.ptp(corner[2, :, :5], (2, 3)).max() == 0  # the edge is repeated, no black frame


def test_a_faint_vertebra_is_found_with_the_lower_threshold():
    probability = block(2, (8, 16), (12, 20), (12, 20), value=0.1)
    crops = vertebra_slices(numbered_volume(), probability, 32)
    assert crops[2, 7, 2, 16, 16] and crops[2, 7, 5, 16, 16] in (25, 26)
    probability[2, 8:12, 12:16, 12:16] = 0.9  # the clear part alone gives the box
    clear = vertebra_slices(numbered_volume(), probability, 32)
    assert clear[2, 0, 2, 16, 16] == 21 and clear[2, 14, 2, 16, 16] == 38


@pytest.mark.parametrize("probability", (
    block(2, (8, 16), (12, 20), (12, 20), value=0.04), block(2, (8, 9), (12, 13), (12, 14)),
    block(2, (8, 16), (12, 20), (12, 20), value=0.0)))
def test_an_absent_vertebra_is_all_zero_and_only_that_one(probability):
    probability = probability + block(3, (20, 28), (12, 20), (12, 20))
    crops = vertebra_slices(numbered_volume(), probability, 32)
    assert not crops[2].any() and crops[3, :, 5].all(), "a mask of 0 means absent"


def test_black_slices_of_a_vertebra_in_view_are_not_absent():
    volume = make_volume(np.full((96, 64, 64), -1024))
    crops = vertebra_slices(volume, block(0, (8, 16), (12, 20), (12, 20)), 32)
    assert not crops[0, :, :5].any() and crops[0, :, 5].all()


def test_strays_do_not_widen_the_box():
    probability = block(2, (8, 16), (12, 20), (12, 20))
    plain = vertebra_slices(numbered_volume(), probability, 32)
    probability[2, 30, 2, 29] = probability[2, 1, 30, 1] = 0.9
    stray = vertebra_slices(numbered_volume(), probability, 32)
    assert np.array_equal(plain[2, :, :5], stray[2, :, :5])
    probability[2, 16 + GAP, 15, 15] = 0.9
    assert np.array_equal(plain[2], vertebra_slices(numbered_volume(), probability, 32)[2])


def test_the_window_runs_from_black_to_white():
    for hu, grey in ((-1024, 0), (-500, 0), (500, 127.5), (1500, 255), (3000, 255)):
        volume = make_volume(np.full((32, 32, 32), hu))
        crops = vertebra_slices(volume, block(0, (8, 16), (12, 20), (12, 20)), 16)
        assert abs(int(crops[0, 7, 2, 8, 8]) - grey) <= 0.5, hu


def test_crops_are_stored_without_loss_in_a_quarter_of_their_size(tmp_path):
    rng = np.random.default_rng(0)
    probability = sum(block(v, (2 + 4 * v, 6 + 4 * v), (9, 20), (9, 20)) for v in range(6))
    hu = cv2.resize(rng.normal(300, 400, (96, 32 * 32)).astype(np.float32), (64 * 64, 96))
    crops = vertebra_slices(make_volume(hu.reshape(96, 64, 64)), probability)
    cspine.write_crops(tmp_path / "a.npz", crops)
    assert np.array_equal(cspine.read_crops(tmp_path / "a.npz"), crops)
    assert np.array_equal(cspine.read_crops(tmp_path / "a.npz", [5, 1]), crops[[5, 1]])
    assert (tmp_path / "a.npz").stat().st_size < 31.6e6 / 4
    nothing = np.zeros((7, 15, 6, 16, 16), np.uint8)
    cspine.write_crops(tmp_path / "b.npz", nothing)
    assert np.array_equal(cspine.read_crops(tmp_path / "b.npz"), nothing)


def test_a_thin_trail_of_mask_does_not_draw_the_steps_out_of_the_vertebra():
    """A few faint cells a plane reached far below a vertebra: half of its steps missed it."""
    solid = np.zeros((32, 32, 32), np.float32)
    solid[8:14, 8:20, 8:20] = 0.9
    trail = solid.copy()
    trail[14:28, 12, 10:14] = 0.4
    assert np.array_equal(cspine.vertebra_box(trail), cspine.vertebra_box(solid))


@pytest.mark.parametrize("count", [16, 24, 40, 300])
def test_steps_never_go_from_foot_to_head(count):
    """Also where a vertebra is thinner than a slice."""
    for cell in range(128):
        for z_margin in (0, 1):
            index = cspine.slice_indices((cell, cell), z_margin, 128, count)
            assert (np.diff(index[:, 2]) >= 0).all()


def test_a_damaged_file_of_crops_is_a_study_error(tmp_path):
    cspine.write_crops(tmp_path / "a.npz", np.ones((7, 15, 6, 16, 16), np.uint8))
    data = (tmp_path / "a.npz").read_bytes()
    for broken in (data[: len(data) // 2], b"", b"no zip file", data[:300] + data[400:]):
        (tmp_path / "b.npz").write_bytes(broken)
        with pytest.raises(cspine.StudyError, match="b.npz"):
            cspine.read_crops(tmp_path / "b.npz")


def test_a_vertebra_is_read_without_the_others(tmp_path):
    crops = np.random.default_rng(0).integers(0, 256, (7, 15, 6, 16, 16), dtype=np.uint8)
    cspine.write_crops(tmp_path / "a.npz", crops)
    with np.load(tmp_path / "a.npz") as file:
        others = {name: file[name] for name in file if name not in ("C1", "C3", "C6")}
    np.savez(tmp_path / "b.npz", **others)
    assert np.array_equal(cspine.read_crops(tmp_path / "b.npz", [4, 1]), crops[[4, 1]])
    with pytest.raises(cspine.StudyError, match="C6"):
        cspine.read_crops(tmp_path / "b.npz", [4, 5])


def test_some_steps_are_read_without_the_others(tmp_path):
    crops = np.random.default_rng(0).integers(1, 256, (7, 15, 6, 16, 16), dtype=np.uint8)
    crops[2] = 0
    cspine.write_crops(tmp_path / "a.npz", crops)
    for first in range(3):
        found = cspine.read_crops(tmp_path / "a.npz", [1, 2], slice(first, None, 3))
        assert np.array_equal(found, crops[[1, 2], first::3])


def test_the_head_of_crops_tells_how_they_were_cut_and_by_whom(tmp_path):
    crops = np.ones((7, 15, 6, 8, 8), np.uint8)
    crops[4] = 0
    cspine.write_crops(tmp_path / "a.npz", crops, 1.5, made_by={"2" * 16, "1" * 16})
    head = cspine.crops_head(tmp_path / "a.npz")
    assert (head.edge, head.z_margin, head.made_by) == (8, 1.5, {"1" * 16, "2" * 16})
    assert head.seen.tolist() == [v != 4 for v in range(7)]


def test_heads_are_read_of_the_studies_asked_for_that_have_crops(tmp_path):
    for uid in "abc":
        cspine.write_crops(tmp_path / f"{uid}.npz", np.ones((7, 15, 6, 8, 8), np.uint8))
    (tmp_path / ".4711.d.npz").write_bytes(b"what a kill has left")
    assert [*cspine.crops_heads(tmp_path, "dcxa", workers=2)] == ["c", "a"]


def test_crops_of_an_older_version_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", index=np.zeros((7, 15, 6)), edge=8, C1=np.zeros(4, np.uint8))
    with pytest.raises(cspine.UserError, match="delete it and run extract again: .*of an older"):
        cspine.crops_heads(tmp_path, "a", 1)


def test_noisy_crops_take_little_more_than_a_quarter_and_are_without_loss(tmp_path):
    noise = np.random.default_rng(0).normal(128, 40, (7 * 15 * 96, 6 * 96))
    noise = cv2.GaussianBlur(noise, (0, 0), 2).clip(0, 255).astype(np.uint8)
    crops = noise.reshape(7, 15, 96, 6, 96).swapaxes(2, 3).copy()
    crops[:, :, -1] = 255
    cspine.write_crops(tmp_path / "a.npz", crops)
    assert np.array_equal(cspine.read_crops(tmp_path / "a.npz"), crops)
    assert (tmp_path / "a.npz").stat().st_size < 0.28 * crops.nbytes


def test_of_two_parts_the_one_with_more_cells_counts_not_the_longer_one():
    profile = np.array([0, 100, 90, 0, 0, 0, 10, 10, 10, 10, 10, 0])
    assert cspine.fullest_run(profile, 2).tolist() == [1, 2]
