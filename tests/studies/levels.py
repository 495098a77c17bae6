"""How many levels of real necks the segmenters of a folder name right.

    python tests/studies/levels.py NECKS --weights weights --part test --views 3
    python tests/studies/levels.py NECKS --weights weights --part test --answers

A level is named right if the mask that holds most cells within NEAR_MM of its landmark
has its name; C1 counts by both arches. Views are cut as the competition's studies are, the
same for all weights; `whole` is the whole CT. T1 has a name where masks hold more than half
of the cells within NEAR_MM of its body, and is touched where they hold any. --answers
prints what the classifiers say of one neck view a patient; no fracture is known there.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/necks")]

import cspine  # noqa: E402
import real_necks  # noqa: E402

NEAR_MM = 5
LEVELS = real_necks.LEVELS
SLICE_MM = 0.5, 1.25  # of the neck views
COLUMNS = 256


def whole_volume(neck):
    """The CT as it is: (Volume, points in mm from the volume's corner)."""
    volume = cspine.Volume(neck.name, neck.hu, tuple(neck.spacing), np.eye(4))
    points = {name: at + neck.spacing / 2 for name, at in neck.points.items()}
    return volume, points


def cut_volume(neck, labels, kind, seed):
    """A view of one of real_necks.KINDS, upright, as a study with thin slices."""
    rng = np.random.default_rng([seed, *neck.name.encode()])
    view = real_necks.KINDS[kind](neck, labels, rng)
    return view_volume(neck, view, rng.uniform(*SLICE_MM))


def view_volume(neck, view, slice_mm):
    """A view as (Volume, points in mm from its corner)."""
    edges = 2 * view.axes.diagonal()
    shape = round(edges[0] / slice_mm), COLUMNS, COLUMNS
    hu = real_necks.view_hu(neck, view, shape).round().short().numpy()
    volume = cspine.Volume(neck.name, hu, tuple(edges / shape), np.eye(4))
    corner = view.centre - edges / 2
    return volume, {name: at - corner for name, at in neck.points.items()}


def names_near(probability, volume, points):
    """{landmark: level whose mask holds most cells nearby, or ""}, of those in view."""
    edge = probability.shape[-1]
    extent = np.multiply(volume.hu.shape, volume.spacing)
    named = np.where(probability.max(0) > cspine.LABEL_THRESHOLD, probability.argmax(0) + 1, 0)
    centres = [(np.arange(edge) + 0.5) * mm / edge for mm in extent]

    out = {}
    for name, at in points.items():
        if (at < NEAR_MM).any() or (at > extent - NEAR_MM).any():
            continue
        z, y, x = (np.square(c - a) for c, a in zip(centres, at))
        near = z[:, None, None] + y[:, None] + x < NEAR_MM**2
        count = np.bincount(named[near], minlength=8)
        most = count[1:].argmax()
        out[name] = LEVELS[most] if count[1:].any() else ""
        if name == "T1_body" and 2 * count[1:].sum() <= count.sum():
            out[name] = "touched" if count[1:].any() else ""
    return out


def judge(near):
    """{level: right or not; a body of T1 is wrong if it has a name} of names_near."""
    wanted = {f"{level}_body": level for level in LEVELS[1:7]}
    out = {wanted[at]: name == wanted[at] for at, name in near.items() if at in wanted}
    ring = [name for point, name in near.items() if "arch" in point]
    if ring:
        out["C1"] = all(name == "C1" for name in ring)
    if "T1_body" in near:
        out["T1"] = near["T1_body"] in ("", "touched")
        out["T1 untouched"] = near["T1_body"] == ""
    return out


def measure(folder, models, part, views, most=None, cuts=("neck", "partial")):
    """A row for each patient and view: right or not for each level, NaN out of view."""
    rows = []
    for coarse in islice(real_necks.read_necks(folder, part), most):
        neck = real_necks.finer(coarse)
        labels = real_necks.make_mask(neck)
        studies = [("whole", *whole_volume(coarse))]
        for seed in range(views):
            for kind in cuts:
                studies.append((kind, *cut_volume(neck, labels, kind, seed)))

        for kind, volume, points in studies:
            quiet = [].append
            probability = cspine.segment(models, volume, torch.device("cpu"), quiet)
            near = names_near(probability, volume, points)
            rows.append(dict(patient=neck.name, view=kind, near=near, **judge(near)))
    return pd.DataFrame(rows)


def summary(table):
    """A row a kind of view: levels named right, studies with all right, T1 named."""
    rows = []
    for view, part in table.groupby("view"):
        right = part[[*LEVELS[:7]]].astype(float)
        rows.append(dict(
            view=view,
            studies=len(part),
            named_right=np.nanmean(right.to_numpy()),
            all_right=(right.fillna(1) == 1).all(axis=1).mean(),
            t1_named=1 - part["T1"].astype(float).mean(),
            t1_touched=1 - part["T1 untouched"].astype(float).mean()))
    return pd.DataFrame(rows)


def answers(folder, ensemble, part, most=None):
    """The eight answers to one neck view of every patient, a row each."""
    rows = []
    for coarse in islice(real_necks.read_necks(folder, part), most):
        neck = real_necks.finer(coarse)
        volume, _ = cut_volume(neck, real_necks.make_mask(neck), "neck", 0)
        row, *_ = cspine.answer_study(volume, 0, ensemble, 100)
        rows.append([row[target] for target in cspine.TARGETS])
    return pd.DataFrame(rows, columns=cspine.TARGETS)


def print_answers(table):
    vertebrae = table[[*cspine.VERTEBRAE]].to_numpy()
    prior = cspine.PRIOR
    print(f"{len(table)} patients; mean answer of C1 to C7: {vertebrae.mean():.3f} (the prior: "
          f"{prior[:7].mean():.3f}), above its prior {(vertebrae > prior[:7]).mean():.1%}, "
          f"above 0.5 {(vertebrae > 0.5).mean():.1%}; of the patient: "
          f"{table.patient_overall.mean():.3f} ({prior[7]:.3f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("necks", help="folder of <patient>.nii.gz")
    parser.add_argument("--weights", default=str(ROOT / "weights"))
    parser.add_argument("--part", default="test", choices=real_necks.PARTS)
    parser.add_argument("--views", type=int, default=3, help="cut ones of each kind a patient")
    parser.add_argument("--out", default="", help="csv of every study")
    parser.add_argument("--answers", action="store_true", help="of the classifiers")
    o = parser.parse_args()
    cspine.keep_memory()
    try:
        run(o)
    except FileNotFoundError as error:
        parser.error(f"no {error.filename}: tests/necks/openkbp.py makes it")


def run(o):
    """Measure and print what the options ask for."""
    if o.answers:
        calibration = cspine.read_calibration(o.weights)
        ensemble = cspine.load_ensemble(o.weights, torch.device("cpu"), calibration)
        print_answers(answers(o.necks, ensemble, o.part))
        return
    models = [*cspine.load_models(o.weights, "segmenter", "cpu").values()]
    table = measure(o.necks, models, o.part, o.views)
    if o.out:
        table.to_csv(o.out, index=False)
    print(summary(table).to_string(index=False, float_format=lambda v: f"{100 * v:.1f} %"))
    for row in table.itertuples():
        wrong = {k: v for k, v in row.near.items() if not k.startswith((v or "-", "T1"))}
        wrong = {k: v for k, v in wrong.items() if "spinous" not in k}
        if wrong or row.T1 is False:
            t1 = "" if row.T1 else f"T1 called {row.near['T1_body']}"
            print(row.patient, row.view, wrong, t1)


if __name__ == "__main__":
    main()
