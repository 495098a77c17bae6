"""Small trainings that differ in one choice each: made for a GPU, a day's work for a CPU.

    python tests/studies/ablations.py make OUT --studies 480 --held-out 120 [--workers 16]
    python tests/studies/ablations.py run OUT VARIANT --init LITE0 [--epochs 8]
    python tests/studies/ablations.py table OUT

`make` draws phantoms and keeps their cubes and crops (cut by the true masks) in OUT; `run`
trains on them from ImageNet's tf_efficientnet_lite0 (the file that LITE0 names); `table`
prints what the held-out phantoms say of every run: Dice of a segmenter at 64 cubed, AUC and
log loss of a vertebra classifier.
"""

import argparse
import contextlib
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "tools"), str(TESTS / "studies")]

import cspine  # noqa: E402
from limits import at_cells  # noqa: E402
from phantoms import make_phantom  # noqa: E402

BACKBONE = "tf_efficientnet_lite0"
EDGE = 128  # cells, of the cubes on disk
SMALL = 64  # cells, of the cubes trained on
CROP = 160  # pixels
SEED = 1111  # of the phantoms
FRACTURES = 2.5  # times as many as real
CUTS = ("square", "stretched", "center")  # folders of crops
VARIANTS = {  # of the vertebra classifier: folder of crops, changes of the recipe
    "default": ("square", {}),
    "no mask": ("square", {}),
    "stretched": ("stretched", {}),
    "mask of the centre": ("center", {}),
    "mixup 0.2": ("square", dict(mixup=0.2)),
    "dropout 0.2": ("square", dict(dropout=0.2)),
}
SEGMENTERS = ("segmenter", "not divided", "3 channels", "from scratch")


# ---- make ----

def stretched_slices(volume, probability, size):
    """vertebra_slices whose crops fill the box on both axes: a spacing in which it is
    square."""
    out = np.zeros((7, cspine.STEPS, cspine.CHANNELS, size, size), np.uint8)
    for v, cells in enumerate(probability):
        found = cspine.vertebra_box(cells)
        if found is None:
            continue
        wide = np.ptp(found[1:], 1) + 1 + 2 * cspine.BOX_MARGIN  # cells, of Y and X
        spacing = 1 / (wide * volume.hu.shape[1:])
        squeezed = volume._replace(spacing=(volume.spacing[0], *spacing))
        alone = np.zeros_like(probability)
        alone[v] = cells
        out[v] = cspine.vertebra_slices(squeezed, alone, size)[v]
    return out


def make_study(out, k):
    """Draw phantom k and keep its cube and crops; which of C1 to C7 are fractured."""
    torch.set_num_threads(1)
    made = make_phantom([SEED, k], 256, fractures=FRACTURES)
    volume = cspine.Volume(str(k), made.hu, made.spacing, made.affine)
    labels = at_cells(made.label, EDGE)
    cube = cspine.segmenter_input(volume, EDGE)[0] * 255
    np.save(out / f"cubes/{k}.npy", np.stack([cube.round().byte().numpy(), labels]))
    truth = (labels == np.arange(1, 8).reshape(7, 1, 1, 1)).astype(np.float32)
    crops = dict(
        square=cspine.vertebra_slices(volume, truth, CROP),
        stretched=stretched_slices(volume, truth, CROP),
        center=cspine.vertebra_slices(volume, truth, CROP, mask_of="center"),
    )
    for name, images in crops.items():
        np.save(out / f"{name}/{k}.npy", images)
    return made.fractured


def make(options):
    """Draw all phantoms, and write their labels."""
    for name in ("cubes", *CUTS):
        (options.out / name).mkdir(parents=True, exist_ok=True)
    count = options.studies + options.held_out
    with ProcessPoolExecutor(options.workers) as pool:
        rows = list(pool.map(partial(make_study, options.out), range(count)))
    table = pd.DataFrame(np.array(rows), columns=cspine.VERTEBRAE)
    table = table.assign(held_out=table.index >= options.studies)
    table.to_csv(options.out / "labels.csv", index=False)


# ---- run ----

