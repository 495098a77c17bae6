"""How the shipped weights' answers fall as studies get worse: prints one table.

    python tests/studies/limits.py [--studies 24] [--seed 11] [--weights DIR]

The same phantoms, no training's, are made noisier, are thinned out, and get finer fractures; one in
two patients is fractured. Dice and names are the segmenter's, the AUC is that of C1 to C7 together.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parents[k] / name) for k, name in ((2, ""), (1, "tools"))]

import phantoms  # noqa: E402
from cspine import (  # noqa: E402
    Answers, Effort, Volume, auc, classify, combine, dice_scores, load_ensemble, segment,
    vertebra_slices)
from evaluation import named_right  # noqa: E402


def worse(volume, labels, rng, noise=0, every=1):
    """The study with more noise (a standard deviation in HU), of every n-th slice."""
    hu = volume.hu[::every] + rng.normal(0, noise, volume.hu[::every].shape) if noise else (
        volume.hu[::every])
    spacing = (volume.spacing[0] * every, *volume.spacing[1:])
    affine = volume.affine @ np.diag([every, 1, 1, 1])
    hu = np.rint(hu).clip(-1024, 32767).astype(np.int16)
    return Volume("", hu, spacing, affine), labels[::every]


def at_cells(labels, edge):
    """uint8 (D, D, D): the label at the centre of each cell."""
    index = [((np.arange(edge) + 0.5) * n / edge).astype(int) for n in labels.shape]
    return labels[np.ix_(*index)]


def answer(ensemble, volume, labels):
    """Dice (7,), named right (7,), answers (7,); NaN for what is not in view."""
    probability = segment(ensemble.models["segmenter"], volume, ensemble.device)
    truth = at_cells(labels, probability.shape[-1])
    dice = dice_scores(probability, truth)
    named = named_right(probability, truth)
    crops = vertebra_slices(volume, probability)
    answers = combine(classify(ensemble, crops, Effort(1, 9)), Answers(), ensemble.calibration)[:7]
    missing = np.isnan(dice)
    return dice, np.where(missing, np.nan, named), np.where(missing, np.nan, answers)


def measure(ensemble, studies, seed, gap=phantoms.GAP_MM, **change):
    """Mean spacing of the slices, Dice, share named right, AUC of C1 to C7."""
    rows, fractured, spacing = [], [], []
    for k in tqdm(range(studies), disable=None, leave=False):
        made = phantoms.make_phantom(
            [seed, k], 256, fractures=1.0 + k % 2, gap_mm=gap)
        volume = Volume("", np.rint(made.hu).clip(-1024, 32767).astype(np.int16),
                        tuple(made.spacing), made.affine)
        volume, labels = worse(volume, made.label, np.random.default_rng([seed, k]), **change)
        rows.append(answer(ensemble, volume, labels))
        fractured.append(made.fractured[:7])
        spacing.append(volume.spacing[0])
    dice, named, answers = (np.array(part) for part in zip(*rows))
    seen = ~np.isnan(answers)
    area = auc(answers[seen], np.array(fractured)[seen])
    return np.mean(spacing), np.nanmean(dice), np.nanmean(named), area


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=24)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--weights", default=str(Path(__file__).parents[2] / "weights"))
    o = parser.parse_args()
    ensemble = load_ensemble(o.weights, torch.device("cpu"))
    changes = {"as they are": {}}
    changes |= {f"noise + {hu} HU": dict(noise=hu) for hu in (25, 50, 100)}
    changes |= {f"every {n}. slice": dict(every=n) for n in (2, 3)}
    changes |= {f"fracture gaps of {mm} mm": dict(gap=(mm, mm)) for mm in (0.5, 1.0, 2.0, 3.0)}
    rows = {name: measure(ensemble, o.studies, o.seed, **change)
            for name, change in changes.items()}
    columns = ["slice spacing, mm", "Dice", "named right", "AUC of C1 to C7"]
    print(pd.DataFrame.from_dict(rows, orient="index", columns=columns).round(3).to_string())


if __name__ == "__main__":
    main()
