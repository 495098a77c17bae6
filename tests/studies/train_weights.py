"""A segmenter like the one that ships, of real necks and drawn ones, on two CPU cores.

    python tests/studies/train_weights.py hands --work WORK
    python tests/studies/train_weights.py necks --work WORK --necks NECKS
    python tests/studies/train_weights.py first --work WORK --init OLDER --out FIRST
    python tests/studies/train_weights.py second --work WORK --init FIRST/SEGMENTER --out NEW

Each step keeps what it has done and goes on where it was stopped. `hands` draws studies and
keeps them as cubes (10 s each), `necks` brings the CTs to a fine grid and masks them (6 s
each), `first` and `second` train (8 s a step) and write `segmenter_fold0.pt`. NECKS holds
`<patient>.nii.gz`; who is kept out, and what a view is, says tests/necks/real_necks.py.
"""

import argparse
import copy
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ".", "tests", "tests/tools", "tests/necks"
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import cspine  # noqa: E402
import phantoms  # noqa: E402
import real_necks  # noqa: E402

EDGE = 128  # of a cube
DRAWN = 176  # studies of phantoms.py; tubes.py only measures
HAND_SEED = 7777  # no seed that anything is measured on
LEVELS = 8  # T1 is taught too: the network answers for it only while it is trained
UNKNOWN = 255  # label of cells that teach nothing

# A step: samples of a batch, and how a real neck is cut.
WINDOW = 128, 80, 80  # cells of a cube around the spine: a third of the time of a whole one
VIEWS = dict(closer=0.45, neck=0.30, whole=0.13, partial=0.12)
OFF_CENTRE = 0.25  # of a window, in half edges of the cube

WARM_UP = 0.05
WEIGHT_DECAY = 0.01
EMA = 0.998
CLIP = 1.0  # norm of the gradient
DROP_PATH = 0.05
SAVE_EVERY = 60  # steps
SAY_EVERY = 20


@dataclass(frozen=True)
class Stage:
    """What a step is made of: real necks and drawn studies."""

    steps: int
    lr: float  # peak of AdamW
    seed: int
    batch: tuple  # sources of a step's samples, each a window
    whole_share: float  # of the steps: two whole cubes, from one of two pairs of sources
    whole_batches: tuple


STAGES = dict(
    first=Stage(
        steps=500, lr=5e-4, seed=1,
        batch=("neck", "drawn", "neck", "drawn"),
        whole_share=0.25,
        whole_batches=(("neck", "drawn"), ("neck", "drawn"))),
    second=Stage(  # back to the drawn edges
        steps=85, lr=2.5e-4, seed=2,
        batch=("neck", "drawn", "drawn", "drawn"),
        whole_share=0.35,
        whole_batches=(("neck", "drawn"), ("drawn", "drawn"))))


# ==== What is trained on ====

def draw_study(number):
    """One drawn study."""
    share = np.random.default_rng([HAND_SEED, number, 2]).random()
    variety = 1 + 0.3 * share * (number % 2)
    return phantoms.make_phantom([HAND_SEED, number], 256, variety, 2.0)


def make_hands(work):
    """Cubes of all drawn studies under `work`/hands."""
    folder = work / "hands"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(DRAWN):
        path = folder / f"phantoms_{number:03}.npz"
        if path.exists():
            continue
        study = draw_study(number)
        volume = cspine.Volume("", study.hu, study.spacing, np.eye(4))
        cube = cspine.segmenter_input(volume)[0] * 255
        cells = (np.arange(EDGE) + 0.5) / EDGE
        nearest = np.ix_(*[(cells * n).astype(int) for n in study.label.shape])
        save(path, cube=cube.round().byte().numpy(), label=study.label[nearest])
        print(path, flush=True)


def make_necks(work, necks):
    """The necks to train on, on a fine grid, under `work`/necks."""
    folder = work / "necks"
    folder.mkdir(parents=True, exist_ok=True)
    for coarse in real_necks.read_necks(necks, "train"):
        path = folder / f"{coarse.name}.npz"
        if path.exists():
            continue
        neck = real_necks.finer(coarse)
        labels = real_necks.make_mask(neck)
        unknown = real_necks.uncertain(neck, labels)
        taught = np.where(unknown, np.uint8(UNKNOWN), labels)
        save(path, hu=neck.hu, spacing=neck.spacing, labels=labels, taught=taught)
        print(path, flush=True)


def save(path, **arrays):
    def write(new):
        with open(new, "wb") as file:
            np.savez_compressed(file, **arrays)

    cspine.write_atomic(path, write)


def read_all(folder):
    """{file's stem: its arrays, a dict}, in memory."""
    out = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            out[path.stem] = dict(file)
    return out


# ==== Samples ====

