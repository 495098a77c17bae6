"""The classifiers that ship, on crops of drawn hands and of real necks, and their calibration.

    python tests/studies/train_classifiers.py draw --work WORK --workers 16 --necks NECKS \
        --weights NEW
    python tests/studies/train_classifiers.py crops --work WORK --workers 16 --weights NEW OLD
    python tests/studies/train_classifiers.py vertebra --work WORK --older weights
    python tests/studies/train_classifiers.py patient --work WORK --older weights
    python tests/studies/train_classifiers.py calibrate --work WORK --weights NEW

Each step goes on where it was stopped. `draw` makes studies, to train on and to calibrate by
(5 s each on a core, 25 MB each), and of most a copy with more vertebrae broken
(tests/necks/breaks.py). `crops` masks them by the segmenters of the folders --weights, the
first of which is to ship, and cuts the crops (6 s each). The trainings go on from the
classifiers in OLDER and write to WORK/weights; the patient's takes over all but its own head
from the new vertebra classifier. `calibrate` fits leaving out one generator after the other,
and writes WORK/weights/calibration.json.

NECKS holds `<patient>.nii.gz`; no fracture is known in them, and tests/necks/real_necks.py says
who is kept out. Generators that have left the repository are found in the folder of
--old-hands (`weights/README.md` says how to fill it), or left out.
"""

import argparse
import functools
import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ".", "tests", "tests/tools", "tests/necks"
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import breaks  # noqa: E402
import cspine  # noqa: E402
import real_necks  # noqa: E402
from train_weights import (  # noqa: E402
    COLUMNS, draw_hand, run_all, save as write_arrays, volume_of)

# Seed, number of studies, share with a copy; no seed that anything is measured on.
HANDS = dict(
    train=dict(
        phantoms=(4242, 54, 0.65),
        lofts=(21, 36, 0.75),
        metaballs=(21, 36, 0.75)),
    calibrate=dict(
        phantoms=(8, 40, 0),
        lofts=(3, 20, 0),
        metaballs=(3, 20, 0),
        fourth_hand=(3, 20, 0)))
NECK_SEED = 31
NECK_VIEWS = 2  # of a patient to train on
COPIED_VIEWS = 1  # of these, with a copy that has breaks
CALIBRATED_NECKS = 30  # without landmarks: every second one with breaks
CENTRES_MM = 8, 30  # between the centres of neighbouring masks, in one that is let in
BESIDE_MM = 15  # of the centres of C3..C7, to the side of the spinal cord
PARTIAL_SHARE = 0.15  # of the views; the others show all of C1 to C7
SLICE_MM = 0.5, 1.25
THICK_MM = 2.5
NOISE_HU = 5, 60
Z_MARGIN = 0.0  # of the crops, as the older classifiers know them

SHARED = (
    "--backbone tf_efficientnet_lite0 --size 160 --hidden 128 --mixup 0 --half "
    f"--folds 40 --fold 0 --z-margin {Z_MARGIN} --resume")
TRAININGS = dict(
    vertebra=f"train-cls --batch-size 16 --lr 1.5e-4 --epochs 2 --seed 51 {SHARED}",
    patient=f"train-patient --batch-size 4 --lr 1e-4 --epochs 1 --seed 52 {SHARED}")

NOISY_OR = np.linspace(0, 1, 11).round(1)  # shares of the vertebrae in the patient's answer
CONSTANTS = "the best constants of the 2019 training labels"
OWN_BEST = "the best constants of these very studies"
TRAINED_ON = "phantoms and 57 real necks; no real fracture"


# ==== Studies ====

def draw_neck(neck, labels, rng):
    """A view of a real neck on a fine grid: float32 HU, labels, spacing."""
    kind = "partial" if rng.random() < PARTIAL_SHARE else "neck"
    view = real_necks.draw_view(neck, labels, rng, kind)
    edges = 2 * np.linalg.norm(view.axes, axis=0)
    most = THICK_MM if rng.random() < 0.15 else SLICE_MM[1]
    pixel = edges[1:].max() / COLUMNS
    wanted = np.array([rng.uniform(SLICE_MM[0], most), pixel, pixel])
    shape = tuple(np.rint(edges / wanted).astype(int).tolist())
    hu = real_necks.view_hu(neck, view, shape).numpy()
    seen = real_necks.view_labels(neck, labels, view, shape).numpy()
    return hu, seen, edges / shape


