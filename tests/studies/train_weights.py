"""The segmenter that ships, of real necks and drawn ones: on one GPU, or on CPU cores.

    python tests/studies/train_weights.py hands --work WORK --workers 16
    python tests/studies/train_weights.py cubes --work WORK --workers 16 --drawn 360
    python tests/studies/train_weights.py necks --work WORK --workers 16 --necks NECKS
    python tests/studies/train_weights.py long --work WORK --init OLDER --out LONG
    python tests/studies/train_weights.py sharp --work WORK --init LONG/SEGMENTER --out NEW
    python tests/studies/train_weights.py edges --work WORK --init OLDER --out NEW
    python tests/studies/train_weights.py norms --work WORK --init NEW/SEGMENTER --out LAST \
        --necks NECKS

Each step keeps what it has done and goes on where it was stopped. `hands` draws studies (2 to
10 s each on a core), `cubes` others, as predict shows them to the segmenter, `necks` brings the
CTs to a fine grid and masks them (3 to 6 s each), the stages train and write
`segmenter_fold0.pt`: `long` and `sharp` on a GPU, `windows` and then `edges`, which sees the
cubes, on two CPU cores (2 to 3 s a step with bfloat16, 12 without; all studies are held in
memory: 180 drawn ones, the necks and 480 cubes take 15 GB). `norms` measures the mean and
variance of the network's norms anew on whole cubes, after `windows` above all, which showed
them parts (2 minutes). NECKS holds `<patient>.nii.gz`; who is kept out, and what a view is,
says tests/necks/real_necks.py.
"""

import argparse
import copy
import importlib
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ".", "tests", "tests/tools", "tests/necks", "tests/studies"
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import cspine  # noqa: E402
import levels  # noqa: E402
import real_necks  # noqa: E402

EDGE = 128  # of a cube
DRAWN = 240  # studies of phantoms.py; tubes.py only measures
OLD_HANDS = "lofts", "metaballs", "fourth_hand"  # generators that have left the repository
HAND_SEED, CUBE_SEED = 7777, 8888  # no seeds that anything is measured on
COLUMNS = 256
LEVELS = 8  # T1 is taught too: the network answers for it only while it is trained
UNKNOWN = 255  # label of cells that teach nothing
VIEWS = dict(  # shares of how a sample is cut
    neck=dict(closer=0.42, neck=0.20, whole=0.10, partial=0.28),
    drawn=dict(closer=0.40, neck=0.10, whole=0.30, partial=0.20))

WINDOW = 128, 80, 80  # cells of a cube around the spine: a third of the time of a whole one
OFF_CENTRE = 0.25  # of a window, in half edges of the cube

WARM_UP = 0.05
WEIGHT_DECAY = 0.01
EMA = 0.998
CLIP = 1.0  # norm of the gradient
DROP_PATH = 0.05
NORM_STUDIES = 24  # drawn ones, and necks, by which the norms are measured
NORM_SEED = 50  # of the necks' views
NORM_KINDS = "neck", "whole", "closer"
SAVE_EVERY = 100  # steps
SAY_EVERY = 20


@dataclass(frozen=True)
class Stage:
    """What a step is made of: cubes, or windows of them, of real necks and drawn studies."""

    steps: int
    lr: float  # peak of AdamW
    seed: int
    necks: int  # samples of a step
    drawn: int
    cubes: int = 0  # whole drawn studies, as predict shows them to the segmenter
    windows: float = 0.0  # share of the steps that show windows; the others half the samples


STAGES = dict(
    long=Stage(steps=2000, lr=8e-4, seed=1, necks=4, drawn=4),
    sharp=Stage(steps=500, lr=3e-4, seed=2, necks=2, drawn=6),  # back to the drawn edges
    windows=Stage(steps=1300, lr=4e-4, seed=5, necks=2, drawn=2, windows=0.5),
    edges=Stage(steps=1400, lr=3e-4, seed=6, necks=2, drawn=1, cubes=3, windows=0.5))


# ==== What is trained on ====

