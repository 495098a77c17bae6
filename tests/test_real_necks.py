"""Real necks: the masks' rule and the views on a drawn column; the weights on real CTs."""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
for folder in ("tests", "tests/tools", "tests/necks", "tests/studies"):
    if str(ROOT / folder) not in sys.path:
        sys.path.append(str(ROOT / folder))

import cspine  # noqa: E402
import levels  # noqa: E402
import openkbp  # noqa: E402
import phantoms  # noqa: E402
import real_necks  # noqa: E402
import train_classifiers  # noqa: E402

NECKS = os.environ.get("CSPINE_NECKS", "")
LEAST_RIGHT = 0.95  # of the levels of PATIENTS necks kept out of the training
MOST_T1 = 0.10  # of the bodies of T1 with a name
PATIENTS = 2


@pytest.fixture(scope="module")
def column():
    """A straight column of bone with landmarks 18 mm apart, arches of C1 on top."""
    points = {
        "C1_anterior_arch": (40, 60, 60),
        "C1_posterior_arch": (44, 96, 60),
    }
    for k, level in enumerate(real_necks.LEVELS[1:]):
        points[f"{level}_body"] = (58 + 18 * k, 66, 60)
        points[f"{level}_spinous"] = (64 + 18 * k, 102, 60)
    points = {name: np.array(at, float) for name, at in points.items()}

    hu = np.full((110, 70, 60), -50, np.int16)
    hu[:, 24:56, 20:40] = 400  # mm: y 48 to 112, x 40 to 80
    return real_necks.Neck(
        "column", hu, np.array([2.0, 2.0, 2.0]), points, np.full(110, 60.0), True)


@pytest.fixture(scope="module")
def mask(column):
    return real_necks.make_mask(column)


def test_every_body_lies_in_the_mask_of_its_name(column, mask):
    for k, level in enumerate(real_necks.LEVELS[1:], 2):
        z, y, x = (column.points[f"{level}_body"] / column.spacing).astype(int)
        assert mask[z, y, x] == k


