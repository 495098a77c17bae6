# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "timm>=1.0.9", "pydicom>=3.0", "opencv-python>=4.8",
#                 "numpy>=1.26", "pandas>=2.1", "tqdm>=4.64"]
# ///
"""cspine: neck CT studies in, fracture probabilities of C1..C7 and the patient out.

    study folder --read_volume--> Volume (HU, Z Y X, head first)
    Volume --segmenter_input--> (1, D, D, D) --Segmenter--> probability (7, D, D, D)
    Volume + probability --vertebra_slices--> uint8 (7, T, K, S, S): 5 slices + 1 mask a step
    (T, K, S, S) --VertebraClassifier--> T logits --> P(Ck)
    (7 * T, K, S, S) --PatientClassifier--> 7 * T + 1 logits --> P(C1..C7), P(patient_overall)
    all models --combine--> submission.csv

Shapes: B batch, C channels, Z Y X voxel axes (head to foot, front to back, right to left),
T 15 steps, K 6 channels a step, S 224 crop edge, D 128 cube edge, F features.

In the repository: `python cspine.py demo`, other modes: --help. Pasted, it runs nothing
until main(["predict"]). Not a medical device."""

import argparse
import copy
import functools
import hashlib
import math
import mmap
import os
import re
import resource
import signal
import struct
import sys
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, permutations
from pathlib import Path
from time import monotonic

import cv2
import numpy as np
import pandas as pd
import pydicom
import torch
import torch.nn.functional as F
from torch import distributed as dist, nn
from tqdm import tqdm


# ==== Facts and settings ====
# The starting solution's numbers, unless another source is named.

VERTEBRAE = ("C1", "C2", "C3", "C4", "C5", "C6", "C7")
TARGETS = VERTEBRAE + ("patient_overall",)
STUDY = "StudyInstanceUID"
STEPS, SLICES_PER_STEP, CROP = 15, 5, 224
CHANNELS = SLICES_PER_STEP + 1  # and a mask
TARGET_WEIGHTS, POSITIVE_FACTOR = np.array([1.0] * 7 + [7.0]), 2.0  # the metric's
# The constants with the best score (0.5573) on the 2019 training labels.
PRIOR = np.array([0.1027, 0.1930, 0.0512, 0.0752, 0.1105, 0.1842, 0.2559, 0.5309])
FLOOR, USUAL, AIR_HU = 1e-4, -2.5, -1024  # answers; their median logit; padding
SEGMENTER_WINDOW, BONE_WINDOW = (300, 1600), (500, 2000)  # (level, width) HU
MIN_SLICES, MAX_VOXELS = 16, 2**30  # of a study
MAX_GAP_MM, SAME_STEP_MM = 30.0, 0.0031  # odd: no usual spacing lies on the edge
MASK_THRESHOLDS = (0.2, 0.05)  # first place's, in turn
MIN_CELLS, BOX_MARGIN, APART = 12, 1.0, 2  # cells: of a vertebra; around (first place); between
AROUND, CLOSER, BOX_SHARE = (0.25, 0.75, 0.75), 0.57, 0.05  # of extent; cube; fullest plane
CROPS_AT_ONCE = {"cpu": STEPS, "cuda": 210}  # 15: a CPU's cache
CROP_PNG = cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, 3
KAGGLE_DATA = "/kaggle/input/rsna-2022-cervical-spine-fracture-detection"
KAGGLE_MINUTES = 510.0  # of a submission's 540
MAX_SKIPPED_STEPS = 20  # in a row
MAX_READ_S, READERS = 600, 99  # or a quarter of the time left; some may hang


@dataclass(frozen=True)
class Recipe:
    """A training. Ours, unless a source is named."""
    backbone: str
    epochs: int
    batch_size: int
    lr: float  # peak
    size: int = CROP
    mixup: float = 0.0  # share of batches (first place)
    accumulate: int = 1  # parts of a batch
    weight_decay: float = 0.01
    warm_up: float = 0.05  # share of the steps
    ema: float = 0.998
    clip: float = 1.0  # norm of the gradient
    drop_path: float = 0.05
    dropout: float = 0.2  # Tan and Le 2021
    hidden: int = 256  # LSTMs' (starting solution)
    thin: int = 1  # 3: a third of the steps
    shuffle: float = 0.2  # share of samples (first place)
    mask_of: str = "last"
    half: bool = False  # bfloat16 on a CPU that has it
    seed: int = 0


RECIPES = dict(segmenter=Recipe("tf_efficientnetv2_s", 60, 4, 1e-3, 128, dropout=0.1),
               vertebra=Recipe("tf_efficientnetv2_s", 20, 8, 3e-4, mixup=0.2),
               patient=Recipe("convnext_nano", 15, 2, 2e-4, mixup=0.2))


@dataclass(frozen=True)
class Answers:
    """How logits become answers."""
    top_k: int = 5  # largest steps averaged (first place)
    views: int = 1  # dihedral ones a model, from the i-th on
    noisy_or: float = 0.8  # share in patient_overall
    compile: bool = False  # pays after hundreds of studies


# ==== House tools ====

class UserError(Exception):
    """What the user can mend: status 2."""


class StudyError(UserError):
    """One study that cannot be used."""


class Stopped(Exception):
    """A run that ended early, all saved."""


@contextmanager
def study_errors(where):
    """Any exception becomes a StudyError: damaged bytes raise nearly every kind."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise StudyError(f"{where}: {reason}") from error


def say(text):
    tqdm.write(text, file=sys.stderr)


def progress(items, unit, total=None):
    return tqdm(items, unit=unit, total=total, disable=None, leave=False)


def write_atomic(path, write):
    new = (path := Path(path)).parent / f".{os.getpid()}.{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(new)
        new.replace(path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        with suppress(OSError):
            new.unlink()


def write_csv(path, table):
    write_atomic(path, lambda new: table.to_csv(new, index=False))


def read_csv(path, columns):
    with study_errors(f"{path}: no csv with {', '.join(columns)}"):
        table = pd.read_csv(path, dtype={STUDY: str, "row_id": str})
        table[[*columns]]  # or KeyError
        return table


def prefetch(work, items, workers, ahead=1):
    """(item, future of work(item)), `ahead` of them under way."""
    pool, waiting = ThreadPoolExecutor(max(1, workers)), []
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > ahead:
                yield waiting.pop(0)
        yield from waiting
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def ranks():  # set by torchrun
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def over_ranks(value):
    out = [value] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(out, value)
    return out


def pick_device(name):
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    with study_errors(f"--device {name}"):
        return torch.empty(1, device=name).device


def half_type(device):
    """bfloat16 where it is native, else float16 on a GPU (T4), None on a CPU."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    flags = Path("/proc/cpuinfo")
    return torch.bfloat16 if flags.exists() and "_bf16" in flags.read_text() else None


def autocast(device, wanted=True):
    half = half_type(device) if wanted else None
    return torch.autocast(device.type, half, enabled=half is not None)


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of KiB


class Stop:
    """Why a run should end: a signal or its deadline."""
    def __init__(self, minutes=0.0, clock=monotonic):
        self.clock, self.signal, self.until = clock, "", clock() + 60 * min(minutes or 1e7, 1e7)
        with suppress(ValueError):  # fails in a thread
            for kind in (signal.SIGINT, signal.SIGTERM):
                signal.signal(kind, self.note)

    def note(self, number, _):
        self.signal = signal.Signals(number).name

    def left(self):
        return self.until - self.clock()

    def reason(self, needed=0.0):
        return self.signal or ("--time-limit" if self.left() < needed else "")


# ==== Reading ====
# Only its position says where a slice lies.

DEFAULTS = dict(ImagePositionPatient=[math.nan] * 3, ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                PixelSpacing=[0, 0], RescaleSlope=1, RescaleIntercept=0)
NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4",
               1024: "i8", 1280: "u8"}


class Volume(namedtuple("Volume", "uid hu spacing affine problems", defaults=[()])):
    """A CT study: hu int16 (Z, Y, X), head first; spacing mm; affine (4, 4): LPS mm of a voxel."""


def read_slices(path):
    """[(series, (first voxel, step down a row, to the right) LPS mm, HU (Y, X))] of frames."""
    if not path.is_file():  # a pipe would wait
        raise StudyError("no plain file")
    data, out = pydicom.dcmread(path, force=True), []
    for number, stored in enumerate(decode_pixels(data)):
        groups = [*data.get("SharedFunctionalGroupsSequence", []),
                  *data.get("PerFrameFunctionalGroupsSequence", [])[number : number + 1]]
        tags = {part.keyword: part.value for group in groups for part in group.iterall()}
        position, directions, (height, width), slope, intercept = (
            np.array(tags.get(name) or data.get(name) or default, float)
            for name, default in DEFAULTS.items())
        row, column = directions.reshape(2, 3)
        place, normal = np.array([position, column * height, row * width]), np.cross(row, column)
        if not (min(height, width) > 0 and abs(place).max() < 1e6 and 0.9 < normal @ normal < 1.1):
            raise StudyError("no usable position or orientation")
        memory = mmap.mmap(-1, 2 * stored.size, mmap.MAP_PRIVATE)  # malloc hoards
        hu = np.ndarray(stored.shape, np.int16, memory)
        hu[:] = np.rint(stored * slope + intercept).clip(AIR_HU, 32767)
        steps = np.rint(place[1:].ravel() / SAME_STEP_MM)
        out.append(((str(data.get("SeriesInstanceUID")), hu.shape, *steps), place, hu))
    return out


