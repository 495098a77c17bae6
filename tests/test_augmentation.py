"""I rely on: a mask stays on its image, and a sample's luck is its own."""

import numpy as np
import pytest
import torch

from cspine import CROP_RANGES, VOLUME_RANGES, augment_crops, augment_volumes

GREY = ("window", "gamma", "noise", "blur", "hole")
MOVES = ("rotation", "scale", "shift", "mirror")
NOTHING = dict.fromkeys(GREY + MOVES + ("still",), 0.0)


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


def crops(count=1, steps=15, size=48):
    """Slices and mask of a step show the same picture."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(count, steps, 1, size, size, generator=generator)
    return picture.repeat(1, 1, 6, 1, 1)


def test_identity_settings_change_nothing():
    cubes, labels = volumes(2)
    cubes = cubes * 0.7 + 0.1
    moved, same = augment_volumes(cubes.clone(), labels.clone(), generators(1, 2), NOTHING)
    assert torch.allclose(moved, cubes, atol=1e-5) and torch.equal(same, labels)
    images = crops(2)
    assert torch.allclose(augment_crops(images.clone(), generators(1, 2), 48, NOTHING), images,
                          atol=1e-4)  # a cell's place is exact to 1e-5


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
    plain = augment_crops(crops(), generators(5), 48, only(CROP_RANGES, MOVES))
    with torch.autocast("cpu", torch.bfloat16):
        half = augment_crops(crops(), generators(5), 48, only(CROP_RANGES, MOVES))
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


def test_crops_take_all_eight_views():
    image, seen = crops(steps=1, size=16), set()
    views = [torch.rot90(v, k, (-2, -1)) for v in (image, image.flip(-1)) for k in range(4)]
    for seed in range(60):
        moved = augment_crops(image.clone(), generators(seed), 16, only(CROP_RANGES, ["mirror"]))
        fits = [k for k, view in enumerate(views) if torch.allclose(moved, view, atol=1e-3)]
        assert len(fits) == 1, seed
        seen.update(fits)
    assert seen == set(range(8))


def test_the_six_channels_of_all_steps_share_one_geometry():
    image = crops(steps=1).repeat(1, 15, 1, 1, 1)
    for seed in range(6):
        moved = augment_crops(image.clone(), generators(seed), 40, only(CROP_RANGES, MOVES))
        assert moved.shape == (1, 15, 6, 40, 40)
        assert torch.allclose(moved, moved[:, :1, :1].expand_as(moved), atol=1e-6), seed


def test_the_mask_channel_is_moved_and_never_brightened():
    image = crops()
    for seed in range(6):
        full = augment_crops(image.clone(), generators(seed), 48, CROP_RANGES | {"still": 0.0})
        moved = augment_crops(image.clone(), generators(seed), 48, only(CROP_RANGES, MOVES))
        assert torch.equal(full[:, :, -1], moved[:, :, -1]), seed
        assert not torch.allclose(full[:, :, :-1], moved[:, :, :-1], atol=1e-3), seed
        assert 0 <= full.min() and full.max() <= 1, seed


def test_labels_are_never_brightened():
    cubes, labels = volumes()
    cube, same = augment_volumes(cubes * 0.5, labels.clone(), generators(3),
                                 only(VOLUME_RANGES, GREY))
    assert torch.equal(same, labels) and not torch.allclose(cube, cubes * 0.5, atol=1e-3)


@pytest.mark.parametrize("name", GREY)
def test_each_grey_setting_does_something_alone(name):
    image = crops()
    ranges = NOTHING | {name: 1.0 if name in ("blur", "hole") else CROP_RANGES[name]}
    changed = augment_crops(image.clone(), generators(4), 48, ranges)
    assert not torch.allclose(changed[:, :, :-1], image[:, :, :-1], atol=1e-3)
    if name == "hole":
        gone = (changed[0, :, :-1] == 0) & (image[0, :, :-1] > 0)
        assert torch.equal(gone[0, 0], gone[14, 4]) and 0 < gone[0, 0].float().mean() < 0.1


def test_a_sample_does_not_depend_on_its_batch():
    images = torch.cat([crops(), crops() ** 2, 1 - crops()])
    together = augment_crops(images.clone(), generators(1, 2, 3), 48)
    alone = augment_crops(images[1:2].clone(), generators(2), 48)
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    other_way = augment_crops(images.flip(0), generators(3, 2, 1), 48)
    assert torch.allclose(together, other_way.flip(0), atol=1e-4)
    cubes, labels = volumes(3)
    several, marked = augment_volumes(cubes.clone(), labels.clone(), generators(1, 2, 3))
    one, mark = augment_volumes(cubes[2:].clone(), labels[2:].clone(), generators(3))
    assert torch.allclose(several[2:], one, atol=1e-4) and torch.equal(marked[2:], mark)
    assert not torch.allclose(several[0], several[1], atol=1e-2)


def test_a_seed_repeats_itself_and_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = augment_crops(crops(), generators(7), 48)
    assert torch.equal(first, augment_crops(crops(), generators(7), 48))
    assert torch.equal(torch.get_rng_state(), before)