def scan(hu, spacing, rng):
    """int16 HU as another scanner shows them: kernel, couch, circle, noise."""
    hu = real_necks.dress(torch.from_numpy(hu), spacing * hu.shape, rng).numpy()
    hu = hu + rng.uniform(*NOISE_HU) * rng.standard_normal(hu.shape, np.float32)
    return stored(hu)


def stored(hu):
    return np.rint(hu.clip(cspine.AIR_HU, 3071)).astype(np.int16)


def save(folder, uid, hu, spacing, broken):
    write_arrays(folder / f"{uid}.npz", hu=hu, spacing=spacing, broken=broken)
    print(uid, *broken, flush=True)


def make_hand(folder, hand, seed, number, copied):
    """A drawn study, and of some a copy with more breaks."""
    uid = f"{hand}.{seed}.{number}"
    rng = np.random.default_rng([seed, number, 99])
    copied = rng.random() < copied
    if (folder / f"{uid}.npz").exists():
        return
    varied = folder.name == "train"
    hu, labels, spacing, broken = draw_hand(hand, seed, number, varied)
    if copied:
        other, also = breaks.broken_copy(rng, hu, labels, spacing, broken)
        save(folder, f"{uid}.copy", stored(other), spacing, also)
    save(folder, uid, hu, spacing, broken)


def make_neck(folder, coarse):
    """Views of a patient to train on, taken as unbroken, and copies with breaks."""
    uids = [f"neck.{coarse.name}.{k}" for k in range(NECK_VIEWS)]
    if all((folder / f"{uid}.npz").exists() for uid in uids):
        return
    neck = real_necks.finer(coarse)
    labels = real_necks.make_mask(neck)
    for number, uid in enumerate(uids):
        make_view(folder, neck, labels, number, uid)


def make_view(folder, neck, labels, number, uid, part="both"):
    """One view, its copy with breaks, or both, scanned alike."""
    key = [NECK_SEED, number, *neck.name.encode()]
    rng = np.random.default_rng(key)
    hu, seen, spacing = draw_neck(neck, labels, rng)
    whole = np.zeros(7, np.uint8)
    copy, broken = breaks.broken_copy(rng, hu, seen, spacing, whole)
    if rng.random() < 0.5:
        breaks.draw_harmless(rng, hu, seen, spacing, whole)
    if part == "broken" or part == "both" and number < COPIED_VIEWS:
        copy = scan(copy, spacing, np.random.default_rng([*key, 1]))
        save(folder, f"{uid}.copy", copy, spacing, broken)
    if part != "broken":
        hu = scan(hu, spacing, np.random.default_rng([*key, 1]))
        save(folder, uid, hu, spacing, whole)


@functools.cache
def segmenters(weights, device):
    models = cspine.load_models(Path(weights), "segmenter", device)
    return [*models.values()]


makers_of = functools.cache(cspine.makers_of)


def mask(weights, device, hu, spacing):
    volume = volume_of(hu, spacing)
    models = segmenters(weights, device)
    return cspine.segment(models, volume, torch.device(device), [].append)


def is_consistent(probability, neck):
    """Whether masks (7, D, D, D) lie over a neck as vertebrae do: all are seen, each below the
    one before and about a vertebra away, C3 to C7 around the spinal cord."""
    extent = neck.hu.shape * neck.spacing
    centres = []
    for cells in probability:
        at = np.argwhere(cells > 0.5)
        if not len(at):
            return False
        centres.append((at.mean(0) + 0.5) * extent / len(cells) - neck.spacing / 2)
    centres = np.array(centres)
    down = np.diff(centres[:, 0])
    apart = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    heights = np.arange(len(neck.midline)) * neck.spacing[0]
    beside = abs(centres[:, 2] - np.interp(centres[:, 0], heights, neck.midline))
    least, most = CENTRES_MM
    in_order = (down > 0) & (apart > least) & (apart < most)
    return bool(in_order.all() and (beside[2:] < BESIDE_MM).all())


