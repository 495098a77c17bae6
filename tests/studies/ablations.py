"""Small trainings that differ in one choice each: made for a GPU, a day's work for a CPU.

    python tests/studies/ablations.py make OUT --studies 480 --held-out 120 [--workers 16]
    python tests/studies/ablations.py run OUT VARIANT --init LITE0 [--epochs 8] [--device auto]
    python tests/studies/ablations.py table OUT

`make` draws phantoms and keeps their cubes and crops (cut by the true masks) in OUT; `run` trains
on them from ImageNet's tf_efficientnet_lite0 (the file that LITE0 names); `table` prints what the
held-out phantoms say of every run: Dice of a segmenter at 64 cubed, AUC and log loss of a vertebra
classifier.
"""

import argparse
import inspect
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

sys.path[:0] = [str(Path(__file__).parents[k] / name) for k, name in ((2, ""), (1, "tools"))]

import cspine  # noqa: E402
from limits import at_cells  # noqa: E402
from phantoms import make_phantom  # noqa: E402

BACKBONE, EDGE, SMALL, CROP, SEED, FRACTURES = "tf_efficientnet_lite0", 128, 64, 160, 1111, 2.5
CUTS = "square", "stretched", "center"
VARIANTS = {  # of the vertebra classifier: folder of crops, recipe
    "default": ("square", {}), "no mask": ("square", {}), "stretched": ("stretched", {}),
    "mask of the centre": ("center", {}), "shuffle 0.2": ("square", dict(shuffle=0.2)),
    "mixup 0.2": ("square", dict(mixup=0.2)), "dropout 0.2": ("square", dict(dropout=0.2))}
SEGMENTERS = "segmenter", "not divided", "3 channels", "from scratch"


def stretched_slices():
    """vertebra_slices whose crops fill the box on both axes."""
    source = inspect.getsource(cspine.vertebra_slices)
    for old, new in (("(high - low).max()", "high - low"), ("[side / size] * 2", "side / size")):
        assert old in source
        source = source.replace(old, new)
    room = dict(vars(cspine))
    exec(source, room)
    return room["vertebra_slices"]


def make_study(out, k):
    torch.set_num_threads(1)
    made = make_phantom([SEED, k], 256, fractures=FRACTURES)
    volume = cspine.Volume(str(k), made.hu, made.spacing, made.affine)
    labels = at_cells(made.label, EDGE)
    cube = (cspine.segmenter_input(volume, EDGE)[0] * 255).round().byte().numpy()
    np.save(out / f"cubes/{k}.npy", np.stack([cube, labels]))
    truth = (labels == np.arange(1, 8).reshape(7, 1, 1, 1)).astype(np.float32)
    for name, cut in (("square", cspine.vertebra_slices), ("stretched", stretched_slices()),
                      ("center", partial(cspine.vertebra_slices, mask_of="center"))):
        np.save(out / f"{name}/{k}.npy", cut(volume, truth, CROP))
    return made.fractured


def make(o):
    for name in ("cubes", *CUTS):
        (o.out / name).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(o.workers) as pool:
        rows = list(pool.map(partial(make_study, o.out), range(o.studies + o.held_out)))
    table = pd.DataFrame(np.array(rows), columns=cspine.VERTEBRAE)
    table.assign(held_out=table.index >= o.studies).to_csv(o.out / "labels.csv", index=False)