def draw_hand(hand, seed, number, varied=True):
    """(HU, labels, spacing, broken (7,)) of one study of a generator, head first; those of
    phantoms.py are more varied than `cspine.py phantom` draws them, unless varied is False."""
    module = importlib.import_module(hand)
    if hand == "phantoms":
        how = ()
        if varied:
            share = np.random.default_rng([seed, number, 2]).random()
            how = 1 + 0.3 * share * (number % 2), 2.0
        study = module.make_phantom([seed, number], COLUMNS, *how)
        return study.hu, study.label, study.spacing, study.fractured

    rng = np.random.default_rng([seed, number])
    hu, labels, grid, found = module.make_study(rng)  # foot first
    hu = np.ascontiguousarray(hu[::-1]).astype(np.int16)
    broken = np.isin(range(7), [*found]).astype(np.uint8)
    return hu, labels[::-1], tuple(grid.step[::-1]), broken


def make_hand(folder, hand, number):
    """A drawn study in `folder`."""
    path = folder / f"{hand}_{number:03}.npz"
    if path.exists():
        return
    hu, labels, spacing, _ = draw_hand(hand, HAND_SEED, number)
    labels = np.where(labels <= LEVELS, labels, 0).astype(np.uint8)
    save(path, hu=hu, spacing=np.array(spacing), labels=labels, taught=labels)


def volume_of(hu, spacing):
    """A drawn study, head first, as read_volume would give it."""
    return cspine.Volume("", hu, tuple(spacing), np.eye(4))


def make_cube(folder, hand, number):
    """A drawn study in `folder` as cells of predict's cube: uint8 grey levels and labels."""
    path = folder / f"{hand}_{number:03}.npz"
    if path.exists():
        return
    hu, labels, spacing, _ = draw_hand(hand, CUBE_SEED, number)
    cube = cspine.segmenter_input(volume_of(hu, spacing))[0]
    cube = np.rint(cube.numpy() * 255).astype(np.uint8)
    save(path, cube=cube, labels=labels_of_cells(labels))


def labels_of_cells(labels):
    """uint8 (D, D, D): of labels (Z, Y, X), in each cell of a cube that of most voxels."""
    shares = []
    for level in range(LEVELS + 1):
        inside = torch.from_numpy(labels == level)[None].float()
        shares.append(F.adaptive_avg_pool3d(inside, EDGE))
    return torch.cat(shares).argmax(0).byte().numpy()  # of equals the first: background


def hand_items(o):
    """(generator, number) of every study to draw, the generators in turns."""
    counts = dict(phantoms=o.drawn)
    if o.old_hands:
        counts |= dict.fromkeys(OLD_HANDS, o.drawn_old)
    items = [(hand, number) for hand, count in counts.items() for number in range(count)]
    return sorted(items, key=lambda item: item[1])


def make_neck(folder, coarse):
    """A real neck on a fine grid with its masks, in `folder`."""
    path = folder / f"{coarse.name}.npz"
    if path.exists():
        return
    neck = real_necks.finer(coarse)
    labels = real_necks.make_mask(neck)
    unknown = real_necks.uncertain(neck, labels)
    taught = np.where(unknown, np.uint8(UNKNOWN), labels)
    save(path, hu=neck.hu, spacing=neck.spacing, labels=labels, taught=taught)


def save(path, **arrays):
    def write(new):
        with open(new, "wb") as file:
            np.savez(file, **arrays)

    cspine.write_atomic(path, write)
    print(path, flush=True)


def make_all(make, folder, items, workers):
    """Call make(folder, *item) for all items, in processes."""
    folder.mkdir(parents=True, exist_ok=True)
    run_all(((make, folder, *item) for item in items), workers)