def neck_sample(necks, rng, shape):
    """A view of a real neck: float32 0..1 and uint8 labels of `shape`."""
    arrays = necks[rng.choice([*necks])]
    neck = real_necks.Neck("", arrays["hu"], arrays["spacing"], {}, None)
    labels = arrays["labels"]
    kind = rng.choice([*VIEWS], p=[*VIEWS.values()])
    view = real_necks.draw_view(neck, labels, rng, kind)

    middle = real_necks.vertebrae_ends(neck, labels).mean(0)
    spine = np.linalg.inv(view.axes) @ (middle - view.centre)
    window = draw_window(rng, spine, shape)

    hu = real_necks.view_hu(neck, view, shape, window=window)
    taught = real_necks.view_labels(neck, arrays["taught"], view, shape, window=window)
    edges = 2 * np.linalg.norm(view.axes, axis=0) * shape / EDGE
    hu = real_necks.dress(hu, edges, rng)

    level, width = cspine.SEGMENTER_WINDOW
    return ((hu - level + width / 2) / width).clip(0, 1), taught


def draw_window(rng, spine, shape):
    """Ends, from -1 to 1, of a window of `shape` cells near a point of the cube."""
    half = np.array(shape) / EDGE
    off = rng.uniform(-OFF_CENTRE, OFF_CENTRE, 3) * (0, 1, 1)
    middle = (spine + off).clip(-1 + half, 1 - half)
    return middle - half, middle + half


def hand_sample(hands, rng, shape):
    """A drawn study moved as cspine's augmentation moves it, or a window of that."""
    arrays = hands[rng.choice([*hands])]
    cube = torch.from_numpy(arrays["cube"])[None, None] / 255
    label = torch.from_numpy(arrays["label"])[None, None].float()
    motion = cspine.draw_matrix(rng, cspine.VOLUME_RANGES, 3)
    motion = motion[::-1, [2, 1, 0, 3]]  # grid_sample's axes are x, y, z
    matrix, shift = motion[:, :3], motion[:, 3]

    inside = np.argwhere((arrays["label"] > 0) & (arrays["label"] < LEVELS))
    spine = (inside.mean(0) + 0.5) / EDGE * 2 - 1
    low, high = draw_window(rng, np.linalg.inv(matrix) @ (spine - shift), shape)
    shift = shift + matrix @ (low + high) / 2
    matrix = matrix * (high - low) / 2

    theta = np.c_[matrix, shift][::-1, [2, 1, 0, 3]]
    theta = torch.from_numpy(np.float32(theta))[None]
    grid = F.affine_grid(theta, (1, 1, *shape), align_corners=False)
    seen = F.grid_sample(cube, grid, align_corners=False)[0, 0]
    truth = F.grid_sample(label, grid, "nearest", align_corners=False)[0, 0]
    truth[truth > LEVELS] = 0
    return seen.numpy(), truth.byte().numpy()


