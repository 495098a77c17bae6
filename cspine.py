# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "timm>=1.0.9", "pydicom>=3.0", "opencv-python>=4.8",
#                 "numpy>=1.26", "pandas>=2.1", "tqdm>=4.64"]
# ///
"""cspine: neck CT studies in, fracture probabilities of C1..C7 and the patient out.

    study folder --read_volume--> Volume (HU, Z Y X, head first)
    Volume --segmenter_input--> (1, 128, 128, 128) --Segmenter--> probability (7, 128, 128, 128)
    Volume + probability --vertebra_slices--> uint8 (7, 15, 6, 224, 224), 5 slices + 1 mask a step
    (15, 6, 224, 224) --VertebraClassifier--> 15 logits --> P(Ck)
    (105, 6, 224, 224) --PatientClassifier--> 105 + 1 logits --> P(C1..C7), P(patient_overall)
    all models --ensemble--> submission.csv

Shapes: B batch, C channels, Z Y X voxel axes (head to foot, front to back, right to left),
V 7 vertebrae, T 15 steps, K 6 channels a step, S crop edge, D cube edge, F features.

    python cspine.py demo                              phantoms in, scored submission.csv out
    python cspine.py train-seg --data DIR              then extract, train-cls, train-patient
    python cspine.py evaluate --data DIR --folds       the out-of-fold score
    python cspine.py predict --data DIR                submission.csv
    torchrun --nproc_per_node=2 cspine.py predict ...  on two GPUs

Pasted into a notebook cell, the file defines everything and runs nothing; then
main(["predict", "--weights", "/kaggle/input/..."]) runs a mode. Not a medical device.
"""

import argparse
import contextlib
import copy
import hashlib
import inspect
import json
import math
import mmap
import os
import re
import resource
import runpy
import signal
import struct
import sys
import threading
import time
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import pydicom
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import (UID, ImplicitVRLittleEndian, JPEG2000TransferSyntaxes, JPEGLossless,
                         JPEGLosslessSV1)
from timm.layers import BatchNormAct2d, Conv2dSame
from tqdm import tqdm


# ======================================= Facts and settings ======================================
# Every number of the road. Source: the starting solution, unless another is named.

VERTEBRAE = ("C1", "C2", "C3", "C4", "C5", "C6", "C7")
TARGETS = VERTEBRAE + ("patient_overall",)
STUDY = "StudyInstanceUID"
STEPS, SLICES_PER_STEP, CROP = 15, 5, 224
CHANNELS = SLICES_PER_STEP + 1  # five slices and one mask
TARGET_WEIGHTS = np.array([1.0] * 7 + [7.0])  # the metric's; a positive weighs double
POSITIVE_FACTOR = 2.0
# The constants with the lowest score on the 2019 training labels (0.5573): a blind answer.
PRIOR = np.array([0.1027, 0.1930, 0.0512, 0.0752, 0.1105, 0.1842, 0.2559, 0.5309])
FLOOR = 1e-4  # answers stay within (FLOOR, 1 - FLOOR): no infinite loss
AIR_HU = -1024  # padding outside the scanner's circle lies below it
SEGMENTER_WINDOW, BONE_WINDOW = (300, 1600), (500, 2000)  # (level, width) HU: cube, crops
MIN_SLICES, MAX_VOXELS = 16, 2**30  # fewer are no study, more do not fit a notebook
MAX_GAP_MM = 30.0  # a longer hole along the normal separates two series
SAME_STEP_MM = 0.0031  # within a series; odd, so that no usual spacing lies on the edge
ENCODER_STRIDE = 16  # four encoder levels at strides 2, 4, 8, 16
MASK_THRESHOLDS = (0.2, 0.05)  # first place's: the second when the first leaves nothing
MIN_CELLS, BOX_MARGIN = 12, 1.0  # cube cells: fewer are no vertebra; around a box (first place)
CROPS_AT_ONCE = {"cpu": STEPS, "cuda": 210}  # 15 stay in a CPU's cache
KAGGLE_DATA = "/kaggle/input/rsna-2022-cervical-spine-fracture-detection"
KAGGLE_MINUTES = 510.0  # of the 540 that a submission has
MAX_SKIPPED_STEPS = 20  # in a row without a finite gradient before a training gives up


@dataclass(frozen=True)
class Recipe:
    """What a training does; plain values, stored in its checkpoint. Ours, but where a source is."""

    backbone: str
    epochs: int
    batch_size: int
    lr: float  # peak of AdamW
    size: int = CROP  # edge of the cube or the crop
    mixup: float = 0.0  # share of batches whose two losses are mixed (first place)
    accumulate: int = 1  # parts in which a batch is computed
    weight_decay: float = 0.01  # AdamW's default; not on norms and biases
    warm_up: float = 0.05  # share of the steps
    ema: float = 0.998  # averaged weights are evaluated and shipped
    clip: float = 1.0  # norm of the gradient
    drop_path: float = 0.05
    dropout: float = 0.2  # EfficientNetV2-S's (Tan and Le 2021)
    positives: float = 0.0  # share of an epoch drawn from fractured vertebrae; 0: as they come
    hidden: int = 256  # width of the LSTMs (starting solution)
    shuffle: float = 0.2  # share of samples with steps and vertebrae permuted (first place)
    mask_of: str = "last"  # slice of a step whose mask is the sixth channel
    seed: int = 0


RECIPES = {
    "segmenter": Recipe("tf_efficientnetv2_s", 60, 4, 1e-3, 128, dropout=0.1),
    "vertebra": Recipe("tf_efficientnetv2_s", 20, 8, 3e-4, mixup=0.2, positives=0.35),
    "patient": Recipe("convnext_nano", 15, 2, 2e-4, mixup=0.2),
}


class Answers(NamedTuple):
    """How logits become answers: README, "Better answers"."""

    top_k: int = 5  # a vertebra's probability is the mean of its largest steps (first place)
    views: int = 1  # dihedral views a model, the i-th starting at view i mod 8; 0: none
    average: str = "logit"  # space of the ensemble's mean, or "probability"
    noisy_or: float = 0.3  # share of 1 - prod(1 - P(Ck)) in patient_overall


# ========================================== House tools ==========================================


class UserError(Exception):
    """What the user can mend: one line on stderr, status 2."""


class StudyError(UserError):
    """One study that cannot be used."""


class Stopped(Exception):
    """A run that ended early, all saved."""


def say(text):
    tqdm.write(text, file=sys.stderr)  # does not tear a progress bar


def progress(items, unit, total):
    """A bar on a terminal, silence elsewhere."""
    return tqdm(items, unit=unit, total=total, disable=None, leave=False)