def run_all(jobs, workers):
    """Do every job (function, *arguments), in processes; the first error ends all."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    with ProcessPoolExecutor(workers, context, start_worker, [sys.path]) as pool:
        for done in [pool.submit(*job) for job in jobs]:
            done.result()


def start_worker(paths):
    sys.path[:] = paths
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def read_all(folder, device):
    """[(Neck, taught labels)] of all studies of a folder, on the device."""
    out = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            hu = torch.from_numpy(file["hu"]).to(device)
            taught = torch.from_numpy(file["taught"]).to(device)
            study = real_necks.Neck(path.stem, hu, file["spacing"], {}, None)
            ends = real_necks.vertebrae_ends(study, file["labels"])
        out.append((replace(study, ends=ends), taught))
    return out


def read_cubes(folder, device):
    """[(grey levels, labels, spine)] of all cubes of a folder: uint8 (D, D, D) on the device,
    and the middle of all vertebrae, from -1 to 1."""
    out = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            cube, labels = file["cube"], file["labels"]
        spine = np.argwhere(labels).mean(0) * 2 / EDGE - 1
        out.append((torch.from_numpy(cube).to(device), torch.from_numpy(labels).to(device), spine))
    return out


# ==== Samples ====

def make_batch(stage, step, studies):
    """(B, 1, Z, Y, X) in 0..1 and uint8 labels of a step; `studies` by source."""
    rng = np.random.default_rng([stage.seed, step])
    windows = rng.random() < stage.windows
    shape = WINDOW if windows else (EDGE,) * 3
    share = 2 if stage.windows and not windows else 1
    sources = ["neck"] * (stage.necks // share) + ["drawn"] * (stage.drawn // share)
    samples = [cut_sample(studies[source], source, shape, rng) for source in sources]
    for _ in range(stage.cubes // share):
        samples.append(cut_cube(studies["cubes"], shape, rng))
    cubes, labels = zip(*samples)
    return torch.stack(cubes), torch.stack(labels)


def draw_window(rng, spine, shape):
    """Ends, from -1 to 1, of a window of `shape` cells near a point of the cube."""
    half = np.array(shape) / EDGE
    off = rng.uniform(-OFF_CENTRE, OFF_CENTRE, 3) * (0, 1, 1)
    middle = (spine + off).clip(-1 + half, 1 - half)
    return middle - half, middle + half


def cut_sample(studies, source, shape, rng):
    """A view of one of the studies: float32 (1, Z, Y, X) in 0..1 and its labels."""
    study, taught = studies[rng.integers(len(studies))]
    kinds = VIEWS[source]
    kind = rng.choice([*kinds], p=[*kinds.values()])
    view = real_necks.draw_view(study, None, rng, kind)
    spine = np.linalg.solve(view.axes, study.ends.mean(0) - view.centre)
    window = draw_window(rng, spine, shape)

    hu = real_necks.view_hu(study, view, shape, window=window)
    labels = real_necks.view_labels(study, taught, view, shape, window=window)
    if source == "neck":
        edges = 2 * np.linalg.norm(view.axes, axis=0) * shape / EDGE
        hu = real_necks.dress(hu, edges, rng)

    level, width = cspine.SEGMENTER_WINDOW
    cube = ((hu - level + width / 2) / width).clip(0, 1)[None]
    cspine.grey_levels(cube[None], rng, cspine.VOLUME_RANGES)
    return cube, labels


def cut_cube(cubes, shape, rng):
    """A cube, mirrored or not, or a window of it around the spine, as cut_sample gives it."""
    cube, labels, spine = cubes[rng.integers(len(cubes))]
    low, _ = draw_window(rng, spine, shape)
    first = np.rint((low + 1) * EDGE / 2).astype(int)
    window = tuple(slice(at, at + count) for at, count in zip(first, shape))
    mirrored = (2,) * int(rng.integers(2))
    cube = cube[window].flip(mirrored)[None].float() / 255
    cspine.grey_levels(cube[None], rng, cspine.VOLUME_RANGES)
    return cube, labels[window].flip(mirrored)


# ==== Network and loss ====

class TeachingSegmenter(cspine.Segmenter):
    """The segmenter with an eighth answer, T1's, which the shipped file does not hold."""

    def __init__(self, settings, tensors):
        super().__init__(**settings, drop_path=DROP_PATH)
        width = self.head.in_channels
        self.head = nn.Conv3d(width, LEVELS * 8, 1)  # a place answers for 8 cells
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.constant_(self.head.bias, -4)
        own = self.state_dict()
        for name, tensor in tensors.items():
            place = own[name]  # the parameter itself
            if name.startswith("head."):
                place = place[: len(tensor)]
            place.copy_(tensor)

    def shipped_tensors(self):
        """As cspine stores a segmenter, without T1."""
        out = {}
        for name, tensor in self.state_dict().items():
            if name.startswith("head."):
                tensor = tensor[:56]
            tensor = tensor.cpu().contiguous()
            out[name] = tensor.half() if tensor.ndim > 1 else tensor.clone()
        return out