def read_series(folder, workers, give_up):
    """(Planes in order, where even steps lie among them, affine, problems)."""
    files, stacks, problems = sorted(Path(folder).iterdir(), key=lambda p: (len(p.name), p)), {}, []
    for path, future in prefetch(read_slices, files, workers, 4 * workers + 1):
        if give_up():
            raise StudyError("out of time")
        try:
            with study_errors(path.name):
                for series, *frame in future.result():
                    stacks.setdefault(series, []).append(frame)
        except StudyError as error:
            problems.append(f"{error}; left out")
    stack = max(stacks.values(), key=len, default=[])
    places = np.array([place for place, _ in stack]).reshape(-1, 3, 3)
    normal = np.cross(places[:1, 1], places[:1, 2])
    mm = (places[:, 0] @ normal.T).ravel() / np.linalg.norm(normal)
    order = np.unique(np.rint(mm / SAME_STEP_MM), return_index=True)[1]
    run = max(np.split(order, np.flatnonzero(np.diff(mm[order]) > MAX_GAP_MM) + 1), key=len)
    if other := sum(map(len, stacks.values())) - len(run):
        problems.append(f"{other} images of another series, size or position left out")
    if len(run) < MIN_SLICES:
        raise StudyError("; ".join([f"{len(run)} usable slices, not {MIN_SLICES}", *problems[-1:]]))
    mm, steps, (start, column, row) = mm[run], np.arange(len(run)), places[run[0]]
    step, way = np.median(np.diff(mm)), places[run[-1], 0] - start
    even = np.linspace(mm[0], mm[-1], round(np.ptp(mm) / step) + 1)
    if len(even) != len(mm) or abs(mm - even).max() > 0.25 * step:
        problems.append(f"uneven positions, filled to {len(even)}")
        steps = np.interp(even, mm, steps)
    if (straight := np.ptp(mm) / np.linalg.norm(way)) < 0.999:
        problems.append(f"gantry tilted by {math.degrees(math.acos(straight)):.0f} degrees")
    affine = np.c_[way / (len(even) - 1), column, row, start]
    return [stack[k][1] for k in run], steps, np.r_[affine, [[0, 0, 0, 1]]], problems


def read_volume(folder, workers=2, give_up=lambda: False):
    """One CT study, head first, in HU. Raises StudyError, nothing else."""
    with study_errors(folder):
        planes, steps, affine, problems = read_series(folder, workers, give_up)
        shape = len(steps), *planes[0].shape
        if math.prod(shape) > MAX_VOXELS:
            raise StudyError(f"{shape} voxels")
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        share = affine[2::-1, :3] / spacing * [[-1], [1], [1]]  # (down back left, old axis)
        axes = max(permutations(range(3)), key=lambda axes: abs(share[range(3), axes]).sum())
        flip = share[range(3), axes] < 0
        affine, hu = affine[:, [*axes, 3]], np.empty([shape[k] for k in axes], np.int16)
        affine[:, 3] += affine[:, :3] @ (flip * np.subtract(hu.shape, 1))
        affine[:, :3] *= 1 - 2 * flip
        slices = np.flip(hu, [*np.flatnonzero(flip)]).transpose(np.argsort(axes))
        for k, at in enumerate(steps):
            low = min(int(at), len(planes) - 2)
            planes[:low] = [None] * low  # never held twice
            slices[k] = cv2.addWeighted(planes[low], low + 1 - at, planes[low + 1], at - low, 0)
    return Volume(Path(folder).name, hu, tuple(spacing[[*axes]].tolist()), affine, tuple(problems))


def read_nifti(path):
    """(labels (I, J, K), slope, intercept, voxel from LPS mm)."""
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = zlib.decompressobj(31).decompress(raw, MAX_VOXELS)
    order = "<" if raw[:2] == b"\x5c\x01" else ">"  # offsets of nifti1.h
    short = np.ndarray(174, order + "i2", raw)
    real = np.ndarray(87, order + "f4", raw).astype(float)
    rank, start, shape, zooms = short[20], int(real[27]), short[21:24], real[20:23]
    if raw[344:348] != b"n+1\0" or rank < 3 or start < 348 or (short[24 : 21 + rank] > 1).any():
        raise ValueError("not one 3-D image")  # NumPy reads before a file's start
    stored = np.ndarray(shape, order + NIFTI_TYPES[short[35]], raw, start, order="F")
    affine = np.diag([*zooms * (-1, 1, 1), 1])
    affine[:3, 3] = affine[:3, :3] @ (1.0 - shape) / 2  # as nibabel does
    if short[127] > 0:  # sform
        affine[:3] = real[70:82].reshape(3, 4)
    elif short[126] > 0:  # qform
        axis, affine[:3, 3] = real[64:67], real[67:70]
        skew, cosine = np.cross(np.eye(3), axis), math.sqrt(max(0, 1 - axis @ axis))
        turn = np.eye(3) + 2 * (cosine * skew + skew @ skew)
        affine[:3, :3] = turn * zooms * (1, 1, -1 if real[19] < 0 else 1)
    voxel_from_lps = np.linalg.inv(np.asarray_chkfinite(affine)) * (-1, -1, 1, 1)
    slope, intercept = real[28:30] if 0 < abs(real[28]) < math.inf else (1, 0)
    return stored, slope, intercept, voxel_from_lps


def read_mask(path, volume, shape=None):
    """uint8 (Z, Y, X), or a coarser `shape`: the nearest label, 1-7 = C1-C7, or 0."""
    with study_errors(f"{path}: no whole NIfTI-1 mask"):
        stored, slope, intercept, voxel_from_lps = read_nifti(path)
    out = np.zeros(shape or volume.hu.shape, np.uint8)
    matrix = (voxel_from_lps @ volume.affine)[:3, :, None, None]
    z, y, x = ((np.arange(n) + 0.5) * m / n - 0.5 for m, n in zip(volume.hu.shape, out.shape))
    flat = matrix[:, 1] * y[:, None] + matrix[:, 2] * x + matrix[:, 3] + 0.5  # (3, Y, X)
    for plane, above in zip(out, z):
        at = np.floor(flat + matrix[:, 0] * above).astype(int)
        inside = ((at >= 0) & (at < np.reshape(stored.shape, (3, 1, 1)))).all(0)
        values = stored[tuple(k[inside] for k in at)] * slope + intercept
        plane[inside] = np.where((values > 0) & (values < 255), np.rint(values), 0)
    return out


def resize(image, rows, columns):
    how = cv2.INTER_LINEAR if rows > len(image) or columns > image.shape[1] else cv2.INTER_AREA
    return cv2.resize(image, (columns, rows), interpolation=how)


def segmenter_input(volume, size=128, window=SEGMENTER_WINDOW):
    """float32 (1, D, D, D) in 0..1: a cell averages its share."""
    low, width = window[0] - window[1] // 2, window[1]
    planes = (np.float32(np.clip(hu, low, low + width)) for hu in volume.hu)
    planes = [resize(resize(p, size, p.shape[1]), size, size).ravel() for p in planes]
    cube = resize(np.array(planes), size, size * size)  # (Z, D * D) -> (D, D * D)
    return torch.from_numpy((cube.reshape(1, size, size, size) - low) / width)


# ==== Segmenter ====
# A 3-D network can be wrong without an error: to_3d refuses what it does not know.