def make_unmarked(folder, weights, number, coarse):
    """A view of a patient without landmarks, named by the segmenter of `weights`, if it names
    the whole CT consistently."""
    uid = f"neck.{coarse.name}"
    broken = number % 2 == 1
    if (folder / f"{uid}{'.copy' * broken}.npz").exists():
        return
    neck = real_necks.finer(coarse)
    found = mask(weights, "cpu", neck.hu, neck.spacing)
    if not is_consistent(found, neck):
        print(f"{uid}: not named as a neck; left out", flush=True)
        return
    named = np.where(found.max(0) > 0.5, found.argmax(0) + 1, 0).astype(np.uint8)
    cells = [(np.arange(n) + 0.5) * named.shape[0] // n for n in neck.hu.shape]
    labels = named[np.ix_(*[c.astype(int) for c in cells])]
    make_view(folder, neck, labels, number, uid, "broken" if broken else "whole")


def drawing_jobs(o):
    """(function, arguments) of every study there is to draw."""
    for part in o.parts:
        folder = o.work / "studies" / part
        folder.mkdir(parents=True, exist_ok=True)
        for hand, (seed, count, share) in HANDS[part].items():
            if not importlib.util.find_spec(hand):
                print(f"{hand}: not in this repository; left out")
                continue
            for number in range(count):
                yield make_hand, folder, hand, seed, number, share

    if "train" in o.parts:
        for coarse in real_necks.read_necks(o.necks, "train"):
            yield make_neck, o.work / "studies/train", coarse
    if "calibrate" not in o.parts:
        return
    entries = sorted(real_necks.read_landmarks().items())
    unmarked = [name for name, entry in entries if not entry.get("points")]
    for number, name in enumerate(unmarked[:CALIBRATED_NECKS]):
        coarse = real_necks.read_neck(o.necks, name, dict(entries)[name])
        folder = o.work / "studies/calibrate"
        yield make_unmarked, folder, o.weights[0], number, coarse


# ==== Crops ====

def cut_crops(weights, device, work, path):
    """Crops of a study, and last its row of labels."""
    part, uid = path.parent.name, path.stem
    row_path = work / part / "labels" / f"{uid}.csv"
    if row_path.exists():
        return
    with np.load(path) as file:
        hu, spacing, broken = (file[name] for name in ("hu", "spacing", "broken"))
    volume = volume_of(hu, spacing)
    crops = cspine.vertebra_slices(
        volume, mask(weights, device, hu, spacing), z_margin=Z_MARGIN)
    path = work / part / "last" / f"{uid}.npz"
    cspine.write_crops(path, crops, Z_MARGIN, makers_of(weights))
    (work / part / "train_images" / uid).mkdir(parents=True, exist_ok=True)
    row = [uid, *map(int, broken), int(np.any(broken))]
    text = ",".join(map(str, row)) + "\n"
    cspine.write_atomic(row_path, lambda new: new.write_text(text))
    print(text, end="", flush=True)


def crop_jobs(o):
    """Studies to train on are shared out among the segmenters, so that the classifiers do not
    learn one's masks by heart; those to calibrate are all masked by the first."""
    for part in o.parts:
        for folder in ("last", "labels"):
            (o.work / part / folder).mkdir(parents=True, exist_ok=True)
        weights = o.weights if part == "train" else o.weights[:1]
        for path in sorted((o.work / "studies" / part).glob("*.npz")):
            uid = path.stem.removesuffix(".copy")  # a study and its copy by the same one
            drawn = np.random.default_rng([*uid.encode()]).integers(len(weights))
            yield cut_crops, weights[drawn], o.device, o.work, path


# ==== Training ====

def init_of(step, work, older):
    """The file that a training starts from."""
    init = older / f"{step}_fold0.pt"
    if step == "vertebra":
        return init
    content = torch.load(init, weights_only=True)
    vertebra = torch.load(work / "weights" / "vertebra_fold0.pt", weights_only=True)
    content["tensors"] |= vertebra["tensors"]
    torch.save(content, work / "init.pt")
    return work / "init.pt"


def read_rows(folder):
    """The labels of all studies of a part, written as its train.csv, and returned."""
    rows = [path.read_text() for path in sorted((folder / "labels").glob("*.csv"))]
    header = ",".join([cspine.STUDY, *cspine.TARGETS]) + "\n"
    (folder / "train.csv").write_text(header + "".join(rows))
    return cspine.read_truth(folder / "train.csv").set_index(cspine.STUDY)


def train(step, o):
    data = o.work / "train"
    read_rows(data)
    command = TRAININGS[step].split() + ["--data", data, "--work", data]
    command += ["--weights", o.work / "weights", "--init", init_of(step, o.work, o.older)]
    command += ["--workers", o.workers, "--device", o.device]
    if o.device == "cpu":
        command += ["--thin", 3]  # all 105 steps of four studies take 15 GB
    sys.exit(cspine.main([*map(str, command)]))


# ==== Calibration ====

def fit(outputs, labels, share):
    """The Calibration of a share of noisy-or, to {uid: outputs} and a table of labels."""
    start, in_view = cspine.fit_unseen(outputs, labels)
    answers = replace(start.answers, noisy_or=float(share))
    return cspine.fit_moves(outputs, start._replace(answers=answers), in_view)[1]


def calibrate(o):
    """Choose by the left-out scores how much the patient's answer is of noisy-or, the rest
    being the patient classifier's; fit to all; print the table."""
    data = o.work / "calibrate"
    labels = read_rows(data)
    weights = o.work / "weights"
    for path in Path(o.weights[0]).glob("segmenter_fold*.pt"):
        if not (weights / path.name).exists():
            shutil.copy(path, weights)
    ensemble = cspine.load_ensemble(weights, torch.device(o.device))
    outputs = {
        uid: cspine.classify(ensemble, cspine.read_crops(data / "last" / f"{uid}.npz"))
        for uid in labels.index}
    generator = labels.index.str.split(".").str[0]

    table = {}
    for name in sorted(set(generator)):
        others = {u: outputs[u] for u in labels.index[generator != name]}
        left_out = {u: outputs[u] for u in labels.index[generator == name]}
        truth = labels.loc[[*left_out]].to_numpy()
        prior = np.broadcast_to(cspine.PRIOR, truth.shape)
        table[CONSTANTS, name] = score(prior, truth)
        table[OWN_BEST, name] = score(np.broadcast_to(own_best(truth), truth.shape), truth)
        for share in NOISY_OR:
            answers = cspine.blend(left_out, fit(others, labels, share))
            table[share, name] = score(answers.to_numpy(), truth)
    table = pd.Series(table).unstack()
    print(table.round(3).to_string())

    for name in table:
        other = choose(table.drop(columns=name))
        print(f"{name}: {table.loc[other, name]:.3f} by the share that the others choose, {other}")
    share = choose(table)
    print(f"chosen: {share}")
    write_calibration(weights, fit(outputs, labels, share))


def own_best(truth):
    """The (8,) constants that score best on the very studies with these labels (N, 8)."""
    weight = cspine.element_weights(truth) * cspine.TARGET_WEIGHTS
    weight /= weight.sum(1, keepdims=True)
    return (weight * np.nan_to_num(truth)).sum(0) / weight.sum(0)


def choose(table):
    """The share of noisy-or, by left-out scores: a row a share, a column a generator. Of the
    shares that are nowhere above the best constants of these very studies, which score no
    worse than the training labels', the best on the mean."""
    tried = table.drop(index=[CONSTANTS, OWN_BEST])
    safe = tried[(tried <= table.loc[OWN_BEST]).all(axis=1)]
    return (safe if len(safe) else tried).mean(axis=1).idxmin()


def write_calibration(weights, found):
    """calibration.json, with what the program itself never fits."""
    cspine.write_calibration(weights, found)
    path = weights / "calibration.json"
    content = json.loads(path.read_text()) | dict(trained_on=TRAINED_ON)
    path.write_text(json.dumps(content, indent=1) + "\n")


def score(answers, truth):
    return np.nanmean(cspine.study_scores(answers, truth))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("draw", "crops", *TRAININGS, "calibrate"))
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--necks", type=Path, help="folder of <patient>.nii.gz")
    parser.add_argument("--old-hands", help="folder of generators that left the repository")
    parser.add_argument(
        "--weights", nargs="+", default=[str(ROOT / "weights")],
        help="folders of the segmenter that ships, and of others for crops to train on")
    parser.add_argument("--parts", nargs="+", default=[*HANDS], choices=[*HANDS])
    parser.add_argument(
        "--older", type=Path, default=ROOT / "weights", help="classifiers to start from")
    parser.add_argument("--workers", type=int, default=1, help="processes, or threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args()
    if o.step == "draw" and not o.necks:
        parser.error("draw needs --necks")
    cspine.keep_memory()
    if o.old_hands:
        sys.path.append(str(Path(o.old_hands).resolve()))
    if o.step in ("draw", "crops"):
        run_all(drawing_jobs(o) if o.step == "draw" else crop_jobs(o), o.workers)
    elif o.step == "calibrate":
        calibrate(o)
    else:
        train(o.step, o)


if __name__ == "__main__":
    main()