def write_atomic(path, write):
    """write(temporary path), then move the file into place: never half a file."""
    path = Path(path)
    new = path.with_name(f".{os.getpid()}.{threading.get_ident()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(new)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if new.exists():
            new.unlink()


def write_csv(path, table):
    write_atomic(path, lambda new: table.to_csv(new, index=False))


def read_csv(path, columns):
    """A table. UserError if it is missing, unreadable or lacks a column."""
    try:
        table = pd.read_csv(path, dtype={STUDY: str, "row_id": str})
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: no readable csv ({str(error).splitlines()[0]})") from None
    missing = ", ".join(c for c in columns if c not in table)
    if missing:
        raise UserError(f"{path}: no column {missing}; found {', '.join(table)}")
    return table


def prefetch(work, items, workers, ahead=1):
    """Pairs (item, future of work(item)) in order, started `ahead` of the one yielded."""
    pool, waiting = ThreadPoolExecutor(max(1, workers)), []
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > ahead:
                yield waiting.pop(0)
        yield from waiting
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def ranks():
    """(rank, number of processes) of torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def over_ranks(value):
    """The list of every rank's value."""
    out = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(out) > 1:
        dist.all_gather_object(out, value)
    return out


def pick_device(name):
    """A torch.device that works; "auto": this rank's GPU if there is one."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def half_type(device):
    """bfloat16 where it is native, else float16 (T4); None on the CPU."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16


def autocast(device):
    return torch.autocast(device.type, half_type(device), enabled=device.type == "cuda")


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux: KiB


class Stop:
    """Why a run should end: a signal or its deadline."""

    def __init__(self, minutes=0.0, clock=time.monotonic):
        self.clock, self.signal = clock, ""
        self.until = clock() + (60 * minutes or math.inf)
        with contextlib.suppress(ValueError):  # another thread gets no signals
            for kind in (signal.SIGINT, signal.SIGTERM):
                signal.signal(kind, self.note)

    def note(self, number, _):
        self.signal = signal.Signals(number).name

    def left(self):
        return self.until - self.clock()

    def reason(self, needed=0.0):
        """Why not to begin what takes `needed` seconds, or ""."""
        return self.signal or ("--time-limit" if self.left() < needed else "")


# ============================================ Reading ============================================
# In: DICOM slices, a NIfTI mask. Out: a Volume, labels on its grid. The trap: only its position
# says where a slice lies.

DEFAULTS = {"ImagePositionPatient": [math.nan] * 3, "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0, 0], "RescaleSlope": 1, "RescaleIntercept": 0}
NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4",
               1024: "i8", 1280: "u8"}


class Volume(NamedTuple):
    """One CT study: `hu` int16 (Z, Y, X), head first, front to back, right to left.

    `spacing` (z, y, x) in mm; `affine` LPS mm from (z, y, x, 1); `problems` in words.
    """

    uid: str
    hu: np.ndarray
    spacing: tuple
    affine: np.ndarray
    problems: tuple = ()


@contextlib.contextmanager
def study_errors(where):
    """Whatever damaged bytes raise becomes a StudyError: libraries raise nearly every kind."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise StudyError(f"{where}: {reason}") from error


def read_slices(path):
    """(series, place (3, 3), HU int16 (Y, X)) of each frame of a file.

    `place`, LPS mm: the first voxel's centre, the step to the next row, to the next column.
    """
    if not path.is_file():
        raise StudyError("no plain file")
    data, out = pydicom.dcmread(path, force=True), []
    shared = data.get("SharedFunctionalGroupsSequence") or []
    own = data.get("PerFrameFunctionalGroupsSequence") or []
    for number, stored in enumerate(decode_pixels(data)):
        groups = [*shared, *own[number : number + 1]]
        tags = {part.keyword: part.value for group in groups for part in group.iterall()}
        position, directions, (height, width), slope, intercept = (
            np.array(tags.get(name) or data.get(name) or default, float)
            for name, default in DEFAULTS.items())
        row, column = directions.reshape(2, 3)
        place, normal = np.array([position, column * height, row * width]), np.cross(row, column)
        if not (min(height, width) > 0 and abs(place).max() < 1e6 and 0.9 < normal @ normal < 1.1):
            raise StudyError("no usable PixelSpacing, position or orientation")
        pages = mmap.mmap(-1, 2 * stored.size, mmap.MAP_PRIVATE)  # malloc keeps what is freed
        hu = np.ndarray(stored.shape, np.int16, pages)
        hu[:] = np.rint(stored * slope + intercept).clip(AIR_HU, 32767)
        steps = np.rint(place[1:].ravel() / SAME_STEP_MM)
        out.append(((str(data.get("SeriesInstanceUID")), hu.shape, *steps), place, hu))
    return out


def decode_study(folder, workers, give_up):
    """({series: [(place, HU), ...]}, problems); each file is opened once."""
    files = sorted(Path(folder).iterdir(), key=lambda path: (len(path.name), path))
    stacks, problems = {}, []
    for path, future in prefetch(read_slices, files, workers, 4 * workers + 1):
        if give_up():
            raise StudyError("out of time while reading")
        try:
            with study_errors(path.name):
                for series, *frame in future.result():
                    stacks.setdefault(series, []).append(frame)
        except StudyError as error:
            problems.append(f"{error}; left out")
    return stacks, problems


def one_series(stacks, problems):
    """The largest stack in order: (planes, where even steps lie among them, affine).

    Missing slices are filled by position, not by index.
    """
    stack = max(stacks.values(), key=len, default=[])
    places = np.array([place for place, _ in stack]).reshape(-1, 3, 3)
    normal = np.cross(places[:1, 1], places[:1, 2])
    mm = (places[:, 0] @ normal.T).ravel() / np.linalg.norm(normal)
    order = np.argsort(mm, kind="stable")
    order = order[np.diff(mm[order], prepend=-np.inf) > 0.01]
    run = max(np.split(order, np.flatnonzero(np.diff(mm[order]) > MAX_GAP_MM) + 1), key=len)
    if other := sum(map(len, stacks.values())) - len(run):
        problems.append(f"{other} images of another series, size or position left out")
    if len(run) < MIN_SLICES:
        found = f"{len(run)} usable slices of at least {MIN_SLICES}"
        raise StudyError("; ".join([found, *problems[-1:]]))
    mm, steps, (start, column, row) = mm[run], np.arange(len(run)), places[run[0]]
    step, way = np.median(np.diff(mm)), places[run[-1], 0] - start
    even = np.linspace(mm[0], mm[-1], round(np.ptp(mm) / step) + 1)
    if len(even) != len(mm) or abs(mm - even).max() > 0.25 * step:
        problems.append(f"uneven positions: {len(mm)} slices on {len(even)} even ones")
        steps = np.interp(even, mm, steps)
    straight = np.ptp(mm) / np.linalg.norm(way)
    if straight < 0.999:
        problems.append(f"gantry tilted by {math.degrees(math.acos(straight)):.0f} degrees")
    affine = np.c_[way / (len(even) - 1), column, row, start]
    return [stack[k][1] for k in run], steps, np.r_[affine, [[0, 0, 0, 1]]]


def read_volume(folder, workers=2, give_up=lambda: False):
    """One CT study, head first, in Hounsfield units, on `workers` threads.

    StudyError, nothing else: under MIN_SLICES usable, or give_up() is true.
    """
    with study_errors(folder):
        stacks, problems = decode_study(folder, workers, give_up)
        planes, steps, affine = one_series(stacks, problems)
        stacks.clear()
        shape = len(steps), *planes[0].shape
        if math.prod(shape) > MAX_VOXELS:
            raise StudyError(f"{shape} voxels")
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        share = affine[2::-1, :3] / spacing * [[-1], [1], [1]]  # (down back left, old axis)
        axes = max(permutations(range(3)), key=lambda axes: abs(share[range(3), axes]).sum())
        signs = np.sign(share[range(3), axes]).astype(int)
        affine, hu = affine[:, [*axes, 3]], np.empty([shape[k] for k in axes], np.int16)
        affine[:, 3] += affine[:, :3] @ ((signs < 0) * np.subtract(hu.shape, 1))
        affine[:, :3] *= signs
        slices = hu[tuple(slice(None, None, sign) for sign in signs)].transpose(np.argsort(axes))
        for k, at in enumerate(steps):
            low = min(int(at), len(planes) - 2)
            planes[:low] = [None] * low  # the volume is never held twice
            slices[k] = cv2.addWeighted(planes[low], low + 1 - at, planes[low + 1], at - low, 0)
    return Volume(Path(folder).name, hu, tuple(spacing[[*axes]].tolist()), affine, tuple(problems))


def read_nifti(path):
    """(stored labels (I, J, K), slope, intercept, voxel from LPS mm) of a mask."""
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = zlib.decompressobj(31).decompress(raw, MAX_VOXELS)
    order = "<" if raw[:2] == b"\x5c\x01" else ">"  # fields by their offsets in nifti1.h
    short = np.frombuffer(raw[:348], order + "i2")
    real = np.frombuffer(raw[:348], order + "f4").astype(float)
    shape, zooms = short[21:24], real[20:23]
    rank, start = short[20], int(real[27])
    if raw[344:348] != b"n+1\0" or rank < 3 or start < 348 or (short[24 : 21 + rank] > 1).any():
        raise ValueError("not one 3-D image")  # NumPy would read before the file's first byte
    stored = np.ndarray(shape, order + NIFTI_TYPES[short[35]], raw, start, order="F")
    affine = np.eye(4)
    if short[127] > 0:  # sform
        affine[:3] = real[70:82].reshape(3, 4)
    elif short[126] > 0:  # qform
        b, c, d, *affine[:3, 3] = real[64:70]
        skew = np.array([[0, -d, c], [d, 0, -b], [-c, b, 0]])
        a = math.sqrt(max(0, 1 - b * b - c * c - d * d))
        turn = np.eye(3) + 2 * (a * skew + skew @ skew)
        affine[:3, :3] = turn * zooms * (1, 1, -1 if real[19] < 0 else 1)
    else:  # centred, as nibabel does
        affine[:3, :3] = np.diag(zooms * (-1, 1, 1))
        affine[:3, 3] = affine[:3, :3] @ (1.0 - shape) / 2
    voxel_from_lps = np.linalg.inv(np.asarray_chkfinite(affine)) * (-1, -1, 1, 1)
    slope, intercept = real[28:30] if math.isfinite(real[28]) and real[28] else (1, 0)
    return stored, slope, intercept, voxel_from_lps


def read_mask(path, volume, shape=None):
    """uint8 (Z, Y, X): each voxel's nearest label, 1-7 = C1-C7, 8-19 = T1-T12, 0 outside.

    `shape`: of a coarser grid. StudyError for another format.
    """
    with study_errors(f"{path}: not a whole NIfTI-1 mask in one file"):
        stored, slope, intercept, voxel_from_lps = read_nifti(path)
    out = np.zeros(shape or volume.hu.shape, np.uint8)
    matrix = (voxel_from_lps @ volume.affine)[:3, :, None, None]
    z, y, x = ((np.arange(n) + 0.5) * m / n - 0.5 for m, n in zip(volume.hu.shape, out.shape))
    flat = matrix[:, 1] * y[:, None] + matrix[:, 2] * x + matrix[:, 3] + 0.5  # (3, Y, X)
    for plane, above in zip(out, z):
        at = np.floor(flat + matrix[:, 0] * above).astype(int)
        inside = ((at >= 0) & (at < np.reshape(stored.shape, (3, 1, 1)))).all(0)
        values = stored[tuple(at[:, inside])] * slope + intercept
        plane[inside] = np.where((values > 0) & (values < 255), np.rint(values), 0)
    return out


def cube_labels(path, volume, size):
    """uint8 (D, D, D): the mask at the centres of the segmenter's cells."""
    return read_mask(path, volume, (size, size, size))


def to_cells(image, rows, columns):
    """The image averaged along an axis that gets shorter, interpolated along one that does not."""
    for size in ((image.shape[1], rows), (columns, rows)):  # OpenCV's: width first
        how = cv2.INTER_AREA if size <= image.shape[::-1] else cv2.INTER_LINEAR
        image = cv2.resize(image, size, interpolation=how)
    return image


def segmenter_input(volume, size=128, window=SEGMENTER_WINDOW):
    """float32 (1, D, D, D) in 0..1: the whole study averaged onto a cube.

    Cell i covers the voxels [i * Z / D, (i + 1) * Z / D), along Y and X likewise.
    """
    low, high = window[0] - window[1] // 2, window[0] + window[1] // 2
    planes = np.empty((len(volume.hu), size * size), np.float32)  # (Z, D * D)
    for k, hu in enumerate(volume.hu):
        planes[k] = to_cells(np.clip(hu, low, high).astype(np.float32), size, size).ravel()
    cube = to_cells(planes, size, size * size)  # (Z, D * D) -> (D, D * D)
    return torch.from_numpy((cube.reshape(1, size, size, size) - low) / (high - low))


# =========================================== Segmenter ===========================================
# In: the cube. Out: seven logits a cell. The trap: a timm network made 3-D can be wrong without
# an error (activations inside norms, means over two axes); to_3d refuses what it does not know.


class Conv3dSame(nn.Conv3d):
    """TensorFlow's SAME padding."""

    def forward(self, x):
        reach, stride = (self.kernel_size[0] - 1) * self.dilation[0] + 1, self.stride[0]
        padding = []
        for n in x.shape[:1:-1]:  # F.pad takes the last axis first
            total = max(reach - (n % stride or stride), 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


class BatchNormAct3d(nn.BatchNorm3d):
    """With the activation inside, as timm's."""

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SqueezeExcite3d(nn.Sequential):
    """Layers of timm's, in their order; the mean over three axes."""

    def forward(self, x):
        return x * super().forward(x.mean((2, 3, 4), keepdim=True))


SOLID = {nn.Conv2d: nn.Conv3d, Conv2dSame: Conv3dSame, nn.MaxPool2d: nn.MaxPool3d,
         nn.AvgPool2d: nn.AvgPool3d, nn.BatchNorm2d: nn.BatchNorm3d, BatchNormAct2d: BatchNormAct3d}


def to_3d(module, path=""):
    """The 3-D twin of a timm network: paths kept, weights divided by the new edge of the kernel.

    UserError naming the first layer that it cannot convert.
    """
    kind, name, home = type(module), type(module).__name__, type(module).__module__
    path = path or name
    sides = {n: v for n, v in vars(module).items() if isinstance(v, tuple) and len(v) == 2}
    if kind in SOLID and all(height == width for height, width in sides.values()):
        twin = copy.deepcopy(module)
        twin.__class__ = SOLID[kind]
        vars(twin).update({n: v[:1] * 3 for n, v in sides.items()})  # kernel, stride, padding
        if isinstance(module, nn.Conv2d):
            k, weight = module.kernel_size[0], module.weight.detach()[:, :, None]
            twin.weight = nn.Parameter(weight.repeat(1, 1, k, 1, 1) / k)  # (O, I, k, k, k)
        return twin
    squeeze = name in ("SqueezeExcite", "SEModule", "EffectiveSEModule")
    known = squeeze or name.endswith(("ConvNormAct", "DropPath")) or "activation" in home
    strange = kind in SOLID or "2d" in name or home.startswith("timm.layers")
    own = [*module.parameters(False), *module.buffers(False)]
    if own or strange and not known or getattr(module, "add_maxpool", False):
        raise UserError(f"cannot make {path} three-dimensional: unknown layer {name}")
    twin = SqueezeExcite3d() if squeeze else copy.copy(module)
    twin._modules = {n: to_3d(child, f"{path}.{n}") if child is not None else None
                     for n, child in module._modules.items()}
    return twin


def create_backbone(name, **arguments):
    """A timm model with random weights. UserError for a name timm does not know."""
    if ":" in name:  # hf-hub: would ask the network
        raise UserError(f"--backbone {name}: not a plain name of timm")
    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        if "drop_path_rate" in arguments and "drop_path_rate" in str(error):
            del arguments["drop_path_rate"]  # DenseNet and others have none
            return create_backbone(name, **arguments)
        raise UserError(f"--backbone {name}: {str(error).splitlines()[0]}") from None


class ConvBlock(nn.Module):
    """Convolution, norm, ReLU, then scSE (Roy et al. 2018): channels and places weighed."""

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
                 decoder=(64, 32, 24), drop_path=0.0, dropout=0.0):
        super().__init__()
        self.settings = dict(backbone=backbone, size=size, window=window, decoder=decoder)
        flat = create_backbone(backbone, features_only=True, out_indices=(0, 1, 2, 3), in_chans=1,
                               drop_path_rate=drop_path)
        if flat.feature_info.reduction() != [2, 4, 8, ENCODER_STRIDE]:
            raise UserError(f"--backbone {backbone}: needs features at strides 2, 4, 8 and 16")
        self.encoder = to_3d(flat)
        *skips, deepest = flat.feature_info.channels()
        skips[0] += 8  # and the cube itself, 2 x 2 x 2 cells a place
        self.decoder = nn.ModuleList(ConvBlock(a + b, c) for a, b, c in zip(
            (deepest, *decoder), skips[::-1], decoder))
        self.dropout = nn.Dropout3d(dropout)
        self.head = nn.Conv3d(decoder[-1], 7 * 8, 1)  # at stride 2: answers for 2 x 2 x 2 cells
        nn.init.constant_(self.head.bias, -4.0)  # most cells belong to no vertebra

    def forward(self, x):
        size = x.shape[2:]
        if any(n % ENCODER_STRIDE for n in size):
            raise UserError(f"cube {tuple(size)}: axes must be multiples of {ENCODER_STRIDE}")
        x = (x - 0.5) * 4
        cells = x.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).flatten(5)[:, 0].movedim(-1, 1)
        *skips, x = self.encoder(x)
        skips[0] = torch.cat([skips[0], cells], 1)  # (B, C + 8, Z/2, Y/2, X/2)
        for block, skip in zip(self.decoder, skips[::-1]):
            x = block(torch.cat([F.interpolate(x, skip.shape[2:]), skip], 1))
        x = self.head(self.dropout(x)).unflatten(1, (7, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(len(x), 7, *size)  # (B, 7, Z/2, 2, Y/2, 2, X/2, 2) -> (B, 7, Z, Y, X)


def segmenter_loss(logits, labels):
    """BCE, and soft Dice of what is in view: logits (B, 7, Z, Y, X), uint8 labels (B, Z, Y, X)."""
    logits, space = logits.float(), (2, 3, 4)
    truth = torch.stack([labels == v for v in range(1, 8)], 1).float()
    mask, seen = logits.sigmoid(), truth.amax(space)
    dice = (2 * (mask * truth).sum(space) + 1) / ((mask + truth).sum(space) + 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth)
    return 10 * entropy + 1 - (dice * seen).sum() / seen.sum().clamp(min=1)


# ============================================= Slices ============================================
# In: a Volume and the cube's probability. Out: ninety images a vertebra. The trap: the cube is
# stretched, so cells and voxels differ by another factor on every axis.


def interleave(images, masks):
    """(75, S, S) images and (15, S, S) masks -> (15, 6, S, S): images 5i .. 5i + 4, then mask i."""
    steps = images.reshape(STEPS, SLICES_PER_STEP, *masks.shape[1:])
    return np.concatenate([steps, masks[:, None]], 1)


def vertebra_box(probability):
    """First and last cell on each axis of (D, D, D): the run with most mask; None if not seen."""
    for threshold in MASK_THRESHOLDS:
        mask, box = probability > threshold, []
        if mask.sum() >= MIN_CELLS:
            for others in ((1, 2), (0, 2), (0, 1)):
                profile = mask.sum(others)
                inside = np.flatnonzero(profile)
                runs = np.split(inside, np.flatnonzero(np.diff(inside) > 2) + 1)
                longest = max(runs, key=lambda run: profile[run].sum())
                box.append((longest[0], longest[-1]))
            return box


def apply_window(hu, window):
    """uint8: (level, width) HU to 0..255."""
    low, scale = window[0] - window[1] // 2, 255 / window[1]
    return cv2.convertScaleAbs(np.maximum(hu, low), alpha=scale, beta=-low * scale)


def crop_plane(plane, box, size):
    """(S, S): the part of an image inside ((y0, y1), (x0, x1)) pixels, edge repeated."""
    (y, _), (x, _) = box
    dy, dx = np.diff(box)[:, 0] / size
    source = np.array([[dx, 0, x + dx / 2 - 0.5], [0, dy, y + dy / 2 - 0.5]])
    return cv2.warpAffine(plane, source, (size, size), borderMode=cv2.BORDER_REPLICATE,
                          flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def vertebra_slices(volume, probability, size=CROP, mask_of="last", window=BONE_WINDOW):
    """uint8 (7, 15, 6, S, S): a step is five neighbouring native slices and one soft mask.

    `probability` (7, D, D, D) covers the study. Boxes are square in mm: the shape is kept.
    A vertebra not seen is all zero, mask included, which tells the classifiers.
    """
    out = np.zeros((7, STEPS, CHANNELS, size, size), np.uint8)
    probability = np.asarray(probability, np.float32)
    voxels = np.array(volume.hu.shape) / probability.shape[1:]  # a cell's edges
    scale, cell_mm = voxels[0], (voxels * volume.spacing)[1:, None]
    near = np.arange(SLICES_PER_STEP) - SLICES_PER_STEP // 2
    for v, cells in enumerate(probability):
        found = vertebra_box(cells)
        if found is None:
            continue
        (first, last), *sides = found
        sides = (np.array(sides) + [-BOX_MARGIN, 1 + BOX_MARGIN]) * cell_mm
        half = np.ptp(sides, 1).max() / 2
        box = (sides.mean(1, keepdims=True) + [-half, half]) / cell_mm  # of cells
        centres = np.rint(np.linspace(first * scale, (last + 1) * scale - 1, STEPS))
        index = np.clip(centres[:, None] + near, 0, len(volume.hu) - 1).astype(int)  # (15, 5)
        shown, which = np.unique(index.ravel(), return_inverse=True)
        images = [crop_plane(apply_window(volume.hu[z], window), box * voxels[1:, None], size)
                  for z in shown]
        z = (index[:, -1 if mask_of == "last" else SLICES_PER_STEP // 2] + 0.5) / scale - 0.5
        z = np.float32(np.divmod(np.clip(z, 0, len(cells) - 1.001), 1))  # plane, share of the next
        masks = [crop_plane(cells[int(k)] * (1 - share) + cells[int(k) + 1] * share, box, size)
                 for k, share in z.T]
        masks = np.rint(np.maximum(np.array(masks) * 255, 1)).astype(np.uint8)  # 0: absent
        out[v] = interleave(np.array(images)[which], masks)
    return out


def write_crops(path, crops):
    """One study's crops: each different image once, as PNG (steps share slices)."""
    index, known = np.full(crops.shape[:3], -1, np.int16), {}
    for place in np.ndindex(index.shape):
        if crops[place].any():
            index[place], _ = known.setdefault(crops[place].tobytes(), (len(known), place))
    images = [cv2.imencode(".png", crops[place])[1].ravel() for _, place in known.values()]
    ends, data = np.cumsum([0, *map(len, images)]), np.concatenate([np.uint8([]), *images])
    write_atomic(path, lambda new: np.savez(
        new, index=index, ends=ends, data=data, edge=crops.shape[-1]))


def read_crops(path, vertebrae=range(7)):
    """uint8 (len(vertebrae), 15, 6, S, S) of a study. StudyError if the file is damaged."""
    try:
        with np.load(path) as file:
            index, ends, data, edge = (file[k] for k in ("index", "ends", "data", "edge"))
        index = index[list(vertebrae)]
        out = np.zeros((*index.shape, edge, edge), np.uint8)
        for k in np.unique(index[index >= 0]):
            out[index == k] = cv2.imdecode(data[ends[k] : ends[k + 1]], cv2.IMREAD_GRAYSCALE)
        return out
    except Exception as error:  # NumPy, zipfile, zlib and OpenCV each have their own
        raise StudyError(f"{path}: no crops of this version ({type(error).__name__})") from None


def crops_seen(path):
    """bool (7,): which vertebrae a file of crops holds."""
    with np.load(path) as file:
        return (file["index"] >= 0).any((1, 2))


# ========================================== Classifiers ==========================================


class StepEncoder(nn.Module):
    """Backbone, then LSTM: crops (B, N, K, S, S), uint8 or 0..1 -> (B, N, F), (B, N, 2H)."""

    def __init__(self, backbone, hidden, drop_path, dropout):
        super().__init__()
        self.backbone = create_backbone(backbone, in_chans=CHANNELS, num_classes=0,
                                        global_pool="avg", drop_path_rate=drop_path)
        width = self.backbone.eval()(torch.zeros(1, CHANNELS, 64, 64)).shape[1]
        self.absent = nn.Parameter(torch.zeros(width))  # in the place of a vertebra out of view
        self.lstm = nn.LSTM(width, hidden, 2, batch_first=True, bidirectional=True, dropout=dropout)

    def forward(self, crops):
        masks = crops[:, :, -1].unflatten(1, (-1, STEPS)).flatten(2)
        seen = (masks.amax(2) > 0).flatten().repeat_interleave(STEPS)  # (B * N,)
        features = self.absent.float().repeat(len(seen), 1)
        if seen.any():  # absent vertebrae cost nothing
            shown = crops.flatten(0, 1)[seen]  # (B, N, K, S, S) -> (M, K, S, S)
            at_once = len(shown) if self.training else CROPS_AT_ONCE[crops.device.type]
            found = [self.backbone(to_unit(part)) for part in shown.split(at_once)]
            features[seen] = torch.cat(found).float()
        features = features.unflatten(0, crops.shape[:2])  # (B * N, F) -> (B, N, F)
        return features, self.lstm(features)[0]


def to_unit(crops):
    """Channels-last floats in -1..1 from uint8 or 0..1."""
    crops = crops / 255 if crops.dtype == torch.uint8 else crops
    return (crops * 2 - 1).contiguous(memory_format=torch.channels_last)


def logit_head(width, hidden, dropout):
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(0.1),
                         nn.Dropout(dropout), nn.Linear(hidden, 1))


class VertebraClassifier(nn.Module):
    """One vertebra: (B, 15, 6, S, S) -> (B, 15) logits of a fracture."""

    def __init__(self, backbone="tf_efficientnetv2_s", size=CROP, mask_of="last", hidden=256,
                 drop_path=0.0, dropout=0.0):
        super().__init__()
        self.settings = dict(backbone=backbone, size=size, mask_of=mask_of, hidden=hidden)
        self.encoder = StepEncoder(backbone, hidden, drop_path, dropout)
        self.head = logit_head(2 * hidden, hidden, dropout)

    def forward(self, crops):
        return self.head(self.encoder(crops)[1])[..., 0]


class PatientClassifier(VertebraClassifier):
    """All vertebrae: (B, 105, 6, S, S) -> (B, 105) logits of the steps, (B,) of the patient."""

    def __init__(self, backbone="convnext_nano", **settings):
        super().__init__(backbone, **settings)
        lstm = self.encoder.lstm
        self.patient_lstm = copy.deepcopy(lstm)
        self.patient_head = logit_head(4 * lstm.hidden_size, lstm.hidden_size, lstm.dropout)

    def forward(self, crops):
        features, context = self.encoder(crops)
        whole = self.patient_lstm(features)[0]
        whole = torch.cat([whole.amax(1), whole.mean(1)], 1)  # (B, N, 2H) -> (B, 4H)
        return self.head(context)[..., 0], self.patient_head(whole)[..., 0]


KINDS = {"segmenter": Segmenter, "vertebra": VertebraClassifier, "patient": PatientClassifier}


def fold_norms(model):
    """The model for inference, batch norms folded into the convolutions before them.

    Seen by running it: a norm is given what a convolution of the same part returned.
    """
    paths, calls = {m: path for path, m in model.named_modules()}, []
    kinds = (nn.Conv2d, nn.Conv3d, nn.BatchNorm2d, nn.BatchNorm3d)

    def note(module, given, out):
        if isinstance(module, kinds):
            calls.append((getattr(given[0], "made_by", None), module))
            out.made_by = module

    shape = (1, 1, 32, 32, 32) if isinstance(model, Segmenter) else (1, STEPS, CHANNELS, 64, 64)
    with torch.no_grad(), nn.modules.module.register_module_forward_hook(note):
        model.eval()(torch.ones(shape))
    used = [module for _, module in calls]
    for conv, norm in calls:
        home, _, name = paths[norm].rpartition(".")
        pair = isinstance(conv, kinds[:2]) and isinstance(norm, kinds[2:])
        if pair and used.count(conv) == used.count(norm) == 1 and paths[conv].startswith(home):
            conv.weight, conv.bias = nn.utils.fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                norm.weight, norm.bias)
            setattr(model.get_submodule(home), name, getattr(norm, "act", nn.Identity()))
    return model


def classifier_loss(outputs, labels):
    """The metric, of outputs (B, 15) and labels (B, 1), or (B, 105), (B,) and (B, 8).

    The steps of a vertebra share its label and weight; NaN is unknown.
    """
    if isinstance(outputs, tuple):
        outputs = torch.cat([outputs[0], outputs[1][:, None]], 1)
    which = np.arange(outputs.shape[1]) // STEPS  # the label of every logit
    share = labels.new_tensor(TARGET_WEIGHTS[which] / np.bincount(which)[which])
    truth = labels[:, which]
    weight = share * torch.where(truth > 0, POSITIVE_FACTOR, 1.0) * ~truth.isnan()
    loss = F.binary_cross_entropy_with_logits(outputs.float(), truth.nan_to_num(), weight,
                                              reduction="sum")
    return loss / weight.sum().clamp(min=1e-6)


# ========================================== Augmentation =========================================
# Batches, on the device they train on. All that is random about a sample comes from its own
# generator: batches, workers and ranks cannot change it.

# Degrees, log scale, share of the edge (the cube's: top teams), share mirrored along an axis;
# window, log gamma, noise (of 0..1), shares seen at half resolution and with a hole.
VOLUME_RANGES = dict(rotation=15, scale=0.2, shift=0.3, mirror=0.5, window=0.2, gamma=0.3,
                     noise=0.06, blur=0.3, hole=0.0)
CROP_RANGES = dict(rotation=20, scale=0.15, shift=0.1, mirror=0.5, window=0.15, gamma=0.25,
                   noise=0.04, blur=0.15, hole=0.3)


def draw_grid(rngs, ranges, shape, device):
    """A random affine grid for grid_sample a sample."""
    maps, axes = [], len(shape) - 2
    for rng in rngs:
        scale, shift, *angles = rng.uniform(-1, 1, (2 + axes, axes))
        angles = np.triu(angles, 1) * math.radians(ranges["rotation"])
        turn = torch.matrix_exp(torch.from_numpy(angles - angles.T)).numpy()
        matrix = turn * np.exp(scale * ranges["scale"])
        flips = rng.random(3) < ranges["mirror"]  # cubes: X, never Z; crops: X, Y and transposed
        matrix[:, : 4 - axes] *= 1 - 2 * flips[: 4 - axes]
        if axes == 2 and flips[2]:
            matrix = matrix[::-1]
        maps.append(np.c_[matrix, 2 * ranges["shift"] * shift])
    maps = torch.tensor(np.array(maps), dtype=torch.float32, device=device)
    return F.affine_grid(maps, shape, align_corners=False)


def grey_levels(image, rng, ranges):
    """One sample (N, ...) in 0..1 as another scanner might show it, perhaps with a hole."""
    stretch, shift = ranges["window"] * rng.uniform(-1, 1, 2)
    gamma = math.exp(ranges["gamma"] * rng.uniform(-1, 1))
    noise, coarse, hole = rng.random(3)
    seeded = torch.Generator(image.device).manual_seed(int(rng.integers(2**31)))
    image = (image * (1 + stretch) + shift).clamp(0, 1) ** gamma
    if coarse < ranges["blur"]:
        mode = "trilinear" if image.ndim == 4 else "bilinear"
        half = F.interpolate(image[None], scale_factor=0.5, mode=mode)
        image = F.interpolate(half, image.shape[1:], mode=mode)[0]
    grain = torch.randn(image.shape, generator=seeded, device=image.device)
    image = image + ranges["noise"] * noise**2 * grain
    if hole < ranges["hole"]:
        edge = int(image.shape[-1] * rng.uniform(0.05, 0.25))
        top, left = rng.integers(0, image.shape[-1] - edge, 2)
        image[..., top : top + edge, left : left + edge] = 0
    return image.clamp(0, 1)


def augment_volumes(cubes, labels, rngs, ranges=VOLUME_RANGES):
    """Cubes (B, 1, D, D, D) in 0..1 and labels (B, D, D, D) moved together; cubes regreyed."""
    grid = draw_grid(rngs, ranges, cubes.shape, cubes.device)
    cubes = F.grid_sample(cubes, grid, align_corners=False)
    labels = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)
    cubes = torch.stack([grey_levels(cube, rng, ranges) for cube, rng in zip(cubes, rngs)])
    return cubes, labels[:, 0].to(torch.uint8)


def augment_crops(crops, rngs, size=CROP, ranges=CROP_RANGES):
    """Crops (B, N, K, S, S) in 0..1: a sample moved as one, its slices regreyed, not its masks."""
    grid = draw_grid(rngs, ranges, (len(crops), 1, size, size), crops.device)
    moved = F.grid_sample(crops.flatten(1, 2), grid, align_corners=False)
    moved = moved.unflatten(1, crops.shape[1:3])  # (B, N * K, S, S) -> (B, N, K, S, S)
    for slices, rng in zip(moved[:, :, :-1], rngs):
        slices[:] = grey_levels(slices.flatten(0, 1), rng, ranges).view_as(slices)
    return moved


def shuffle_order(crops, labels, rngs, share):
    """A share of the samples with vertebrae, and the steps of each, in another order."""
    crops, labels = crops.unflatten(1, (-1, STEPS)).clone(), labels.clone()
    for crop, label, rng in zip(crops, labels, rngs):
        steps, order = rng.permutation(STEPS), rng.permutation(len(crop))
        if rng.random() < share:
            crop[:] = crop[order][:, steps]
            label[: len(crop)] = label[order]
    return crops.flatten(1, 2), labels


# ======================================== Metric and folds =======================================


def element_losses(answers, labels):
    """Log loss of every answer, clipped as the competition does."""
    right = np.where(labels, answers, 1 - np.asarray(answers))
    return -np.log(np.clip(right, 1e-15, 1))


def competition_scores(answers, labels):
    """Mean of sum(w * loss) / sum(w) over studies, and over columns, of (N, 8) answers."""
    loss, weight = element_losses(answers, labels), np.where(labels, POSITIVE_FACTOR, 1.0)
    study = np.average(loss, 1, weight * TARGET_WEIGHTS).mean()
    column = np.average(np.average(loss, 0, weight), weights=TARGET_WEIGHTS)
    return study, column


def auc(answers, labels):
    """Area under the ROC curve, ties counting half; NaN with one class only."""
    positive = np.asarray(labels) > 0
    n, m = positive.sum(), (~positive).sum()
    rank = pd.Series(answers, dtype=float).rank()[positive].sum()
    return float((rank - n * (n + 1) / 2) / (n * m)) if n and m else math.nan


def dice_scores(probability, labels):
    """Dice (7,) of masks at 0.5; NaN for a vertebra that labels (D, D, D) do not hold."""
    mask, truth = probability > 0.5, labels == np.arange(1, 8)[:, None, None, None]
    overlap, found, size = (x.sum((1, 2, 3)) for x in (mask & truth, mask, truth))
    return np.where(size, 2 * overlap / np.maximum(found + size, 1), np.nan)


def assign_folds(table, folds, masked):
    """uid -> fold: strata by mask, patient, number of fractures; within one by the uid's hash."""
    uids, fractures = table[STUDY], table[list(VERTEBRAE)].sum(axis=1).clip(upper=2)
    hashes = [hashlib.sha256(uid.encode()).digest() for uid in uids]
    keys = sorted(zip(uids.isin(list(masked)), table.patient_overall, fractures, hashes, uids))
    return {uid: k % folds for k, (*_, uid) in enumerate(keys)}


# ============================================ Training ===========================================
# One loop for three models. What is random is drawn from (seed, step) or (seed, epoch, place): a
# resumed run repeats an uninterrupted one, on the CPU bit for bit.

# One fold. train: samples; fractured: bool of each; load(sample) -> arrays; loss(model, tensors,
# generators, recipe); score(model, held-out study) -> columns; judge(table) -> "score": low is good
Task = namedtuple("Task", "kind name recipe device train fractured load loss held_out columns "
                  "score judge")


def save_checkpoint(path, kind, recipe, **content):
    content |= dict(program="cspine", kind=kind, recipe=asdict(recipe))
    write_atomic(path, lambda new: torch.save(content, new))


def load_checkpoint(path):
    """The plain content of a checkpoint of ours; nothing in it can run code."""
    with contextlib.suppress(Exception):  # torch has a dozen kinds
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["program"] == "cspine":
            return content
    raise UserError(f"{path}: missing, damaged or not one of our checkpoints; refused")


def new_model(kind, settings):
    """A model with those of the settings that it knows, channels last."""
    known = inspect.signature(KINDS[kind]).parameters
    model = KINDS[kind](**{k: v for k, v in settings.items() if k in known})
    deep = kind == "segmenter"
    return model.to(memory_format=torch.channels_last_3d if deep else torch.channels_last)


def load_model(path, kind):
    """The model of a checkpoint, ready for inference. UserError if it holds another."""
    content = load_checkpoint(path)
    try:
        model = new_model(kind, content["settings"])
        model.load_state_dict(content["tensors"])
    except (KeyError, TypeError, RuntimeError, AttributeError, ValueError):
        raise UserError(f"{path} holds a {content.get('kind')}, not a {kind} that fits") from None
    return model.eval()


def adapt(tensor, like):
    """An ImageNet tensor (3 colours, 2-D) in the shape of our layer, or None."""
    if tensor.ndim == 4 <= like.ndim:
        channels, depth = like.shape[1:3]
        if tensor.shape[1] == 3 != channels:
            tensor = tensor.sum(1, keepdim=True).repeat(1, channels, 1, 1) / channels
        if like.ndim == 5:
            tensor = tensor[:, :, None].repeat(1, 1, depth, 1, 1) / depth
    return tensor if tensor.shape == like.shape else None


def load_init(model, path):
    """Start from a timm file, less its head, or one of ours: by name, else in order.

    Only a patient classifier's own part may be missing. UserError for another architecture.
    """
    try:
        source = timm.models.load_state_dict(str(path), weights_only=True)
        part = model if "program" in source else getattr(model.encoder, "backbone", model.encoder)
        source = {n: t for n, t in source.get("tensors", source).items() if t.ndim}
    except Exception as error:  # any file may be given here
        raise UserError(f"--init {path}: cannot be read ({type(error).__name__})") from None
    target = {n: t for n, t in part.state_dict().items()
              if t.ndim and (n in source or not n.startswith("patient_"))}
    named = target.keys() <= source.keys()
    pairs = dict(zip(target, target if named else source))
    taken = {n: adapt(source[other], target[n]) for n, other in pairs.items()}
    if len(taken) < len(target) or any(t is None for t in taken.values()):
        raise UserError(f"--init {path}: not the architecture of {model.settings}")
    part.load_state_dict(taken, strict=False)
    left = [n for n in source if n not in pairs.values()]
    say(f"--init: {len(taken)} tensors taken {'by name' if named else 'in order: names differ'}; "
        f"{len(left)} left out, last {', '.join(left[-2:])}")


class Trainer:
    """The state of a training, all of it saved, and its step."""

    def __init__(self, task, init=""):
        recipe = task.recipe
        torch.manual_seed(recipe.seed)
        self.model = model = new_model(task.kind, asdict(recipe))
        if init:
            load_init(model, init)
        model.to(task.device)
        self.averaged = copy.deepcopy(model).eval()
        groups = [dict(params=[p for p in model.parameters() if p.ndim > 1]),
                  dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.weight_decay)
        half = half_type(task.device) is torch.float16
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=half)
        self.step = self.skipped = self.in_a_row = 0
        self.losses, self.history, self.seconds, self.evaluation_s = [], [], 0.0, 0.0

    def state(self):
        return {k: getattr(v, "state_dict", lambda: v)() for k, v in vars(self).items()}

    def load(self, state):
        for name, value in state.items():
            part = getattr(self, name)
            getattr(part, "load_state_dict", lambda v: setattr(self, name, v))(value)

    def update(self, task, batch, total):
        """One of `total` optimiser steps, on this rank's pairs (arrays, generator)."""
        recipe, model, done = task.recipe, self.model.train(), self.step / total
        warm = min(1, (done + 1e-3) / (recipe.warm_up + 1e-3))
        for group in self.optimizer.param_groups:  # half a cosine, down to 1 %
            group["lr"] = recipe.lr * warm * (0.505 + 0.495 * math.cos(math.pi * done))
        torch.manual_seed((recipe.seed * 1009 + self.step) * 64 + ranks()[0])  # for dropout
        self.optimizer.zero_grad()
        mean, parts = 0.0, min(recipe.accumulate, len(batch))
        for k in range(parts):
            samples, rngs = zip(*batch[k::parts])
            tensors = [torch.from_numpy(np.stack(x)).to(task.device) for x in zip(*samples)]
            with autocast(task.device):
                loss = task.loss(model, tensors, rngs, recipe) * len(rngs) / len(batch)
            self.scaler.scale(loss).backward()
            mean += loss.item()
        self.scaler.unscale_(self.optimizer)
        for p in model.parameters() if dist.is_initialized() else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # no vertebra on this rank
        mean_over_ranks([p.grad for p in model.parameters()])
        self.in_a_row += 1
        if torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)):
            self.scaler.step(self.optimizer)
            self.losses.append(mean)
            self.in_a_row = 0
        self.skipped += self.in_a_row > 0
        if self.in_a_row > MAX_SKIPPED_STEPS:
            raise UserError(f"{self.in_a_row} steps without a finite gradient: lower --lr")
        self.scaler.update()
        self.step += 1
        share = 1 - min(recipe.ema, (1 + self.step) / (10 + self.step))
        for slow, fast in zip(self.averaged.state_dict().values(), model.state_dict().values()):
            slow.lerp_(fast, share) if slow.is_floating_point() else slow.copy_(fast)


