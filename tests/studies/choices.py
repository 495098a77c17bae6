"""What each choice in the way from logits to answers is worth: prints one table.

    python tests/studies/choices.py --data held [--weights DIR]

Every study of --data's test_images is read once and shown to the classifiers in 8 views, with the
mask of the last and of the centre slice and with an even mask; the choices are then compared on the
same outputs. The AUCs need no calibration; the log loss is after the calibration in --weights.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parents[k] / name) for k, name in ((2, ""), (1, "tools"))]

from cspine import (  # noqa: E402
    AS_IS, TARGETS, Answers, Effort, auc, classify, combine, competition_scores, load_ensemble,
    read_volume, segment, vertebra_slices)
from evaluation import read_labels  # noqa: E402


def outputs_of(ensemble, folder):
    """{name: what classify gives} of a study: all views, and other masks in one view."""
    volume = read_volume(folder)
    probability = segment(ensemble.models["segmenter"], volume, ensemble.device)
    crops = vertebra_slices(volume, probability)
    centre = vertebra_slices(volume, probability, mask_of="center")
    even = crops.copy()
    even[:, :, -1] = np.where(crops[:, :, -1] > 0, 128, 0)
    one, all_views = Effort(1, 9), Effort(8, 9)
    return {"views": classify(ensemble, crops, all_views), "even": classify(ensemble, even, one),
            "centre": classify(ensemble, centre, one)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", default=str(Path(__file__).parents[2] / "weights"))
    o = parser.parse_args()
    ensemble, labels = load_ensemble(o.weights, torch.device("cpu")), read_labels(Path(o.data))
    folders = sorted(p for p in Path(o.data).glob("test_images/*") if p.name in labels.index)
    outputs = [outputs_of(ensemble, folder) for folder in tqdm(folders, disable=None, leave=False)]
    truth = labels.loc[[folder.name for folder in folders], list(TARGETS)].to_numpy()

    def rate(name="views", views=1, plain=False, **options):
        rows = []
        for study in outputs:
            shown = study[name]
            if name == "views":  # 8 a model, one after another
                shown = [part for k, part in enumerate(shown) if k % 8 < views]
            calibration = AS_IS if plain else ensemble.calibration
            rows.append(combine(shown, Answers(**options), calibration))
        answers = np.array(rows)
        vertebrae = auc(answers[:, :7].ravel(), truth[:, :7].ravel())
        return competition_scores(answers, truth)[0], vertebrae, auc(answers[:, 7], truth[:, 7])

    rows = {"as shipped": rate(), "no calibration": rate(plain=True)}
    rows |= {f"mean of {k} steps": rate(top_k=k) for k in (1, 3, 10, 15)}
    rows |= {f"{n} views": rate(views=n) for n in (2, 4, 8)}
    rows |= {f"noisy-or {w}": rate(noisy_or=w) for w in (0.0, 0.6, 1.0)}
    rows |= {"mask of the centre slice": rate("centre"), "even mask": rate("even")}
    columns = ["log loss per study", "AUC of C1 to C7", "AUC of the patient"]
    print(f"{len(folders)} studies")
    print(pd.DataFrame.from_dict(rows, orient="index", columns=columns).round(3).to_string())


if __name__ == "__main__":
    main()
