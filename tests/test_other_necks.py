"""I rely on: the other generators' necks carry true labels and masks, from a seed."""

import lofts
import numpy as np
import pandas as pd
import pytest
import tubes
import writers

from cspine import TARGETS, read_mask, read_volume

GENERATORS = (lofts, tubes)


@pytest.fixture(scope="module", autouse=True)
def small():
    """The lofts on a coarse grid, of a narrower view; tubes in fewer pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lofts, "MATRIX", 96)
        patch.setattr(lofts, "LOCAL_MM", 0.8)
        patch.setattr(tubes, "MATRIX", 128)
        yield


def draw(generator, *arguments):
    """Run a generator's command line."""
    argv = [*map(str, arguments)]
    writers.main(generator.make_study, generator.UID_ROOT, generator.__doc__, argv)


@pytest.fixture(scope="module", params=GENERATORS, ids=lambda param: param.__name__)
def drawn(request, small, tmp_path_factory):
    """(generator, folder of its two studies, the first part of their uids)."""
    generator = request.param
    folder = tmp_path_factory.mktemp(generator.__name__)
    draw(generator, folder, "--studies", 2, "--seed", 4)
    return generator, folder, f"{generator.UID_ROOT}.4"


def test_masks_lie_on_bone_and_are_in_order_from_head_to_foot(drawn):
    generator, folder, _ = drawn
    voxels, levels, hu = (50, 5, 200) if generator is lofts else (500, 6, 130)  # osteopenia
    for study in sorted((folder / "test_images").iterdir()):
        volume = read_volume(study)
        mask = read_mask(folder / "segmentations" / f"{study.name}.nii", volume)
        present = [v for v in range(1, 8) if (mask == v).sum() > voxels]
        assert len(present) >= levels
        assert min(volume.hu[mask == v].mean() for v in present) > hu
        depth = [np.nonzero(mask == v)[0].mean() for v in present]
        assert (np.diff(depth) > 0).all()


def test_the_tables_have_the_competitions_columns(drawn):
    test, truth = (pd.read_csv(drawn[1] / name) for name in ("test.csv", "test_labels.csv"))
    assert list(test) == ["row_id", "StudyInstanceUID", "prediction_type"]
    assert sorted(truth) == sorted(["StudyInstanceUID", *TARGETS])
    assert list(test.prediction_type) == [*TARGETS] * 2
    assert (truth.patient_overall == truth[[*TARGETS[:7]]].max(axis=1)).all()


def test_a_seed_gives_the_same_study_as_it_was_written(drawn):
    """Drawn again: the truth, and the pixels as they were written."""
    generator, folder, root = drawn
    uid = f"{root}.1"
    ct, labels, grid, broken = generator.make_study(np.random.default_rng([4, 1]))
    volume = read_volume(folder / "test_images" / uid)
    assert np.array_equal(volume.hu, ct[::-1])
    assert np.allclose(volume.spacing, grid.step[::-1], atol=1e-4)
    mask = read_mask(folder / "segmentations" / f"{uid}.nii", volume)
    assert np.array_equal(mask, labels[::-1])
    row = pd.read_csv(folder / "test_labels.csv").set_index("StudyInstanceUID").loc[uid]
    assert [*np.flatnonzero(row[[*TARGETS[:7]]])] == sorted(broken)
    assert row.patient_overall == (len(broken) > 0)


def test_studies_to_train_on_lie_where_the_trainings_look(tmp_path):
    draw(lofts, tmp_path, "--studies", 1, "--train")
    table = pd.read_csv(tmp_path / "train.csv").set_index("StudyInstanceUID")
    assert sorted(table) == sorted(TARGETS)
    assert [p.name for p in (tmp_path / "train_images").iterdir()] == [*table.index]
    assert not (tmp_path / "test.csv").exists()
