"""I rely on: the second hand's necks carry true labels and masks, in the layout, from a seed."""

import numpy as np
import other_hand
import pandas as pd
import pytest
from other_hand import Study, draw_vertebrae, make_dataset, whole
from phantoms import TARGETS

from cspine import read_mask, read_volume

SEED = 2
UIDS = [f"1.2.3.4.{SEED}.{index}" for index in (0, 1)]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Studies of 96 x 96 pixels and at most 60 slices: a second each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MATRIX", 96), ("LARGE_MATRIX", 96), ("PIXEL_MM", (0.3, 3)),
                            ("MAX_SLICES", 60)):
            patch.setattr(other_hand, name, value)
        yield


@pytest.fixture(scope="module")
def data(small, tmp_path_factory):
    """A data set of one training and one test study."""
    folder = tmp_path_factory.mktemp("other") / "data"
    make_dataset(folder, 1, 1, SEED, workers=2)
    return folder


def read(data, index):
    """The volume and mask of study 0, for training, or 1, for testing."""
    volume = read_volume(data / ("train_images", "test_images")[index] / UIDS[index])
    return volume, read_mask(data / "segmentations" / f"{UIDS[index]}.nii", volume)


def test_a_seed_gives_the_same_study_and_what_is_written_is_what_was_drawn(data):
    """Drawn again alone, and read back head first, voxel for voxel."""
    study = Study(SEED, 0)
    hu, labels = study.render()
    volume, mask = read(data, 0)
    assert np.array_equal(volume.hu, hu[::-1]) and np.array_equal(mask, labels[::-1])
    expected = study.slice_mm, study.pixel, study.pixel
    assert np.allclose(volume.spacing, expected, atol=1e-4)
    assert Study(SEED + 1, 0).pixel != study.pixel


@pytest.mark.parametrize("index", [0, 1])
def test_masks_lie_on_bone_and_are_in_order_from_head_to_foot(data, index):
    volume, mask = read(data, index)
    present = range(1, 8)
    inside = {v: volume.hu[mask == v] for v in present}
    assert min(map(len, inside.values())) > 100
    assert min(values.mean() for values in inside.values()) > 250
    assert volume.hu[mask == 0].mean() < 0
    depth = [np.nonzero(mask == v)[0].mean() for v in present]
    assert (np.diff(depth) > 0).all()


def test_the_tables_name_the_vertebrae_that_are_fractured(data):
    """One of studies 0 and 1 is; overall is any; the test's rows are all asked for."""
    train, truth = (pd.read_csv(data / name) for name in ("train.csv", "test_labels.csv"))
    assert list(train) == list(truth) == ["StudyInstanceUID", "patient_overall", *TARGETS[:7]]
    rows = pd.concat([train, truth]).set_index("StudyInstanceUID")
    assert list(rows.index) == UIDS and rows.patient_overall.sum() == 1
    for index, uid in enumerate(UIDS):
        broken = np.flatnonzero(rows.loc[uid, list(TARGETS[:7])]) + 1
        assert set(broken) == set(Study(SEED, index).fractured)
        assert rows.patient_overall[uid] == (len(broken) > 0)
    test, sample = (pd.read_csv(data / name) for name in ("test.csv", "sample_submission.csv"))
    assert list(test.row_id) == list(sample.row_id) == [f"{UIDS[1]}_{t}" for t in TARGETS]
    assert set(test.StudyInstanceUID) == {UIDS[1]} and list(test.prediction_type) == list(TARGETS)
    assert set(sample.fractured) == {0.5}


def test_a_fractured_vertebra_and_no_other_has_a_gap_in_its_bone_or_is_wedged():
    """In half of the studies, whose levels differ."""
    met = set()
    for index in range(6):
        study = Study(SEED, index)
        for level, v in draw_vertebrae(study, whole(study.shape)).items():
            gap = v.gap is not None and ((v.distance < 0) & (v.gap > -0.5)).any()
            broken = gap or level in study.wedge
            assert broken == (level in study.fractured), (index, level)
        met |= {*study.fractured}
    assert len(met) >= 3