def mean_over_ranks(tensors):
    """Each tensor becomes its mean over the ranks."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([t.flatten() for t in tensors]) / ranks()[1]
        dist.all_reduce(flat)  # one message
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))


def epoch_order(task, epoch, count):
    """(count,) places in task.train; a share of `positives` fractured, or (0) as they come."""
    rng, share = np.random.default_rng([task.recipe.seed, epoch]), task.recipe.positives
    order = rng.permutation(len(task.train))
    hit = np.resize(task.fractured or [False], len(order))[order]
    if share and hit.any() and not hit.all():
        n = round(share * count)
        order = np.r_[np.resize(order[hit], n), np.resize(order[~hit], count - n)]
        order = rng.permutation(order)
    return np.resize(order, count)


def sample_stream(task, step, count):
    """(sample, generator) for this rank from `step` on; an epoch is `count` samples."""
    (rank, world), start = ranks(), step * task.recipe.batch_size
    for epoch in range(start // count, task.recipe.epochs):
        order = epoch_order(task, epoch, count)
        for place in range(max(0, start - epoch * count) + rank, count, world):
            seed = [task.recipe.seed, epoch, place]
            yield task.train[order[place]], np.random.default_rng(seed)


def close_epoch(trainer, task, weights, clock):
    """Score the averaged weights; write the best, their held-out answers and the log."""
    started, (rank, world), history = clock(), ranks(), trainer.history
    mean_over_ranks([b for b in trainer.averaged.buffers() if b.is_floating_point()])
    with torch.inference_mode(), autocast(task.device):
        rows = [(uid, *task.score(trainer.averaged, uid)) for uid in task.held_out[rank::world]]
    table = pd.DataFrame(sum(over_ranks(rows), []), columns=[STUDY, *task.columns])
    losses = sum(over_ranks(trainer.losses), [])
    loss = np.mean(losses or math.nan)
    result = dict(task.judge(table) if len(table) else {"score": loss}, train_loss=loss)
    result = {k: float(v) for k, v in result.items()}  # plain data, as load_checkpoint asks
    if math.isnan(result["score"]):
        result["score"] = math.inf
    best = result["score"] <= min([line["score"] for line in history], default=math.inf)
    samples = len(losses) // world * task.recipe.batch_size
    result |= dict(lr=trainer.optimizer.param_groups[0]["lr"], seconds=trainer.seconds)
    shown = "  ".join(f"{k} {v:.4g}" for k, v in result.items())
    history.append(dict(epoch=len(history) + 1, **result, peak_gb=peak_gb(),
                        samples_per_s=samples / trainer.seconds, skipped_steps=trainer.skipped))
    trainer.losses, trainer.seconds, trainer.evaluation_s = [], 0.0, clock() - started
    if rank == 0:
        say(f"{task.name}  epoch {len(history)}/{task.recipe.epochs}  {shown}")
        if best:  # ships matrices in half precision
            tensors = trainer.averaged.state_dict()
            tensors = {n: (t.half() if t.ndim > 1 else t).cpu() for n, t in tensors.items()}
            save_checkpoint(weights / f"{task.name}.pt", task.kind, task.recipe, tensors=tensors,
                            settings=trainer.model.settings, result=result)
            write_csv(weights / f"{task.name}_heldout.csv", table)
        write_csv(weights / f"{task.name}_log.csv", pd.DataFrame(history))


def train(task, weights, stop, workers=2, go_on=False, init=""):
    """Train one fold into <name>.pt under `weights`; Stopped if cut short."""
    (rank, world), samples, size = ranks(), len(task.train), task.recipe.batch_size
    if not samples or size % world:
        raise UserError(f"{task.name}: {samples} samples, --batch-size {size}: needs samples, and "
                        f"a multiple of {world} processes")
    trainer, last, clock = Trainer(task, init), weights / f"{task.name}_last.pt", stop.clock
    if go_on and last.exists():
        saved = load_checkpoint(last)
        other = [k for k, v in asdict(task.recipe).items() if v != saved["recipe"].get(k)]
        if other or saved["samples"] != samples:
            raise UserError(f"{last} was made with other {', '.join(other) or 'data'}: give the "
                            "same options, or delete it")
        trainer.load(saved["state"])
    per_epoch, slowest = max(1, samples // size), 0.0
    total = per_epoch * task.recipe.epochs
    if rank == 0:
        say(f"{task.name}: {task.recipe.backbone}, {samples} samples, {len(task.held_out)} studies "
            f"held out, step {trainer.step} of {total}, {task.device}")

    def save():
        if rank == 0:
            save_checkpoint(last, task.kind, task.recipe, samples=samples, state=trainer.state())

    stream = sample_stream(task, trainer.step, per_epoch * size)
    loaded = prefetch(lambda pair: (task.load(pair[0]), pair[1]), stream, workers, 2 * size)
    for _ in progress(range(trainer.step, total), "step", total - trainer.step):
        started, evaluation = clock(), trainer.evaluation_s or slowest * len(task.held_out)
        if reason := max(over_ranks(stop.reason(2 * slowest + evaluation))):
            save()
            raise Stopped(f"{task.name}: stopped by {reason} at step {trainer.step} of {total}; "
                          "the same command with --resume goes on")
        batch = [future.result() for _, (_, future) in zip(range(size // world), loaded)]
        trainer.update(task, batch, total)
        seconds = clock() - started
        trainer.seconds, slowest = trainer.seconds + seconds, max(0.9 * slowest, seconds)
        if trainer.step % per_epoch == 0:
            close_epoch(trainer, task, weights, clock)
            save()


# =========================================== Prediction ==========================================
# Studies to rows. A complete submission is on disk from the first second, at worst with the prior.

CALIBRATION_PULL = 2.0  # towards the identity: a spread of 0.5 in log scale and in shift
READING_SHARE = 0.25  # of the time left, for one study
REPORTS = [f"predict_report{k or ''}.csv" for k in range(16)]  # one a process

# models: {kind: list}; calibration: (8, 2) scale and shift in logit space, or None
Ensemble = namedtuple("Ensemble", "models device calibration", defaults=[None])
Effort = namedtuple("Effort", "views folds")  # what a study is given; without folds the prior


def write_json(path, content):
    write_atomic(path, lambda new: new.write_text(json.dumps(content, indent=1)))


def load_models(weights, kind, device):
    """{fold: model} of <kind>_fold<k>.pt."""
    paths = [(p.stem.rpartition("fold")[2], p) for p in Path(weights).glob(f"{kind}_fold*.pt")]
    return {int(k): load_model(p, kind).to(device) for k, p in sorted(paths) if k.isdecimal()}


def load_ensemble(weights, device):
    """All models under `weights`. UserError without a segmenter and a classifier."""
    models = {kind: [*load_models(weights, kind, device).values()] for kind in KINDS}
    if not models["segmenter"] or not models["vertebra"] + models["patient"]:
        raise UserError(f"no weights in {weights}: train, or give --weights a folder with "
                        "segmenter_fold*.pt and vertebra_fold*.pt or patient_fold*.pt")
    path = Path(weights) / "calibration.json"
    if not path.exists():
        return Ensemble(models, device)
    with study_errors(f"{path}: expected a finite [scale, shift] for each target"):
        table = json.loads(path.read_text())
        calibration = np.array([table[t] for t in TARGETS], float).reshape(8, 2)
        assert np.isfinite(calibration).all()
    return Ensemble(models, device, calibration)


@torch.inference_mode()
def segment(models, volume, device, problems=None):
    """float32 (7, D, D, D): mean probability of the segmenters, in_order."""
    edge, total, cubes = max(model.settings["size"] for model in models), 0, {}
    for model in models:
        key = model.settings["size"], tuple(model.settings["window"])
        if key not in cubes:
            cubes[key] = segmenter_input(volume, *key)[None]
        with autocast(device):
            logits = model(cubes[key].to(device, memory_format=torch.channels_last_3d))
        found = F.interpolate(logits.float().sigmoid(), (edge,) * 3, mode="trilinear")[0]
        total += found.nan_to_num_() / len(models)
    return in_order(total.cpu().numpy(), [] if problems is None else problems)


def in_order(probability, problems):
    """(7, D, D, D); of two vertebrae against the order head to foot the fainter is emptied."""
    weight = (probability * (probability > 0.5)).sum((2, 3))  # (7, D)
    mass = weight.sum(1)
    centre = weight @ np.arange(weight.shape[1]) / np.maximum(mass, 1)
    while True:
        seen = np.flatnonzero(mass > MIN_CELLS)
        wrong = np.diff(centre[seen]) <= 0
        if not wrong.any():
            return probability
        drop = min(seen[wrong.argmax() :][:2], key=lambda v: mass[v])
        mass[drop] = probability[drop] = 0
        problems.append(f"{VERTEBRAE[drop]} against the order head to foot, taken out")


@torch.inference_mode()
def classify(ensemble, crops, effort):
    """[(step probability (7, 15), patient probability)], one a model and view; NaN: none."""
    absent, resized, out = ~crops.any((1, 2, 3, 4)), {}, []
    crops = torch.from_numpy(crops).to(ensemble.device)
    patient = ensemble.models["patient"][: effort.folds]
    for i, model in enumerate(ensemble.models["vertebra"][: effort.folds] + patient):
        size = model.settings["size"]
        if size not in resized:  # a vertebra at a time, back to bytes: little memory
            resized[size] = torch.stack([F.interpolate(
                c.float(), (size, size), mode="bilinear").round().byte() for c in crops])
        for view in range(i, i + effort.views) or [0]:
            turned = torch.rot90(resized[size], view, (-2, -1))
            turned = turned.flip(-1) if view & 4 else turned
            with autocast(ensemble.device):
                whole = model in patient
                steps, head = model(turned.flatten(0, 1)[None]) if whole else (model(turned), None)
            steps = steps.float().sigmoid().double().view(7, STEPS).cpu().numpy()
            steps[absent] = np.nan
            out.append((steps, float(head.float().sigmoid()) if whole else math.nan))
    return out


def combine(outputs, options, calibration=None):
    """(8,) answers from what classify gave; what is NaN gets the prior."""
    rows = [[*np.sort(steps, 1)[:, -options.top_k :].mean(1), head] for steps, head in outputs]
    rows, share = torch.tensor(rows, dtype=torch.float64), options.noisy_or
    logit = options.average == "logit"
    answer = (rows.logit(FLOOR).nanmean(0).sigmoid() if logit else rows.nanmean(0)).numpy()
    either = 1 - pd.Series(1 - answer[:7]).prod(min_count=1)  # NaN with no vertebra in sight
    answer[7] = share * either + (1 - share) * np.nan_to_num(answer[7], nan=either)
    if calibration is not None:
        scale, shift = torch.tensor(calibration).T
        answer = (torch.tensor(answer).logit(FLOOR) * scale + shift).sigmoid().numpy()
    return np.where(np.isnan(answer), PRIOR, answer).clip(FLOOR, 1 - FLOOR)


def fit_calibration(answers, labels):
    """(8, 2) scale and shift that lower the score of (N, 8) answers, held near the identity."""
    weight = np.where(labels > 0, POSITIVE_FACTOR, 1.0)
    weight /= (weight * TARGET_WEIGHTS).sum(1, keepdims=True)
    weight *= (labels.min(0) < labels.max(0)) / weight.mean(0)  # one class says nothing
    logits, truth = torch.tensor(answers).logit(FLOOR), torch.tensor(labels).double()
    fit = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)  # log scale, shift
    optimizer = torch.optim.LBFGS([fit], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = CALIBRATION_PULL * fit.square().sum() + F.binary_cross_entropy_with_logits(
            logits * fit[0].exp() + fit[1], truth, torch.tensor(weight), reduction="sum")
        total.backward()
        return total

    optimizer.step(loss)
    return np.stack([fit[0].exp().detach(), fit[1].detach()], 1)


def answer_study(volume, ensemble, effort, options):
    """A study's row of the report, with its answers."""
    models, clock, problems = ensemble.models, time.monotonic, [*volume.problems]
    for model in sum(models.values(), []):
        model.to(ensemble.device)  # the study before may have left them on the CPU
    start = clock()
    probability = segment(models["segmenter"][: effort.folds], volume, ensemble.device, problems)
    found = clock()
    mask_of = (models["vertebra"] + models["patient"])[0].settings["mask_of"]
    crops = vertebra_slices(volume, probability, mask_of=mask_of)
    cut = clock()
    answers = combine(classify(ensemble, crops, effort), options, ensemble.calibration)
    seen = [name for name, crop in zip(VERTEBRAE, crops) if crop.any()]
    status = "ok" if len(seen) == 7 else "partial" if seen else "nothing seen"
    return dict(zip(TARGETS, answers), status=status, slices=len(volume.hu), seen="+".join(seen),
                segment_s=found - start, crops_s=cut - found, classify_s=clock() - cut,
                warnings="; ".join(problems)[:500])


