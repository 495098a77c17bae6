"""What each choice in the way from logits to answers is worth: prints one table.

    python tests/studies/choices.py --data held [--weights DIR]

Every study of --data's test_images is read once and shown to the classifiers with the mask
of the last and of the centre slice and with an even mask; the choices are then compared on
the same outputs. The AUCs need no calibration; the log loss is after the calibration in
--weights.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from cspine import (  # noqa: E402
    HERE,
    Calibration,
    TARGETS,
    auc,
    classify,
    combine,
    competition_scores,
    crops_wanted,
    load_ensemble,
    read_calibration,
    read_labels,
    read_volume,
    segment,
    vertebra_slices,
)


def outputs_of(ensemble, folder):
    """{mask: what classify gives} of a study, with its own and with other masks."""
    volume = read_volume(folder)
    probability = segment(ensemble.models["segmenter"], volume, ensemble.device)
    wanted = crops_wanted(ensemble)
    crops, centre = (
        vertebra_slices(volume, probability, **wanted | dict(mask_of=one))
        for one in ("last", "center"))
    even = crops.copy()
    even[:, :, -1] = np.where(crops[:, :, -1] > 0, 128, 0)
    shown = dict(last=crops, centre=centre, even=even)
    return {mask: classify(ensemble, images) for mask, images in shown.items()}


def rate(outputs, truth, calibration, mask="last", **options):
    """Log loss per study, AUC of C1 to C7 and of the patient, with one choice changed."""
    chosen = calibration._replace(answers=replace(calibration.answers, **options))
    answers = np.array([combine(study[mask], chosen) for study in outputs])
    vertebrae = auc(answers[:, :7].ravel(), truth[:, :7].ravel())
    patient = auc(answers[:, 7], truth[:, 7])
    return competition_scores(answers, truth)[0], vertebrae, patient


def compare(outputs, truth, calibration):
    """{choice: its rates}."""
    measured = (outputs, truth)
    rows = {"as shipped": rate(*measured, calibration)}
    rows["no calibration"] = rate(*measured, Calibration())
    for steps in (1, 3, 10, 15):
        rows[f"mean of {steps} steps"] = rate(*measured, calibration, top_k=steps)
    for share in (0.0, 0.6, 1.0):
        rows[f"noisy-or {share}"] = rate(*measured, calibration, noisy_or=share)
    rows["mask of the centre slice"] = rate(*measured, calibration, "centre")
    rows["even mask"] = rate(*measured, calibration, "even")
    return rows


def main():
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", default=str(HERE / "weights"))
    options = parser.parse_args()

    calibration = read_calibration(options.weights)
    ensemble = load_ensemble(options.weights, torch.device("cpu"), calibration)
    labels = read_labels(options.data)
    folders = sorted(options.data.glob("test_images/*"))
    folders = [folder for folder in folders if folder.name in labels.index]
    bar = tqdm(folders, disable=None, leave=False)
    outputs = [outputs_of(ensemble, folder) for folder in bar]
    truth = labels.loc[[folder.name for folder in folders], [*TARGETS]].to_numpy()

    rows = compare(outputs, truth, ensemble.calibration)
    columns = ["log loss per study", "AUC of C1 to C7", "AUC of the patient"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    print(f"{len(folders)} studies")
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
