"""The classifiers that ship, on crops of drawn hands and of real necks.

    python tests/studies/train_classifiers.py crops --work WORK --necks NECKS --weights weights
    python tests/studies/train_classifiers.py vertebra --work WORK --older OLDER
    python tests/studies/train_classifiers.py patient --work WORK --older OLDER

Each step goes on where it was stopped. `crops` draws a study, masks it with the segmenter of
--weights and keeps its crops (6 s each); of most it keeps a copy too, with more vertebrae
broken (tests/necks/breaks.py). The trainings go on from the classifiers in OLDER and write
to WORK/weights; the patient's takes over all but its own head from the new vertebra
classifier. NECKS holds `<patient>.nii.gz`; no fracture is known in them, and
tests/necks/real_necks.py says who is kept out. A hand that is not in the
repository (`lofts` and `metaballs` left after commit 0fff004) is left out.
"""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ".", "tests", "tests/tools", "tests/necks"
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import breaks  # noqa: E402
import cspine  # noqa: E402
import real_necks  # noqa: E402

HANDS = dict(  # seed, studies, share with a copy; no seed that anything is measured on
    phantoms=(4242, 100, 0.6),
    lofts=(21, 36, 0.8),
    metaballs=(21, 36, 0.8))
NECK_SEED = 31
NECK_VIEWS = 2  # of a patient; a copy with breaks of the first
PARTIAL_SHARE = 0.15  # of the views; the others show all of C1 to C7
COLUMNS = 256
SLICE_MM = 0.5, 1.25
THICK_MM = 2.5
NOISE_HU = 5, 60
Z_MARGIN = 0.0  # of the crops, as the older classifiers know them

SHARED = (
    "--backbone tf_efficientnet_lite0 --size 160 --hidden 128 --thin 3 --mixup 0 "
    f"--folds 40 --fold 0 --z-margin {Z_MARGIN} --resume")
TRAININGS = dict(
    vertebra=f"train-cls --batch-size 8 --lr 1.5e-4 --epochs 2 --seed 51 {SHARED}",
    patient=f"train-patient --batch-size 2 --lr 1e-4 --epochs 1 --seed 52 {SHARED}")


def draw_hand(hand, seed, number):
    """(HU, labels, spacing, broken (7,)) of one drawn study, head first."""
    module = importlib.import_module(hand)
    rng = np.random.default_rng([seed, number])
    if hand == "phantoms":
        share = np.random.default_rng([seed, number, 2]).random()
        variety = 1 + 0.3 * share * (number % 2)
        study = module.make_phantom([seed, number], COLUMNS, variety, 2.0)
        return study.hu, study.label, study.spacing, study.fractured

    hu, labels, grid, found = module.make_study(rng)  # foot first
    hu = np.ascontiguousarray(hu[::-1]).astype(np.int16)
    broken = np.isin(range(7), [*found]).astype(np.uint8)
    return hu, labels[::-1], tuple(grid.step[::-1]), broken


def draw_neck(neck, labels, rng):
    """A view of a real neck on a fine grid: float32 HU, labels, spacing."""
    kind = "partial" if rng.random() < PARTIAL_SHARE else "neck"
    view = real_necks.draw_view(neck, labels, rng, kind)
    edges = 2 * np.linalg.norm(view.axes, axis=0)
    most = THICK_MM if rng.random() < 0.15 else SLICE_MM[1]
    pixel = edges[1:].max() / COLUMNS
    wanted = np.array([rng.uniform(SLICE_MM[0], most), pixel, pixel])
    shape = tuple(np.rint(edges / wanted).astype(int).tolist())
    hu = real_necks.view_hu(neck, view, shape)
    return hu, real_necks.view_labels(neck, labels, view, shape), edges / shape


def scan(hu, spacing, rng):
    """int16 HU as another scanner shows them: kernel, couch, circle, noise."""
    hu = real_necks.dress(hu, spacing * hu.shape, rng)
    hu = hu + rng.uniform(*NOISE_HU) * rng.standard_normal(hu.shape, np.float32)
    return np.rint(hu.clip(cspine.AIR_HU, 3071)).astype(np.int16)