def answer_or_prior(uid, future, ensemble, effort, options, seconds):
    """A study's row of the report: whatever goes wrong with it ends here."""
    prior = dict(zip(TARGETS, PRIOR), status="no time")
    if not effort.folds:
        future.cancel()
        return prior
    try:
        volume, read_s = future.result(min(max(seconds, 1), threading.TIMEOUT_MAX))
        try:
            row = answer_study(volume, ensemble, effort, options)
        except torch.OutOfMemoryError:  # the CPU has room for this study
            ensemble = ensemble._replace(device=torch.device("cpu"))
            row = answer_study(volume, ensemble, effort, options)
            row["warnings"] += "; out of GPU memory, done on the CPU"
        return dict(row, read_s=read_s)
    except Exception as error:  # the one place that must outlive all that a study can do
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        say(f"study {uid}: {what}; answered with the prior")
        return dict(prior, status="failed", warnings=what)


def choose_effort(options, folds, seconds, left):
    """What fits `left`, at `seconds` a fold and view: views go first, then folds, then all."""
    few = min(options.views, 1)
    for effort in (Effort(options.views, folds), *(Effort(few, folds >> k) for k in range(9))):
        if seconds * effort.folds * max(effort.views, 1) <= max(left, 0):
            return effort


def safe_folder(root, uid):
    """root / uid. StudyError if the uid, from a csv, is no plain folder name."""
    if uid in ("", "..") or Path(uid).name != uid:
        raise StudyError(f"{uid!r} is no plain folder name")
    return Path(root) / uid


