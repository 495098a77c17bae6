"""I rely on: a mask stays on its image, and a sample's luck is its own."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cspine
from cspine import CROP_RANGES, VOLUME_RANGES, augment_crops, augment_volumes

MILD, STRONG = CROP_RANGES["mild"], CROP_RANGES["strong"]

GREY = ("window", "gamma", "noise", "blur", "hole")
MOVES = ("rotation", "scale", "shift", "mirror")
NOTHING = MILD | dict.fromkeys(GREY + MOVES + ("still",), 0.0)


def only(ranges, names):
    return NOTHING | {name: ranges[name] for name in names}


def generators(*seeds):
    return [np.random.default_rng(seed) for seed in seeds]


def ellipsoid(size=32):
    """A lopsided body in the first octant's direction: every move of it can be told."""
    z, y, x = np.meshgrid(*[np.arange(size)] * 3, indexing="ij")
    body = ((z - 12) / 8) ** 2 + ((y - 16) / 5) ** 2 + ((x - 20) / 6) ** 2 < 1
    return torch.from_numpy(body).float()


def volumes(count=1, size=32):
    body = ellipsoid(size)
    return body.repeat(count, 1, 1, 1, 1), (body * 3).to(torch.uint8).repeat(count, 1, 1, 1)


def crops(count=1, steps=15, size=48, seed=0):
    """Slices and mask of a step show the same picture."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.rand(count, steps, 1, size, size, generator=generator)
    return picture.repeat(1, 1, 6, 1, 1)


def crop_bytes(*arguments, **options):
    """The same as bytes, which a CPU augments in a way of its own."""
    return (crops(*arguments, **options) * 255).byte()


both = pytest.mark.parametrize("shown", (crops, crop_bytes))


def as_floats(images):
    return images if images.is_floating_point() else images / 255


def test_identity_settings_leave_volumes_alone():
    cubes, labels = volumes(2)
    cubes = cubes * 0.7 + 0.1
    moved, same = augment_volumes(cubes.clone(), labels.clone(), generators(1, 2), NOTHING)
    assert torch.allclose(moved, cubes, atol=1e-5) and torch.equal(same, labels)


@both
def test_identity_settings_leave_crops_alone(shown):
    images = shown(2)
    same = augment_crops(images.clone(), generators(1, 2), 48, NOTHING)
    assert torch.allclose(same, as_floats(images), atol=1e-4)  # a cell's place is exact to 1e-5


@pytest.mark.parametrize("size, ranges", ((96, MILD), (70, MILD), (96, STRONG)))
def test_bytes_on_a_cpu_come_out_as_floats_do(size, ranges):
    """Rounded once, and moved by 32nds of a pixel in older versions of OpenCV."""
    smooth = F.interpolate(crops(1, 15, 12).flatten(0, 1), 96, mode="bicubic").clamp(0, 1)
    images = (smooth * 255).byte()[None]
    ranges = ranges | {"noise": 0, "still": 0, "blur": 0.5, "hole": 0.5}
    for seed in range(12):
        ours = augment_crops(images, generators(seed), size, ranges)
        exact = augment_crops(images / 255, generators(seed), size, ranges)
        off = 255 * (ours - exact).abs()
        assert off.mean() < 0.4 and off.max() < 10, seed


def test_noise_of_bytes_is_that_of_floats():
    grey, ranges = torch.full((1, 15, 6, 96, 96), 128, dtype=torch.uint8), NOTHING | {"noise": 0.1}
    for seed in range(5):
        pair = [augment_crops(images, generators(seed), 96, ranges)[:, :, :-1] - 128 / 255
                for images in (grey, grey / 255)]
        (mean, other_mean), (sd, other_sd) = [[getattr(one, f)().item() for one in pair] for f in ("mean", "std")]
        assert sd == pytest.approx(other_sd, rel=0.01) and abs(mean) < sd / 200, seed
        near = (pair[0][0, 0, 0] * pair[0][0, 0, 1]).mean()
        assert abs(near) < sd**2 / 20, "each image has its own"


def centre(mask):
    return torch.nonzero(mask).float().mean(0)


def test_labels_stay_on_their_volume():
    for seed in range(12):
        cube, labels = augment_volumes(*volumes(), generators(seed), only(VOLUME_RANGES, MOVES))
        body, marked = cube[0, 0] > 0.5, labels[0] == 3
        assert set(labels.unique().tolist()) <= {0, 3}
        if body.sum() > 200:
            overlap = 2 * (body & marked).sum() / (body.sum() + marked.sum())
            assert overlap > 0.95, seed  # linear against nearest: the rim differs
            assert (centre(body) - centre(marked)).abs().max() < 0.5, seed


def test_volumes_move_and_never_turn_head_to_foot():
    ramp = torch.linspace(0, 1, 32)[:, None, None].expand(32, 32, 32)[None, None]
    labels, moved = torch.zeros(1, 32, 32, 32, dtype=torch.uint8), 0
    for seed in range(30):
        still = only(VOLUME_RANGES, ("rotation", "scale", "mirror"))
        cube, _ = augment_volumes(ramp.clone(), labels, generators(seed), still)
        assert cube[0, 0, 20:26, 12:20, 12:20].mean() > cube[0, 0, 6:12, 12:20, 12:20].mean(), seed
        moved += not torch.allclose(cube, ramp, atol=0.02)
    assert moved > 25


def test_a_still_sample_is_mirrored_and_no_more():
    """Every move resamples: edges that stay as sharp as in prediction must be seen too."""
    cubes, labels = volumes()
    for seed in range(8):
        still = only(VOLUME_RANGES, MOVES) | {"still": 1.0}
        cube, moved = augment_volumes(cubes.clone(), labels.clone(), generators(seed), still)
        assert any(torch.allclose(cube, view, atol=1e-4) and torch.equal(moved, truth)
                   for view, truth in ((cubes, labels), (cubes.flip(-1), labels.flip(-1)))), seed


def test_mixed_precision_never_rounds_where_a_sample_goes():
    """bfloat16 has 8 bits: an edge would wander by half a pixel."""
    plain = augment_crops(crops(), generators(5), 48, only(MILD, MOVES))
    with torch.autocast("cpu", torch.bfloat16):
        half = augment_crops(crops(), generators(5), 48, only(MILD, MOVES))
    assert half.dtype == torch.float32 and torch.allclose(half, plain, atol=1e-4)


def test_volumes_are_mirrored_left_to_right_alone():
    cubes, labels = volumes()
    seen = set()
    for seed in range(12):
        cube, _ = augment_volumes(cubes.clone(), labels, generators(seed),
                                  only(VOLUME_RANGES, ["mirror"]))
        mirrored = torch.allclose(cube, cubes.flip(-1), atol=1e-3)
        assert mirrored or torch.allclose(cube, cubes, atol=1e-3), seed
        seen.add(mirrored)
    assert seen == {True, False}


@both
def test_crops_take_all_eight_views(shown):
    image, seen = shown(steps=1, size=16), set()
    views = [torch.rot90(v, k, (-2, -1)) for v in (image, image.flip(-1)) for k in range(4)]
    for seed in range(60):
        moved = augment_crops(image.clone(), generators(seed), 16, only(MILD, ["mirror"]))
        fits = [k for k, view in enumerate(views) if torch.allclose(moved, as_floats(view), atol=1e-3)]
        assert len(fits) == 1, seed
        seen.update(fits)
    assert seen == set(range(8))


@both
def test_the_six_channels_of_all_steps_share_one_geometry(shown):
    image = shown(steps=1).repeat(1, 15, 1, 1, 1)
    for seed in range(6):
        moved = augment_crops(image.clone(), generators(seed), 40, only(MILD, MOVES))
        assert moved.shape == (1, 15, 6, 40, 40)
        assert torch.allclose(moved, moved[:, :1, :1].expand_as(moved), atol=1e-6), seed


@both
def test_strong_draws_every_step_by_itself_and_its_six_channels_together(shown):
    image = shown(steps=1).repeat(1, 15, 1, 1, 1)
    moves = only(STRONG, MOVES) | {"by_step": True}
    moved = augment_crops(image.clone(), generators(3), 40, moves)
    assert moved.shape == (1, 15, 6, 40, 40)
    assert torch.allclose(moved, moved[:, :, :1].expand_as(moved), atol=1e-6)
    alike = (moved[0, 1:] - moved[0, :-1]).abs().amax((1, 2, 3)) < 1e-3
    assert not alike.any()


@both
def test_beyond_a_strongly_moved_image_lies_its_reflection(shown):
    bright = (shown(steps=3) * 0 + (1 if shown is crops else 255))
    for seed in range(6):
        strong = augment_crops(bright.clone(), generators(seed), 48, only(STRONG, MOVES) | {
            "beyond": "reflection"})
        mild = augment_crops(bright.clone(), generators(seed), 48, only(STRONG, MOVES))
        assert strong.min() > 0.99 and mild.min() < 0.01, seed


def test_holes_of_strong_are_larger():
    image = torch.ones(1, 1, 6, 100, 100)
    gone = {}
    for name, ranges in (("mild", MILD), ("strong", STRONG)):
        hole = NOTHING | {"hole": 1.0, "edge": ranges["edge"]}
        shown = [augment_crops(image.clone(), generators(k), 100, hole) for k in range(40)]
        gone[name] = max((one[0, 0, 0] == 0).sum().item() for one in shown)
    assert gone["mild"] <= 25**2 < gone["strong"] <= 50**2


@both
def test_the_mask_channel_is_moved_and_never_brightened(shown):
    image = shown()
    for seed in range(6):
        full = augment_crops(image.clone(), generators(seed), 48, MILD | {"still": 0.0})
        moved = augment_crops(image.clone(), generators(seed), 48, only(MILD, MOVES))
        assert torch.equal(full[:, :, -1], moved[:, :, -1]), seed
        assert not torch.allclose(full[:, :, :-1], moved[:, :, :-1], atol=1e-3), seed
        assert 0 <= full.min() and full.max() <= 1, seed


def test_labels_are_never_brightened():
    cubes, labels = volumes()
    cube, same = augment_volumes(cubes * 0.5, labels.clone(), generators(3),
                                 only(VOLUME_RANGES, GREY))
    assert torch.equal(same, labels) and not torch.allclose(cube, cubes * 0.5, atol=1e-3)


@both
@pytest.mark.parametrize("name", GREY)
def test_each_grey_setting_does_something_alone(name, shown):
    image = shown()
    ranges = NOTHING | {name: 1.0 if name in ("blur", "hole") else MILD[name]}
    changed = augment_crops(image.clone(), generators(4), 48, ranges)
    image = as_floats(image)
    assert not torch.allclose(changed[:, :, :-1], image[:, :, :-1], atol=1e-3)
    if name == "hole":
        gone = (changed[0, :, :-1] == 0) & (image[0, :, :-1] > 0)
        assert torch.equal(gone[0, 0], gone[14, 4]) and 0 < gone[0, 0].float().mean() < 0.1


@both
def test_a_crop_does_not_depend_on_its_batch(shown):
    images = torch.cat([shown(), shown(seed=1), shown(seed=2)])
    together = augment_crops(images.clone(), generators(1, 2, 3), 48)
    alone = augment_crops(images[1:2].clone(), generators(2), 48)
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    other_way = augment_crops(images.flip(0), generators(3, 2, 1), 48)
    assert torch.allclose(together, other_way.flip(0), atol=1e-4)


def test_a_volume_does_not_depend_on_its_batch():
    cubes, labels = volumes(3)
    several, marked = augment_volumes(cubes.clone(), labels.clone(), generators(1, 2, 3))
    one, mark = augment_volumes(cubes[2:].clone(), labels[2:].clone(), generators(3))
    assert torch.allclose(several[2:], one, atol=1e-4) and torch.equal(marked[2:], mark)
    assert not torch.allclose(several[0], several[1], atol=1e-2)


@both
def test_a_seed_repeats_itself_and_the_global_generator_is_left_alone(shown):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = augment_crops(shown(), generators(7), 48)
    assert torch.equal(first, augment_crops(shown(), generators(7), 48))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ranges, axes", [(MILD, 2), (VOLUME_RANGES, 3)])
def test_moves_go_as_far_as_their_ranges_and_no_further(ranges, axes):
    """rotation in degrees about each axis; scale a logarithm; shift a share of the edge, which
    is two units of affine_grid."""
    alone = dict.fromkeys(("rotation", "scale", "shift", "mirror", "still"), 0.0)
    far = {}
    for name in ("rotation", "scale", "shift"):
        own = ranges | alone | {name: ranges[name]}
        drawn = [cspine.draw_matrix(np.random.default_rng(k), own, axes) for k in range(400)]
        turns, shifts = np.array(drawn)[:, :, :axes], np.array(drawn)[:, :, axes]
        cosine = (np.trace(turns, 0, 1, 2) - axes + 2) / 2
        far["scale"] = abs(np.log(abs(np.linalg.det(turns)))).max() / axes
        far["rotation"] = np.degrees(np.arccos(cosine.clip(-1, 1))).max()
        far["shift"] = abs(shifts).max() / 2
        most = ranges[name] * (math.sqrt(3) if name == "rotation" and axes == 3 else 1)
        assert 0.6 * most < far[name] <= most * 1.001, name


def test_greys_go_as_far_as_their_ranges_to_both_sides():
    drawn = [cspine.draw_greys(np.random.default_rng(k), MILD, 400) for k in range(1000)]
    for values, most in (
            ([one.stretch - 1 for one in drawn], MILD["window"]),
            ([one.shift for one in drawn], MILD["window"]),
            ([math.log(one.gamma) for one in drawn], MILD["gamma"])):
        assert -most <= min(values) < -0.95 * most and 0.95 * most < max(values) <= most
    noise = [one.noise for one in drawn]  # mostly weak: the square of what is drawn
    assert np.median(noise) == pytest.approx(MILD["noise"] / 4, rel=0.15)
    edges = {one.hole[0].stop - one.hole[0].start for one in drawn} - {0}
    assert 20 <= min(edges) < 30 and 90 < max(edges) <= 100