class Crops:
    """The folder of crops, and what masks a study."""

    def __init__(self, work, weights):
        self.work = work
        self.models = [*cspine.load_models(weights, "segmenter", "cpu").values()]

    def has(self, uid):
        return (self.work / "labels" / f"{uid}.csv").exists()

    def mask(self, hu, spacing):
        volume = cspine.Volume("", hu, tuple(spacing), np.eye(4))
        return cspine.segment(self.models, volume, torch.device("cpu"), [].append)

    def write(self, uid, hu, spacing, masks, broken):
        """A study's crops, and last its row of labels."""
        volume = cspine.Volume("", hu, tuple(spacing), np.eye(4))
        crops = cspine.vertebra_slices(volume, masks, z_margin=Z_MARGIN)
        cspine.write_crops(self.work / "last" / f"{uid}.npz", crops, Z_MARGIN)
        (self.work / "train_images" / uid).mkdir(parents=True, exist_ok=True)
        row = [uid, *map(int, broken), int(np.any(broken))]
        path = self.work / "labels" / f"{uid}.csv"
        text = ",".join(map(str, row)) + "\n"
        cspine.write_atomic(path, lambda new: new.write_text(text))
        print(text, end="", flush=True)


def crops_of_hands(crops):
    for hand, (seed, count, share) in HANDS.items():
        if not importlib.util.find_spec(hand):
            print(f"{hand}: not in this repository; left out")
            continue
        for number in range(count):
            uid = f"{hand}.{seed}.{number}"
            rng = np.random.default_rng([seed, number, 99])
            copied = rng.random() < share
            if crops.has(f"{uid}.copy" if copied else uid):
                continue
            hu, labels, spacing, broken = draw_hand(hand, seed, number)
            masks = crops.mask(hu, spacing)
            crops.write(uid, hu, spacing, masks, broken)
            if copied:
                hu, broken = breaks.broken_copy(rng, hu, labels, spacing, broken)
                hu = np.rint(hu.clip(cspine.AIR_HU, 3071)).astype(np.int16)
                crops.write(f"{uid}.copy", hu, spacing, masks, broken)


def crops_of_necks(crops, necks):
    for coarse in real_necks.read_necks(necks, "train"):
        names = [f"neck.{coarse.name}.{k}" for k in range(NECK_VIEWS)]
        if all(map(crops.has, names)):
            continue
        neck = real_necks.finer(coarse)
        labels = real_necks.make_mask(neck)
        for number, uid in enumerate(names):
            draw_neck_study(crops, neck, labels, number, uid)


def draw_neck_study(crops, neck, labels, number, uid):
    """Crops of one view; of the first also of a copy with breaks, scanned alike."""
    key = [NECK_SEED, number, *neck.name.encode()]
    rng = np.random.default_rng(key)
    hu, seen, spacing = draw_neck(neck, labels, rng)
    whole = np.zeros(7, np.uint8)
    copy, broken = breaks.broken_copy(rng, hu, seen, spacing, whole)
    if rng.random() < 0.5:
        breaks.draw_harmless(rng, hu, seen, spacing, whole)

    hu = scan(hu, spacing, np.random.default_rng([*key, 1]))
    masks = crops.mask(hu, spacing)
    if number == 0:
        copy = scan(copy, spacing, np.random.default_rng([*key, 1]))
        crops.write(f"{uid}.copy", copy, spacing, masks, broken)
    crops.write(uid, hu, spacing, masks, whole)


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


def train(step, work, older):
    rows = [path.read_text() for path in sorted((work / "labels").glob("*.csv"))]
    header = ",".join([cspine.STUDY, *cspine.TARGETS]) + "\n"
    (work / "train.csv").write_text(header + "".join(rows))
    command = TRAININGS[step].split() + ["--data", work, "--work", work]
    command += ["--weights", work / "weights", "--init", init_of(step, work, older)]
    sys.exit(cspine.main([*map(str, command)]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("crops", *TRAININGS))
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--necks", type=Path, help="folder of <patient>.nii.gz")
    parser.add_argument("--weights", default=str(ROOT / "weights"))
    parser.add_argument("--older", type=Path, help="folder of classifiers to start from")
    o = parser.parse_args()
    if o.step == "crops":
        for folder in ("last", "labels"):
            (o.work / folder).mkdir(parents=True, exist_ok=True)
        crops = Crops(o.work, o.weights)
        crops_of_hands(crops)
        crops_of_necks(crops, o.necks)
        return
    train(o.step, o.work, o.older)


if __name__ == "__main__":
    main()