def segmenter_task(o, recipe, device):
    def load(k):
        cube, labels = np.load(o.out / f"cubes/{k}.npy")
        cube = F.avg_pool3d(torch.from_numpy(cube)[None].float(), EDGE // SMALL)[0]
        return cube.round().byte().numpy(), labels[1::2, 1::2, 1::2]

    def score(model, k):
        cube, labels = load(k)
        logits = model(torch.from_numpy(cube)[None, None].to(device) / 255)
        return cspine.dice_scores(logits[0].float().sigmoid().cpu().numpy(), labels)

    recipe = replace(recipe, size=SMALL, lr=1e-3, dropout=0.0)
    return cspine.Task("segmenter", recipe, device, load, cspine.segmenter_batch, score,
                       lambda table: dict(score=1 - table.mean().mean(), dice=table.mean().mean()))


def vertebra_task(o, recipe, device, truth):
    folder, changes = VARIANTS[o.variant]

    def crops_of(k, vertebrae):
        crops = np.load(o.out / f"{folder}/{k}.npy", mmap_mode="r")[vertebrae].copy()
        if o.variant == "no mask":
            crops[..., -1, :, :] = np.where(crops[..., -1, :, :] > 0, 128, 0)
        return crops

    def load(sample):
        k, v = sample
        crops = crops_of(k, v)
        return crops, truth[k][[v]] if crops.any() else np.float32([np.nan])

    def score(model, k):
        one = cspine.Ensemble(dict.fromkeys(cspine.KINDS, []) | {"vertebra": [model]}, device)
        (steps, _), = cspine.classify(one, crops_of(k, slice(7)), cspine.Effort(1, 1))
        return [*np.sort(steps, 1)[:, -cspine.Answers().top_k :].mean(1), np.nan]

    def judge(table):
        answers = table.to_numpy(float)[:, :7]
        seen, right = ~np.isnan(answers), truth[[*table.index]]
        loss = cspine.element_losses(answers[seen], right[seen])
        weight = np.where(right[seen], cspine.POSITIVE_FACTOR, 1.0)
        loss = np.average(loss, weights=weight)
        return dict(score=loss, auc=cspine.auc(answers[seen], right[seen]), log_loss=loss)

    recipe = replace(recipe, size=CROP, hidden=128, thin=3, mixup=0.0, shuffle=0.0, dropout=0.0)
    return cspine.Task("vertebra", replace(recipe, **changes), device, load,
                       cspine.classifier_batch, score, judge)


def undivided(load_init, model, path):
    """The weights of the slices of a 3-D kernel as large as the 2-D kernel's."""
    load_init(model, path)
    for layer in model.encoder.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.weight.data *= layer.kernel_size[0]


def three_channels(segmenter):
    """A segmenter whose encoder sees its input three times."""
    def make(*arguments, **options):
        create = cspine.create_backbone
        with mock.patch.object(cspine, "create_backbone",
                               lambda name, **more: create(name, **more | dict(in_chans=3))):
            model = segmenter(*arguments, **options)
        model.encoder.register_forward_pre_hook(lambda _, x: (x[0].expand(-1, 3, -1, -1, -1),))
        return model
    return make


def run(o):
    table = pd.read_csv(o.out / "labels.csv")
    held = table.pop("held_out").to_numpy()
    train, held_out = np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()
    device, init = cspine.pick_device(o.device), o.init
    recipe = cspine.Recipe(BACKBONE, o.epochs, 8, 6e-4, seed=o.seed)
    if o.variant in SEGMENTERS:
        task = segmenter_task(o, recipe, device)
    else:
        task = vertebra_task(o, recipe, device, table.to_numpy(np.float32))
        train = [(k, v) for k in train for v in range(7)]
    if o.variant == "not divided":
        cspine.load_init = partial(undivided, cspine.load_init)
    elif o.variant == "3 channels":
        cspine.KINDS["segmenter"] = three_channels(cspine.KINDS["segmenter"])
    elif o.variant == "from scratch":
        init = ""
    name = f"{o.variant}, seed {o.seed}"
    task = task._replace(name=name, train=train * o.rounds, held_out=held_out)
    cspine.train(task, o.out / "runs", cspine.Stop(), o.workers, init=init)


def table(o):
    rows = {path.name[: -len("_log.csv")]: pd.read_csv(path).iloc[-1]
            for path in sorted((o.out / "runs").glob("*_log.csv"))}
    columns = ["epoch", "train_loss", "dice", "auc", "log_loss"]
    print(pd.DataFrame(rows).T.reindex(columns=columns).round(3).to_string(na_rep="-"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "run", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument("variant", nargs="?", default="default", choices=[*VARIANTS, *SEGMENTERS])
    parser.add_argument("--studies", type=int, default=480)
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="how often an epoch shows a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", default="")
    parser.add_argument("--device", default="auto")
    o = parser.parse_args()
    {"make": make, "run": run, "table": table}[o.what](o)


if __name__ == "__main__":
    main()
