"""How the shipped weights' answers fall as studies get worse: prints one table.

    python tests/studies/limits.py [--studies 24] [--seed 11] [--weights DIR]

The same phantoms, no training's, are made noisier, are thinned out, and get finer
fractures; seven in ten patients are fractured. Dice and names are the segmenter's, the AUC is
that of C1 to C7 together.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "tools")]

import phantoms  # noqa: E402
from cspine import (  # noqa: E402
    HERE,
    Volume,
    auc,
    classify,
    combine,
    crops_wanted,
    dice_scores,
    load_ensemble,
    named_right,
    read_calibration,
    segment,
    vertebra_slices,
)

MATRIX = 256  # rows of a phantom's slice, pixels


def worse(made, rng, noise=0, every=1):
    """(Volume, labels) of every n-th slice of a phantom, with more noise (deviation in
    HU)."""
    hu = made.hu[::every]
    if noise:
        hu = np.rint(hu + rng.normal(0, noise, hu.shape))
        hu = hu.clip(-1024, 32767).astype(np.int16)
    spacing = (made.spacing[0] * every, *made.spacing[1:])
    affine = made.affine @ np.diag([every, 1, 1, 1])
    return Volume("", hu, spacing, affine), made.label[::every]


def at_cells(labels, edge):
    """uint8 (D, D, D): the label at the centre of each cell."""
    centres = np.arange(edge) + 0.5
    index = [(centres * n / edge).astype(int) for n in labels.shape]
    return labels[np.ix_(*index)]


def answer(ensemble, volume, labels):
    """Dice (7,), named right (7,), answers (7,); NaN for what is not in view."""
    probability = segment(ensemble.models["segmenter"], volume, ensemble.device)
    truth = at_cells(labels, probability.shape[-1])
    dice = dice_scores(probability, truth)
    named = named_right(probability, truth)
    crops = vertebra_slices(volume, probability, **crops_wanted(ensemble))
    answers = combine(classify(ensemble, crops), ensemble.calibration)[:7]
    missing = np.isnan(dice)
    return dice, np.where(missing, np.nan, named), np.where(missing, np.nan, answers)


def measure(ensemble, studies, seed, gap=phantoms.GAP_MM, **change):
    """Mean spacing of the slices, Dice, share named right, AUC of C1 to C7."""
    rows, fractured, spacing = [], [], []
    for k in tqdm(range(studies), disable=None, leave=False):
        made = phantoms.make_phantom(
            [seed, k], MATRIX, fractures=1.0 + k % 2, gap_mm=gap)
        volume, labels = worse(made, np.random.default_rng([seed, k]), **change)
        rows.append(answer(ensemble, volume, labels))
        fractured.append(made.fractured[:7])
        spacing.append(volume.spacing[0])
    dice, named, answers = (np.array(part) for part in zip(*rows))
    seen = ~np.isnan(answers)
    area = auc(answers[seen], np.array(fractured)[seen])
    return np.mean(spacing), np.nanmean(dice), np.nanmean(named), area


def changes():
    """{row of the table: how its studies are made worse}."""
    rows = {"as they are": {}}
    for hu in (25, 50, 100):
        rows[f"noise + {hu} HU"] = dict(noise=hu)
    for n in (2, 3):
        rows[f"every {n}. slice"] = dict(every=n)
    for mm in (0.5, 1.0, 2.0, 3.0):
        rows[f"fracture gaps of {mm} mm"] = dict(gap=(mm, mm))
    return rows


def main():
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=24)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--weights", default=str(HERE / "weights"))
    options = parser.parse_args()
    calibration = read_calibration(options.weights)
    ensemble = load_ensemble(options.weights, torch.device("cpu"), calibration)
    rows = {}
    for name, change in changes().items():
        rows[name] = measure(ensemble, options.studies, options.seed, **change)
    columns = ["slice spacing, mm", "Dice", "named right", "AUC of C1 to C7"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
