"""I rely on: breaks drawn into a labelled CT stay in the vertebrae that are called broken."""

import breaks
import numpy as np
import pytest

SPACING = 1.0, 0.5, 0.5
BONE_HU = 600


@pytest.fixture
def column():
    """(HU, labels) of seven blocks of bone, 20 x 20 x 12 mm, 3 mm of muscle between."""
    labels = np.zeros((110, 70, 70), np.uint8)
    for level in range(1, 8):
        start = 15 * level - 10
        labels[start : start + 12, 15:55, 15:55] = level
    hu = np.where(labels > 0, BONE_HU, 50).astype(np.float32)
    return hu, labels


def changed(hu, column):
    """Share of the voxels inside each vertebra that are another HU than before."""
    before, _ = column
    other = abs(hu - before) > 1
    middles = [15 * level - 4 for level in range(1, 8)]  # slices
    return np.array([other[z - 3 : z + 3, 15:55, 15:55].mean() for z in middles])


def test_one_to_three_more_vertebrae_are_broken_and_only_those_get_dark_clefts(
        column, monkeypatch):
    monkeypatch.setattr(breaks, "draw_harmless", lambda *_: None)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        already = np.array([0, 0, 1, 0, 0, 0, 0], np.uint8)
        hu, broken = breaks.broken_copy(rng, column[0], column[1], SPACING, already)
        assert 1 <= broken.sum() - 1 <= 3 and broken[2]
        new = broken - already > 0
        share = changed(hu, column)
        assert (share[new] > 0.002).all() and (share[~new] == 0).all()
        for v in np.flatnonzero(new):
            assert hu[column[1] == v + 1].min() < 0.6 * BONE_HU


def test_harmless_marks_spare_the_broken_and_are_canals_or_bright(column):
    hu = column[0].copy()
    broken = np.array([1, 0, 0, 0, 0, 0, 0])
    for seed in range(8):
        rng = np.random.default_rng(seed)
        breaks.draw_harmless(rng, hu, column[1], SPACING, broken)
    share = changed(hu, column)
    assert share[0] == 0 and (share[1:] > 0).any()
    assert hu.max() > BONE_HU + 50


def test_a_vertebra_cut_off_by_the_end_of_the_study_is_not_broken(column):
    hu, labels = (part[9:] for part in column)  # C1 begins outside
    for seed in range(4):
        rng = np.random.default_rng(seed)
        _, broken = breaks.broken_copy(rng, hu, labels, SPACING, np.zeros(7, np.uint8))
        assert not broken[0]


def test_the_same_seed_draws_the_same_break(column):
    draws = [
        breaks.broken_copy(np.random.default_rng(3), *column, SPACING, np.zeros(7, np.uint8))
        for _ in range(2)]
    assert (column[0] % 550 == 50).all()  # the CT itself stays
    assert (draws[0][0] == draws[1][0]).all() and (draws[0][1] == draws[1][1]).all()