def test_masks_follow_one_another_and_end_at_t1(column, mask):
    middle = mask[:, 33, 30]
    seen = middle[middle > 0].astype(int)
    assert (np.diff(seen) >= 0).all() and seen[-1] == 8
    assert not mask[: (40 - real_necks.ATLAS_ABOVE_MM) // 2 - 1].any()


def test_the_dens_is_c2s_and_the_arches_are_c1s(column, mask):
    front = column.points["C1_anterior_arch"]
    at = (front + [0, 10, 0]) / column.spacing
    assert mask[tuple(at.astype(int))] == 2
    assert mask[tuple((front / column.spacing).astype(int))] == 1
    back = column.points["C1_posterior_arch"] / column.spacing
    assert mask[tuple(back.astype(int))] == 1


def test_between_two_bodies_the_border_lies_midway(column, mask):
    high, low = (column.points[f"{level}_body"][0] for level in ("C4", "C5"))
    z = round((high + low) / 2 / 2)
    assert mask[z - 2, 33, 30] == 4 and mask[z + 2, 33, 30] == 5


def test_edges_and_borders_are_not_taught(column, mask):
    unknown = real_necks.uncertain(column, mask)
    z, y, x = (column.points["C5_body"] / column.spacing).astype(int)
    assert not unknown[z, y, x]  # inside
    border = np.flatnonzero(np.diff(mask[:, 33, 30].astype(int)))
    assert unknown[border[1:-1], 33, 30].all()


def test_a_bit_is_dropped_and_a_vertebra_is_not(mask):
    dotted = mask.copy()
    dotted[10, 10, 10] = 3
    clean = real_necks.without_bits(dotted, [2.0, 2.0, 2.0])
    assert clean[10, 10, 10] == 0
    assert (clean == 3).sum() > 0.99 * (mask == 3).sum()


def test_finer_keeps_landmarks_on_their_voxels(column):
    fine = real_necks.finer(column, 1.0)
    assert fine.hu.shape == (220, 140, 120)
    z, y, x = np.rint(fine.points["C4_body"] / fine.spacing).astype(int)
    assert fine.hu[z, y, x] == 400
    assert np.allclose(fine.points["C4_body"] - column.points["C4_body"], 0.5)


@pytest.mark.parametrize("kind", real_necks.KINDS)
def test_a_view_shows_image_and_mask_alike(column, mask, kind):
    rng = np.random.default_rng(3)
    view = real_necks.draw_view(column, mask, rng, kind)
    shape = 64, 48, 48
    hu = real_necks.view_hu(column, view, shape)
    labels = real_necks.view_labels(column, mask, view, shape)
    assert labels.any()
    bone = hu[labels > 0] > real_necks.BONE_HU / 2
    assert bone.float().mean() > 0.95


def test_a_window_of_a_view_is_cut_from_it(column, mask):
    view = real_necks.whole_view(column, mask)
    whole = real_necks.view_hu(column, view, (64, 64, 64))
    window = (-1, -0.5, -0.5), (1, 0.5, 0.5)
    part = real_necks.view_hu(column, view, (64, 32, 32), window=window)
    assert np.allclose(part, whole[:, 16:48, 16:48], atol=0.1)


@pytest.mark.parametrize("kind", real_necks.KINDS)
def test_a_study_comes_back_from_disk(column, mask, kind, tmp_path):
    rng = np.random.default_rng(5)
    study = real_necks.make_study(column, mask, rng, kind, 64)
    phantoms.write_phantom(study, "1.2.3", tmp_path, tmp_path / "masks", 0)
    volume = cspine.read_volume(tmp_path / "1.2.3")
    found = cspine.read_mask(tmp_path / "masks/1.2.3.nii", volume)
    assert np.allclose(volume.spacing, study.spacing, rtol=1e-4)
    assert volume.hu.shape == study.label.shape
    assert (found == study.label).mean() > 0.999


def test_landmarks_stand_in_order_and_enough_patients_are_kept_out():
    necks = real_necks.read_landmarks()
    parts = [real_necks.part_of(name) for name, entry in necks.items() if entry.get("sure")]
    assert parts.count("test") >= 15
    assert len({*parts}) == 3
    for entry in necks.values():
        if "points" in entry:
            z = [entry["points"][f"{level}_body"][2] for level in real_necks.LEVELS[1:]]
            assert (np.diff(z) > 0).all()


def test_names_are_read_from_the_mask_around_a_landmark():
    probability = np.zeros((7, 32, 32, 32), np.float32)
    probability[3, 10:14, 10:14, 10:14] = 0.9
    volume = cspine.Volume("", np.zeros((64, 64, 64), np.int16), (1.0, 1.0, 1.0), np.eye(4))
    points = {"C4_body": np.array([24.0, 24, 24]), "C5_body": np.array([50.0, 50, 50])}
    points["C7_body"] = np.array([70.0, 24, 24])  # out of view
    near = levels.names_near(probability, volume, points)
    assert near == {"C4_body": "C4", "C5_body": ""}
    assert levels.judge(near) == {"C4": True, "C5": False}


def test_a_table_counts_levels_and_patients():
    right = dict.fromkeys((*real_necks.LEVELS, "T1 untouched"), True)
    rows = [dict(right, view="neck"), dict(right, view="neck", C3=False)]
    table = levels.summary(pd.DataFrame(rows)).iloc[0]
    assert table.named_right == pytest.approx(13 / 14)
    assert table.all_right == 0.5
    assert table.t1_named == 0 and table.t1_touched == 0


@pytest.mark.parametrize("level", [5, 6])
def test_t1_is_named_by_most_cells_and_touched_by_one(level):
    volume = cspine.Volume("", np.zeros((64, 64, 64), np.int16), (1.0, 1.0, 1.0), np.eye(4))
    points = {"T1_body": np.array([32.0, 32, 32])}
    probability = np.zeros((7, 32, 32, 32), np.float32)
    probability[level, 14, 16, 16] = 0.9
    near = levels.names_near(probability, volume, points)
    assert levels.judge(near) == {"T1": True, "T1 untouched": False}
    probability[level] = 0.9
    near = levels.names_near(probability, volume, points)
    assert levels.judge(near) == {"T1": False, "T1 untouched": False}


def test_a_neck_without_landmarks_is_let_in_if_its_names_are_consistent():
    """Seven masks 18 mm apart around the cord; then one missing, two exchanged, one aside."""
    midline = np.full(90, 60.0)
    neck = real_necks.Neck("", np.zeros((90, 60, 60), np.int16), np.full(3, 2.0), {}, midline)
    probability = np.zeros((7, 30, 30, 30), np.float32)  # cells of 6, 4 and 4 mm
    for v in range(7):
        probability[v, 3 + 3 * v, 10:15, 13:18] = 0.9
    assert train_classifiers.is_consistent(probability, neck)
    missing, aside = probability.copy(), probability.copy()
    missing[4] = 0
    aside[4] = np.roll(aside[4], 6, 2)
    exchanged = probability[[0, 1, 3, 2, 4, 5, 6]]
    far = np.roll(probability, 3, 1)
    far[:2] = probability[:2]  # a level is left out below C2
    for wrong in (missing, aside, exchanged, far):
        assert not train_classifiers.is_consistent(wrong, neck)


def test_the_share_of_noisy_or_follows_from_the_rows_left_out():
    """The best on the mean of those that are nowhere above the studies' own constants."""
    constants = {train_classifiers.CONSTANTS: [0.6, 0.6], train_classifiers.OWN_BEST: [0.5, 0.5]}
    scores = {0.7: [0.40, 0.40], 0.85: [0.30, 0.45], 1.0: [0.10, 0.55]}
    table = pd.DataFrame(constants | scores, ["a", "b"]).T
    assert train_classifiers.choose(table) == 0.85
    assert train_classifiers.choose(table[["a"]]) == 1.0
    table.loc[0.7:, "b"] = 0.7  # none is safe
    assert train_classifiers.choose(table) == 1.0


def test_a_share_of_noisy_or_is_fitted_with_its_scale_and_shift():
    """At 0 the patient's own answers count alone, here the truth; at 1 the vertebrae's."""
    rng = np.random.default_rng(0)
    truth = (rng.random((60, 8)) < 0.3).astype(float)
    labels = pd.DataFrame(truth, [f"s{k}" for k in range(60)], cspine.TARGETS)
    outputs = {uid: [cspine.Output(rng.random((7, cspine.STEPS)), 0.1 + 0.8 * row[7])]
               for uid, row in zip(labels.index, truth)}
    own, vertebrae = (train_classifiers.fit(outputs, labels, share) for share in (0, 1))
    assert (own.answers.noisy_or, vertebrae.answers.noisy_or) == (0, 1)
    found = [cspine.auc(cspine.blend(outputs, one).to_numpy()[:, 7], truth[:, 7])
             for one in (own, vertebrae)]
    assert found[0] == 1 and found[1] < 0.8


def test_the_constants_of_very_studies_score_best_there():
    labels = (np.random.default_rng(0).random((30, 8)) < 0.3).astype(float)
    best = train_classifiers.own_best(labels)

    def score(answers):
        return train_classifiers.score(np.broadcast_to(answers, labels.shape), labels)

    for change in (-0.02, 0.02):
        for column in np.eye(8):
            assert score(best + change * column) > score(best)


def test_a_ct_of_openkbp_becomes_a_neck(tmp_path, monkeypatch):
    """Its cube has the axes y, x, z, z fastest; the box keeps what the landmarks speak of."""
    name, entry = next(iter(real_necks.read_landmarks().items()))
    x0, y0, z0 = entry["openkbp_offset"]
    x, y, z = entry["shape"]
    places = [(y0, x0, z0), (y0 + y - 1, x0 + x - 1, z0 + z - 1), (y0 + 2, x0 + 1, z0 + 3)]
    places = [(y * 128 + x) * 128 + z for y, x, z in places]
    folder = tmp_path / "clone/provided-data/train-pats" / name
    folder.mkdir(parents=True)
    pd.Series([24.0, 1100, 4095], places, name="data").to_csv(folder / "ct.csv")
    command = ["openkbp.py", str(tmp_path / "clone"), str(tmp_path / "necks")]
    monkeypatch.setattr(sys, "argv", command)
    openkbp.main()

    neck = real_necks.read_neck(tmp_path / "necks", name, entry)
    assert neck.hu.shape == (z, y, x)
    wanted = np.full((z, y, x), -1024)
    wanted[0, 0, 0], wanted[-1, -1, -1], wanted[3, 2, 1] = -1000, 76, 3071
    np.testing.assert_array_equal(neck.hu, wanted)
    stored, _, _, voxel_from_lps, _ = cspine.read_nifti(tmp_path / "necks" / f"{name}.nii.gz")
    np.testing.assert_array_equal(stored, wanted.T)
    x, y, z = entry["spacing_mm"]
    wanted = np.diag([1 / x, 1 / y, -1 / z, 1])  # x and y as in LPS, z to the feet
    np.testing.assert_allclose(voxel_from_lps, wanted, atol=1e-5)


@pytest.mark.skipif(not NECKS, reason="CSPINE_NECKS names no folder of real necks")
def test_the_landmarks_know_the_boxes_of_the_cts():
    for name, entry in real_necks.read_landmarks().items():
        if real_necks.part_of(name) == "test":
            neck = real_necks.read_neck(NECKS, name, entry)
            assert [*neck.hu.shape] == entry["shape"][::-1], name


@pytest.mark.skipif(not NECKS, reason="CSPINE_NECKS names no folder of real necks")
def test_shipped_weights_name_real_necks_they_never_saw():
    models = [*cspine.load_models(ROOT / "weights", "segmenter", "cpu").values()]
    table = levels.measure(NECKS, models, "test", views=1, most=PATIENTS, cuts=("neck",))
    right = table[[*real_necks.LEVELS[:7]]].astype(float).to_numpy()
    assert np.nanmean(right) >= LEAST_RIGHT, table
    assert 1 - table["T1"].astype(float).mean() <= MOST_T1, table
