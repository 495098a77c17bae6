"""I rely on: the other generator's necks carry true labels and masks, from a seed."""

import numpy as np
import pandas as pd
import pytest
import tubes
import writers

from cspine import TARGETS, read_mask, read_volume


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder of two studies of few pixels by its command line, the first as it was drawn)."""
    folder = tmp_path_factory.mktemp("tubes")
    argv = [str(folder), "--studies", "2", "--seed", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tubes, "MATRIX", 64)
        writers.main(tubes.make_study, tubes.UID_ROOT, tubes.__doc__, argv)
        study = tubes.make_study(np.random.default_rng([4, 0]))
    return folder, study


def test_masks_lie_on_bone_and_are_in_order_from_head_to_foot(drawn):
    for path in sorted((drawn[0] / "test_images").iterdir()):
        volume = read_volume(path)
        mask = read_mask(drawn[0] / "segmentations" / f"{path.name}.nii", volume)
        present = [v for v in range(1, 8) if (mask == v).sum() > 100]
        assert len(present) >= 6
        assert min(volume.hu[mask == v].mean() for v in present) > 130  # osteopenia
        depth = [np.nonzero(mask == v)[0].mean() for v in present]
        assert (np.diff(depth) > 0).all()


def test_the_tables_have_the_competitions_columns(drawn):
    test, truth = (pd.read_csv(drawn[0] / name) for name in ("test.csv", "test_labels.csv"))
    assert list(test) == ["row_id", "StudyInstanceUID", "prediction_type"]
    assert sorted(truth) == sorted(["StudyInstanceUID", *TARGETS])
    assert list(test.prediction_type) == [*TARGETS] * 2
    assert (truth.patient_overall == truth[[*TARGETS[:7]]].max(axis=1)).all()


def test_a_seed_gives_the_same_study_as_it_was_written(drawn):
    """Drawn again: the truth, and the pixels as they were written."""
    folder, (ct, labels, grid, broken) = drawn
    uid = f"{tubes.UID_ROOT}.4.0"
    volume = read_volume(folder / "test_images" / uid)
    assert np.array_equal(volume.hu, ct[::-1])
    assert np.allclose(volume.spacing, grid.step[::-1], atol=1e-4)
    assert np.allclose(volume.affine[:3, 3], grid.origin + grid.step * (0, 0, len(ct) - 1))
    mask = read_mask(folder / "segmentations" / f"{uid}.nii", volume)
    assert np.array_equal(mask, labels[::-1])
    row = pd.read_csv(folder / "test_labels.csv").set_index("StudyInstanceUID").loc[uid]
    assert [*np.flatnonzero(row[[*TARGETS[:7]]])] == sorted(broken)
    assert row.patient_overall == (len(broken) > 0)