def teaching_loss(logits, labels):
    """cspine's segmenter_loss where the labels are known, and the share of T1 that C7's mask
    takes: Dice hardly feels a few cells at T1's upper edge."""
    known = (labels != UNKNOWN)[:, None].float()
    truth = torch.stack([labels == level for level in range(1, LEVELS + 1)], 1).float()
    mask, space = logits.sigmoid() * known, (2, 3, 4)
    seen = truth.amax(space)
    dice = (2 * (mask * truth).sum(space) + 1) / ((mask + truth).sum(space) + 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    lost = (entropy * known).mean()
    below = truth[:, 7]  # T1
    taken = (mask[:, 6] * below).sum() / below.sum().clamp(min=1)
    return 10 * lost + 1 - (dice * seen).sum() / seen.sum().clamp(min=1) + taken


# ==== Training ====

class Run:
    """The state of a training, saved whole."""

    def __init__(self, init, stage, device):
        content = cspine.load_checkpoint(init)
        torch.manual_seed(stage.seed)
        self.stage, self.settings, self.step = stage, content["settings"], 0
        self.history = []  # a dict a line of the log
        self.device = device
        self.model = TeachingSegmenter(self.settings, content["tensors"])
        self.model.to(device, memory_format=torch.channels_last_3d)
        self.averaged = copy.deepcopy(self.model).eval()
        parameters = [*self.model.parameters()]
        self.optimizer = torch.optim.AdamW([
            dict(params=[p for p in parameters if p.ndim > 1], weight_decay=WEIGHT_DECAY),
            dict(params=[p for p in parameters if p.ndim == 1], weight_decay=0)])

    def update(self, cubes, labels):
        """One step; its loss, on the device."""
        done = self.step / self.stage.steps
        warm = min(1, (done + 1e-3) / (WARM_UP + 1e-3))
        for group in self.optimizer.param_groups:  # half a cosine, down to 1 %
            group["lr"] = self.stage.lr * warm * (0.505 + 0.495 * math.cos(math.pi * done))
        self.optimizer.zero_grad()
        half = cspine.half_type(torch.device(self.device))  # float16 would need a scaler
        with torch.autocast(self.device, torch.bfloat16, enabled=half == torch.bfloat16):
            logits = self.model.train()(cubes)
        loss = teaching_loss(logits.float(), labels)
        loss.backward()
        if nn.utils.clip_grad_norm_(self.model.parameters(), CLIP).isfinite():
            self.optimizer.step()
        self.step += 1
        self.average()
        return loss.detach()

    @torch.no_grad()
    def average(self):
        share = 1 - min(EMA, (1 + self.step) / (10 + self.step))
        slow, fast = (part.state_dict() for part in (self.averaged, self.model))
        floats = [name for name, tensor in slow.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([slow[n] for n in floats], [fast[n] for n in floats], share)

    def save(self, out):
        parts = dict(model=self.model, averaged=self.averaged, optimizer=self.optimizer)
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= dict(step=self.step, history=self.history)
        cspine.write_atomic(out / "last.pt", lambda new: torch.save(state, new))
        recipe = cspine.Recipe(
            backbone=self.settings["backbone"], epochs=1, lr=self.stage.lr, size=EDGE,
            batch_size=self.stage.necks + self.stage.drawn + self.stage.cubes,
            seed=self.stage.seed)
        cspine.save_checkpoint(
            out / "segmenter_fold0.pt", "segmenter", recipe,
            settings=self.settings, tensors=self.averaged.shipped_tensors())

    def load(self, out):
        state = torch.load(out / "last.pt", weights_only=True, map_location=self.device)
        self.step, self.history = state.pop("step"), state.pop("history")
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)
        self.write_log(out)  # what was said after this state was saved will be said again

    def write_log(self, out):
        cspine.write_csv(out / "segmenter_fold0_log.csv", pd.DataFrame(self.history))


def train_segmenter(o, stage):
    """Train on what `hands` and `necks` made; goes on from `out`/last.pt."""
    run = Run(o.init, stage, o.device)
    o.out.mkdir(parents=True, exist_ok=True)
    if (o.out / "last.pt").exists():
        run.load(o.out)

    studies = dict(
        neck=read_all(o.work / "necks", o.device), drawn=read_all(o.work / "hands", o.device))
    if stage.cubes:
        studies["cubes"] = read_cubes(o.work / "cubes", o.device)
    for source, found in studies.items():
        if not found:
            raise SystemExit(f"no {source} in {o.work}: run the steps before")
    losses = []
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(make_batch, stage, run.step, studies)
        while run.step < stage.steps:
            now = batch.result()
            batch = pool.submit(make_batch, stage, run.step + 1, studies)
            losses.append(run.update(*now))
            if run.step % SAY_EVERY == 0:
                report(o.out, run, torch.stack(losses[-SAY_EVERY:]).mean().item())
            if run.step % SAVE_EVERY == 0 or run.step == stage.steps:
                run.save(o.out)


def report(out, run, loss):
    lr = float(f"{run.optimizer.param_groups[0]['lr']:.3g}")
    run.history.append(dict(step=run.step, train_loss=round(loss, 4), lr=lr))
    print(*run.history[-1].values(), sep=",", flush=True)
    run.write_log(out)


# ==== Norms ====

def norm_cubes(o):
    """(1, D, D, D) cubes of whole drawn studies and of views of necks, in turns."""
    drawn, necks = [], []
    paths = sorted((o.work / "hands").glob("*.npz"))
    for path in paths[:: math.ceil(len(paths) / NORM_STUDIES)]:  # of every generator
        with np.load(path) as file:
            volume = volume_of(file["hu"], file["spacing"])
        drawn.append(cspine.segmenter_input(volume))
    coarse = islice(real_necks.read_necks(o.necks, "train"), NORM_STUDIES)
    for seed, neck in enumerate(map(real_necks.finer, coarse), NORM_SEED):
        labels = real_necks.make_mask(neck)
        kind = NORM_KINDS[seed % len(NORM_KINDS)]
        volume, _ = levels.cut_volume(neck, labels, kind, seed)
        necks.append(cspine.segmenter_input(volume))
    return [cube for pair in zip(drawn, necks) for cube in pair]


@torch.inference_mode()
def measure_norms(o, batch=4):
    """Write the segmenter of --init with norms whose statistics are the mean over batches."""
    content = cspine.load_checkpoint(o.init)
    model = cspine.new_model("segmenter", content["settings"])
    model.load_state_dict(content["tensors"])
    model.float().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean of all batches
            layer.train()
    cubes = norm_cubes(o)
    for first in range(0, len(cubes), batch):
        model(torch.stack(cubes[first : first + batch]))
    for name, tensor in model.state_dict().items():
        if "running" in name:
            stored = content["tensors"][name]
            content["tensors"][name] = tensor.to(stored.dtype)
    o.out.mkdir(parents=True, exist_ok=True)
    path = o.out / "segmenter_fold0.pt"
    cspine.write_atomic(path, lambda new: torch.save(content, new))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("hands", "cubes", "necks", *STAGES, "norms"))
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--necks", type=Path, help="folder of <patient>.nii.gz")
    parser.add_argument("--init", default=str(ROOT / "weights/segmenter_fold0.pt"))
    parser.add_argument("--out", type=Path, default=Path("new"))
    parser.add_argument("--workers", type=int, default=1, help="processes of hands and necks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="of a stage, instead of its own")
    parser.add_argument("--seed", type=int, help="of a stage, instead of its own")
    parser.add_argument("--drawn", type=int, default=DRAWN, help="phantoms that hands draws")
    parser.add_argument("--old-hands", help="folder of generators that left the repository")
    parser.add_argument("--drawn-old", type=int, default=20, help="studies of each of them")
    o = parser.parse_args()

    cspine.keep_memory()
    if o.old_hands:
        sys.path.append(str(Path(o.old_hands).resolve()))
    if o.step in ("hands", "cubes"):
        make = make_hand if o.step == "hands" else make_cube
        make_all(make, o.work / o.step, hand_items(o), o.workers)
    elif o.step == "necks":
        coarse = zip(real_necks.read_necks(o.necks, "train"))
        make_all(make_neck, o.work / "necks", coarse, o.workers)
    elif o.step == "norms":
        measure_norms(o)
    else:
        stage = STAGES[o.step]
        own = dict(steps=o.steps, seed=o.seed)
        stage = replace(stage, **{n: v for n, v in own.items() if v is not None})
        train_segmenter(o, stage)


if __name__ == "__main__":
    main()