def segmenter_task(options, device):
    """The Task of a segmenter on cubes of SMALL."""
    recipe = cspine.Recipe(
        BACKBONE, options.epochs, batch_size=8, lr=1e-3, size=SMALL, dropout=0.0,
        seed=options.seed)

    def load(sample, first=0):
        cube, labels = np.load(options.out / f"cubes/{sample[0]}.npy")
        cube = torch.from_numpy(cube)[None].float()
        cube = F.avg_pool3d(cube, EDGE // SMALL)[0]
        return cube.round().byte().numpy(), labels[1::2, 1::2, 1::2]

    def answer(model, k):
        cube, labels = load((k,))
        logits = model(torch.from_numpy(cube)[None, None].to(device) / 255)
        return cspine.dice_scores(logits[0].float().sigmoid().cpu().numpy(), labels)

    def judge(table):
        dice = table.mean().mean()
        return dict(score=1 - dice, dice=dice)

    loss = cspine.segmenter_batch
    return cspine.Task("segmenter", recipe, device, load, loss, answer, judge)


def vertebra_task(options, device, truth):
    """The Task of a vertebra classifier on the crops of a variant."""
    folder, changes = VARIANTS[options.variant]
    recipe = cspine.ClassifierRecipe(
        BACKBONE, options.epochs, batch_size=8, lr=6e-4, size=CROP, dropout=0.0, mixup=0.0,
        hidden=128, thin=3, seed=options.seed)
    recipe = replace(recipe, **changes)

    def crops_of(k, vertebrae):
        stored = np.load(options.out / f"{folder}/{k}.npy", mmap_mode="r")
        crops = stored[vertebrae].copy()
        if options.variant == "no mask":
            masks = crops[..., -1, :, :]
            masks[:] = np.where(masks > 0, 128, 0)
        return crops

    def load(sample, first=0):
        k, v = sample
        crops = crops_of(k, v)[first :: recipe.thin]
        return crops, truth[k][[v]] if crops.any() else np.float32([np.nan])

    def answer(model, k):
        models = dict.fromkeys(cspine.KINDS, []) | {"vertebra": [model]}
        outputs = cspine.classify(cspine.Ensemble(models, device), crops_of(k, slice(7)))
        largest = np.sort(outputs[0].steps, 1)[:, -cspine.Answers().top_k :]
        return [*largest.mean(1), np.nan]

    def judge(table):
        answers = table.to_numpy(float)[:, :7]
        seen = ~np.isnan(answers)
        right = truth[[*table.index]]
        loss = cspine.element_losses(answers[seen], right[seen])
        weight = np.where(right[seen], cspine.POSITIVE_FACTOR, 1.0)
        loss = np.average(loss, weights=weight)
        area = cspine.auc(answers[seen], right[seen])
        return dict(score=loss, auc=area, log_loss=loss)

    loss = cspine.classifier_batch
    return cspine.Task("vertebra", recipe, device, load, loss, answer, judge)


def undivided(load_init, model, path):
    """load_init that leaves the slices of a 3-D kernel as large as the 2-D kernel."""
    load_init(model, path)
    for layer in model.encoder.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.weight.data *= layer.kernel_size[0]


def show_thrice(_, given):
    """What the encoder of a ThreeChannels is given: its input three times."""
    return (given[0].expand(-1, 3, -1, -1, -1),)


def backbone_of_three(create, name, **arguments):
    """A backbone for three channels."""
    return create(name, **arguments | dict(in_chans=3))


class ThreeChannels(cspine.Segmenter):
    """A segmenter whose encoder sees its input three times, as the starting solution's."""

    def __init__(self, *arguments, **options):
        create = partial(backbone_of_three, cspine.create_backbone)
        with mock.patch.object(cspine, "create_backbone", create):
            super().__init__(*arguments, **options)
        self.encoder.register_forward_pre_hook(show_thrice)


def changed(variant):
    """Context: cspine as the variant of a segmenter wants it."""
    if variant == "not divided":
        return mock.patch.object(cspine, "load_init", partial(undivided, cspine.load_init))
    if variant == "3 channels":
        return mock.patch.dict(cspine.KINDS, segmenter=ThreeChannels)
    return contextlib.nullcontext()


def run(options):
    """Train one variant."""
    table = pd.read_csv(options.out / "labels.csv")
    held = table.pop("held_out").to_numpy()
    train = [(k,) for k in np.flatnonzero(~held).tolist()]
    device = cspine.pick_device(options.device)
    if options.variant in SEGMENTERS:
        task = segmenter_task(options, device)
    else:
        task = vertebra_task(options, device, table.to_numpy(np.float32))
        train = [(k, v) for k, in train for v in range(7)]
    task = task._replace(
        name=f"{options.variant}, seed {options.seed}",
        train=train * options.rounds,
        held_out=np.flatnonzero(held).tolist(),
    )
    init = "" if options.variant == "from scratch" else options.init
    with changed(options.variant):
        cspine.train(task, options.out / "runs", cspine.Stop(), options.workers, init=init)


# ---- table ----

def table(options):
    """Print the last line of every run's log."""
    rows = {}
    for path in sorted((options.out / "runs").glob("*_log.csv")):
        rows[path.name[: -len("_log.csv")]] = pd.read_csv(path).iloc[-1]
    columns = ["epoch", "train_loss", "dice", "auc", "log_loss"]
    found = pd.DataFrame(rows).T.reindex(columns=columns)
    print(found.round(3).to_string(na_rep="-"))


def main(argv=None):
    """Make, run or tabulate, as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "run", "table"])
    parser.add_argument("out", type=Path)
    variants = [*VARIANTS, *SEGMENTERS]
    parser.add_argument("variant", nargs="?", default="default", choices=variants)
    parser.add_argument("--studies", type=int, default=480)
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="times a sample is shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", default="", help="ImageNet's weights of BACKBONE, a file")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    if options.what == "run" and options.variant != "from scratch" and not options.init:
        parser.error(f"{options.variant} needs --init: it is compared with what began there")
    work = dict(make=make, run=run, table=table)[options.what]
    work(options)


if __name__ == "__main__":
    main()
