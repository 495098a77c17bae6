"""I rely on: the other generators' necks carry true labels and masks, from a seed."""

import lofts
import metaballs
import numpy as np
import pandas as pd
import pytest
import tubes

from cspine import TARGETS, read_mask, read_volume

GENERATORS = [(lofts, "1.2.3.5"), (metaballs, "1.2.3.7"), (tubes, "1.2.3.8")]


def draw(generator, root, *arguments):
    """Run a generator's command line; the lofts on a coarse grid, of a narrower view."""
    with pytest.MonkeyPatch.context() as patch:
        if generator is lofts:
            patch.setattr(lofts, "MATRIX", 96)
            patch.setattr(lofts, "LOCAL_MM", 0.8)
        patch.setattr("sys.argv", ["", *map(str, arguments)])
        lofts.main(generator.make_study, root)


@pytest.fixture(scope="module", params=GENERATORS, ids=lambda param: param[0].__name__)
def drawn(request, tmp_path_factory):
    """(generator, folder of its two studies, the first part of their uids)."""
    generator, root = request.param
    folder = tmp_path_factory.mktemp(generator.__name__)
    draw(generator, root, folder, "--studies", 2, "--seed", 4)
    return generator, folder, f"{root}.4"


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
    with pytest.MonkeyPatch.context() as patch:
        if generator is lofts:
            patch.setattr(lofts, "MATRIX", 96)
            patch.setattr(lofts, "LOCAL_MM", 0.8)
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
    draw(lofts, "1.2.3.5", tmp_path, "--studies", 1, "--train")
    table = pd.read_csv(tmp_path / "train.csv").set_index("StudyInstanceUID")
    assert sorted(table) == sorted(TARGETS)
    assert [p.name for p in (tmp_path / "train_images").iterdir()] == [*table.index]
    assert not (tmp_path / "test.csv").exists()