class Conv3dSame(nn.Conv3d):
    """TensorFlow's SAME padding."""
    def forward(self, x):
        padding = []
        for n in x.shape[:1:-1]:  # F.pad takes the last axis first
            total = max(self.kernel_size[0] - (n % self.stride[0] or self.stride[0]), 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


class BatchNormAct3d(nn.BatchNorm3d):
    """Then timm's activation."""
    def forward(self, x):
        return self.act(super().forward(x))


class SqueezeExcite3d(nn.Sequential):
    """The mean over three axes."""
    def forward(self, x):
        return x * super().forward(x.mean((2, 3, 4), keepdim=True))


SOLID = dict(Conv2d=nn.Conv3d, Conv2dSame=Conv3dSame, MaxPool2d=nn.MaxPool3d,
             AvgPool2d=nn.AvgPool3d, BatchNorm2d=nn.BatchNorm3d, BatchNormAct2d=BatchNormAct3d)


def to_3d(network):
    """The 3-D twin of a timm network, paths kept. UserError naming a layer that has none."""
    twin = copy.deepcopy(network)
    for path, layer in twin.named_modules():
        kind, name = type(layer).__name__, str(type(layer))
        sides = {n: v for n, v in vars(layer).items() if isinstance(v, tuple) and len(v) == 2}
        own = [*layer.parameters(False), *layer.buffers(False)]
        plain = re.search("activation|ConvNormAct|DropPath", name)
        if kind in SOLID and all(v[0] == v[1] for v in sides.values()):
            layer.__class__ = SOLID[kind]
            vars(layer).update({n: v[:1] * 3 for n, v in sides.items()})
            if isinstance(layer, nn.Conv3d):
                k = layer.kernel_size[0]
                layer.weight = nn.Parameter(torch.stack([layer.weight.data / k] * k, 2))
        elif "SqueezeExcite" in name or "SEModule" in name:
            layer.__class__ = SqueezeExcite3d
        elif own or "2d" in name or "timm.layers" in name and not plain:
            raise UserError(f"no 3-D twin of {type(network).__name__}.{path}: unknown {name}")
    return twin


def create_backbone(name, **arguments):
    if ":" in name:  # hf-hub: the network
        raise UserError("no plain name")
    import timm  # 0.2 GB, for networks alone
    return timm.create_model(name, pretrained=False, **arguments)


class ConvBlock(nn.Module):
    """Convolution, norm, ReLU, then scSE (Roy et al. 2018)."""
    def __init__(self, before, width):
        super().__init__()
        self.conv = nn.Conv3d(before, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(width)
        self.squeeze = nn.Conv3d(width, width // 4, 1)
        self.excite = nn.Conv3d(width // 4, width, 1)
        self.place = nn.Conv3d(width, 1, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        channel = self.excite(F.relu(self.squeeze(x.mean((2, 3, 4), keepdim=True))))
        return x * (channel.sigmoid() + self.place(x).sigmoid())


class Segmenter(nn.Module):
    """3-D U-Net: (B, 1, Z, Y, X) in 0..1 -> (B, 7, Z, Y, X) logits; axes multiples of 16."""
    def __init__(self, backbone="tf_efficientnetv2_s", size=128, window=SEGMENTER_WINDOW,
                 drop_path=0, dropout=0, **_):  # a recipe holds more
        super().__init__()
        self.settings = dict(backbone=backbone, size=size, window=window)
        flat = create_backbone(backbone, features_only=True, out_indices=(0, 1, 2, 3), in_chans=1,
                               drop_path_rate=drop_path)
        if flat.feature_info.reduction() != [2, 4, 8, 16]:
            raise UserError("no features at strides 2, 4, 8 and 16")
        if hasattr(flat, "blocks"):  # else on to stride 32
            del flat.blocks[int(flat.feature_info.module_name()[-1].split(".")[1]) + 1 :]
        self.encoder = to_3d(flat)
        first, second, third, last = flat.feature_info.channels()
        self.decoder = nn.ModuleList([
            ConvBlock(last + third, 64), ConvBlock(64 + second, 32), ConvBlock(32 + first + 8, 48)])
        self.dropout = nn.Dropout3d(dropout)
        self.head = nn.Conv3d(48, 7 * 8, 1)  # a place answers for 8 cells
        nn.init.constant_(self.head.bias, -4)  # most cells are background

    def forward(self, x):
        if any(n % 16 for n in x.shape[2:]):
            raise UserError(f"cube {[*x.shape[2:]]}: no multiples of 16")
        x = (x - 0.5) * 4
        cells = x.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).flatten(5)[:, 0].movedim(-1, 1)
        *skips, x = self.encoder(x)
        skips[0] = torch.cat([skips[0], cells], 1)  # (B, C + 8, Z/2, ...)
        for block, skip in zip(self.decoder, skips[::-1]):
            x = block(torch.cat([F.interpolate(x, skip.shape[2:]), skip], 1))
        x = self.head(self.dropout(x)).unflatten(1, (7, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.flatten(6).flatten(4, 5).flatten(2, 3)  # (B, 7, Z/2, 2, ...) -> (B, 7, Z, Y, X)


def segmenter_loss(logits, labels):
    """BCE, and Dice of those in view: logits (B, 7, Z, Y, X), uint8 labels (B, Z, Y, X)."""
    logits, space = logits.float(), (2, 3, 4)
    truth = torch.stack([labels == v for v in range(1, 8)], 1).float()
    mask, seen = logits.sigmoid(), truth.amax(space)
    dice = (2 * (mask * truth).sum(space) + 1) / ((mask + truth).sum(space) + 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth)
    return 10 * entropy + 1 - (dice * seen).sum() / seen.sum().clamp(min=1)


# ==== Slices ====
# The cube is stretched, by another factor on every axis.

def interleave(images, masks):
    """(75, S, S), (15, S, S) -> (15, 6, S, S): images 5i .. 5i + 4, then mask i."""
    return np.concatenate([images.reshape(STEPS, -1, *masks.shape[1:]), masks[:, None]], 1)


def vertebra_box(probability, gap=2):
    for threshold in MASK_THRESHOLDS:
        mask, box = probability > threshold, []
        if mask.sum() >= MIN_CELLS:
            for others in ((1, 2), (0, 2), (0, 1)):
                profile = mask.sum(others)
                inside = np.flatnonzero(profile > BOX_SHARE * profile.max())
                runs = np.split(inside, np.flatnonzero(np.diff(inside) > gap) + 1)
                longest = max(runs, key=lambda run: profile[run].sum())
                box.append(longest[[0, -1]])
            return np.array(box)  # (3, 2): first and last cell on each axis


def apply_window(hu, window):
    low, scale = window[0] - window[1] // 2, 255 / window[1]
    return cv2.convertScaleAbs(np.maximum(hu, low), alpha=scale, beta=-low * scale)


def crop_plane(plane, box, size):
    (y, x), (dy, dx) = box * plane.shape  # corner and step
    source = np.array([[dx, 0, x + (dx - 1) / 2], [0, dy, y + (dy - 1) / 2]])
    return cv2.warpAffine(
        plane, source, (size, size), borderMode=cv2.BORDER_REPLICATE,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def vertebra_slices(volume, probability, size=CROP, mask_of="last"):
    """uint8 (7, 15, 6, S, S), square in mm: all 0 if not seen, else the mask nowhere."""
    out, edge = np.zeros((7, STEPS, CHANNELS, size, size), np.uint8), probability.shape[-1]
    count, extent_mm = len(volume.hu), np.multiply(volume.hu.shape, volume.spacing)[1:]
    for v, cells in enumerate(probability):
        if (found := vertebra_box(cells)) is None:
            continue
        low, high = (found[1:].T + [[-BOX_MARGIN], [1 + BOX_MARGIN]]) * extent_mm / edge
        side = (high - low).max()
        box = np.array([(low + high - side) / 2, [side / size] * 2]) / extent_mm
        ends = (found[0] + [0, 1]) * count / edge - [0, 1]
        centres = np.rint(np.linspace(*ends, STEPS))[:, None].astype(int)
        index = (centres + [-2, -1, 0, 1, 2]).clip(0, count - 1)
        shown, which = np.unique(index, return_inverse=True)
        images = [crop_plane(apply_window(volume.hu[z], BONE_WINDOW), box, size) for z in shown]
        at = (index[:, -1 if mask_of == "last" else 2] + 0.5) * edge / count - 0.5
        masks = [crop_plane(cells[int(k)] * (1 - share) + cells[int(k) + 1] * share, box, size)
                 for k, share in np.float32(np.divmod(at.clip(0, edge - 1.001), 1)).T]
        out[v] = interleave(np.array(images)[which], np.rint(np.multiply(masks, 255)).clip(1))
    return out


def write_crops(path, crops):
    """Each different image once (steps share slices); the bytes they take."""
    index, known, edge = np.full(crops.shape[:3], -1, np.int16), {}, crops.shape[-1]
    for place in zip(*crops.any((3, 4)).nonzero()):
        index[place], _ = known.setdefault(crops[place].tobytes(), (len(known), crops[place]))
    images = [cv2.imencode(".png", image, CROP_PNG)[1].ravel() for _, image in known.values()]
    ends, data = np.cumsum([0, *map(len, images)]), np.concatenate([np.uint8([]), *images])
    write_atomic(path, lambda new: np.savez(new, index=index, ends=ends, data=data, edge=edge))
    return len(data)


def read_crops(path, vertebrae=range(7)):
    with study_errors(f"{path}: no crops"), np.load(path) as file:
        index, ends, data, edge = file.values()
        index = index[vertebrae]
        out = np.zeros((*index.shape, edge, edge), np.uint8)
        for k in np.unique(index[index >= 0]):
            out[index == k] = cv2.imdecode(data[ends[k] : ends[k + 1]], cv2.IMREAD_GRAYSCALE)
    return out


# ==== Classifiers ====

def logit_head(width, hidden, dropout):
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(0.1),
                         nn.Dropout(dropout), nn.Linear(hidden, 1))


class VertebraClassifier(nn.Module):
    """(B, 15, 6, S, S), uint8 or 0..1 -> (B, 15) logits of a fracture."""
    def __init__(self, backbone="tf_efficientnetv2_s", size=CROP, mask_of="last", hidden=256,
                 drop_path=0, dropout=0, **_):
        super().__init__()
        self.settings = dict(backbone=backbone, size=size, mask_of=mask_of, hidden=hidden)
        self.encoder = part = nn.Module()
        part.backbone = create_backbone(
            backbone, in_chans=CHANNELS, num_classes=0, global_pool="avg", drop_path_rate=drop_path)
        width = part.backbone.eval()(torch.zeros(1, CHANNELS, 64, 64)).shape[1]
        part.absent = nn.Parameter(torch.zeros(width))  # a step out of view
        part.lstm = nn.LSTM(width, hidden, 2, batch_first=True, dropout=dropout, bidirectional=True)
        self.head = logit_head(2 * hidden, hidden, dropout)

    def encode(self, crops):
        seen = crops[:, :, -1].amax((2, 3)).flatten() > 0  # (B * N,)
        features = self.encoder.absent.repeat(len(seen), 1)
        if seen.any():  # the absent cost nothing
            shown = crops.flatten(0, 1)[seen].to(memory_format=torch.channels_last)
            at_once = len(shown) if self.training else CROPS_AT_ONCE[crops.device.type]
            scale = 2 if crops.is_floating_point() else 2 / 255
            parts = [self.encoder.backbone(part * scale - 1) for part in shown.split(at_once)]
            features[seen] = torch.cat(parts).float()
        return features.unflatten(0, crops.shape[:2])  # (B, N, F)

    def forward(self, crops):
        features = self.encode(crops)
        with torch.autocast(crops.device.type, enabled=False):  # bfloat16 would round answers
            return self.answer(features)

    def answer(self, features):
        return self.head(self.encoder.lstm(features)[0])[..., 0]  # (B, N, F) -> (B, N)


class PatientClassifier(VertebraClassifier):
    """(B, 105, 6, S, S) -> (B, 105) logits of the steps, (B,) of the patient."""
    def __init__(self, backbone="convnext_nano", hidden=256, dropout=0, **others):
        super().__init__(backbone, hidden=hidden, dropout=dropout, **others)
        self.patient_lstm = copy.deepcopy(self.encoder.lstm)
        self.patient_head = logit_head(4 * hidden, hidden, dropout)

    def answer(self, features):
        whole = self.patient_lstm(features)[0]
        whole = torch.cat([whole.amax(1), whole.mean(1)], 1)  # (B, N, 2H) -> (B, 4H)
        return super().answer(features), self.patient_head(whole)[..., 0]


def fold_norms(model):
    """For inference: norms go into the convolutions that fed them in a run."""
    made_by = {}

    def note(module, given, out):
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            out.made_by = module
        elif hasattr(module, "running_var"):
            made_by[module] = getattr(given[0], "made_by", None)

    shape = (1, 1, 32, 32, 32) if isinstance(model, Segmenter) else (1, 1, CHANNELS, 64, 64)
    with nn.modules.module.register_module_forward_hook(note):
        model.eval()(torch.ones(shape))
    for part in model.modules():
        for name, norm in part.named_children():
            conv = made_by.get(norm)
            if conv in part.modules():  # else others may use its output
                vars(conv).update(vars(nn.utils.fuse_conv_bn_eval(conv, norm)))
                setattr(part, name, getattr(norm, "act", nn.Identity()))
    return model


def classifier_loss(outputs, labels):
    """The metric of (B, 15) and labels (B, 1), or ((B, 105), (B,)) and (B, 8); NaN: unknown."""
    logits = torch.column_stack(outputs if isinstance(outputs, tuple) else [outputs])
    steps = logits.shape[1] // min(7, labels.shape[1])  # of a vertebra
    which = np.arange(logits.shape[1]) // steps  # every logit's label
    share = labels.new_tensor(TARGET_WEIGHTS[which] / np.bincount(which)[which])
    truth = labels[:, which]
    weight = share * torch.where(truth > 0, POSITIVE_FACTOR, 1.0) * ~truth.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, truth.nan_to_num(), weight, reduction="sum")
    return loss / len(labels) / TARGET_WEIGHTS[: labels.shape[1]].sum()


# ==== Augmentation ====
# Drawn by a sample's own generator. Degrees, log, share of the edge, share; of 0..1, log, of 0..1.
VOLUME_RANGES = dict(rotation=15, scale=0.35, shift=0.3, mirror=0.5, window=0.2, gamma=0.3,
                     noise=0.06, blur=0.3, hole=0, still=0.4)
CROP_RANGES = dict(rotation=20, scale=0.15, shift=0.1, mirror=0.5, window=0.15, gamma=0.25,
                   noise=0.04, blur=0.15, hole=0.3, still=0.2)


def draw_grid(rngs, ranges, shape, device):
    maps, axes = [], len(shape) - 2
    for rng in rngs:
        moved = rng.random() >= ranges["still"]
        scale, shift, *angles = moved * rng.uniform(-1, 1, (2 + axes, axes))
        angles = np.triu(angles, 1) * math.radians(ranges["rotation"])
        turn = torch.matrix_exp(torch.from_numpy(angles - angles.T)).numpy()
        matrix = turn * np.exp(scale * ranges["scale"])
        flips = rng.random(3) < ranges["mirror"]  # cubes: X, never Z; crops: X, Y, transposed
        matrix[:, : 4 - axes] *= 1 - 2 * flips[: 4 - axes]
        matrix = matrix[:: -1 if axes == 2 and flips[2] else 1]
        maps.append(np.c_[matrix, 2 * ranges["shift"] * shift])
    return F.affine_grid(  # doubles: autocast rounds
        torch.tensor(np.array(maps), device=device), shape, align_corners=False).float()


def grey_levels(image, rng, ranges):
    """Changes (N, C, ...) in 0..1 in place to another scanner's."""
    stretch, shift = ranges["window"] * rng.uniform(-1, 1, 2)
    gamma = math.exp(ranges["gamma"] * rng.uniform(-1, 1))
    noise, coarse, hole = rng.random(3)
    seeded = torch.Generator(image.device).manual_seed(int(rng.integers(2**31)))
    image.mul_(1 + stretch).add_(shift).clamp_(0, 1).pow_(gamma)
    if coarse < ranges["blur"]:
        mode = "trilinear" if image.ndim == 5 else "bilinear"
        half = F.interpolate(image, scale_factor=0.5, mode=mode)
        image[:] = F.interpolate(half, image.shape[2:], mode=mode)
    image.add_(torch.empty_like(image).normal_(generator=seeded), alpha=ranges["noise"] * noise**2)
    if hole < ranges["hole"]:
        edge = int(image.shape[-1] * rng.uniform(0.05, 0.25))
        top, left = rng.integers(0, image.shape[-1] - edge, 2)
        image[..., top : top + edge, left : left + edge] = 0
    image.clamp_(0, 1)


def augment_volumes(cubes, labels, rngs, ranges=VOLUME_RANGES):
    """(B, 1, D, D, D) in 0..1 moved with labels (B, D, D, D), and regreyed."""
    grid = draw_grid(rngs, ranges, cubes.shape, cubes.device)
    cubes = F.grid_sample(cubes, grid, align_corners=False)
    labels = F.grid_sample(labels[:, None].float(), grid, "nearest", align_corners=False)
    for cube, rng in zip(cubes.split(1), rngs):
        grey_levels(cube, rng, ranges)
    return cubes, labels[:, 0].byte()


def augment_crops(crops, rngs, size=CROP, ranges=CROP_RANGES):
    """(B, N, K, S, S) in 0..1: a sample moves as one; its masks keep their grey."""
    grid = draw_grid(rngs, ranges, (len(crops), 1, size, size), crops.device)
    moved = F.grid_sample(crops.flatten(1, 2), grid, align_corners=False)
    moved = moved.unflatten(1, crops.shape[1:3])
    for slices, rng in zip(moved[:, :, :-1], rngs):
        grey_levels(slices, rng, ranges)
    return moved


def shuffle_order(crops, labels, rngs, share):  # crops: in place
    crops, labels = crops.unflatten(1, (min(7, labels.shape[1]), -1)), labels.clone()
    for crop, label, rng in zip(crops, labels, rngs):
        steps, order = rng.permutation(crop.shape[1]), rng.permutation(len(crop))
        if rng.random() < share:
            crop[:] = crop[order][:, steps]
            label[: len(crop)] = label[order]
    return crops.flatten(1, 2), labels


# ==== Metric and folds ====

def element_losses(answers, labels):
    right = np.where(labels, answers, 1 - np.asarray(answers))
    return -np.log(np.clip(right, 1e-15, 1))  # as the metric's


def competition_scores(answers, labels):
    loss, weight = element_losses(answers, labels), np.where(labels, POSITIVE_FACTOR, 1.0)
    study = np.average(loss, 1, weight * TARGET_WEIGHTS).mean()
    return study, np.average(np.average(loss, 0, weight), weights=TARGET_WEIGHTS)  # by columns


def auc(answers, labels):
    """Area under the ROC curve; NaN of one class."""
    positive = np.asarray(labels) > 0
    n, m = positive.sum(), (~positive).sum()
    rank = pd.Series(answers, dtype=float).rank()[positive].sum()
    return (rank - n * (n + 1) / 2) / (n * m) if n and m else math.nan


def dice_scores(probability, labels):
    mask, truth = probability > 0.5, labels == np.arange(1, 8).reshape(7, 1, 1, 1)
    both, found, size = (x.sum((1, 2, 3)) for x in (mask & truth, mask, truth))
    return np.where(size, 2 * both / (found + size).clip(1), np.nan)


def assign_folds(table, folds, masked):
    """{uid: fold}: strata of mask, patient, fractures; inside by the uid's hash."""
    fractures = table[[*VERTEBRAE]].sum(axis=1).clip(upper=2)
    hashes = [hashlib.sha256(uid.encode()).digest() for uid in table[STUDY]]
    keys = zip(table[STUDY].isin(masked), table.patient_overall, fractures, hashes, table[STUDY])
    return {uid: k % folds for k, (*_, uid) in enumerate(sorted(keys))}


# ==== Training ====
# Random draws come from (seed, step) or (seed, place in the order): runs resume exactly.
# load(sample) -> arrays; score(model, study) -> a value a target; judge(table) -> dict of score
KINDS = dict(segmenter=Segmenter, vertebra=VertebraClassifier, patient=PatientClassifier)
Task = namedtuple("Task", "kind recipe device load loss score judge name train held_out",
                  defaults=["", [], []])


def save_checkpoint(path, kind, recipe, **content):
    content |= dict(program="cspine", kind=kind, recipe=asdict(recipe))
    if ranks()[0] == 0:
        write_atomic(path, lambda new: torch.save(content, new))


def load_checkpoint(path):
    with suppress(Exception):
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {"cspine": content}[content["program"]]
    raise UserError(f"{path}: damaged or not ours")


def new_model(kind, settings, device="cpu"):
    solid = torch.channels_last_3d if str(device) == "cpu" else torch.contiguous_format
    layout = solid if kind == "segmenter" else torch.channels_last  # fastest (README)
    with study_errors(f"--backbone {settings['backbone']}"):
        return KINDS[kind](**settings).to(memory_format=layout)


def load_model(path, kind, device="cpu"):
    content = load_checkpoint(path)
    with study_errors(f"{path}: a {content.get('kind')}, no {kind} that fits"):
        model = new_model(kind, content["settings"], device)
        model.load_state_dict(content["tensors"])
        return fold_norms(model).to(device)


def load_init(model, path):
    """From ours, or a timm file less its head: by name, else in order."""
    with study_errors(f"--init {path}: cannot be read"):
        import timm
        source = timm.models.load_state_dict(str(path), weights_only=True)
        part = model if "program" in source else getattr(model.encoder, "backbone", model.encoder)
        source = {n: t for n, t in source.get("tensors", source).items() if t.ndim}
    target = {n: t for n, t in part.state_dict().items()  # a patient's own may be missing
              if t.ndim and (n in source or not n.startswith("patient_"))}
    named, taken = target.keys() <= source.keys(), {}
    for (name, like), other in zip(target.items(), target if named else source):
        tensor = source[other]
        if tensor.ndim == 4 <= like.ndim and tensor.shape[1] == 3 != like.shape[1]:
            tensor = tensor.sum(1, True).repeat(1, like.shape[1], 1, 1) / like.shape[1]
        if tensor.ndim == 4 < like.ndim:
            tensor = tensor[:, :, None].repeat(1, 1, like.shape[2], 1, 1) / like.shape[2]
        taken[name] = tensor
    if [t.shape for t in taken.values()] != [t.shape for t in target.values()]:
        raise UserError(f"--init {path}: not the architecture of {model.settings}")
    part.load_state_dict(taken, strict=False)
    say(f"--init: {len(taken)} of {len(source)} tensors {'by name' if named else 'in order'}")


class Trainer:
    """The state of a training, all of it saved."""
    def __init__(self, task, init=""):
        recipe, device = task.recipe, task.device
        torch.manual_seed(recipe.seed)
        self.model = model = new_model(task.kind, asdict(recipe), device)
        if init:
            load_init(model, init)
        self.averaged = copy.deepcopy(model.to(device)).eval()
        groups = [dict(params=[p for p in model.parameters() if (p.ndim > 1) == wide],
                       weight_decay=recipe.weight_decay * wide) for wide in (True, False)]
        self.optimizer = torch.optim.AdamW(groups, recipe.lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half_type(device) is torch.half)
        self.step = self.skipped = self.in_a_row = self.seconds = self.slowest = 0
        self.losses, self.history = [], []

    def save(self, path, task):
        state = {k: getattr(v, "state_dict", lambda: v)() for k, v in vars(self).items()}
        save_checkpoint(path, task.kind, task.recipe, samples=len(task.train), state=state)

    def load(self, state):
        for name, value in state.items():
            part = getattr(self, name)
            getattr(part, "load_state_dict", lambda v: setattr(self, name, v))(value)

    def update(self, task, batch, total):
        recipe, model, done = task.recipe, self.model.train(), self.step / total
        warm = min(1, (done + 1e-3) / (recipe.warm_up + 1e-3))
        for group in self.optimizer.param_groups:  # half a cosine, down to 1 %
            group["lr"] = recipe.lr * warm * (0.505 + 0.495 * math.cos(math.pi * done))
        torch.manual_seed((recipe.seed * 1009 + self.step) * 64 + ranks()[0])  # for dropout
        self.optimizer.zero_grad()
        mean, parts = 0, min(recipe.accumulate, len(batch))
        for k in range(parts):
            samples, rngs = zip(*batch[k::parts])
            tensors = [torch.from_numpy(np.stack(x)).to(task.device) for x in zip(*samples)]
            with autocast(task.device, recipe.half or task.device.type == "cuda"):
                loss = task.loss(model, tensors, rngs, recipe) * len(rngs) / len(batch)
            self.scaler.scale(loss).backward()
            mean += loss.item()
        self.scaler.unscale_(self.optimizer)
        for p in model.parameters() if dist.is_initialized() else ():
            grad = torch.zeros_like(p) if p.grad is None else p.grad  # nothing in view
            p.grad = grad.contiguous() / ranks()[1]
            dist.all_reduce(p.grad)
        bad = not nn.utils.clip_grad_norm_(model.parameters(), recipe.clip).isfinite()
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad
        if self.in_a_row > MAX_SKIPPED_STEPS:
            raise UserError("too many steps without a finite gradient: lower --lr")
        if not bad:
            self.scaler.step(self.optimizer)
            self.losses.append(mean)
        else:  # the norms have seen it
            model.load_state_dict(dict(self.averaged.named_buffers()), False)
        self.scaler.update()
        self.step += 1
        share = 1 - min(recipe.ema, (1 + self.step) / (10 + self.step))
        for slow, fast in zip(*(m.state_dict().values() for m in (self.averaged, model))):
            slow.lerp_(fast, share) if slow.is_floating_point() else slow.copy_(fast)

    def close_epoch(self, task, weights):
        (rank, world), stem = ranks(), weights / task.name
        with torch.inference_mode(), autocast(task.device):
            rows = [(uid, *task.score(self.averaged, uid)) for uid in task.held_out[rank::world]]
        rows, losses = sum(over_ranks(rows), []), sum(over_ranks(self.losses), [])
        table = pd.DataFrame(rows, columns=[STUDY, *TARGETS][: len(rows[0])])
        line = dict(
            epoch=len(self.history) + 1, **task.judge(table.set_index(STUDY)),
            train_loss=np.mean(losses or math.nan), lr=self.optimizer.param_groups[0]["lr"],
            samples_per_s=len(self.losses) * task.recipe.batch_size / self.seconds,
            seconds=self.seconds, skipped_steps=self.skipped, peak_gb=peak_gb())
        log = pd.DataFrame([*self.history, line])
        self.history = log.to_dict("records")
        self.losses, self.seconds = [], 0
        if rank:
            return
        say(f"{task.name}  " + "  ".join(f"{k} {v:.4g}" for k, v in line.items()))
        write_csv(f"{stem}_log.csv", log)
        if line["score"] <= log.score.min():  # NaN is never the best
            state = self.averaged.state_dict().items()
            save_checkpoint(f"{stem}.pt", task.kind, task.recipe, settings=self.model.settings,
                            tensors={n: t.half() if t.ndim > 1 else t for n, t in state})
            write_csv(f"{stem}_heldout.csv", table)


def train(task, weights, stop, workers=2, go_on=False, init=""):
    """The history of a fold; <name>.pt in `weights`. Stopped if cut short."""
    (rank, world), recipe, name, samples = ranks(), task.recipe, task.name, len(task.train)
    size, run, last = recipe.batch_size, Trainer(task, init), weights / f"{name}_last.pt"
    if not samples or not task.held_out or size % world:
        raise UserError(f"{name}: too few studies, or --batch-size no multiple of {world}")
    if go_on and last.exists():
        saved = load_checkpoint(last)
        with study_errors(f"{last}: made with other options or data; delete it"):
            if [saved["recipe"], saved["samples"]] != [asdict(recipe), samples]:
                raise ValueError("recipe or samples")
            run.load(saved["state"])
    steps = max(1, samples // size)  # an epoch
    total = steps * recipe.epochs
    rngs = [np.random.default_rng([recipe.seed, k]) for k in range(recipe.epochs)]
    order = np.concatenate([np.resize(rng.permutation(samples), steps * size) for rng in rngs])
    mine = range(run.step * size + rank, len(order), world)
    loaded = prefetch(lambda k: task.load(task.train[order[k]]), mine, workers, 2 * size)
    bar = progress(range(run.step, total), "step")
    for now in bar:
        started = stop.clock()
        if reason := max(over_ranks(stop.reason(1.1 * run.slowest))):
            run.save(last, task)
            raise Stopped(f"{name}: stopped by {reason} at step {now} of {total}; --resume goes on")
        batch = [(future.result(), np.random.default_rng([recipe.seed, k]))
                 for _, (k, future) in zip(range(size // world), loaded)]
        run.update(task, batch, total)
        run.seconds += stop.clock() - started
        bar.set_postfix(loss=np.mean(run.losses[-20:] or math.nan))
        if run.step % steps == 0:
            run.close_epoch(task, weights)
            run.save(last, task)
        run.slowest = max(run.slowest, stop.clock() - started)
    return run.history


# ==== Prediction ====
# A complete submission is on disk at once, at worst with the prior.

REPORTS = [f"predict_report{k or ''}.csv" for k in range(16)]  # one a rank
BLIND = dict(zip(TARGETS, PRIOR))
AS_IS = np.repeat([[1.0], [0.0]], 8, 1)  # scale and shift of the logits
Ensemble = namedtuple("Ensemble", "models device calibration options", defaults=[AS_IS, Answers()])
Effort = namedtuple("Effort", "views folds")


def load_models(weights, kind, device):
    return {k: load_model(path, kind, device) for k in range(100)
            if (path := Path(weights) / f"{kind}_fold{k}.pt").exists()}


def load_ensemble(weights, device):
    """All models of a folder, or UserError."""
    models = {kind: [*load_models(weights, kind, device).values()] for kind in KINDS}
    if not models["segmenter"] or not models["vertebra"] + models["patient"]:
        raise UserError(f"--weights {weights}: no segmenter or no classifier")
    path = Path(weights) / "calibration.json"
    if not path.exists():
        return Ensemble(models, device)
    with study_errors(f"{path}: no finite [scale, shift] of each target"):
        table = np.asarray_chkfinite(pd.read_json(path)[[*TARGETS]], float)
        return Ensemble(models, device, table.reshape(2, 8))


@torch.inference_mode()
def segment(models, volume, device, report=say, closer=True):
    """float32 (7, D, D, D): mean probability, in_order. Looks again where vertebrae are small."""
    size, window = (models[0].settings[k] for k in ("size", "window"))
    cube = segmenter_input(volume, size, window)[None].to(device)
    with autocast(device):
        mean = sum(m.to(device)(cube)[0].float().sigmoid().nan_to_num() for m in models)
    mean = (mean / len(models)).cpu()
    box = vertebra_box(mean.amax(0).numpy(), size)
    if closer and box is not None:
        shape, reach = np.array(volume.hu.shape), np.outer([-1, 1], np.ptp(box, 1) * AROUND)
        low, high = ((box.T + reach) * shape / size).clip(0, shape - 1).astype(int) + [[0], [1]]
        if min((high - low) / shape) < CLOSER:
            part = volume._replace(hu=volume.hu[tuple(map(slice, low, high))])
            part = torch.from_numpy(segment(models, part, device, report, False))[None]
            to_part = np.c_[np.diag(shape), shape - low - high] / np.c_[high - low]
            to_part = torch.from_numpy(np.float32(to_part)[None, ::-1, [2, 1, 0, 3]])
            grid = F.affine_grid(to_part, mean[None].shape, align_corners=False)
            mean = F.grid_sample(part, grid, align_corners=False)[0]  # 0 around
    return in_order(mean.numpy(), report)


def in_order(probability, report):
    """(7, D, D, D) head to foot: two that are not change names; a faint one is emptied."""
    weight = (probability * (probability > 0.5)).sum((2, 3))  # (7, D)
    mass = weight.sum(1)
    centre = weight @ np.arange(weight.shape[1]) / np.maximum(mass, 1)
    seen = [*np.flatnonzero(mass > MIN_CELLS)]
    while wrong := [p for p in zip(seen, seen[1:]) if centre[p[0]] >= centre[p[1]]]:
        pair, faint = [*wrong[0]], min(wrong[0], key=mass.item)
        report(" and ".join(np.take(VERTEBRAE, pair)) + " out of order")
        if 2 * mass[faint] > max(mass[pair]) and np.ptp(centre[pair]) > APART:
            for part in probability, centre, mass:
                part[pair] = part[pair[::-1]]
        else:
            seen.remove(faint)
            probability[faint] = 0
    return probability


@torch.inference_mode()
def classify(ensemble, crops, effort):
    """[(steps' probability (7, 15), patient's)] of models and views; NaN: none."""
    absent, out = ~crops.any((1, 2, 3, 4)), []
    vertebra, patient = (ensemble.models[k][: effort.folds] for k in ("vertebra", "patient"))
    crops = torch.from_numpy(crops).to(ensemble.device)
    for i, model in enumerate(vertebra + patient):
        model.to(ensemble.device)  # after a lack of memory
        size, whole = model.settings["size"], i >= len(vertebra)
        shown = torch.stack([  # bytes: little memory
            F.interpolate(c.float(), size, mode="bilinear").round().byte() for c in crops])
        for view in range(i, i + effort.views):
            turned = torch.rot90(shown.flip(-1) if view & 4 else shown, view, (-2, -1))
            with autocast(ensemble.device):
                steps, head = model(turned.flatten(0, 1)[None]) if whole else (model(turned), None)
            steps = steps.sigmoid().view(7, STEPS).cpu().numpy()
            steps[absent] = np.nan
            out.append((steps, float(head.sigmoid()) if whole else math.nan))
    return out


def combine(outputs, options, calibration=AS_IS):
    """(8,) answers from classify's; for NaN the prior. Most vertebrae are whole: where calibrated
    answers say not, the study is foreign, and they lean to the prior."""
    rows = [[*np.sort(steps, 1)[:, -options.top_k :].mean(1), head] for steps, head in outputs]
    rows, prior, (scale, shift) = map(torch.tensor, (np.array(rows), PRIOR, calibration))
    raw, share = rows.logit(FLOOR).nanmean(0), options.noisy_or
    logits = raw * scale + shift
    excess = (logits[:7].nan_to_num(-9).median() - USUAL).clamp(0) * (calibration is not AS_IS)
    logits -= excess
    either = float(1 - (1 - logits[:7].sigmoid()).nan_to_num(1).prod()) or math.nan
    patient = share * either + (1 - share) * raw[7].sigmoid().nan_to_num(either)
    logits[7] = patient.logit(FLOOR) * scale[7] + shift[7]
    answer = prior.logit().lerp(logits, (-excess / 2).exp()).sigmoid()
    return torch.where(answer.isnan(), prior, answer).clamp(FLOOR, 1 - FLOOR).numpy()


def answer_study(volume, read_s, ensemble, effort):
    """A study's row of the report."""
    models, device, problems = ensemble.models, ensemble.device, [*volume.problems]
    start = monotonic()
    probability = segment(models["segmenter"][: effort.folds], volume, device, problems.append)
    found = monotonic()
    mask_of = (models["vertebra"] + models["patient"])[0].settings["mask_of"]
    crops = vertebra_slices(volume, probability, mask_of=mask_of)
    cut = monotonic()
    answers = combine(classify(ensemble, crops, effort), ensemble.options, ensemble.calibration)
    seen = [name for name, crop in zip(VERTEBRAE, crops) if crop.any()]
    status = "ok" if len(seen) == 7 else "partial" if seen else "nothing seen"
    return dict(zip(TARGETS, answers), status=status, slices=len(volume.hu), seen="+".join(seen),
                read_s=read_s, segment_s=found - start, crops_s=cut - found,
                classify_s=monotonic() - cut, device=device, warnings="; ".join(problems))


def answer_or_prior(uid, future, ensemble, effort, seconds):
    try:
        study = future.result(seconds)  # a file may hang
        for _ in range(2):  # in small parts, then on the CPU
            with suppress(torch.OutOfMemoryError):
                return answer_study(*study, ensemble, effort)
            CROPS_AT_ONCE["cuda"] = STEPS
        return answer_study(*study, ensemble._replace(device=torch.device("cpu")), effort)
    except Exception as error:
        say(f"study {uid}: {error!r:.300}; answered with the prior")
        return dict(BLIND, status="failed", warnings=f"{error!r:.300}")


def choose_effort(views, folds, seconds, share):
    while views * folds > max(share / seconds, 1):
        views, folds = 1, folds if views > 1 else folds // 2
    return Effort(views, folds)


def read_reports(out):
    """{study: row} of all processes, no failures."""
    rows = [row for path in map(out.parent.joinpath, REPORTS) if path.exists()
            for row in read_csv(path, (STUDY, "status", *TARGETS)).to_dict("records")]
    return {row[STUDY]: row for row in rows if row["status"] not in ("failed", "no time")}


def write_submission(out, rows, reports=()):
    """This process's report, and every row: an answer or the prior."""
    if reports:
        write_csv(out.parent / REPORTS[ranks()[0]], pd.DataFrame(reports))
    known = -1
    while known < len(answers := read_reports(out)):  # others report too
        known = len(answers)
        values = [(row, answers.get(uid, BLIND).get(target, 0.5)) for row, uid, target in rows]
        write_csv(out, pd.DataFrame(values, columns=["row_id", "fractured"]))


def predict_studies(images, out, rows, ensemble, stop, workers, resume=False):
    """Answer this process's share, writing after each study."""
    (rank, world), seconds, done = ranks(), 1e-9, read_reports(out) if resume else {}
    uids = [*dict.fromkeys(uid for _, uid, _ in rows)]
    todo, reports = [uid for uid in uids[rank::world] if uid not in done], [*done.values()]
    full = Effort(max(1, ensemble.options.views), max(map(len, ensemble.models.values())))

    def read(uid):
        start, until = stop.clock(), stop.left() - min(MAX_READ_S, stop.left() / 4)
        if uid in ("", "..") or Path(uid).name != uid:
            raise StudyError(f"{uid!r}: no plain name")
        volume = read_volume(images / uid, workers, lambda: stop.left() < until)
        return volume, stop.clock() - start

    for k, (uid, future) in enumerate(progress(prefetch(read, todo, READERS), "study", len(todo))):
        start, left = stop.clock(), stop.left()
        if seconds > left:
            say(f"time is short: {len(todo) - k} studies get the prior")
            reports += [{STUDY: uid, **BLIND, "status": "no time"} for uid in todo[k:]]
            return write_submission(out, rows, reports)
        effort = choose_effort(*full, seconds, left / (len(todo) - k))
        if effort != full:
            say(f"study {uid}: time is short, {effort}")
        row = answer_or_prior(uid, future, ensemble, effort, min(MAX_READ_S, left / 4))
        reports.append({STUDY: uid, **row, "peak_gb": peak_gb()})
        write_submission(out, rows, reports)
        if stop.signal:
            raise Stopped(f"stopped by {stop.signal}; {out} is complete, --resume goes on")
        used = (stop.clock() - start) / (effort.folds * effort.views)
        seconds = max(used, 0.8 * seconds)


# ==== Decoding ====
# Headers lie: every size is checked.

MAX_JPEG_2000 = 2**20  # pixels: more cost gigabytes
HALVES = {1: (2, 0, 0), 2: (0, 2, 0), 3: (0, 0, 2), 4: (2, 2, -2),  # of left, above, corner
          5: (2, 1, -1), 6: (1, 2, -1), 7: (1, 1, 0)}  # by predictor (T.81 table H.1)


@study_errors("pixel data")
def decode_pixels(data):
    """Stored values (frames, rows, columns), 16 or 32 bits."""
    shape = int(data.get("NumberOfFrames") or 1), data.Rows, data.Columns
    samples, allocated = data.get("SamplesPerPixel", 1), data.BitsAllocated
    stored, count = data.get("BitsStored") or allocated, math.prod(shape)
    if not (samples == 1 and allocated in (8, 16, 32) and 1 <= stored <= allocated
            and min(shape) > 0 and count <= MAX_VOXELS):
        raise StudyError(f"{samples} samples of {stored} bits in {allocated}, shape {shape}")
    syntax = data.file_meta.get("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian)
    jpeg_2000 = syntax in pydicom.uid.JPEG2000TransferSyntaxes
    if syntax.is_little_endian and not syntax.is_encapsulated:
        words = np.frombuffer(data.PixelData, f"<u{allocated // 8}", count)
    elif not jpeg_2000 and pydicom.pixels.get_decoder(syntax).is_available:
        words = pydicom.pixels.pixel_array(data, raw=True)  # big endian, RLE; others by a plug-in
    elif jpeg_2000 or syntax in (pydicom.uid.JPEGLossless, pydicom.uid.JPEGLosslessSV1):
        decode = _decode_jpeg_2000 if jpeg_2000 else decode_lossless_jpeg
        frames = pydicom.encaps.generate_frames(data.PixelData, number_of_frames=shape[0])
        words = np.stack([decode(frame) for frame in frames])
    else:
        raise StudyError(f"{syntax.name}: pip install pylibjpeg pylibjpeg-libjpeg")
    size, kind = max(2, words.itemsize), "i" if data.get("PixelRepresentation") == 1 else "u"
    spare = 8 * size - stored  # bits above the pixel may hold overlays
    return (words.reshape(shape).astype(f"u{size}") << spare).view(f"{kind}{size}") >> spare


def _decode_jpeg_2000(jpeg):
    """(rows, columns) uint16, negative numbers as two's complement."""
    stream = bytearray(jpeg[max(0, jpeg.find(b"\xff\x4f\xff\x51")):])  # without JP2 boxes
    width, height, components, depth = struct.unpack_from(">2I24xHB", stream, 8)
    if width * height * components > MAX_JPEG_2000:
        raise StudyError(f"JPEG 2000 of {width}x{height}x{components}")
    bits, signed = depth % 128 + 1, depth > 127
    stream[42] = bits - 1  # OpenCV refuses signed; unsigned, it adds half the range
    cv2.utils.logging.setLogLevel(0)  # else a line a slice
    words = cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_UNCHANGED)
    return words.astype(np.uint16) - np.uint16(signed << bits - 1)


@study_errors("JPEG Lossless")
def decode_lossless_jpeg(data):
    """(rows, columns) uint16 of a one-component stream (ITU-T T.81 annex H)."""
    at, segments, tables = 2, {}, {}  # by marker; Huffman tables by destination (annex B)
    while 0xFFDA not in segments:
        marker, length = struct.unpack_from(">HH", data, at)
        segments[marker] = body = data[at + 4 : at + 2 + length]
        at += 2 + length
        while marker == 0xFFC4 and body:
            end = 17 + sum(body[1:17])
            tables[body[0]], body = body[1:end], body[end:]
    bits, rows, columns, parts = struct.unpack_from(">BHHB", segments.get(0xFFC3, bytes(6)))
    _, _, table, predictor, _, shift = segments[0xFFDA][:6]
    restart = int.from_bytes(segments.get(0xFFDD, b""), "big")
    if (parts != 1 or predictor not in HALVES or not shift < bits <= 16 or restart % columns
            or rows * columns > 8 * len(data)):  # a sample takes a bit
        raise StudyError(f"{rows}x{columns}x{parts} pixels of {bits} bits in {len(data)} bytes")
    scan = re.sub(rb"\xff+(?=\xff)", b"", data[at:])  # fill bytes
    scan = re.split(rb"\xff[^\x00\xd0-\xd7]", scan, maxsplit=1)[0]
    intervals = re.split(rb"\xff[\xd0-\xd7]", scan)
    table, band = tables[table >> 4], restart // columns or rows
    length = np.repeat(range(1, 18), [*table[:16], 1])  # of codes (annex C), last of the rest
    category, share = np.array([*table[16:], 255]), 2**16 >> length  # of the next 16 bits
    share[-1] = 2**16 - share.sum()
    advance = (length + category % 16).astype(np.uint8)  # bits of code and difference
    codes = category.repeat(share), advance.repeat(share)
    grid = np.zeros((-(-rows // band), band * columns), int)  # a restart interval a row
    for number, found in enumerate(grid):
        count = min(band, rows - number * band) * columns
        found[:count] = _differences(intervals[number].replace(b"\xff\0", b"\xff"), count, *codes)
    grid[:, 0] += 1 << bits - shift - 1
    samples = _undo_prediction(grid.reshape(-1, band, columns), *HALVES[predictor])
    return samples.reshape(-1, columns)[:rows] << shift


def _differences(coded, count, category_of, advance_of):
    """Walks from code to code: the jump is known at every bit."""
    stream = np.frombuffer(coded[:4 * count] + bytes(48), np.uint8).astype(np.int32)
    words = stream[:-2] << 16 | stream[1:-1] << 8 | stream[2:]
    windows = np.stack([words >> 8 - bit for bit in range(8)], 1).astype(np.uint16).ravel()
    jumps = [advance_of.take(windows)]
    for _ in range(3):  # over 8 codes: a loop in Python stops the other workers
        jumps.append(jumps[-1] + jumps[-1].take(np.arange(len(windows)) + jumps[-1], mode="clip"))
    far = jumps.pop().tobytes()
    starts = [*accumulate(range(0, count, 8), lambda at, _: at + far[at], initial=0)]
    while jumps:
        starts = np.stack([starts, starts + jumps.pop().take(starts, mode="clip")], 1).ravel()
    starts, ends = starts[:count], starts[1 : count + 1]
    category = category_of.take(windows.take(starts))
    if ends[-1] > 8 * len(coded) or category.max() > 16:
        raise StudyError("cut short or broken")
    extra = category % 16
    value = windows.take(ends - extra).astype(int) >> 16 - extra
    value -= np.where(value < 1 << extra >> 1, (1 << extra) - 1, 0)
    return value + (category >> 4 << 15)  # 16 stands for 32768


def _undo_prediction(grid, left, above, corner):
    """uint16 of differences (bands, rows, columns), modulo 2**16 (T.81 H.1.2.1)."""
    bands, rows, columns = grid.shape
    grid[:, :, 0] = grid[:, :, 0].cumsum(1)
    if (left, above) == (2, 0):
        return grid.cumsum(2).astype(np.uint16)
    grid[:, 0] = grid[:, 0].cumsum(1)
    flat = grid.reshape(bands, -1).T & 0xFFFF  # (rows * columns, bands)
    for diagonal in range(2, rows + columns - 1):
        met = np.arange(max(1, diagonal - columns + 1), min(rows, diagonal))
        at = met * (columns - 1) + diagonal
        halves = left * flat[at - 1] + above * flat[at - columns] + corner * flat[at - columns - 1]
        flat[at] = flat[at] + (halves >> 1) & 0xFFFF
    return flat.T.astype(np.uint16).reshape(grid.shape)


# ==== Modes ====

HERE = Path(globals().get("__file__", "cspine.py")).resolve().parent


def data_folder(o, *needed):
    for name in needed:
        if not (Path(o.data) / name).exists():
            raise UserError(f"no {name} in --data {o.data}")
    return Path(o.data)


def training_data(o):
    """{uid: labels (8,)} where images are, {uid: fold}, {uid: mask}."""
    data = data_folder(o, "train.csv", "train_images")
    table = read_csv(data / "train.csv", (STUDY, *TARGETS))
    masks = {p.name.split(".nii")[0]: p for p in (data / "segmentations").glob("*.nii*")}
    folds = assign_folds(table, max(1, o.folds), masks)  # of all: a study keeps its fold
    truth = zip(table[STUDY], table[[*TARGETS]].to_numpy(np.float32))
    return {u: y for u, y in truth if (data / "train_images" / u).is_dir()}, folds, masks


def recipe_from(o):
    least = min(o.folds, o.epochs, o.batch_size, o.accumulate, o.size, o.hidden, o.thin, o.seed + 1)
    if least < 1 or o.lr <= 0 or STEPS % o.thin:
        raise UserError(f"--epochs, ...: 0 or below 0, or --thin {o.thin} does not divide {STEPS}")
    return Recipe(**{name: getattr(o, name) for name in Recipe.__dataclass_fields__})


def run_training(o, samples, folds, task):
    """Train the folds asked for, of samples (uid, ...)."""
    wanted = [k for k in range(o.folds) if o.fold in ("all", str(k))]
    if not wanted:
        raise UserError(f"--fold {o.fold}: there are folds 0 to {o.folds - 1}")
    stop = Stop(o.time_limit)
    if ranks()[1] > 1:
        dist.init_process_group()
    for fold in wanted:
        task = task._replace(
            name=f"{task.kind}_fold{fold}",
            train=[s for s in samples if folds[s[0]] != fold or o.folds == 1],
            held_out=[*dict.fromkeys(uid for uid, *_ in samples if folds[uid] == fold)])
        train(task, Path(o.weights), stop, o.workers, o.resume or o.fold == "all", o.init)


def segmenter_batch(model, tensors, rngs, recipe):
    cubes, labels = augment_volumes(tensors[0][:, None] / 255, tensors[1], rngs)
    return segmenter_loss(model(cubes), labels)


def classifier_batch(model, tensors, rngs, recipe):
    """Mixup mixes losses, never labels."""
    crops = tensors[0][:, int(rngs[0].integers(recipe.thin)) :: recipe.thin]
    crops = augment_crops(crops.float().div_(255), rngs, recipe.size)
    crops, labels = shuffle_order(crops, tensors[1], rngs, recipe.shuffle)
    share = rngs[0].random() if rngs[0].random() < recipe.mixup else 1.0
    outputs = model(crops if share == 1 else crops.flip(0).lerp(crops, share))
    return classifier_loss(outputs, labels.flip(0)).lerp(classifier_loss(outputs, labels), share)


def mode_train_seg(o):
    """Train segmenters on studies with masks: writes segmenter_fold<k>.pt to --weights."""
    recipe, (truth, folds, masks) = recipe_from(o), training_data(o)
    device, samples = pick_device(o.device), [(uid,) for uid in truth if uid in masks]

    @functools.cache  # 4 MB a study
    def load(sample):
        volume = read_volume(Path(o.data) / "train_images" / sample[0])
        cube = (segmenter_input(volume, recipe.size)[0] * 255).round().byte().numpy()
        return cube, read_mask(masks[sample[0]], volume, (recipe.size,) * 3)

    def score(model, uid):
        cube, labels = load((uid,))
        logits = model(torch.from_numpy(cube)[None, None].to(device) / 255)
        return dice_scores(logits[0].float().sigmoid().cpu().numpy(), labels)

    task = Task("segmenter", recipe, device, load, segmenter_batch, score, lambda table: dict(
        table.mean().add_prefix("dice_"), score=1 - table.mean().mean()))
    run_training(o, samples, folds, task)


def mode_extract(o):
    """Write every study's crops under --work, masked by its fold's segmenter, else by all."""
    (truth, folds, _), (rank, world), stop = training_data(o), ranks(), Stop(o.time_limit)
    device, out = pick_device(o.device), Path(o.work) / o.mask_of
    images, models = Path(o.data) / "train_images", load_models(o.weights, "segmenter", device)
    if not models:
        raise UserError(f"no segmenter in {o.weights}: run train-seg first")
    todo = [u for u in [*truth][rank::world] if not (out / f"{u}.npz").exists()]
    volumes = prefetch(lambda uid: read_volume(images / uid, o.workers), todo, 1)
    for uid, future in progress(volumes, "study", len(todo)):
        if reason := stop.reason():
            raise Stopped(f"extract: stopped by {reason}; the same command goes on")
        try:
            volume, own = future.result(), models.get(folds[uid])
            probability = segment([own] if own else [*models.values()], volume, device)
            crops, low = vertebra_slices(volume, probability, mask_of=o.mask_of), 0
            while write_crops(out / f"{uid}.npz", crops) > crops.nbytes / 4.01:
                low = 2 * low + 1  # strong noise loses its lowest bits
                crops |= np.uint8(low) * crops.any((3, 4), keepdims=True)
        except StudyError as error:
            say(f"study {uid}: {error}; left out")
    print(f"{out}: crops of {len([*out.glob('*.npz')])} studies")


def mode_train_cls(o):
    """Train classifiers on the crops: writes vertebra_fold<k>.pt or patient_fold<k>.pt."""
    kind = "patient" if o.mode == "train-patient" else "vertebra"
    recipe, (truth, folds, _) = recipe_from(o), training_data(o)
    device, folder = pick_device(o.device), Path(o.work) / o.mask_of
    asked = [[*range(8)]] if kind == "patient" else [[v] for v in range(7)]
    samples = [(uid, targets) for uid in truth if (folder / f"{uid}.npz").exists()
               for targets in asked]
    if not samples:
        raise UserError(f"no crops in {folder}: run extract first")

    def load(sample):
        uid, targets = sample
        crops = read_crops(folder / f"{uid}.npz", targets[:7])
        seen = [*crops.any((1, 2, 3, 4)), True][: len(targets)]
        labels = np.where(seen, truth[uid][targets], np.float32("nan"))
        return crops.reshape(-1, *crops.shape[2:]), labels  # (N, T, K, S, S) -> (N * T, K, S, S)

    def score(model, uid):
        one = Ensemble(dict.fromkeys(KINDS, []) | {kind: [model]}, device)
        (steps, patient), = classify(one, read_crops(folder / f"{uid}.npz"), Effort(1, 1))
        return [*np.sort(steps, 1)[:, -Answers().top_k :].mean(1), patient]

    def judge(table):  # the prior where nothing was asked or in view
        answers = table.astype(float).fillna(BLIND).to_numpy()
        right = np.array([truth[uid] for uid in table.index])
        return dict(score=competition_scores(answers, right)[0],
                    vertebra_auc=auc(answers[:, :7].ravel(), right[:, :7].ravel()),
                    patient_auc=auc(answers[:, 7], right[:, 7]))

    task = Task(kind, recipe, device, load, classifier_batch, score, judge)
    run_training(o, samples, folds, task)


def mode_predict(o):
    """Answer every row of --data's test.csv: writes --out, and predict_report.csv beside it."""
    data, out, (rank, world) = data_folder(o, "test.csv"), Path(o.out), ranks()
    table = read_csv(data / "test.csv", ("row_id", STUDY, "prediction_type")).fillna("").astype(str)
    table = table.drop_duplicates("row_id")
    target = table.row_id.str.extract(f"_({'|'.join(TARGETS)})$")[0]
    rows = [*zip(table.row_id, table[STUDY], target.fillna(table.prediction_type))]
    stop = Stop(o.time_limit or KAGGLE_MINUTES * Path("/kaggle").exists())
    with suppress(OSError):
        for name in [] if o.resume else REPORTS[rank::world]:
            (out.parent / name).unlink(missing_ok=True)
    write_submission(out, rows)
    ensemble = load_ensemble(o.weights, pick_device(o.device))._replace(options=o)
    if o.compile:
        torch._dynamo.config.suppress_errors = True  # then as it is
        for model in ensemble.models["vertebra"] + ensemble.models["patient"]:
            model.encoder.backbone.compile()
    predict_studies(data / "test_images", out, rows, ensemble, stop, o.workers, o.resume)
    good = sum(row["status"] != "nothing seen" for row in read_reports(out).values())
    count = table[STUDY].nunique()
    print(f"{out}: {len(rows)} rows, {count} studies, {count - good} fell back to a prior")


def all_modes():
    if (HERE / "tests/rooms.py").exists():  # else pasted
        sys.modules.setdefault("cspine", sys.modules[__name__])  # it imports us
        sys.path.insert(0, str(HERE / "tests"))
        return __import__("rooms").MODES
    return MODES


OPTIONS = dict(  # shared by modes: default, meaning
    data=(KAGGLE_DATA, "data set's folder"), weights=(str(HERE / "weights"), "folder"),
    work=("work", "folder of crops"), out=("submission.csv", "file or folder to write"),
    device=("auto", "auto, cpu, cuda:0, ..."), workers=(os.cpu_count() or 1, "threads"),
    fold=("all", "one fold, or all"), folds=(5, "number of folds"),
    resume=(False, "go on where a run stopped"), time_limit=(0.0, "minutes; 0: none"),
    init=("", "weights to start from"), mask_of=("last", "slice with the mask: last, center"))
TRAINING = "data weights work device workers fold folds resume time_limit init"
MODES = {  # function, options, more options
    "train-seg": (mode_train_seg, TRAINING, "segmenter"),
    "extract": (mode_extract, "data weights work device workers folds mask_of time_limit", {}),
    "train-cls": (mode_train_cls, TRAINING, "vertebra"),
    "train-patient": (mode_train_cls, TRAINING, "patient"),
    "predict": (mode_predict, "data weights out device workers resume time_limit", Answers())}


def build_parser():
    """Of all modes."""
    parser = argparse.ArgumentParser("cspine.py", description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    for name, (function, shared, own) in all_modes().items():
        if not isinstance(own, dict):
            settings = asdict(RECIPES[own] if isinstance(own, str) else own)
            own = {option: (default, "see the file") for option, default in settings.items()}
        mode = modes.add_parser(
            name, help=function.__doc__, description=function.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        mode.set_defaults(function=function)
        own = {option: OPTIONS[option] for option in shared.split()} | own
        for option, (default, meaning) in own.items():
            flag = "--" + option.replace("_", "-")
            if default is None:  # must be given
                mode.add_argument(option, help=meaning)
            elif default is False:
                mode.add_argument(flag, action="store_true", help=meaning)
            else:
                mode.add_argument(flag, type=type(default), default=default, help=meaning)
    return parser


def main(argv=None):
    """Runs a mode; its exit status."""
    o = build_parser().parse_args(argv)
    cv2.setNumThreads(1)  # the threads of prefetch share the cores
    try:
        o.function(o)
        return 0
    except (torch.OutOfMemoryError, MemoryError):
        say("cspine: out of memory: lower --batch-size, raise --accumulate, or --device cpu")
        return 2
    except (UserError, Stopped, KeyboardInterrupt) as error:
        say(f"cspine: {str(error) or 'interrupted'}")
        return 2 if isinstance(error, UserError) else 0 if "--time-limit" in str(error) else 130
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__" and "__file__" in globals():
    status = main()
    sys.stdout.flush()
    os._exit(status)  # hanging threads would be waited for