def make_batch(stage, step, necks, hands):
    """(B, 1, Z, Y, X) in 0..1 and uint8 labels (B, Z, Y, X) of a step."""
    rng = np.random.default_rng([stage.seed, step])
    whole = rng.random() < stage.whole_share
    shape = (EDGE,) * 3 if whole else WINDOW

    cubes, labels = [], []
    for kind in stage.whole_batches[step % 2] if whole else stage.batch:
        if kind == "neck":
            cube, label = neck_sample(necks, rng, shape)
        else:
            cube, label = hand_sample(hands, rng, shape)
        cube = torch.from_numpy(cube.copy())[None, None]
        cspine.grey_levels(cube, rng, cspine.VOLUME_RANGES)
        cubes.append(cube[0])
        labels.append(torch.from_numpy(label))
    return torch.stack(cubes), torch.stack(labels)


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

    def forward(self, x):
        x = (x - 0.5) * 4
        cells = x.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2)
        cells = cells.flatten(5)[:, 0].movedim(-1, 1)
        *skips, x = self.encoder(x)
        skips[0] = torch.cat([skips[0], cells], 1)
        for block, skip in zip(self.decoder, skips[::-1]):
            x = block(torch.cat([F.interpolate(x, skip.shape[2:]), skip], 1))
        x = self.head(x).unflatten(1, (LEVELS, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.flatten(6).flatten(4, 5).flatten(2, 3)

    def shipped_tensors(self):
        """As cspine stores a segmenter, without T1."""
        out = {}
        for name, tensor in self.state_dict().items():
            if name.startswith("head."):
                tensor = tensor[:56]
            out[name] = tensor.half() if tensor.ndim > 1 else tensor.clone()
        return out


def teaching_loss(logits, labels):
    """cspine's segmenter_loss where the labels are known."""
    known = (labels != UNKNOWN)[:, None].float()
    truth = torch.stack([labels == level for level in range(1, LEVELS + 1)], 1).float()
    mask, space = logits.sigmoid() * known, (2, 3, 4)
    seen = truth.amax(space)
    dice = (2 * (mask * truth).sum(space) + 1) / ((mask + truth).sum(space) + 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    lost = (entropy * known).mean()
    return 10 * lost + 1 - (dice * seen).sum() / seen.sum().clamp(min=1)


# ==== Training ====

class Run:
    """The state of a training, saved whole."""

    def __init__(self, init, stage):
        content = cspine.load_checkpoint(init)
        torch.manual_seed(stage.seed)
        self.stage, self.settings, self.step = stage, content["settings"], 0
        self.model = TeachingSegmenter(self.settings, content["tensors"])
        self.model.to(memory_format=torch.channels_last_3d)
        self.averaged = copy.deepcopy(self.model).eval()
        parameters = [*self.model.parameters()]
        self.optimizer = torch.optim.AdamW([
            dict(params=[p for p in parameters if p.ndim > 1], weight_decay=WEIGHT_DECAY),
            dict(params=[p for p in parameters if p.ndim == 1], weight_decay=0)])

    def update(self, batch):
        """One step; its loss."""
        done = self.step / self.stage.steps
        warm = min(1, (done + 1e-3) / (WARM_UP + 1e-3))
        for group in self.optimizer.param_groups:  # half a cosine, down to 1 %
            group["lr"] = self.stage.lr * warm * (0.505 + 0.495 * math.cos(math.pi * done))
        cubes, labels = batch
        self.optimizer.zero_grad()
        loss = teaching_loss(self.model.train()(cubes), labels)
        loss.backward()
        if nn.utils.clip_grad_norm_(self.model.parameters(), CLIP).isfinite():
            self.optimizer.step()
        self.step += 1
        self.average()
        return loss.item()

    @torch.no_grad()
    def average(self):
        share = 1 - min(EMA, (1 + self.step) / (10 + self.step))
        pairs = zip(self.averaged.state_dict().values(), self.model.state_dict().values())
        for slow, fast in pairs:
            if slow.is_floating_point():
                slow.lerp_(fast, share)
            else:
                slow.copy_(fast)

    def save(self, out):
        parts = dict(model=self.model, averaged=self.averaged, optimizer=self.optimizer)
        state = {name: part.state_dict() for name, part in parts.items()}
        state["step"] = self.step
        cspine.write_atomic(out / "last.pt", lambda new: torch.save(state, new))
        recipe = cspine.Recipe(
            backbone=self.settings["backbone"], epochs=1, batch_size=len(self.stage.batch),
            lr=self.stage.lr, size=EDGE, seed=self.stage.seed)
        cspine.save_checkpoint(
            out / "segmenter_fold0.pt", "segmenter", recipe,
            settings=self.settings, tensors=self.averaged.shipped_tensors())

    def load(self, out):
        state = torch.load(out / "last.pt", weights_only=True)
        self.step = state.pop("step")
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


def train_segmenter(work, init, out, stage):
    """Train on what `hands` and `necks` made; goes on from `out`/last.pt."""
    necks, hands = read_all(work / "necks"), read_all(work / "hands")
    if not necks or not hands:
        raise SystemExit(f"nothing in {work}/necks or {work}/hands: run these steps first")
    run = Run(init, stage)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "last.pt").exists():
        run.load(out)

    losses = []
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(make_batch, stage, run.step, necks, hands)
        while run.step < stage.steps:
            now = batch.result()
            batch = pool.submit(make_batch, stage, run.step + 1, necks, hands)
            losses.append(run.update(now))
            if run.step % SAY_EVERY == 0:
                report(out, run, np.mean(losses[-SAY_EVERY:]))
            if run.step % SAVE_EVERY == 0 or run.step == stage.steps:
                run.save(out)


def report(out, run, loss):
    line = f"{run.step},{loss:.4f},{run.optimizer.param_groups[0]['lr']:.3g}"
    print(line, flush=True)
    path = out / "segmenter_fold0_log.csv"
    if not path.exists():
        path.write_text("step,train_loss,lr\n")
    with path.open("a") as file:
        file.write(line + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("hands", "necks", *STAGES))
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--necks", type=Path, help="folder of <patient>.nii.gz")
    parser.add_argument("--init", default=str(ROOT / "weights/segmenter_fold0.pt"))
    parser.add_argument("--out", type=Path, default=Path("new"))
    o = parser.parse_args()

    cv2.setNumThreads(1)
    if o.step == "hands":
        make_hands(o.work)
    elif o.step == "necks":
        make_necks(o.work, o.necks)
    else:
        train_segmenter(o.work, o.init, o.out, STAGES[o.step])


if __name__ == "__main__":
    main()