def submission_rows(table):
    """[(row_id, study, target)] of test.csv, each row_id once; its ending says the target."""
    table = table.fillna("").astype(str).drop_duplicates("row_id")
    target = table.row_id.str.extract(f"_({'|'.join(TARGETS)})$")[0].fillna(table.prediction_type)
    return [*zip(table.row_id, table[STUDY], target.where(target.isin(TARGETS), TARGETS[-1]))]


def answered(row):
    return row["status"] not in ("failed", "no time")


def read_reports(out):
    """{study: row} of all processes that write beside `out`; an answer outdoes a failure."""
    rows = [row for path in map(out.with_name, REPORTS) if path.exists()
            for row in read_csv(path, (STUDY, "status", *TARGETS)).to_dict("records")]
    return {row[STUDY]: row for row in sorted(rows, key=answered)}


def write_submission(out, rows):
    """Every row of test.csv, with the prior where no report has an answer."""
    prior, reports, known = dict(zip(TARGETS, PRIOR)), read_reports(out), None
    while known != len(reports):  # else another process reported meanwhile
        known = len(reports)
        values = [(row, reports.get(uid, prior)[target]) for row, uid, target in rows]
        write_csv(out, pd.DataFrame(values, columns=["row_id", "fractured"]))
        reports = read_reports(out)


def predict_studies(images, out, rows, done, ensemble, options, stop, workers):
    """Answer this process's share of the studies; report and submission follow each."""
    (rank, world), reports = ranks(), [*done.values()]
    todo = [u for u in [*dict.fromkeys(u for _, u, _ in rows)][rank::world] if u not in done]
    folds, seconds, effort = max(map(len, ensemble.models.values())), 1e-9, None

    def read(uid):
        start, share = stop.clock(), READING_SHARE * stop.left()
        folder = safe_folder(images, uid)
        volume = read_volume(folder, workers, lambda: stop.clock() - start > share)
        return volume, stop.clock() - start

    for k, (uid, future) in enumerate(progress(prefetch(read, todo, 1), "study", len(todo))):
        start, left, last = stop.clock(), stop.left(), effort
        effort = choose_effort(options, folds, seconds, left / (len(todo) - k))
        if last not in (None, effort):
            say(f"time is short: {effort.folds} folds, {effort.views} views from study {k + 1} on")
        row = answer_or_prior(uid, future, ensemble, effort, options, READING_SHARE * left)
        reports.append({STUDY: uid, **row, "peak_gb": peak_gb()})
        if effort.folds or uid == todo[-1] or stop.signal:  # a prior is on disk already
            write_csv(out.with_name(REPORTS[rank]), pd.DataFrame(reports))
            write_submission(out, rows)
        if effort.folds:
            used = (stop.clock() - start) / (effort.folds * max(effort.views, 1))
            seconds = max(used, 0.8 * seconds)
        if stop.signal:
            raise Stopped(f"stopped by {stop.signal}: {out} is complete, the rest with the prior; "
                          "--resume goes on")


# ============================================ Decoding ===========================================
# In: a DICOM data set. Out: its stored values. The trap: headers lie, so every size is checked.

MAX_JPEG_2000 = 2**20  # pixels: hostile files cost OpenJPEG gigabytes
HALVES = {1: (2, 0, 0), 2: (0, 2, 0), 3: (0, 0, 2), 4: (2, 2, -2),  # of left, above, corner
          5: (2, 1, -1), 6: (1, 2, -1), 7: (1, 1, 0)}  # by predictor (T.81 table H.1)


@study_errors("pixel data")
def decode_pixels(data):
    """Stored values (frames, rows, columns) of a DICOM data set, 16 or 32 bits."""
    shape = int(data.get("NumberOfFrames") or 1), data.Rows, data.Columns
    samples, allocated = data.get("SamplesPerPixel", 1), data.BitsAllocated
    stored, count = data.get("BitsStored") or allocated, math.prod(shape)
    if not (samples == 1 and allocated in (8, 16, 32) and 1 <= stored <= allocated
            and min(shape) > 0 and count <= MAX_VOXELS):
        raise StudyError(f"{samples} samples of {stored} bits in {allocated}, shape {shape}")
    syntax = UID(data.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
    jpeg_2000 = syntax in JPEG2000TransferSyntaxes
    if syntax.is_little_endian and not syntax.is_encapsulated:
        words = np.frombuffer(data.PixelData, f"<u{allocated // 8}", count)
    elif not jpeg_2000 and get_decoder(syntax).is_available:
        words = pixel_array(data, raw=True)  # big endian and RLE always, others by a plug-in
    elif jpeg_2000 or syntax in (JPEGLossless, JPEGLosslessSV1):
        decode = _decode_jpeg_2000 if jpeg_2000 else decode_lossless_jpeg
        frames = generate_frames(data.PixelData, number_of_frames=shape[0])
        words = np.stack([decode(frame) for frame in frames])
    else:
        raise StudyError(f"{syntax.name}: pip install pylibjpeg pylibjpeg-libjpeg")
    size, kind = max(2, words.itemsize), "i" if data.get("PixelRepresentation") == 1 else "u"
    spare = 8 * size - stored  # bits above the pixel may hold overlays
    return (words.reshape(shape).astype(f"u{size}") << spare).view(f"{kind}{size}") >> spare


def _decode_jpeg_2000(jpeg):
    """(rows, columns) uint16 of a JPEG 2000 image, negative numbers as two's complement."""
    stream = bytearray(jpeg[max(0, jpeg.find(b"\xff\x4f\xff\x51")):])  # without JP2 boxes
    width, height, components, depth = struct.unpack_from(">2I24xHB", stream, 8)
    if width * height * components > MAX_JPEG_2000:
        raise StudyError(f"JPEG 2000 of {width}x{height}x{components}")
    bits, signed = depth % 128 + 1, depth > 127
    stream[42] = bits - 1  # OpenCV refuses signed images; unsigned, it adds half the range
    cv2.utils.logging.setLogLevel(0)  # else OpenCV prints a line a slice
    words = cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_UNCHANGED)
    return words.astype(np.uint16) - np.uint16(signed << bits - 1)


