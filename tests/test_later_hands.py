"""I rely on: the fourth, fifth and sixth hand's necks carry true labels and masks, from a seed."""

import fifth_hand
import fourth_hand
import numpy as np
import pandas as pd
import pytest
import sixth_hand
import third_hand

from cspine import TARGETS, read_mask, read_volume

HANDS = [(fourth_hand, "1.2.3.6"), (fifth_hand, "1.2.3.7"), (sixth_hand, "1.2.3.8")]


@pytest.fixture(scope="module", params=HANDS, ids=lambda param: param[0].__name__)
def drawn(request, tmp_path_factory):
    """(hand, folder of its two studies)."""
    hand, root = request.param
    folder = tmp_path_factory.mktemp(hand.__name__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["", str(folder), "--studies", "2", "--seed", "4"])
        third_hand.main(hand.make_study, root)
    return hand, folder


def test_masks_lie_on_bone_and_are_in_order_from_head_to_foot(drawn):
    for folder in sorted((drawn[1] / "test_images").iterdir()):
        volume = read_volume(folder)
        mask = read_mask(drawn[1] / "segmentations" / f"{folder.name}.nii", volume)
        present = [v for v in range(1, 8) if (mask == v).sum() > 500]
        assert len(present) >= 6
        assert min(volume.hu[mask == v].mean() for v in present) > 130  # osteopenia
        depth = [np.nonzero(mask == v)[0].mean() for v in present]
        assert (np.diff(depth) > 0).all()


def test_a_seed_gives_the_same_study_as_it_was_written(drawn):
    hand, folder = drawn
    uid = sorted(p.name for p in (folder / "test_images").iterdir())[1]
    ct, labels, grid, broken = hand.make_study(np.random.default_rng([4, 1]))
    volume = read_volume(folder / "test_images" / uid)
    assert np.array_equal(volume.hu, ct[::-1])
    assert np.allclose(volume.spacing, grid.step[::-1], atol=1e-4)
    mask = read_mask(folder / "segmentations" / f"{uid}.nii", volume)
    assert np.array_equal(mask, labels[::-1])
    row = pd.read_csv(folder / "test_labels.csv").set_index("StudyInstanceUID").loc[uid]
    assert [*np.flatnonzero(row[[*TARGETS[:7]]])] == sorted(broken)
    assert row.patient_overall == (len(broken) > 0)
