"""I rely on: the third hand's necks carry true labels and masks, from a seed."""

import numpy as np
import pandas as pd
import pytest
import third_hand

from cspine import TARGETS, read_mask, read_volume


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two studies of 96 x 96 pixels, of thick slices."""
    folder = tmp_path_factory.mktemp("third") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(third_hand, "MATRIX", 96)
        patch.setattr(third_hand, "LOCAL_MM", 0.8)
        patch.setattr("sys.argv", ["third_hand.py", str(folder), "--studies", "2", "--seed", "4"])
        third_hand.main()
    return folder


def test_masks_lie_on_bone_and_are_in_order_from_head_to_foot(data):
    for folder in sorted((data / "test_images").iterdir()):
        volume = read_volume(folder)
        mask = read_mask(data / "segmentations" / f"{folder.name}.nii", volume)
        present = [v for v in range(1, 8) if (mask == v).sum() > 50]
        assert len(present) >= 5  # in so narrow a view
        assert min(volume.hu[mask == v].mean() for v in present) > 200
        depth = [np.nonzero(mask == v)[0].mean() for v in present]
        assert (np.diff(depth) > 0).all()


def test_the_tables_have_the_competitions_columns(data):
    test, truth = (pd.read_csv(data / name) for name in ("test.csv", "test_labels.csv"))
    assert list(test) == ["row_id", "StudyInstanceUID", "prediction_type"]
    assert sorted(truth) == sorted(["StudyInstanceUID", *TARGETS])
    assert list(test.prediction_type) == [*TARGETS] * 2
    assert (truth.patient_overall == truth[[*TARGETS[:7]]].max(axis=1)).all()


def test_a_seed_gives_the_same_study(data):
    """Drawn again: the truth, and the pixels as they were written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(third_hand, "MATRIX", 96)
        patch.setattr(third_hand, "LOCAL_MM", 0.8)
        ct, labels, _, broken = third_hand.make_study(np.random.default_rng([4, 1]))
    volume = read_volume(data / "test_images" / "1.2.3.5.4.1")
    assert np.array_equal(volume.hu, ct[::-1])
    assert np.array_equal(read_mask(data / "segmentations/1.2.3.5.4.1.nii", volume), labels[::-1])
    row = pd.read_csv(data / "test_labels.csv").set_index("StudyInstanceUID").loc["1.2.3.5.4.1"]
    assert [*np.flatnonzero(row[[*TARGETS[:7]]])] == sorted(broken)


def test_studies_to_train_on_lie_where_the_trainings_look(tmp_path, monkeypatch):
    monkeypatch.setattr(third_hand, "MATRIX", 96)
    monkeypatch.setattr(third_hand, "LOCAL_MM", 0.8)
    monkeypatch.setattr("sys.argv", ["", str(tmp_path), "--studies", "1", "--train"])
    third_hand.main()
    table = pd.read_csv(tmp_path / "train.csv").set_index("StudyInstanceUID")
    assert sorted(table) == sorted(TARGETS)
    assert [p.name for p in (tmp_path / "train_images").iterdir()] == [*table.index]
    assert not (tmp_path / "test.csv").exists()