@study_errors("JPEG Lossless")
def decode_lossless_jpeg(data):
    """(rows, columns) uint16 of a one-component JPEG Lossless stream (ITU-T T.81 annex H)."""
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
    codes, band = _code_tables(tables[table >> 4]), restart // columns or rows
    grid = np.zeros((-(-rows // band), band * columns), int)  # a restart interval a row
    for number, found in enumerate(grid):
        count = min(band, rows - number * band) * columns
        found[:count] = _differences(intervals[number].replace(b"\xff\0", b"\xff"), count, *codes)
    grid[:, 0] += 1 << bits - shift - 1
    samples = _undo_prediction(grid.reshape(-1, band, columns), *HALVES[predictor])
    return samples.reshape(-1, columns)[:rows] << shift


def _code_tables(table):
    """Category, and bits of code and difference together, by the next 16 bits (T.81 annex C)."""
    length = np.repeat(range(1, 17), [*table[:16]])
    share = 2 ** (16 - length)
    share = np.append(share, 2**16 - share.sum())
    category = np.array([*table[16:], 255])  # the rest of the bits is no code
    advance = np.append(length, 1) + category % 16
    return np.repeat(category, share), np.repeat(advance, share).astype(np.uint8)


def _differences(coded, count, category_of, advance_of):
    """`count` differences: jumps to the next code, known at every bit, are walked."""
    stream = np.frombuffer(coded[:4 * count] + bytes(6), np.uint8).astype(np.int32)
    words = stream[:-2] << 16 | stream[1:-1] << 8 | stream[2:]
    windows = np.stack([words >> 8 - bit for bit in range(8)], 1).astype(np.uint16).ravel()
    jumps, at = advance_of.take(windows).tobytes(), 0
    starts = bytearray(len(jumps))
    for _ in range(count):
        starts[at] = 1
        at += jumps[at]
    starts = np.flatnonzero(np.frombuffer(starts, bool))
    category, ends = category_of.take(windows.take(starts)), np.append(starts[1:], at)
    if at > 8 * len(coded) or category.max() > 16:
        raise StudyError("cut short or broken")
    extra = category % 16
    value = windows.take(ends - extra).astype(int) >> 16 - extra
    value -= np.where(value < 1 << extra >> 1, (1 << extra) - 1, 0)
    return value + (category >> 4 << 15)  # 16 stands for 32768


def _undo_prediction(grid, left, above, corner):
    """Samples uint16 of differences (bands, rows, columns), modulo 2**16 (T.81 H.1.2.1)."""
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


# ============================================ Pictures ===========================================
# In: studies, answers, tables. Out: PNGs. The trap: OpenCV's points are (x, y), its colours BGR.

PANEL, TILE = 465, 72  # pixels: edge of a picture, of a crop; 3 pictures are as high as 15 steps
# C1 to C7, patient: Okabe and Ito's colours, which differ for the colour-blind
COLOURS = ((0, 159, 230), (233, 180, 86), (115, 158, 0), (66, 228, 240), (178, 114, 0),
           (0, 94, 213), (167, 121, 204), (140, 140, 140))
SIDES = ("HF", "AP", "RL")  # the two ends of Z, Y and X


def write_png(path, image):
    png = cv2.imencode(".png", image & 252, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1]  # 64 greys: small
    write_atomic(path, png.tofile)


def text(image, words, x, y, anchor=(0, 0), grey=40, size=0.5):
    """Words with a shadow; the share `anchor` of their width and height lies at (x, y)."""
    width, height = cv2.getTextSize(words, 0, size, 1)[0]
    x = int(min(max(2, x - anchor[0] * width), image.shape[1] - width - 2))
    y = int(y + (1 - anchor[1]) * height)
    for shift, tone in ((1, 255 - grey), (0, grey)):
        cv2.putText(image, words, (x + shift, y + shift), 0, size, (tone,) * 3, 1, cv2.LINE_AA)


def chart(title, values, axes, peak=0, colours=COLOURS[4:5], line=False):
    """Bars, or a line, of {label: number}; wider than PANEL if the labels ask for it."""
    letters, count = max([len(str(label)) for label in values], default=1), max(1, len(values))
    slot, base = max((PANEL - 24) / count, 0 if line else 9 * letters + 8), PANEL - 56
    every = max(1, count // 3) if line else 1
    image = np.full((PANEL, int(24 + slot * count), 3), 255, np.uint8)
    scale = (base - 84) / (peak or max([*values.values(), 1e-9]))
    points = [(12, 64), (12, base), (image.shape[1] - 12, base)]
    cv2.polylines(image, [np.int32(points)], False, (40, 40, 40))
    points = [(12 + slot * (i + 0.5), base - v * scale) for i, v in enumerate(values.values())]
    for i, ((x, y), label) in enumerate(zip(points, values)):
        if not line:
            corners = (int(x - 0.4 * slot), round(y)), (int(x + 0.4 * slot), base - 1)
            cv2.rectangle(image, *corners, colours[i % len(colours)], -1)
        if i % every == 0:
            text(image, f"{values[label]:.4g}", x, y - 5, (0 if line else 0.5, 1), size=0.45)
            text(image, str(label), x, base + 8, (0.5, 0), size=0.45)
    if line:
        cv2.polylines(image, [np.int32(points)], False, colours[0], 2, cv2.LINE_AA)
    for words, y in ((title, 12), (axes[1], 40), (axes[0], PANEL - 22)):
        text(image, words, 12, y)
    return image


def draw_curves(path, history):
    """PNG of loss, score and learning rate; `history`: a dict of numbers an epoch."""
    table = pd.DataFrame(history).fillna(0).set_index("epoch")
    write_png(path, np.hstack([
        chart(title, table[key].to_dict(), ("epoch", ""), line=True) for key, title in (
            ("train_loss", "Training loss"), ("score", "Held-out score, lower is better"),
            ("lr", "Learning rate"))]))


def panel(volume, probability, axis, cell, title, names, truth):
    """(PANEL, PANEL, 3): a plane of the cube, mm to one scale, vertebrae coloured and named."""
    rows, columns = (k for k in range(3) if k != axis)
    size_mm = np.multiply(volume.hu.shape, volume.spacing)[[columns, rows]]
    scale = (PANEL - 48) / size_mm.max()
    width, height = size = np.rint(size_mm * scale).astype(int).tolist()
    left, top = (PANEL - width) // 2, (PANEL - height) // 2
    index = int((int(cell) + 0.5) / probability.shape[-1] * volume.hu.shape[axis])
    image = np.zeros((PANEL, PANEL, 3), np.uint8)
    view = image[top : top + height, left : left + width]
    view[:] = cv2.resize(apply_window(volume.hu.take(index, axis), BONE_WINDOW), size)[..., None]
    for v, mask in enumerate(probability.take(int(cell), axis + 1)):
        y, x = np.nonzero(cv2.resize(mask, size) > 0.5)
        view[y, x] = view[y, x] * 0.55 + np.multiply(COLOURS[v], 0.45)
        if len(x):
            text(image, names[v], left + x.max() + 6, top + y.mean(), (0, 0.5), 255)
    if truth is not None:
        labels = cv2.resize(truth.take(index, axis), size, interpolation=cv2.INTER_NEAREST)
        view[cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((2, 2))) > 0] = 255
    for word, x, y in zip(SIDES[rows] + SIDES[columns], (0.5, 0.5, 0, 1), (0, 1, 0.5, 0.5)):
        text(image, word, 6 + x * (PANEL - 12), 6 + y * (PANEL - 12), (x, y), 255, 0.6)
    cm = next(n for n in (5, 2, 1) if n == 1 or 10 * n * scale < PANEL / 3)
    cv2.line(image, (12, PANEL - 10), (12 + round(10 * cm * scale), PANEL - 10), (255,) * 3, 2)
    text(image, f"{cm} cm", 12, PANEL - 16, (0, 1), 255)
    text(image, title, 6, 6, grey=255)
    return cv2.rectangle(image, (0, 0), (PANEL - 1, PANEL - 1), (90,) * 3)


def overview(path, volume, probability, answers, truth=None, dice=None):
    """PNG: middle planes, the three most suspicious vertebrae, the eight answers.

    `probability` (7, D, D, D), `answers` (8,). With a mask: read_mask's labels, outlined white, and
    Dice (7,).
    """
    cells = [np.argwhere(mask > 0.5) for mask in probability]
    found = [v for v in np.argsort(-answers[:7]) if len(cells[v])][:3]
    z, y, x = np.concatenate(cells).mean(0) if found else [probability.shape[-1] / 2] * 3
    planes = [(2, x, "sagittal"), (1, y, "coronal")]
    planes += [(0, cells[v][:, 0].mean(), f"axial, {VERTEBRAE[v]}") for v in sorted(found)]
    planes += [(0, z * share, "axial") for share in (1, 0.5, 1.5)[len(found):]]
    names = VERTEBRAE if dice is None else [f"{n} Dice {d:.2f}" for n, d in zip(VERTEBRAE, dice)]
    panels = [panel(volume, probability, *plane, names, truth) for plane in planes]
    bars = dict(zip((*VERTEBRAE, "all"), np.round(answers, 2)))
    panels.insert(2, chart("Probability of a fracture", bars, (f"study {volume.uid}"[-54:], ""),
                           1, COLOURS))
    write_png(path, np.vstack([np.hstack(panels[:3]), np.hstack(panels[3:])]))


def heat_map(model, crops, device):
    """(15, S, S) in 0..1: gradient of a vertebra's logit at the centre slices of its steps."""
    crops = torch.tensor(crops / np.float32(255), device=device, requires_grad=True)
    with torch.backends.cudnn.flags(enabled=False):  # its LSTM has no gradient in eval mode
        logits = model(F.interpolate(crops, (model.settings["size"],) * 2, mode="bilinear")[None])
        logits = logits if torch.is_tensor(logits) else logits[0]
        logits.topk(Answers().top_k).values.mean().backward(inputs=[crops])
    heat = crops.grad[:, SLICES_PER_STEP // 2].abs().cpu().numpy()
    heat = np.array([cv2.GaussianBlur(step, (0, 0), len(step) / 30) for step in heat])
    return heat / heat.max((1, 2), keepdims=True).clip(1e-12)


def strip(title, crops, steps, heat):
    """A vertebra's (15, 6, S, S), a row and its probability a step; the strongest with its heat."""
    best, rows = int(steps.argmax()), []
    for t, step in enumerate(crops):
        row = [cv2.resize(k, (TILE, TILE), interpolation=cv2.INTER_AREA) for k in step]
        row = np.pad(np.hstack(row), ((0, 21), (0, 12)), constant_values=255)
        text(row, f"step {t + 1}: {steps[t]:.2f}" + ", strongest" * (t == best), 4, TILE + 4)
        rows.append(row)
    left, y = cv2.cvtColor(np.vstack(rows), cv2.COLOR_GRAY2BGR), best * len(row)
    cv2.rectangle(left, (2, y + 2), (CHANNELS * TILE - 2, y + TILE - 2), COLOURS[5], 3)
    centre, hot = (cv2.resize(image, (PANEL, PANEL)) for image in
                   (crops[best, SLICES_PER_STEP // 2], np.uint8(heat[best] * 255)))
    centre = cv2.cvtColor(centre, cv2.COLOR_GRAY2BGR)
    hot = cv2.addWeighted(centre, 0.6, cv2.applyColorMap(hot, cv2.COLORMAP_INFERNO), 0.6, 0)
    text(centre, f"{title}: centre slice of step {best + 1}", 6, 6, grey=255)
    text(hot, "what the answer hangs on: gradient", 6, 6, grey=255)
    bars = chart("Probability of each step, %", dict(enumerate(np.rint(100 * steps), 1)),
                 ("step, head to foot", ""), 100)
    right = np.vstack([centre, hot, bars])
    return np.hstack([left, right])


@study_errors("headers")
def describe_study(folder):
    """A row of studies.csv, from three headers if they agree on the order, else from all."""
    files = sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name))
    if len(files) < MIN_SLICES:
        raise StudyError(f"{len(files)} files of at least {MIN_SLICES}")
    for chosen in (files[:2] + files[-1:], files):
        heads = [pydicom.dcmread(path, stop_before_pixels=True) for path in chosen]
        places = np.array([read_frame(head, 0, np.zeros(1, np.int16))[1] for head in heads])
        at, head = -places[:, 2], heads[0]  # grows to the feet
        step, span = at[1] - at[0], at[-1] - at[0]
        if abs(step * (len(files) - 1) - span) < abs(step) / 2:
            break
    steps, spacing = np.diff(at), np.ptp(at) / (len(files) - 1)
    return dict(
        slices=len(files), spacing_mm=spacing, pixel_mm=places[0, 9],
        extent_mm=np.ptp(at) + spacing, width_mm=places[0, 10] * head.Columns, matrix=f"{head.Rows} x {head.Columns}",
        order="head first" if min(steps) > 0 else "foot first" if max(steps) < 0 else "mixed",
        transfer_syntax=head.file_meta.TransferSyntaxUID.keyword,
        bits=f"{head.BitsStored} {'signed' if head.PixelRepresentation else 'unsigned'}")


def tally(values):
    """{label: count}; many or broken numbers in ten classes, named by where they begin."""
    if pd.api.types.is_float_dtype(values) or values.nunique() > 10:
        counts, edges = np.histogram(values.dropna(), 10)
        return dict(zip([f"{edge:.4g}+" for edge in edges], counts))
    return values.value_counts().sort_index().to_dict()


def unusual(table):
    """Sentences: numbers far from the middle half (Tukey's fences), rare kinds, problems."""
    for name, values in table.set_index(STUDY).items():
        values = values.dropna()
        if values.dtype.kind in "if":
            low, high = values.quantile([0.25, 0.75])
            odd = (values - (low + high) / 2).abs() > 2 * (high - low)
            usual, values = f"{low:.3g} to {high:.3g}", values.round(3)
        else:
            counts = values.value_counts()
            odd, usual = values.map(counts) < 0.2 * len(values), counts.index[0]
        if odd.any():
            examples = "; ".join(f"{value} ({uid})" for uid, value in values[odd][:3].items())
            yield f"{name}: {odd.sum()} of {len(values)} studies differ from {usual}, as {examples}"


# ============================================= Modes =============================================
# One short function a mode. Options stand once, in OPTIONS; a mode names those it takes.

HERE = Path(globals().get("__file__", "cspine.py")).resolve().parent


def data_folder(o, *needed):
    """--data as a path. UserError naming what is missing in it."""
    for name in needed:
        if not (Path(o.data) / name).exists():
            raise UserError(f"no {name} in {o.data}/: --data must name the folder that holds it")
    return Path(o.data)


def training_data(o):
    """(labels by uid, uid -> fold, uid -> mask path), for the studies whose images are there."""
    data = data_folder(o, "train.csv", "train_images")
    table = read_csv(data / "train.csv", (STUDY, *TARGETS))
    table = table[[(data / "train_images" / str(uid)).is_dir() for uid in table[STUDY]]]
    masks = {p.name.split(".nii")[0]: p for p in sorted((data / "segmentations").glob("*.nii*"))}
    masks = {uid: masks[uid] for uid in table[STUDY] if uid in masks}
    return table.set_index(STUDY)[list(TARGETS)], assign_folds(table, o.folds, masks), masks


def recipe_from(o, kind):
    """The recipe of a kind with the options given, checked."""
    given = {k: v for k, v in vars(o).items() if v and k in Recipe.__dataclass_fields__}
    if any(v < 0 for k, v in given.items() if not isinstance(v, str)) or o.folds < 1:
        raise UserError("--folds and the recipe's numbers start above 0")
    return replace(RECIPES[kind], **given)


def run_training(o, make_task):
    """Train the folds asked for; with --fold all, finished ones are not repeated."""
    folds = [k for k in range(o.folds) if o.fold in ("all", str(k))]
    if not folds:
        raise UserError(f"--fold {o.fold}: there are folds 0 to {o.folds - 1}, or all")
    stop = Stop(o.time_limit)
    if ranks()[1] > 1:
        dist.init_process_group()  # gloo, and nccl for what is on a GPU
    try:
        for fold in folds:
            train(make_task(fold), Path(o.weights), stop, o.workers,
                  o.resume or o.fold == "all", o.init)
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError("out of memory: lower --batch-size, --size or --workers, raise "
                        "--accumulate, or choose a smaller --backbone") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def load_cube(uid, data, mask, cache, size):
    """(cube float32 (1, D, D, D), labels uint8 (D, D, D)); the second time from a small file."""
    path = cache / f"cube{size}" / f"{uid}.npy"
    if not path.exists():
        volume = read_volume(data / "train_images" / uid)
        cube = np.rint(segmenter_input(volume, size).numpy() * 255).astype(np.uint8)
        pair = np.concatenate([cube, cube_labels(mask, volume, size)[None]])
        write_atomic(path, lambda new: np.save(new, pair))
    pair = np.load(path)
    return pair[:1] / np.float32(255), pair[1]


def segmenter_batch(model, tensors, rngs, recipe):
    cubes, labels = augment_volumes(*tensors, rngs)
    return segmenter_loss(model(cubes.to(memory_format=torch.channels_last_3d)), labels)


def classifier_batch(model, tensors, rngs, recipe):
    """Loss of an augmented batch; mixup mixes the two losses, never the labels."""
    crops = augment_crops(tensors[0].float() / 255, rngs, recipe.size)
    crops, labels = shuffle_order(crops, tensors[1], rngs, recipe.shuffle)
    share = rngs[0].random() if rngs[0].random() < recipe.mixup else 1.0
    outputs = model(crops.flip(0).lerp(crops, share))
    other = classifier_loss(outputs, labels.flip(0))
    loss = share * classifier_loss(outputs, labels) + (1 - share) * other
    return loss * (1 + labels).nanmean()  # the mean over parts and ranks: by their weights


def mode_train_seg(o):
    """Train segmenters on the studies with masks: writes segmenter_fold<k>.pt under --weights."""
    recipe, (_, folds, masks) = recipe_from(o, "segmenter"), training_data(o)
    device = pick_device(o.device)

    def load(uid):
        return load_cube(uid, Path(o.data), masks[uid], Path(o.work), recipe.size)

    def score(model, uid):
        cube, labels = load(uid)
        cube = torch.from_numpy(cube)[None].to(device)
        return dice_scores(model(cube)[0].float().sigmoid().cpu().numpy(), labels)

    def judge(table):
        dice = table[list(VERTEBRAE)].mean()
        return dict(score=1 - dice.mean(), **dice.add_prefix("dice_"))

    def task(fold):
        mine = [u for u in masks if folds[u] != fold or o.folds == 1]
        held_out = [u for u in masks if folds[u] == fold]
        return Task("segmenter", f"segmenter_fold{fold}", recipe, device, mine, [], load,
                    segmenter_batch, held_out, VERTEBRAE, score, judge)

    run_training(o, task)


def mode_extract(o):
    """Write every study's crops under --work, masked by segmenters that did not train on it."""
    labels, folds, _ = training_data(o)
    device, out, (rank, world) = pick_device(o.device), Path(o.work) / "crops", ranks()
    models = load_models(o.weights, "segmenter", device)
    if not models:
        raise UserError(f"no segmenter_fold*.pt in {o.weights}: run train-seg first")
    todo = [u for u in labels.index[rank::world] if not (out / f"{u}.npz").exists()]
    stop, written = Stop(o.time_limit), 0

    def read(uid):
        return read_volume(Path(o.data) / "train_images" / uid, o.workers)

    for uid, future in progress(prefetch(read, todo, 1), "study", len(todo)):
        if reason := stop.reason():
            raise Stopped(f"extract: stopped by {reason}; the same command goes on")
        try:
            volume = future.result()
            own = [models[folds[uid]]] if folds[uid] in models else [*models.values()]
            crops = vertebra_slices(volume, segment(own, volume, device), mask_of=o.mask_of)
            write_crops(out / f"{uid}.npz", crops)
            written += 1
        except StudyError as error:
            say(f"study {uid}: {error}; left out")
    print(f"{out}: {written} studies written, {len(todo) - written} left out")


def mode_train_cls(o, kind="vertebra"):
    """Train vertebra classifiers on the crops: writes vertebra_fold<k>.pt under --weights."""
    recipe, (labels, folds, _) = recipe_from(o, kind), training_data(o)
    device, folder, truth = pick_device(o.device), Path(o.work) / "crops", {}  # NaN: not in view
    for uid, row in zip(labels.index, labels.to_numpy(np.float32)):
        if (folder / f"{uid}.npz").exists():
            seen = [*crops_seen(folder / f"{uid}.npz"), True]
            truth[uid] = np.where(seen, row, np.float32("nan"))
    if not truth:
        raise UserError(f"no crops in {folder}: run extract with the same --work first")

    def load(sample):
        uid, targets = sample
        crops = read_crops(folder / f"{uid}.npz", targets[:7])
        return crops.reshape(-1, CHANNELS, CROP, CROP), truth[uid][targets]

    def score(model, uid):
        one = Ensemble({"vertebra": [], "patient": [], kind: [model]}, device)
        (steps, patient), = classify(one, read_crops(folder / f"{uid}.npz"), Effort(0, 1))
        return [*np.sort(steps, 1)[:, -Answers().top_k :].mean(1), patient]

    def judge(table):
        return judge_answers(table[list(TARGETS)].to_numpy(), labels.loc[table[STUDY]].to_numpy())

    def task(fold):
        mine = [u for u in truth if folds[u] != fold or o.folds == 1]
        samples = [(u, [*range(8)]) for u in mine]
        if kind == "vertebra":
            samples = [(u, [v]) for u in mine for v in np.flatnonzero(truth[u][:7] >= 0)]
        fractured = [truth[u][targets[0]] > 0 for u, targets in samples]
        held_out = [u for u in truth if folds[u] == fold]
        return Task(kind, f"{kind}_fold{fold}", recipe, device, samples, fractured, load,
                    classifier_batch, held_out, TARGETS, score, judge)

    run_training(o, task)


def mode_train_patient(o):
    """Train patient classifiers on the crops: writes patient_fold<k>.pt under --weights."""
    mode_train_cls(o, "patient")


def judge_answers(answers, labels):
    """Weighted log loss and AUCs of (N, 8) answers; what is NaN was not asked."""
    known = ~np.isnan(answers)
    weight = known * TARGET_WEIGHTS * np.where(labels > 0, POSITIVE_FACTOR, 1)
    loss = weight * element_losses(np.where(known, answers, 0.5), labels)
    areas = [auc(answers[:, k][known[:, k]], labels[:, k][known[:, k]]) for k in (slice(7), 7)]
    return dict(score=loss.sum() / weight.sum(), vertebra_auc=areas[0], patient_auc=areas[1])


def mode_predict(o):
    """Answer every row of --data's test.csv: writes --out, and predict_report.csv beside it."""
    data, out, (rank, world) = data_folder(o, "test.csv"), Path(o.out), ranks()
    rows = submission_rows(read_csv(data / "test.csv", ("row_id", STUDY, "prediction_type")))
    stop = Stop(o.time_limit)
    for name in [] if o.resume else REPORTS[rank::world]:
        out.with_name(name).unlink(missing_ok=True)
    done = {u: row for u, row in read_reports(out).items() if o.resume and answered(row)}
    write_submission(out, rows)
    ensemble = load_ensemble(o.weights, pick_device(o.device))
    if o.no_calibration:
        ensemble = ensemble._replace(calibration=None)
    predict_studies(data / "test_images", out, rows, done, ensemble,
                    Answers(o.top_k, o.views, o.average, o.noisy_or), stop, o.workers)
    good = {u for u, row in read_reports(out).items() if row["status"] in ("ok", "partial")}
    studies = {uid for _, uid, _ in rows}
    print(f"{out}: {len(rows)} rows, {len(studies)} studies, {len(studies - good)} of them fell "
          "back to the prior")


def held_out_answers(weights):
    """Out-of-fold answers by uid, blended over the kinds as predict does."""
    tables = [read_csv(p, (STUDY, *TARGETS)) for kind in ("vertebra", "patient")
              for p in sorted(weights.glob(f"{kind}_fold*_heldout.csv"))]
    if not tables:
        raise UserError(f"no vertebra_fold*_heldout.csv or patient_fold*_heldout.csv in {weights}")
    blended = {}
    for uid, rows in pd.concat(tables).groupby(STUDY)[list(TARGETS)]:
        outputs = [(np.repeat(row[:7, None], STEPS, 1), row[7]) for row in rows.to_numpy()]
        blended[uid] = combine(outputs, Answers())
    return pd.DataFrame.from_dict(blended, orient="index", columns=TARGETS)


def read_answers(path):
    """The answers of a submission, a study a row; what is no number is NaN."""
    table = read_csv(path, ("row_id", "fractured"))
    table[["uid", "target"]] = table.row_id.str.extract(f"^(.*)_({'|'.join(TARGETS)})$")
    table["fractured"] = pd.to_numeric(table.fractured, "coerce")
    return table.pivot_table("fractured", "uid", "target").reindex(columns=TARGETS)


def mode_evaluate(o):
    """Read labels and answers, of --submission or held out (--folds); print scores and Dice."""
    data, weights = data_folder(o, "train.csv"), Path(o.weights)
    files = [p for p in (data / "train.csv", data / "test_labels.csv") if p.exists()]
    labels = pd.concat([read_csv(p, (STUDY, *TARGETS)) for p in files])
    labels = labels.drop_duplicates(STUDY).set_index(STUDY)[list(TARGETS)]
    answers = held_out_answers(weights) if o.held_out else read_answers(o.submission)
    answers = answers[answers.index.isin(labels.index)].fillna(dict(zip(TARGETS, PRIOR)))
    if not len(answers):
        raise UserError(f"nothing to score: no answered study has labels in {data}/")
    labels = labels.loc[answers.index]
    print_scores(answers.to_numpy(), labels.to_numpy())
    if o.calibrate:
        fitted = fit_calibration(answers.to_numpy(), labels.to_numpy())
        write_json(weights / "calibration.json", dict(zip(TARGETS, fitted.tolist())))
        print(f"{weights / 'calibration.json'} is written: predict uses it from now on")
    models = load_models(weights, "segmenter", pick_device(o.device))
    if not o.held_out and models:
        print_dice(data, answers.index, list(models.values()), o.workers)


def print_scores(answers, labels):
    """The metric, and log loss and AUC of every target."""
    study, column = competition_scores(answers, labels)
    blind = competition_scores(np.tile(PRIOR, (len(labels), 1)), labels)
    print(f"{len(labels)} studies; weighted log loss, lower is better: {study:.4f} per study, "
          f"{column:.4f} per column; the best constants: {blind[0]:.4f}, {blind[1]:.4f}")
    parts = [(answers[:, k].ravel(), labels[:, k].ravel()) for k in (*range(8), slice(0, 7))]
    rows = [(y.sum(), element_losses(p, y).mean(), auc(p, y)) for p, y in parts]
    print(pd.DataFrame(rows, (*TARGETS, "C1 to C7"), ["fractured", "log loss", "AUC"]).round(4))


def print_dice(data, uids, models, workers):
    """Dice, and vertebrae named right: more of the mask lies in the true one than elsewhere."""
    rows, named = [], []
    masks = {p.name.split(".nii")[0]: p for p in (data / "segmentations").glob("*.nii*")}
    uids = sorted({*uids} & {*masks})  # no path from a csv
    for uid in progress(uids, "study", len(uids)):
        folder = data / "train_images" / uid
        volume = read_volume(folder if folder.exists() else data / "test_images" / uid, workers)
        probability = segment(models, volume, next(models[0].parameters()).device)
        labels = cube_labels(masks[uid], volume, probability.shape[-1])
        rows.append(dice_scores(probability, labels))
        for v in np.flatnonzero(~np.isnan(rows[-1])):
            found = labels[probability[v] > 0.5]
            named.append(len(found) > 0 and (found == v + 1).mean() > 0.5)
    if rows:
        dice = np.nanmean(rows, 0)
        shown = ", ".join(f"{name} {d:.3f}" for name, d in zip(VERTEBRAE, dice))
        print(f"{len(rows)} masks: Dice {dice.mean():.3f}; {shown}; {np.mean(named):.1%} of "
              f"{len(named)} vertebrae named right")


def mode_phantom(o):
    """Make a synthetic data set in the layout of the competition, in the folder OUT."""
    script = HERE / "tests" / "phantoms.py"
    if not script.exists():
        raise UserError(f"no {script}: phantoms are made where the repository is")
    make_dataset = runpy.run_path(str(script))["make_dataset"]
    make_dataset(Path(o.target), o.studies, o.test_studies, o.seed, o.matrix, o.workers, o.variety,
                 o.fractures)
    print(f"{o.target}: {o.studies} training and {o.test_studies} test studies")


def mode_demo(o):
    """Make phantoms no training saw, predict them with the shipped weights, score the answers."""
    o = argparse.Namespace(**{k: v for k, (v, _) in OPTIONS.items()} | vars(o))
    o.data = o.target = str(Path(o.work) / "demo")
    o.studies, o.held_out, o.submission = 0, False, o.out
    mode_phantom(o)
    mode_predict(o)
    labels = read_csv(Path(o.data) / "test_labels.csv", (STUDY, *TARGETS)).set_index(STUDY)
    answers, labels = read_answers(o.out).loc[labels.index], labels[list(TARGETS)]
    print("probabilities, * fractured:")
    print((answers.map("{:.2f}".format) + labels.map(" *".__getitem__)).to_string())
    mode_evaluate(o)


def mode_notebook(o):
    """Write cspine.ipynb, this file ready to run, and kernel-metadata.json in the folder --out."""
    source, weights = HERE / "cspine.py", o.weights_dataset
    if not source.exists():
        raise UserError(f"no {source} to put into a notebook")
    if not re.fullmatch(r"([\w-]+/[\w-]+)?", weights):
        raise UserError(f"--weights-dataset {weights}: expected OWNER/NAME")
    owner, _, name = weights.partition("/")
    run = "!python cspine.py predict" + (f" --weights /kaggle/input/{name}" if name else "")
    cells = [dict(cell_type="code", metadata={}, outputs=[], execution_count=None, source=text)
             for text in ("%%writefile cspine.py\n" + source.read_text(), run, LOOK)]
    write_json(Path(o.out) / "cspine.ipynb", dict(
        nbformat=4, nbformat_minor=4, cells=cells, metadata=dict(
            kernelspec=dict(name="python3", display_name="Python 3"))))
    write_json(Path(o.out) / "kernel-metadata.json", dict(
        id=f"{owner or 'OWNER'}/cspine", title="cspine", code_file="cspine.ipynb",
        language="python", kernel_type="notebook", is_private=True, enable_gpu=True,
        enable_internet=False, dataset_sources=[weights] if weights else [],
        competition_sources=[Path(KAGGLE_DATA).name]))
    print(f"kaggle kernels push -p {o.out}")


LOOK = """import glob
import pandas as pd
submission = pd.read_csv("submission.csv")
report = pd.concat(map(pd.read_csv, glob.glob("predict_report*.csv")))
print(len(submission), "rows;", report.status.value_counts().to_dict())
submission.head(16)"""


def mode_show(o):
    """Draw a study and its answers: overview.png and C1.png to C7.png in --out."""
    out, places = Path(o.out), [Path(o.study)]
    places += [Path(o.data) / part / o.study for part in ("train_images", "test_images")]
    folder = next((place.resolve() for place in places if place.is_dir()), None)
    if folder is None:
        raise UserError(f"{o.study}: neither a folder nor a study in {o.data}/")
    ensemble, truth, dice = load_ensemble(o.weights, pick_device(o.device)), None, None
    models, volume = ensemble.models["vertebra"] + ensemble.models["patient"], read_volume(folder)
    probability = segment(ensemble.models["segmenter"], volume, ensemble.device)
    crops = vertebra_slices(volume, probability, mask_of=models[0].settings["mask_of"])
    outputs = classify(ensemble, crops, Effort(1, len(models)))
    answers = combine(outputs, Answers(), ensemble.calibration)
    steps = np.mean([steps for steps, _ in outputs], 0)
    for mask in (folder.parents[1] / "segmentations").glob(f"{folder.name}.nii*"):
        truth, edge = read_mask(mask, volume), probability.shape[-1]
        truth, dice = truth * (truth < 8), dice_scores(probability, cube_labels(mask, volume, edge))
    overview(out / "overview.png", volume, probability, answers, truth, dice)
    cell_mm = np.multiply(volume.hu.shape, volume.spacing) / probability.shape[1:]
    for v, name in enumerate(VERTEBRAE):
        image, line = chart(f"{name}: not seen", {}, ("", "")), f"{name}: not seen"
        if crops[v].any():
            z, y, x = (np.ptp(vertebra_box(probability[v]), 1) + 1) * cell_mm
            line = f"{name}: seen, {z:.0f} mm high, {y:.0f} deep, {x:.0f} wide"
            image = strip(name, crops[v], steps[v], heat_map(models[0], crops[v], ensemble.device))
        write_png(out / f"{name}.png", image)
        line += f"; probability {answers[v]:.3f}"
        print(line if dice is None else f"{line}; Dice {dice[v]:.3f}")


def mode_eda(o):
    """Describe a data set from headers: studies.csv and charts in --out, then what is unusual."""
    data, out, rows = data_folder(o, "train.csv"), Path(o.out), []
    folders = sorted(path for path in data.glob("*_images/*") if path.is_dir())
    masks = {path.name.split(".nii")[0] for path in data.glob("segmentations/*.nii*")}
    work = prefetch(describe_study, folders, o.workers, 2 * o.workers)
    for folder, future in progress(work, "study", len(folders)):
        try:
            row = future.result()
        except StudyError as error:
            row = {"problems": str(error)}
        rows.append({STUDY: folder.name, "problems": "none", **row, "mask": folder.name in masks})
    labels, table = read_csv(data / "train.csv", (STUDY, *TARGETS)), pd.DataFrame(rows)
    if "order" not in table:
        raise UserError(f"no readable study in {data}/")
    write_csv(out / "studies.csv", table.merge(labels, "left", STUDY))
    broken = labels[list(VERTEBRAE)]
    both = broken.T @ broken
    pairs = {f"{a}+{b}": both.loc[a, b] for a, b in combinations(VERTEBRAE, 2)}
    charts = {"fractured vertebra": broken.sum().to_dict(), "fractured together": pairs,
              "fractured vertebrae per patient": tally(broken.sum(axis=1))}
    for name in ("slices", "spacing_mm", "extent_mm", "transfer_syntax", "order"):
        charts[name.replace("_", " ")] = tally(table[name])
    path = data / "train_bounding_boxes.csv"
    if path.exists():
        boxes = read_csv(path, (STUDY, "slice_number")).merge(table, on=STUDY)
        share = 100 * boxes.slice_number / boxes.slices
        share = share.where(boxes.order == "head first", 100 - share)[boxes.order != "mixed"]
        charts["boxes, % from head to foot"] = tally(share)
    for name, counts in charts.items():
        file = re.sub(r"\W+", "_", name)
        image = chart(f"{name}, {len(table)} studies".capitalize(), counts, (name, "count"))
        write_png(out / f"{file}.png", image)
    print(f"{len(table)} studies, {len(charts)} charts in {out}/. Unusual:")
    print(*unusual(table), sep="\n")


OPTIONS = {  # default, meaning
    "data": (KAGGLE_DATA, "folder with train.csv, train_images, test.csv, ..."),
    "weights": (str(HERE / "weights"), "folder of the weights"),
    "work": ("work", "folder for crops and caches"),
    "out": ("submission.csv", "file or folder to write"),
    "submission": ("submission.csv", "file to score"),
    "device": ("auto", "auto, cpu, cuda, cuda:1, ..."),
    "seed": (0, "of everything random"),
    "workers": (os.cpu_count() or 1, "threads that read and decode"),
    "backbone": ("", "timm network; else the recipe's"),
    "fold": ("all", "one fold, or all"),
    "folds": (5, "number of folds"),
    "epochs": (0, "0: the recipe's"),
    "batch_size": (0, "over all processes; 0: the recipe's"),
    "accumulate": (0, "parts in which a batch is computed; 0: the recipe's"),
    "lr": (0.0, "peak learning rate; 0: the recipe's"),
    "size": (0, "edge of the cube, or of the crops shown; 0: the recipe's"),
    "hidden": (0, "width of the LSTMs; 0: the recipe's"),
    "resume": (False, "go on where the last run stopped"),
    "time_limit": (0.0, "minutes after which to stop, all saved; 0: none"),
    "init": ("", "weights to start from: a timm file, or one of ours"),
    "mask_of": ("last", "slice of a step whose mask is shown: last or center"),
    "no_calibration": (False, "leave calibration.json out: answers to fit it to"),
    "calibrate": (False, "fit calibration.json under --weights to these answers"),
    "weights_dataset": ("", "OWNER/NAME of the Kaggle data set that holds the weights"),
    "top_k": (Answers().top_k, "steps whose mean is a vertebra's probability"),
    "views": (Answers().views, "dihedral views a model; 0: none"),
    "average": (Answers().average, "space of the ensemble's mean: logit or probability"),
    "noisy_or": (Answers().noisy_or, "share of noisy-or in patient_overall"),
    "studies": (20, "training studies"),
    "test_studies": (4, "test studies"),
    "matrix": (256, "rows and columns of a slice"),
    "variety": (1.0, "1: realistic; 2: far beyond, for training"),
    "fractures": (1.0, "1: as often as in the competition; 2: twice, for training"),
}
TRAINING = ("data weights work device seed workers backbone fold folds epochs batch_size accumulate "
            "lr resume time_limit init ")
MODES = {  # function, options
    "phantom": (mode_phantom, "studies test_studies seed matrix variety fractures workers"),
    "train-seg": (mode_train_seg, TRAINING + "size"),
    "extract": (mode_extract, "data weights work device workers folds mask_of time_limit"),
    "train-cls": (mode_train_cls, TRAINING + "size mask_of hidden"),
    "train-patient": (mode_train_patient, TRAINING + "size mask_of hidden"),
    "predict": (mode_predict,
                "data weights out device workers resume time_limit top_k views average noisy_or "
                "no_calibration"),
    "evaluate": (mode_evaluate, "data weights submission device workers calibrate"),
    "eda": (mode_eda, "data out=eda workers"),
    "show": (mode_show, "data weights out=pictures device"),
    "notebook": (mode_notebook, "out=notebook weights_dataset"),
    "demo": (mode_demo, "weights work out device workers seed test_studies"),
}


def build_parser():
    """The command line, made from MODES and OPTIONS."""
    parser = argparse.ArgumentParser("cspine.py", description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    for name, (function, options) in MODES.items():
        mode = modes.add_parser(name, help=function.__doc__, description=function.__doc__,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        mode.set_defaults(function=function)
        if name == "phantom":
            mode.add_argument("target", metavar="OUT", help="folder to write")
        if name == "show":
            mode.add_argument("study", metavar="STUDY", help="folder, or uid of the data set")
        if name == "evaluate":
            mode.add_argument("--folds", dest="held_out", action="store_true",
                              help="score the held-out answers of all folds")
        for option in options.split():
            option, _, own = option.partition("=")
            default, meaning = OPTIONS[option]
            how = dict(type=type(default), default=own or default)
            mode.add_argument("--" + option.replace("_", "-"), help=meaning,
                              **dict(action="store_true") if default is False else how)
    return parser


def main(argv=None):
    """Run a mode; its exit status. The only place that turns errors into text."""
    o = build_parser().parse_args(argv)
    cv2.setNumThreads(1)  # the threads of prefetch share the cores
    if Path(KAGGLE_DATA).exists() and o.mode == "predict":
        o.time_limit = o.time_limit or KAGGLE_MINUTES
    try:
        o.function(o)
        return 0
    except (UserError, Stopped) as error:
        print(f"cspine: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 130 if "by SIG" in str(error) else 0
    except KeyboardInterrupt:
        return 130
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main())
