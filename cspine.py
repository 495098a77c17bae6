# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5.0", "timm>=1.0.13", "pydicom>=3.0.1", "numpy>=2.0.0",
#                 "opencv-python>=4.13.0.90", "pandas>=2.2.2", "tqdm>=4.64.0"]
# ///
"""cspine: neck CT studies in, fracture probabilities of C1..C7 and the patient out.

For the RSNA 2022 Cervical Spine Fracture Detection task; not a medical device. Data flow:

    study folder --read_volume--> Volume (HU, Z Y X, head first)
    Volume --segmenter_input--> (1, D, D, D) --Segmenter--> probability (7, D, D, D)
    Volume + probability --vertebra_slices--> uint8 (7, T, K, S, S): 5 slices, 1 mask a step
    (T, K, S, S) --VertebraClassifier--> T logits --> P(Ck)
    (7 * T, K, S, S) --PatientClassifier--> 7 * T + 1 logits --> P(C1..C7), P(patient)
    the outputs of all models --combine--> submission.csv

Shapes: B batch, C channels, Z Y X voxel axes (head to foot, front to back, right to left),
D 128 cube edge, V 7 vertebrae, T 15 steps, K 6 channels of a step, S 224 crop edge, N steps
that a classifier sees at once (T or V * T) or, elsewhere, the number of studies or points,
F features of a step, M models; I J K are the stored axes of a NIfTI file.

Modes, in the order of the work: phantom, train-seg, extract, train-cls, train-patient,
predict, evaluate; eda, show, notebook, demo. `python cspine.py MODE --help` shows what each
reads and writes. On two GPUs: torchrun --nproc_per_node=2 cspine.py MODE. Pasted into a
notebook, the file runs nothing; main(["predict", "--weights", "..."]) runs a mode.

Exit status: 0 done, or ended by --time-limit; 1 a bug in this program; 2 an error that you
can fix, told in one line; 3 most studies got the prior or no crops; 130 interrupted, with
all finished work on disk; 141 the reader of the output has closed its pipe."""

import argparse
import copy
import ctypes
import functools
import gzip
import hashlib
import io
import json
import math
import mmap
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice, permutations, product
from pathlib import Path
from time import monotonic
from typing import Any, Callable, NamedTuple

import cv2
import numpy as np
import pandas as pd
import pydicom
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn
from tqdm import tqdm


# ==== Facts and settings ====
# The numbers of the pipeline, with unit and source (of one room alone: at its head); those
# without source are ours, or of the starting solution, a public one that scored 0.3567.
# "First place" is the winner's write-up, Kaggle discussion 362787, and public code. Facts
# are constants; what a run may change is a setting and an option.

VERTEBRAE = ("C1", "C2", "C3", "C4", "C5", "C6", "C7")
TARGETS = VERTEBRAE + ("patient_overall",)
STUDY = "StudyInstanceUID"

# The metric, a weighted log loss (the competition's Evaluation page).
TARGET_WEIGHTS = np.array([1.0] * 7 + [7.0])
POSITIVE_FACTOR = 2.0  # a fractured target weighs twice
PRIOR = np.array(  # the constants with the best score, 0.5573, on the 2019 training labels
    [0.1027, 0.1930, 0.0512, 0.0752, 0.1105, 0.1842, 0.2559, 0.5309])
PRIOR_ANSWERS = dict(zip(TARGETS, PRIOR))
LEAST_ANSWER = 1e-4  # answers stay this far from 0 and 1

# A study.
AIR_HU = -1024  # HU; lower values are padding outside the circular field of view
MAX_HU = 32767  # HU; the largest int16
LEAST_SLICES = 16  # slices; shorter series are refused (the competition's shortest has 69)
MAX_VOXELS = 2**30  # voxels, 2 GB of int16; a larger study is damaged or fills the memory
MAX_GAP_MM = 30.0  # mm; a wider gap along the normal separates two scans
SAME_PLACE_MM = 0.05  # mm; slices closer than this share a position (spacings begin at 0.3)
TWIN_MM = 0.25  # mm; so do slices of two passes closer than this, if the gap between them
TWIN_SHARE = 0.34  # is below this share of the gaps on both sides
FILLS_FROM = 0.75  # share of a step; least distance of a gap-filling slice to a kept one
SAME_STEP = 0.01  # share of a pixel; the pixel size within a series may differ by this much
PASS_APART_S = 30  # s; a longer pause between slice times starts another pass
MAX_UNEVEN = 0.25  # share of a step; if a slice is further off its even place, resample all
LEAST_COSINE = 0.999  # cosine of a stack's axis and normal; if lower, the gantry is tilted
AIR_BELOW = -200  # HU; a CT has air darker than this; labels, grey values and MR have not
BONE_ABOVE = 300  # HU; a CT has bone brighter than this
LEAST_TISSUE = 0.02  # share of voxels between these two; with fewer, the values are not HU

# Masks and crops; a cell is a voxel of the segmenter's cube.
SEGMENTER_WINDOW = (300, 1600)  # level, width; HU
CUBE = 128  # cells per edge
MASK_THRESHOLDS = (0.2, 0.05)  # first place's; the second is tried if the first finds none
LABEL_THRESHOLD = 0.5  # of labels and Dice; crops begin lower, so as to lose no bone
LEAST_CELLS = 12  # cells; a smaller mask is not a vertebra
STRAY_SHARE = 0.05  # planes with less than this share of the fullest plane are strays
STRAY_GAP = 2  # cells; a wider gap separates a stray from its vertebra
APART_CELLS = 2  # cells; masks in the wrong order that are further apart swap names
LOOK_AROUND = (0.25, 0.75, 0.75)  # z y x: share of the neck's extent added on each side
LOOK_CLOSER = 0.57  # segment again if the neck needs less than this share of an axis
BONE_WINDOW = (500, 2000)  # level, width; HU
STEPS = 15
SLICES_PER_STEP = 5
MASKED_SLICES = dict(last=-1, center=SLICES_PER_STEP // 2)  # by mask_of: index in a step
CHANNELS = SLICES_PER_STEP + 1  # the slices and one mask
CROP = 224  # pixels per edge
BOX_MARGIN = 1.0  # cells around the mask (first place)
BESIDE = np.array([*product((1e-4, -1e-4), repeat=3), (1e-4,) * 3])  # voxels; nine: no tie
LEAST_INSIDE = 0.5  # share of a mask's labels inside the study; with less it is another's
BONE_HU = 100  # HU; cancellous bone of a vertebra has about 150 to 350
LEAST_BONE = 0.25  # share of a mask's labels on bone; with less it is misplaced

# The machine.
HERE = Path(globals().get("__file__", "cspine.py")).resolve().parent
KAGGLE = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))  # tests set their own
COMPETITION = "rsna-2022-cervical-spine-fracture-detection"
MOUNTED = KAGGLE / "input/competitions" / COMPETITION  # older images have no competitions/
KAGGLE_DATA = str(MOUNTED if MOUNTED.is_dir() else KAGGLE / "input" / COMPETITION)
KAGGLE_MINUTES = 510.0  # minutes, of the 540 that a submission may run
MAX_READ_S = 600  # s to read a study in, but at most a quarter of the time left
ECHO_S = 2  # s; a signal repeated within this time was only forwarded by torchrun
LOG_S = 60  # s between two lines of progress in a log
ALONE_S = 5  # s that a study is read alone; if it takes longer, the next is read beside it
READING_THREADS = 99  # so many because a read that hangs never gives its thread back
CROPS_ON_CPU = STEPS  # crops per forward pass: their activations about fit a CPU's cache
CROPS_ON_GPU = 2 * 7 * STEPS  # crops per forward pass: those of two studies

# The trainings.
LEAST_SEEN = 0.5  # share of all vertebrae that must be visible in crops to train on them
MAX_SKIPPED_STEPS = 20  # steps in a row without a finite gradient; more end a training
VALIDATION_SHARE = 0.1  # a segmenter scores at most so many studies per study it trains on
INIT_LEVELS = 6  # folder levels: models, owner, model, framework, variation, version

class UserError(Exception):
    """An error that the user can fix; main prints it in one line and returns 2."""

class StudyError(UserError):
    """One study or one of its files cannot be used; the run goes on with the others."""

class Stopped(Exception):
    """Ends a run with an exit status of its own; all finished work is on disk."""
    def __init__(self, message, status):
        super().__init__(message)
        self.status = status

@contextmanager
def errors_as(kind, where):
    """Turn any exception into a `kind` of one line: damaged files raise all sorts."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        where = " ".join(str(where).split())  # macOS has files named "Icon\r"
        raise kind(f"{where}: {reason}") from error

def setting(default, meaning, choices=(), least=-math.inf, most=math.inf):
    """A settings field: `meaning` is its text in --help, the rest limits its values."""
    limits = dict(help=meaning, choices=choices, least=least, most=most)
    return field(default=default, metadata=limits)

def argument(meaning, count=None):
    """A settings field for positional arguments; `count` is argparse's nargs."""
    return field(default="", metadata=dict(help=meaning, positional=True, count=count))

@dataclass(frozen=True)
class Cut:
    """How crops are cut; options of extract and of the classifiers' trainings."""
    mask_of: str = setting("last", "slice of a step that its mask shows", MASKED_SLICES)
    z_margin: float = setting(
        BOX_MARGIN, "z margin of crops, cells of the cube; trainings take their crops'",
        least=0)

@dataclass(frozen=True)
class Recipe:
    """How a model is trained; its fields are options of the trainings."""
    backbone: str = setting(
        "tf_efficientnetv2_s", "network of timm; for train-seg with strides of 2 to 16")
    epochs: int = setting(240, "passes over the training studies", least=1)
    batch_size: int = setting(4, "samples a step, over all GPUs", least=1)
    lr: float = setting(1e-3, "peak learning rate of AdamW", least=1e-9)
    size: int = setting(CUBE, "edge of the cube or crop, voxels or pixels", least=16)
    weight_decay: float = setting(0.01, "of AdamW, on matrices alone", least=0)
    warm_up: float = setting(0.05, "share of the steps in which lr rises", least=0, most=1)
    ema: float = setting(0.998, "decay of the averaged, kept weights", least=0, most=1)
    clip: float = setting(1.0, "largest norm of the gradient", least=1e-9)
    drop_path: float = setting(
        0.05, "share of residual branches left out at random", least=0, most=0.9)
    dropout: float = setting(0.1, "share left out before the last layer", least=0, most=0.9)
    half: bool = setting(
        False, "bfloat16 on a CPU that has it; a GPU always uses half precision")
    seed: int = setting(0, "of everything random", least=0, most=2**32)

@dataclass(frozen=True)
class ClassifierRecipe(Cut, Recipe):
    """How a classifier is trained and its crops are cut."""
    mixup: float = setting(0.2, "share of batches with mixed losses", least=0, most=1)
    hidden: int = setting(256, "width of the LSTMs", least=1)
    augment: str = setting(
        "mild", "how far crops are changed; strong: as first place did, every step by "
        "itself", ("mild", "strong"))
    thin: int = setting(
        1, "3: a batch sees every third step, starting at one of the first three",
        (1, 3, 5, 15))
    checkpoint: bool = setting(False, "compute blocks twice: less memory, a third slower")

# Rates and epochs are ours; dropout is Tan and Le's (2021), mixup first place's.
RECIPES = dict(
    segmenter=Recipe(),
    vertebra=ClassifierRecipe(epochs=20, batch_size=8, lr=3e-4, size=CROP, dropout=0.2),
    patient=ClassifierRecipe(
        "convnext_nano", epochs=15, batch_size=2, lr=2e-4, size=CROP, dropout=0.2))

# A preset replaces defaults of a mode's options; what it does not name stays the recipe's.
FAST = {  # ours: one fold within an hour on two T4s, most of it spent on reading studies
    "train-seg": dict(fold="0", epochs=60),  # 1,020 steps
    "extract": dict(studies=550),
    "train-cls": dict(fold="0", epochs=16, thin=3),
    "train-patient": dict(fold="0", epochs=12, thin=3)}
GOLD_CROPS = dict(  # first place's, but its 50 to 75 epochs see all steps, not every third
    size=384, epochs=50, thin=3, mixup=0.5, drop_path=0.3, dropout=0.3, augment="strong")
GOLD = {
    "train-seg": dict(epochs=1000, drop_path=0.2),  # 17,000 steps; first place: 17,400
    "extract": dict(size=384),
    # First place's rates. Its batch is 7 or 8; with `thin`, norms see a third of a batch.
    "train-cls": dict(GOLD_CROPS, batch_size=12, lr=2e-4, drop_path=0.2),
    "train-patient": dict(GOLD_CROPS, batch_size=4, lr=6e-5, checkpoint=True)}  # for 16 GB
OTHERS = {  # a second set, whose errors differ from the first's; classifiers' rates: ours
    "train-seg": dict(name="second", lr=3e-4, backbone="resnet18d"),  # first place's
    "train-cls": dict(name="second", lr=1e-4, backbone="convnext_nano"),
    "train-patient": dict(name="second", lr=1e-4, backbone="tf_efficientnetv2_s")}
SECOND = {mode: values | OTHERS.get(mode, {}) for mode, values in GOLD.items()}
PRESETS = {"fast": FAST, "standard": {}, "gold": GOLD, "gold-second": SECOND}

PLANS = {  # hours and disk of crops on the competition's data: tests/studies/bench.py plan
    "fast": "1 hour and 6 GB", "standard": "17 hours and 21 GB",
    "gold": "49 hours and 63 GB", "gold-second": "48 hours more than gold"}

@dataclass(frozen=True)
class Shared:
    """Options that several modes have."""
    data: str = setting(KAGGLE_DATA, "folder of the data set")
    weights: str = setting(str(HERE / "weights"), "folder of the models")
    work: str = setting("work", "folder of the crops")
    out: str = setting("submission.csv", "file or folder to write")
    masks: str = setting("", "folder to write the vertebrae's masks to, as NIfTI")
    submission: str = setting("submission.csv", "file to score")
    device: str = setting("auto", "cpu, cuda:0, ...; auto takes a GPU where there is one")
    workers: int = setting(os.cpu_count() or 1, "threads that read files", least=0)
    fold: str = setting("all", "the fold to train, from 0 on, or all of them")
    folds: int = setting(5, "parts of cross-validation; 1: train and score on all", least=1)
    resume: bool = setting(
        False, "go on where it stopped, as a training with --fold all always does")
    time_limit: float = setting(
        0.0, "minutes until a run saves and ends; 0: none, but 510 on Kaggle", least=0)
    init: str = setting(
        "auto", "file of weights to start from, ours or timm's; or none; auto looks for "
        "timm's under /kaggle/input, in --data and in weights/pretrained beside cspine.py; "
        "train-patient takes the vertebra classifier of its fold, where that fits")
    name: str = setting(
        "", "names a second set of models, as vertebra_NAME_fold0.pt; it only repeats the "
        "first unless --backbone or --seed differs")
    preset: str = setting("standard", "defaults of a whole training", tuple(PRESETS))

@dataclass(frozen=True)
class Answers:
    """How logits become answers; its fields are options of predict."""
    top_k: int = setting(
        5, "largest steps averaged to an answer; not given: as fitted", least=1, most=STEPS)
    noisy_or: float = setting(
        0.8, "share of 1 - prod(1 - P(Ck)) in patient_overall; not given: as fitted",
        least=0, most=1)


# ==== Reading ====
# In: a folder of DICOM files. Out: a Volume. Only Reading and Decoding know DICOM.
# Pitfall: file names say nothing about the order of slices; only their positions do.

class Volume(NamedTuple):
    """A CT study, head first: Z from head to foot, Y front to back, X right to left."""
    uid: str
    hu: np.ndarray  # int16 (Z, Y, X), Hounsfield units
    spacing: tuple  # mm, in the order of the axes
    affine: np.ndarray  # (4, 4) LPS mm (DICOM's axes) from (z, y, x, 1)
    problems: tuple = ()  # what was odd, in words
    sources: tuple = ()  # of each slice, if axial: its file and SOPInstanceUID
    # Which axes of its mask's file are Z, Y, X, and which of these run backwards.
    grid: tuple = ((0, 1, 2), (True, False, False))  # axial, foot first: of a DICOM series
    header: Any = None  # of a NIfTI CT, whose masks copy their placement from it

class Slice(NamedTuple):
    """A decoded image, and where its pixels lie."""
    hu: np.ndarray  # int16 (Y, X)
    lps_from_pixel: np.ndarray  # (3, 3) mm from (row, column, 1)
    source: tuple = ("", "")  # file, SOPInstanceUID
    study: str = ""  # StudyInstanceUID
    series: str = ""  # SeriesInstanceUID; if it is missing, StudyInstanceUID
    of_pass: tuple = ()  # its values of PASS_TAGS, then its InstanceNumber
    guessed: bool = False  # True if its header has no orientation

class Scan(NamedTuple):
    """A CT with its axes as they are stored; read_volume puts them in order."""
    planes: list  # int16 (row, column) in HU, in order of position
    places: np.ndarray  # even_places of the planes
    affine: np.ndarray  # (4, 4) LPS mm from (place, row, column, 1)
    problems: list  # what was odd, in words
    sources: Any = ()  # of a DICOM series: the source of each plane
    header: Any = None  # of a NIfTI CT

PASS_TAGS = (  # these tell apart two scans of the same positions within one series
    "AcquisitionNumber", "ConvolutionKernel", "ImageType", "TemporalPositionIdentifier",
    "FrameAcquisitionNumber", "FrameType", "TemporalPositionIndex", "SliceThickness",
    "AcquisitionTime", "ContentTime")  # the times come last: one_pass also sorts by them

@contextmanager
def leaving_out(problems, where):
    """Add an error raised inside to `problems`, with its reason, and go on."""
    try:
        with errors_as(StudyError, where):
            yield
    except StudyError as error:
        problems.append(f"{error}; left out")

def read_slices(path):
    """([Slice, ...], [problem, ...]) of a DICOM file, with or without its preamble: one
    Slice per frame; a problem says what was left out and why. StudyError if it is no CT."""
    if not path.is_file():  # reading from a named pipe would block for ever
        raise StudyError("not a regular file")
    with path.open("rb") as file:
        if not is_dicom(file):  # pydicom would read all of a film or an archive
            raise StudyError("no DICOM image")
        data = pydicom.dcmread(file, force=True)
    if data.get("Modality") not in (None, "", "CT"):  # such as a dose or a segmentation
        raise StudyError(f"not a CT image but {data.Modality}")
    if "Rows" not in data:
        raise StudyError("no DICOM image")
    frames = decode_pixels(data)
    uid = str(data.get("SOPInstanceUID", ""))
    found, problems = [], []
    for k, stored in enumerate(frames):
        name = path.name + (f", frame {k + 1}" if len(frames) > 1 else "")
        with leaving_out(problems, name):
            found.append(place_frame(stored, data, k, (name, uid)))
    return found, problems

def place_frame(stored, data, k, source):
    """The Slice in HU of frame k, `stored` (Y, X), with its place (PS3.3 C.7.6.2)."""
    groups = [*data.get("SharedFunctionalGroupsSequence", [])]  # of an enhanced CT
    groups += data.get("PerFrameFunctionalGroupsSequence", [])[k : k + 1]
    macros = [one for group in groups for one in group if one.VR == "SQ" and one.keyword]
    own = {part.keyword: part.value for one in macros for item in one for part in item}

    def tag(name, default):
        values = (own.get(name), data.get(name), default)
        given = [one for one in values if one not in (None, "")]  # 0 counts
        return np.array(given[0], float)

    origin = tag("ImagePositionPatient", [math.nan] * 3)
    directions = tag("ImageOrientationPatient", [math.nan] * 6).reshape(2, 3)
    supine = data.get("PatientPosition") in (None, "", "HFS", "FFS")
    guessed = supine and np.isnan(directions).all()
    row, column = np.eye(3)[:2] if guessed else directions  # guess: axial
    spacing = tag("PixelSpacing", [0, 0])  # between rows, between columns
    normal = np.cross(row, column)
    lps_from_pixel = np.c_[column * spacing[0], row * spacing[1], origin]
    far = abs(lps_from_pixel).max()  # NaN without a position
    if not (spacing.min() > 0 and far < 1e6 and 0.9 < normal @ normal < 1.1):
        raise StudyError("no usable position, orientation or pixel spacing")

    study = str(data.get("StudyInstanceUID") or "")
    series = str(data.get("SeriesInstanceUID") or study)  # never mix patients
    of_pass = [str(own.get(name, data.get(name, ""))) for name in PASS_TAGS]
    number = 0
    with suppress(ValueError, TypeError):  # used only to break the last ties
        number = int(data.get("InstanceNumber") or 0)
    of_pass = *of_pass, number
    hu = in_hu(stored, data, tag)
    return Slice(hu, lps_from_pixel, source, study, series, of_pass, guessed)

def in_hu(stored, data, tag):
    """`stored` in HU, int16; padding becomes air."""
    slope, intercept = tag("RescaleSlope", 1), tag("RescaleIntercept", 0)
    if not (0 < abs(slope) < math.inf and abs(intercept) < math.inf):
        raise StudyError(f"no usable rescaling: slope {slope}, intercept {intercept}")
    rescaled = stored * slope + intercept
    if "ModalityLUTSequence" in data:
        rescaled = pydicom.pixels.apply_modality_lut(stored, data)
    memory = mmap.mmap(-1, 2 * stored.size, mmap.MAP_PRIVATE)  # malloc may not free it
    hu = np.ndarray(stored.shape, np.int16, memory)
    hu[:] = np.rint(rescaled).clip(AIR_HU, MAX_HU)
    padding = map(data.get, ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    padding = [value for value in padding if isinstance(value, int)]
    padding = np.array(padding, np.int64).astype(stored.dtype)  # the pixels' sign
    if len(padding):  # may be the top of an unsigned range, and would look like metal
        hu[(stored >= padding.min()) & (stored <= padding.max())] = AIR_HU
    return hu

def read_folder(path, workers, give_up):
    """What read_slices gives, for a folder's files. StudyError once give_up() is true."""
    files = [path]  # one multi-frame file
    if not path.is_file():  # macOS adds files whose names begin with ._
        files = [file for file in path.iterdir() if file.name[:2] != "._"]
    files = sorted(files, key=lambda file: (len(file.name), file))  # 2.dcm before 10.dcm
    slices, problems = [], []
    for file, future in prefetch(read_slices, files, workers, 4 * workers + 1):
        if give_up():
            raise StudyError("out of time")
        with leaving_out(problems, file.name):
            found, bad = future.result()
            slices += found
            problems += bad
    return slices, problems

def stacks_of(slices):
    """The slices, grouped into lists that share one series and geometry."""
    stacks = []
    for one in slices:
        if alike := [stack for stack in stacks if same_stack(stack[0], one)]:
            alike[0].append(one)
        else:
            stacks.append([one])
    return stacks

def same_stack(first, other):
    """Whether two Slices share a series and, up to rounding in headers, a geometry."""
    if first.series != other.series or first.hu.shape != other.hu.shape:
        return False
    apart = (first.lps_from_pixel - other.lps_from_pixel)[:, :2]  # mm a pixel
    return abs(apart).max() < SAME_STEP * np.linalg.norm(first.lps_from_pixel[:, 0])

def along_normal(stack):
    """(N,) mm: each slice's position along their common normal (PS3.3 C.7.6.2.1.1)."""
    down, right, _ = stack[0].lps_from_pixel.T
    normal = np.cross(down, right)
    origins = np.array([one.lps_from_pixel[:, 2] for one in stack])
    return origins @ normal / np.linalg.norm(normal)

def parts_of(index, at, gap):
    """`index` split wherever two neighbours' positions `at` are more than `gap` apart;
    `gap` is one number, or an array of one number per pair of neighbours."""
    return np.split(index, np.flatnonzero(np.diff(at) > gap) + 1)

def places_of(mm):
    """Indices of slices sorted by position; of slices at one position only the first.
    Two passes may be slightly offset: every other gap is then far smaller than the rest."""
    order = np.argsort(mm, kind="stable")
    at = mm[order]
    gaps = np.pad(np.diff(at), 1, constant_values=math.inf)
    beside = np.minimum(gaps[:-2], gaps[2:])
    near = (TWIN_SHARE * beside).clip(SAME_PLACE_MM, TWIN_MM)
    return np.array([min(place) for place in parts_of(order, at, near)])

def passes_by_time(times):
    """The number of its pass for each ContentTime, "HHMMSS...": a pause above PASS_APART_S
    starts another. Times need not follow slices: several computers may reconstruct them."""
    stamps = pd.Series([time[:6] for time in times])
    stamps = pd.to_datetime(stamps, format="%H%M%S", errors="coerce")  # NaT: no stamp
    is_next = stamps.sort_values().diff() > pd.Timedelta(seconds=PASS_APART_S)
    return is_next.cumsum().sort_index()

def one_pass(stack):
    """The slices of one acquisition, where a series may hold several passes over a neck.
    Each of PASS_TAGS in turn splits the slices into passes. The one that covers most
    positions is kept (on a tie the first), and of the others only slices that fill its gaps
    or extend it. If no tag splits them, the earliest slice of a position comes first."""
    for k, tag in enumerate(PASS_TAGS):
        mm = along_normal(stack)
        marks = [one.of_pass[k] for one in stack]
        if tag == "SliceThickness":  # rounded to 0.1 mm, as some headers have noise
            marks = pd.to_numeric(pd.Series(marks), errors="coerce")
            marks = (marks - marks.median()).fillna(0).round(1)
        if tag == "ContentTime":
            marks = passes_by_time(marks)
        marks = np.array(marks)
        covered = {mark: len(places_of(mm[marks == mark])) for mark in np.unique(marks)}
        widest = max(covered, key=covered.get)
        if len(covered) == 1 or covered[widest] < LEAST_SLICES:
            continue
        own = np.unique(mm[marks == widest])
        gaps = np.diff(own)
        step = np.median(gaps[gaps > SAME_PLACE_MM])
        apart = abs(mm[:, None] - own).min(1)  # mm from that pass's nearest slice
        kept = (marks == widest) | (apart >= FILLS_FROM * step)
        stack = [one for one, keep in zip(stack, kept) if keep]
    return sorted(stack, key=lambda one: one.of_pass[-3:])  # by both times, then number

def even_places(mm):
    """Evenly spaced places as fractions of slice indices: 2.5 is halfway from 2 to 3."""
    index = np.arange(len(mm))
    step = np.median(np.diff(mm))
    even = np.linspace(mm[0], mm[-1], round(np.ptp(mm) / step) + 1)
    if len(even) == len(mm) and abs(mm - even).max() <= MAX_UNEVEN * step:
        return index
    return np.interp(even, mm, index)

def longest_run(slices, problems):
    """[Slice, ...] in order, of the series of most positions; `problems` gets the rest."""
    stacks = stacks_of(slices)
    studies = {one.study for one in slices} - {""}
    one_neck = len(studies) in (0, 1, len(slices))  # no uid, one, or a new one per file
    if one_neck and len(stacks) > 1 and max(map(len, stacks)) < LEAST_SLICES:
        stacks = stacks_of([one._replace(series="", study="") for one in slices])
        problems.append("no series of enough images: SeriesInstanceUID is not looked at")
    run = []
    if len(stacks) > 1:  # of equals the CT is taken, not an iodine map made of it
        stacks.sort(key=lambda some: not_in_hu([one.hu for one in some]) != "")
    for stack in map(one_pass, stacks):
        mm = along_normal(stack)
        order = places_of(mm)
        places = max(parts_of(order, mm[order], MAX_GAP_MM), key=len)
        if len(places) > len(run):  # most positions, not most images
            run = [stack[k] for k in places]
    if rest := len(slices) - len(run):
        problems.append(f"{rest} images of another series, pass, size or position left out")
    if len(studies) > 1:
        problems.append(f"images of {len(studies)} studies: give each its own folder")
    return run

def scan_of(run, problems):
    """The Scan of slices in order; `problems` gets what is odd about their places."""
    mm = along_normal(run)
    places = even_places(mm)
    if not np.array_equal(places, np.arange(len(mm))):
        problems.append(f"uneven positions: {len(mm)} slices, brought to {len(places)}, "
                        f"gaps of up to {np.diff(mm).max():.1f} mm filled")
    origins = np.array([one.lps_from_pixel[:, 2] for one in run])
    axis = origins[-1] - origins[0]  # (3,) mm
    cosine = np.ptp(mm) / np.linalg.norm(axis)  # between the stack's axis and its normal
    line = origins[0] + np.outer(mm - mm[0], axis) / np.ptp(mm)
    aside = np.linalg.norm(origins - line, axis=1).max()
    if aside > 1:
        problems.append(f"slices lie up to {aside:.0f} mm beside their place")
    elif cosine < LEAST_COSINE:
        problems.append(f"gantry tilted by {math.degrees(math.acos(cosine)):.0f} degrees")
    if any(one.guessed for one in run):
        problems.append("no ImageOrientationPatient: axial and supine are guessed")
    affine = np.eye(4)
    affine[:3] = np.c_[axis / (len(places) - 1), run[0].lps_from_pixel]
    return Scan([one.hu for one in run], places, affine, problems, [s.source for s in run])

def read_series(path, workers, give_up):
    """The Scan of the series of most positions. StudyError if these are too few."""
    slices, problems = read_folder(path, workers, give_up)
    run = longest_run(slices, problems)
    if len(run) < LEAST_SLICES:
        found = f"only {len(run)} usable slices; at least {LEAST_SLICES} are needed"
        if path.is_file():
            found += ": give the folder of its series"
        reasons = [one.partition(": ")[2] for one in problems]  # without its file name
        usual = reasons.index(max(reasons, key=reasons.count)) if problems else 0
        raise StudyError("; ".join([found, *problems[usual : usual + 1]]))
    return scan_of(run, problems)

def read_nifti_ct(path):
    """The Scan of a NIfTI-1 CT. StudyError if it is labels, MR or not in HU."""
    problems = []
    stored, slope, intercept, voxel_from_lps, header = read_nifti(path, problems.append)
    if min(stored.shape) < LEAST_SLICES:
        raise StudyError(f"{stored.shape} voxels; each axis needs at least {LEAST_SLICES}")
    planes = []
    for plane in stored.T:  # (K, J, I)
        hu = np.nan_to_num(plane * slope + intercept, nan=AIR_HU)
        planes.append(np.rint(hu).clip(AIR_HU, MAX_HU).astype(np.int16))
    if why := not_in_hu(planes):
        raise StudyError(why)
    affine = np.linalg.inv(voxel_from_lps)[:, [2, 1, 0, 3]]
    return Scan(planes, np.arange(len(planes)), affine, problems, header=header)

def not_in_hu(planes):
    """Why planes (Y, X) are not a body in HU, but labels, MR or another unit; else ""."""
    apart = max(1, len(planes) // 64)  # some 64 planes are enough
    thin = np.array([hu[::2, ::2] for hu in planes[::apart]])
    low, high = thin.min(), thin.max()
    tissue = ((thin > AIR_BELOW) & (thin < BONE_ABOVE)).mean()
    if low <= AIR_BELOW and high >= BONE_ABOVE and tissue >= LEAST_TISSUE:
        return ""
    return f"no CT in HU: values {low} to {high}, {tissue:.0%} soft tissue"

def is_nifti(path):
    """Whether a path is a file named .nii or .nii.gz."""
    return path.is_file() and path.name.lower().endswith((".nii", ".nii.gz"))

def is_dicom(file):
    """Whether an open file begins as DICOM: with its preamble, or without, when the number
    of a group, 2 or 8, comes first, in either byte order."""
    start = file.read(132)
    file.seek(0)
    bare = start[:2] in (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08")
    return bare or start.endswith(b"DICM")

def begins_as_dicom(path):
    """Whether a file can be read, and begins as DICOM."""
    with suppress(OSError), path.open("rb") as file:
        return is_dicom(file)
    return False

def axial_axes(affine):
    """(axes, flip): the stored axes that become Z, Y, X, and which of these to flip."""
    columns = affine[:3, :3]
    left, back, up = columns / np.linalg.norm(columns, axis=0)
    cosines = np.stack([-up, back, left])  # (3, 3): of Z, Y, X with each stored axis
    orders = permutations(range(3))
    axes = max(orders, key=lambda stored: abs(cosines[:, stored]).trace())
    return axes, cosines[:, axes].diagonal() < 0

def flip_affine(affine, shape, flip):
    """The affine (4, 4) of an array of this shape after the axes in `flip` are flipped."""
    columns = affine[:, :3]
    last = np.where(flip, np.subtract(shape, 1), 0)
    start = affine[:, 3] + columns @ last
    return np.c_[columns * np.where(flip, -1, 1), start]

def read_volume(folder, workers=2, give_up=lambda: False):
    """One CT study, head first, in Hounsfield units: a Volume.
    `folder` is a folder of DICOM files, a multi-frame DICOM file or a NIfTI CT. Slices are
    ordered by position along their normal, never by name; the series of most positions is
    taken, gaps are interpolated, sagittal and coronal slices are made axial. Raises only
    StudyError: fewer than LEAST_SLICES, too large or damaged, or give_up() became true."""
    path = Path(folder)
    with errors_as(StudyError, path):
        nifti = is_nifti(path)
        scan = read_nifti_ct(path) if nifti else read_series(path, workers, give_up)
        planes, places = scan.planes, scan.places
        shape = (len(places), *planes[0].shape)
        if math.prod(shape) > MAX_VOXELS:
            raise StudyError(f"{shape} voxels: damaged, or too large")

        axes, flip = axial_axes(scan.affine)
        hu = np.empty([shape[k] for k in axes], np.int16)
        backwards = np.flatnonzero(flip).tolist()
        stored = np.flip(hu, backwards).transpose(np.argsort(axes))  # a view of hu
        for k, at in enumerate(places):  # interpolated between two planes
            low = min(int(at), len(planes) - 2)
            planes[:low] = [None] * low  # freed: a volume is never held twice
            stored[k] = cv2.addWeighted(
                planes[low], low + 1 - at, planes[low + 1], at - low, 0)

        affine = flip_affine(scan.affine[:, [*axes, 3]], hu.shape, flip)
        spacing = np.linalg.norm(affine[:3, :3], axis=0).tolist()
        axial = scan.sources and axes[0] == 0
        sources = [scan.sources[round(at)] for at in places] if axial else []
        sources = sources[::-1] if flip[0] else sources
    own = dict(grid=(axes, tuple(flip.tolist())), header=scan.header) if nifti else {}
    return Volume(path.name, hu, tuple(spacing), affine, tuple(scan.problems),
                  tuple(sources), **own)


# ==== Masks ====
# In: a NIfTI file of labels, a Volume. Out: the labels on the Volume's or a coarser grid.
# Pitfall: NIfTI is RAS+, DICOM is LPS+. What to flip is read off the affine, never listed.

NIFTI_FIELDS = """
    sizeof_hdr i4, skipped_1 V36, dim 8i2, skipped_2 V14, datatype i2, bitpix i2,
    skipped_3 V2, pixdim 8f4, vox_offset f4, scl_slope f4, scl_inter f4, skipped_4 V3,
    xyzt_units u1, skipped_5 V24, descrip S80, skipped_6 V24, qform_code i2, sform_code i2,
    quatern 3f4, qoffset 3f4, srow 12f4, skipped_7 V16, magic S4"""
NIFTI_HEADER = np.dtype([tuple(one.split()) for one in NIFTI_FIELDS.split(",")])  # nifti1.h
NIFTI_TYPES = {  # NumPy's types by the header's datatype code
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
WRITTEN_BY = b"cspine: C1..C7, for research"
MASK_HEADER = dict(  # of our masks: uint8, mm, both transforms to the scanner's axes
    sizeof_hdr=348, magic=b"n+1", datatype=2, bitpix=8, vox_offset=352, scl_slope=1,
    xyzt_units=2, descrip=WRITTEN_BY, qform_code=1, sform_code=1)
PLACED_BY = (  # the fields that say where voxels lie; programs differ in which they trust
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern", "qoffset", "srow")

def nifti_affine(header):
    """RAS mm from voxel (4, 4), as nibabel: sform, else qform, else zooms about the centre.
    pixdim[0] below 0 mirrors the qform's k axis. Units other than mm are converted."""
    pixdim = header["pixdim"].astype(float)
    zooms = abs(pixdim[1:4])
    affine = np.diag([*zooms * (-1, 1, 1), 1])
    affine[:3, 3] = affine[:3, :3] @ (1.0 - header["dim"][1:4]) / 2
    if header["sform_code"] > 0:
        affine[:3] = header["srow"].reshape(3, 4)
    elif header["qform_code"] > 0:
        axis = header["quatern"].astype(float)
        cosine = math.sqrt(max(0, 1 - axis @ axis))
        skew = np.cross(np.eye(3), axis)
        turn = np.eye(3) + 2 * (cosine * skew + skew @ skew)
        mirror = -1 if pixdim[0] < 0 else 1
        affine[:3, :3] = turn * zooms * (1, 1, mirror)
        affine[:3, 3] = header["qoffset"]
    affine[:3] *= {1: 1000, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1)  # m, um
    return affine

def read_nifti(path, report=None):
    """(stored values (I, J, K), slope, intercept, voxel from LPS mm (4, 4), header).
    NIfTI-1 in either byte order, gzipped or not. report(text) is called if the orientation
    is guessed. A damaged file raises an exception of any kind."""
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":  # read() joins all its members
        raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(2 * MAX_VOXELS)
    order = "<" if raw[:2] == b"\x5c\x01" else ">"  # the header's length, 348
    header = np.frombuffer(raw, NIFTI_HEADER.newbyteorder(order), 1)[0].copy()
    rank, *shape = header["dim"].tolist()
    start = int(header["vox_offset"])
    more = max(shape[3:rank], default=1) > 1  # a time series or vectors
    if header["magic"] != b"n+1" or rank < 3 or more or start < NIFTI_HEADER.itemsize:
        raise ValueError("not one 3-D image of NIfTI-1 in one file")
    if (code := int(header["datatype"])) not in NIFTI_TYPES:
        raise ValueError(f"datatype {code}: not plain numbers")
    kind = np.dtype(order + NIFTI_TYPES[code])
    end = start + math.prod(shape[:3]) * kind.itemsize
    if end > 2 * MAX_VOXELS:
        raise ValueError(f"{shape[:3]} voxels of {kind.itemsize} bytes: too large")
    if len(raw) < end:
        raise ValueError("the file ends too early")
    stored = np.ndarray(shape[:3], kind, raw, start, order="F")

    if max(header["sform_code"], header["qform_code"]) <= 0:
        guessed = f"{path}: no orientation in its header: head, front and left are guessed"
        (report or say)(guessed)
    ras_from_voxel = np.asarray_chkfinite(nifti_affine(header))
    voxel_from_lps = np.linalg.inv(ras_from_voxel) * (-1, -1, 1, 1)
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not (0 < abs(slope) < math.inf and abs(intercept) < math.inf):
        slope, intercept = 1, 0  # a slope of 0 means: as stored
    return stored, slope, intercept, voxel_from_lps, header

def refuse_to_overwrite(path):
    """Raise UserError if the path exists and is not a mask written by this program."""
    if path.exists():
        with errors_as(UserError, f"{path}: not a mask of ours, and not overwritten"):
            with gzip.open(path) as file:
                if WRITTEN_BY not in file.read(348):
                    raise ValueError("it is of another program")

def write_nifti(path, labels, volume):
    """Write uint8 labels (Z, Y, X) on a Volume's grid as NIfTI-1, gzipped.
    The mask of a NIfTI CT has its voxels and placement; that of a DICOM series is axial,
    evenly spaced, foot first, placed by sform and qform. A qform cannot shear: of a tilted
    series it keeps a slice's axes, as ITK does. UserError over another program's file."""
    axes, flip = volume.grid
    order = [*np.argsort(axes)]
    stored = np.flip(labels, np.flatnonzero(flip).tolist()).transpose(order)  # (K, J, I)
    stored_axes = [*order[::-1], 3]
    affine = flip_affine(volume.affine, labels.shape, flip)[:3, stored_axes]
    affine *= [[-1], [-1], [1]]  # LPS -> RAS
    zooms = np.linalg.norm(affine[:, :3], axis=0)
    turn = affine[:, :3] / zooms
    mirror = np.sign(np.linalg.det(turn))
    turn[:, 2] = np.cross(turn[:, 0], turn[:, 1])
    vector = cv2.Rodrigues(turn)[0].ravel()  # axis times angle, radians
    half = np.linalg.norm(vector) / 2
    values = dict(MASK_HEADER, qoffset=affine[:, 3], srow=affine.ravel())
    values["dim"] = [3, *stored.shape[::-1]] + [1] * 4
    values["pixdim"] = [mirror, *zooms] + [1] * 4
    values["quatern"] = vector / 2 * np.sinc(half / np.pi)  # axis * sin(angle / 2)
    if volume.header is not None:
        values |= {name: volume.header[name] for name in PLACED_BY}
    header = np.zeros((), NIFTI_HEADER.newbyteorder("<"))
    for name, value in values.items():
        header[name] = value

    refuse_to_overwrite(path)
    content = header.tobytes() + bytes(4)
    content += stored.tobytes()
    content = gzip.compress(content, 1, mtime=0)
    write_atomic(path, lambda new: new.write_bytes(content))

def read_mask(path, volume, shape=None):
    """Labels uint8 (Z, Y, X) on the volume's grid, or on a coarser one of `shape`, by
    nearest neighbour: 1-7 = C1-C7, others below 255 as stored, 0 outside. The mask may
    have any grid: its affine places it. StudyError if it is damaged.
    Of 512 pixels, four are equally near to the middle of one of 128 cells: nine places
    BESIDE it vote, not rounding."""
    with errors_as(StudyError, f"{path}: not a readable NIfTI-1 mask"):
        *mask, voxel_from_lps, _ = read_nifti(path)
    out = np.zeros(shape or volume.hu.shape, np.uint8)
    cells = [np.arange(count) + 0.5 for count in out.shape]
    z, y, x = (c * n / len(c) - 0.5 for c, n in zip(cells, volume.hu.shape))  # in voxels
    down, back, left, start = (voxel_from_lps @ volume.affine)[:3].T[..., None]  # (3, 1)
    rows = back * y.repeat(len(x))
    flat = rows + left * np.tile(x, len(y)) + start  # (3, Y * X)
    for plane, depth in zip(out, z):
        plane.flat = labels_at(flat + down * depth, *mask)
    if shape:
        shown = torch.from_numpy(out)[None].float()
        wider = F.max_pool3d(shown, 3, 1, 1)[0].numpy()
        k, j, i = wider.nonzero()  # what lies further off has no label
        at = back * y[j] + left * x[i]
        at += start + down * z[k]  # (3, N)
        near = [labels_at(at + aside[:, None], *mask) for aside in BESIDE]
        near = torch.from_numpy(np.array(near))  # (9, N)
        out[k, j, i] = near.mode(0).values
    return out

def labels_at(places, stored, slope, intercept):
    """uint8 (N,) of the voxels nearest to places (3, N), in voxels; see read_mask."""
    at = np.floor(places + 0.5).astype(int)
    limits = np.reshape(stored.shape, (3, 1))
    inside = ((at >= 0) & (at < limits)).all(0)
    labels = np.zeros(len(inside), np.uint8)
    values = stored[tuple(at[:, inside])] * slope + intercept
    is_label = (values > 0) & (values < 255)
    labels[inside] = np.where(is_label, values, 0).round()
    return labels

def mask_fit(path, volume, labels):
    """(share of a mask's C1..C7 inside the study, share of its labels there on bone).
    `labels` is read_mask's, on any grid. Either share is low for another study's mask."""
    stored, slope, intercept, voxel_from_lps, _ = read_nifti(path, str)  # str: be silent
    thin = stored[::2, ::2, ::2] * slope + intercept  # an eighth is enough
    voxels = 8 * ((thin > 0.5) & (thin < 7.5)).sum()
    whole_mm3 = voxels / abs(np.linalg.det(voxel_from_lps))
    cells = np.argwhere((labels > 0) & (labels < 8))
    if not len(cells):
        return 0.0, 0.0
    voxels_a_cell = np.divide(volume.hu.shape, labels.shape)
    found_mm3 = len(cells) * np.prod(voxels_a_cell * volume.spacing)
    at = (cells + 0.5) * voxels_a_cell
    hu = volume.hu[tuple(at.astype(int).T)]
    inside = min(found_mm3 / max(whole_mm3, 1), 1)
    return inside, (hu > BONE_HU).mean()

def mask_files(data):
    """{uid: NIfTI file} of a data set."""
    files = [path for path in sorted(data.glob("segmentations/*")) if is_nifti(path)]
    return {re.sub(r"(?i)\.nii(\.gz)?$", "", path.name): path for path in files}

def fitting_mask(path, volume, shape):
    """What read_mask gives; StudyError if it mostly lies outside the study or off bone."""
    labels = read_mask(path, volume, shape)
    inside, on_bone = mask_fit(path, volume, labels)
    if inside < LEAST_INSIDE or on_bone < LEAST_BONE:
        raise StudyError(f"{inside:.0%} of its mask's labels 1 to 7, for C1 to C7, lie "
                         f"inside, {on_bone:.0%} on bone")
    return labels


# ==== Segmenter ====
# In: a Volume. Out: the probability of C1..C7 in the cells of a cube over the whole study.
# Pitfall: a converted network can run and be wrong; to_3d refuses layers it does not know.

def resize(image, rows, columns):
    """An image (Y, X) of another size: averaged if no axis grows, else interpolated."""
    larger = rows > len(image) or columns > image.shape[1]
    how = cv2.INTER_LINEAR if larger else cv2.INTER_AREA
    return cv2.resize(image, (columns, rows), interpolation=how)  # OpenCV: width first

def segmenter_input(volume, size=CUBE, window=SEGMENTER_WINDOW):
    """float32 (1, D, D, D) in 0..1: each cell is the mean of the windowed HU inside it."""
    level, width = window
    low = level - width // 2
    planes = []
    for hu in volume.hu:
        plane = np.float32(np.clip(hu, low, low + width))
        plane = resize(plane, size, plane.shape[1])  # one axis at a time: one may grow
        planes.append(resize(plane, size, size).ravel())
    cube = resize(np.array(planes), size, size * size)  # (Z, D * D) -> (D, D * D)
    return torch.from_numpy((cube.reshape(1, size, size, size) - low) / width)

class Conv3dSame(nn.Conv3d):
    """A convolution with TensorFlow's SAME padding; an odd voxel goes to the end."""
    def forward(self, x):
        """(B, C, Z, Y, X) -> (B, F, Z/stride, Y/stride, X/stride), rounded up."""
        padding = []
        for length in x.shape[:1:-1]:  # F.pad takes the last axis first
            total = max(self.kernel_size[0] - 1 - (length - 1) % self.stride[0], 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))

class BatchNormAct3d(nn.BatchNorm3d):
    """BatchNormAct2d in 3-D. It includes the activation, which BatchNorm3d would drop."""
    def forward(self, x):
        return self.act(super().forward(x))

class SqueezeExcite3d(nn.Sequential):
    """timm's squeeze-excite on the mean over three axes; over two it would run, wrongly."""
    def forward(self, x):
        return x * super().forward(x.mean((2, 3, 4), keepdim=True))

LAYERS_3D = dict(  # by the name of the 2-D class
    Conv2d=nn.Conv3d, Conv2dSame=Conv3dSame, MaxPool2d=nn.MaxPool3d, AvgPool2d=nn.AvgPool3d,
    BatchNorm2d=nn.BatchNorm3d, BatchNormAct2d=BatchNormAct3d)
# Matches layers for images and timm's own, except those that work in 3-D unchanged.
NO_TWIN = r"2d|timm\.layers(?!.*(activation|ConvNormAct|DropPath))"

def to_3d(network):
    """The 3-D twin of a timm network, with the same names of layers.
    On a volume that is constant along the new axis its features are the 2-D network's, away
    from the border. Raises UserError with the name of a layer that has no twin."""
    twin = copy.deepcopy(network)
    for path, layer in twin.named_modules():
        kind = str(type(layer))
        kind_3d = LAYERS_3D.get(type(layer).__name__)
        settings = vars(layer).items()  # the pairs among these: a value per axis
        pairs = {n: v for n, v in settings if isinstance(v, tuple) and len(v) == 2}
        even = all(first == second for first, second in pairs.values())  # else no twin
        weights = [*layer.parameters(False), *layer.buffers(False)]
        if "SqueezeExcite" in kind or "SEModule" in kind:
            layer.__class__ = SqueezeExcite3d
        elif kind_3d and even:
            layer.__class__ = kind_3d
            vars(layer).update({n: v[:1] * 3 for n, v in pairs.items()})
        elif weights or re.search(NO_TWIN, kind):
            where = f"{type(network).__name__}.{path}"
            raise UserError(f"no 3-D twin of {where}: unknown {kind}")
        if isinstance(layer, nn.Conv3d):
            # A kernel is repeated k times and divided by k, or activations would grow.
            depth = layer.kernel_size[0]
            weight = torch.stack([layer.weight.data / depth] * depth, 2)
            layer.weight = nn.Parameter(weight)  # (O, I, k, k) -> (O, I, k, k, k)
    return twin

def create_backbone(name, **arguments):
    """A timm network by its plain name, with random weights: nothing is downloaded."""
    if ":" in name:  # hf-hub:... would be downloaded
        raise UserError("no plain name")
    import timm  # here, as it takes 0.2 GB that only networks need
    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except TypeError:  # some have no drop_path_rate; one of 0 need not be given
        if arguments.pop("drop_path_rate", True):
            raise
        return create_backbone(name, **arguments)

class ConvBlock(nn.Module):
    """Convolution, norm, ReLU, then scSE attention (Roy et al. 2018)."""
    def __init__(self, channels, width):
        super().__init__()
        self.conv = nn.Conv3d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(width)
        self.squeeze = nn.Conv3d(width, width // 4, 1)
        self.excite = nn.Conv3d(width // 4, width, 1)
        self.place = nn.Conv3d(width, 1, 1)

    def forward(self, x):
        """(B, channels, Z, Y, X) -> (B, width, Z, Y, X)."""
        x = F.relu(self.norm(self.conv(x)))
        mean = x.mean((2, 3, 4), keepdim=True)  # (B, width, 1, 1, 1)
        squeezed = F.relu(self.squeeze(mean))
        channel = self.excite(squeezed).sigmoid()
        return x * (channel + self.place(x).sigmoid())

class Segmenter(nn.Module):
    """A 3-D U-Net. `size` and `window` (level, width) are those of the input it expects."""
    def __init__(
            self, backbone="tf_efficientnetv2_s", size=CUBE, window=SEGMENTER_WINDOW,
            drop_path=0, dropout=0, **_):  # a recipe's other fields
        super().__init__()
        self.settings = dict(backbone=backbone, size=size, window=window)
        flat = create_backbone(backbone, features_only=True, out_indices=(0, 1, 2, 3),
                               in_chans=1, drop_path_rate=drop_path)
        if flat.feature_info.reduction() != [2, 4, 8, 16]:
            raise UserError("no features at strides 2, 4, 8 and 16")
        if hasattr(flat, "blocks"):  # unused layers after the last feature, of stride 32
            last_block = flat.feature_info.module_name()[-1].split(".")[1]
            del flat.blocks[int(last_block) + 1 :]
        self.encoder = to_3d(flat)

        first, second, third, last = flat.feature_info.channels()
        self.decoder = nn.ModuleList([
            ConvBlock(last + third, 64),
            ConvBlock(64 + second, 32),
            ConvBlock(32 + first + 8, 48)])
        self.dropout = nn.Dropout3d(dropout)
        self.head = nn.Conv3d(48, 7 * 8, 1)  # each voxel predicts its 2 x 2 x 2 cells
        nn.init.constant_(self.head.bias, -4)  # most cells are background

    def forward(self, x):
        """(B, 1, Z, Y, X) in 0..1, multiples of 16 -> (B, 7, Z, Y, X) logits of C1..C7."""
        if any(length % 16 for length in x.shape[2:]):
            raise UserError(f"cube {[*x.shape[2:]]}: must be multiples of 16")
        x = (x - 0.5) * 4  # -2..2
        cells = x[:, 0]  # space to depth: the last skip keeps the full resolution
        for axis in (1, 2, 3):
            cells = cells.unfold(axis, 2, 2)  # after three: (B, Z/2, Y/2, X/2, 2, 2, 2)
        cells = cells.flatten(4).movedim(-1, 1)  # (B, 8, Z/2, Y/2, X/2)
        *skips, x = self.encoder(x)
        skips[0] = torch.cat([skips[0], cells], 1)  # (B, C + 8, Z/2, Y/2, X/2)
        for block in self.decoder:
            skip = skips.pop()
            x = F.interpolate(x, skip.shape[2:])
            x = block(torch.cat([x, skip], 1))
        x = self.head(self.dropout(x))  # (B, 7 * 8, Z/2, Y/2, X/2)
        x = x.unflatten(1, (-1, 2, 2, 2))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, 7, Z/2, 2, Y/2, 2, X/2, 2)
        return x.flatten(6).flatten(4, 5).flatten(2, 3)

def segmenter_loss(logits, labels):
    """BCE and Dice: logits (B, 7, Z, Y, X), uint8 labels (B, Z, Y, X), 1-7 = C1-C7.
    Dice counts only vertebrae in view; BCE, a mean of mostly background, weighs tenfold."""
    space = (2, 3, 4)
    logits = logits.float()
    truth = torch.stack([labels == v for v in range(1, 8)], 1).float()
    mask = logits.sigmoid()
    seen = truth.amax(space)  # (B, 7)
    both = (mask * truth).sum(space)
    dice = (2 * both + 1) / ((mask + truth).sum(space) + 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth)
    return 10 * entropy + 1 - (dice * seen).sum() / seen.sum().clamp(min=1)

def vertebra_box(probability, gap=STRAY_GAP):
    """(3, 2) first and last cell per axis of a probability (D, D, D); None if not seen."""
    for threshold in MASK_THRESHOLDS:
        mask = probability > threshold
        if mask.sum() >= LEAST_CELLS:
            profiles = [mask.sum(others) for others in ((1, 2), (0, 2), (0, 1))]
            return np.array([fullest_run(profile, gap) for profile in profiles])
    return None

def fullest_run(profile, gap):
    """First and last plane of the run, with no gap wider than `gap`, of most cells."""
    inside = np.flatnonzero(profile > STRAY_SHARE * profile.max())
    parts = parts_of(inside, inside, gap)
    fullest = max(parts, key=lambda part: profile[part].sum())
    return fullest[[0, -1]]

def mean_probability(models, volume, device):
    """float32 (7, D, D, D) on the CPU: the mean of the segmenters' answers.
    D is the first model's size; models of another size get their own input."""
    size = models[0].settings["size"]
    cube_of = functools.cache(functools.partial(segmenter_input, volume))
    total = torch.zeros((7, *[size] * 3), device=device)
    count = torch.zeros_like(total, dtype=torch.uint8)
    with autocast(device):
        for model in models:
            cube = cube_of(model.settings["size"], tuple(model.settings["window"]))
            logits = finite_answer(model.to(device), cube[None].to(device)).float()
            if len(cube[0]) != size:
                logits = F.interpolate(logits, (size,) * 3, mode="trilinear")
            count += ~logits[0].isnan()  # a NaN is left out of the mean
            total += logits[0].sigmoid().nan_to_num()
    return (total / count.clamp(min=1)).cpu()

def neck_part(probability, shape):
    """(low, high), voxels (3,) each: the part of the study with the neck and a margin;
    None if no neck is seen, if the study's first or last slice cuts it (a closer look
    misnames it more often), or if it is so large that the cube's cells are fine enough."""
    cells = probability.shape[-1]
    box = vertebra_box(probability.amax(0).numpy(), gap=cells)
    if box is None or not 0 < box[0, 0] < box[0, 1] < cells - 1:
        return None
    shape = np.array(shape)
    reach = np.ptp(box, 1) * LOOK_AROUND
    corners = (box.T + [-reach, reach]) * shape / cells
    corners = corners.clip(0, shape - 1).astype(int)
    low, high = corners + [[0], [1]]
    return (low, high) if min((high - low) / shape) < LOOK_CLOSER else None

def place_back(part, low, high, shape):
    """The probability (7, D, D, D) over a whole study of `shape`, from that of a `part`
    of it, its voxels from `low` to `high` (z, y, x each). It is 0 elsewhere."""
    size = high - low
    scale = np.divide(shape, size)
    shift = np.subtract(shape, low + high) / size
    matrix = np.c_[np.diag(scale[::-1]), shift[::-1]]  # affine_grid: x y z, from -1 to 1
    theta = torch.tensor(matrix[None]).float()
    part = part[None]
    grid = F.affine_grid(theta, part.shape, align_corners=False)
    return F.grid_sample(part, grid, align_corners=False)[0]  # 0 outside

@torch.inference_mode()
def segment(models, volume, device, report=print):
    """float32 (7, D, D, D): probability of C1..C7 in the cells of a cube over the study.
    The mean of the models; masks in the wrong order are renamed or emptied (in_order). If
    the neck is a small part of the study, it is also segmented by itself, and both results
    are averaged: each sees what the other misses. report(text) is called with oddities."""
    probability = mean_probability(models, volume, device)
    if part := neck_part(probability, volume.hu.shape):
        low, high = part
        neck = volume._replace(hu=volume.hu[tuple(map(slice, low, high))])
        inner = in_order(mean_probability(models, neck, device).numpy(), report)
        inner = place_back(torch.from_numpy(inner), low, high, volume.hu.shape)
        probability = (probability + inner) / 2
    return in_order(probability.numpy(), report)

def in_order(probability, report=print):
    """The probability (7, D, D, D), changed in place so that C1..C7 lie head to foot.
    Two neighbours in the wrong order swap names if they are of similar mass and lie apart;
    else the fainter one is emptied. report(text) is called for each pair."""
    weight = (probability * (probability > LABEL_THRESHOLD)).sum((2, 3))  # (7, D)
    mass = weight.sum(1)
    centre = weight @ np.arange(weight.shape[1]) / np.maximum(mass, 1)
    seen = [v for v in range(7) if mass[v] > LEAST_CELLS]
    while wrong := [[a, b] for a, b in zip(seen, seen[1:]) if centre[a] >= centre[b]]:
        pair = wrong[0]
        report(f"{VERTEBRAE[pair[0]]} and {VERTEBRAE[pair[1]]} out of order")
        faint = min(pair, key=lambda v: mass[v])
        alike = 2 * mass[faint] > mass[pair].max()
        if alike and np.ptp(centre[pair]) > APART_CELLS:
            for values in (probability, centre, mass):
                values[pair] = values[pair[::-1]]
        else:
            seen.remove(faint)
            probability[faint] = 0
    return probability


# ==== Slices ====
# In: a Volume, the probability of its vertebrae. Out: the ninety images of each vertebra.
# Pitfall: the cube is stretched by another factor on each axis; a crop is square in mm.

def apply_window(hu, window):
    """uint8: the lower end of the window (level, width) in HU becomes 0, the upper 255."""
    level, width = window
    low = level - width // 2
    scale = 255 / width
    return cv2.convertScaleAbs(np.maximum(hu, low), alpha=scale, beta=-low * scale)

def crop_plane(plane, box, size):
    """(S, S) cut out of a plane (Y, X), whose border repeats outside it. `box` (2, 2) holds
    the corner and the step between pixels, as (y, x) shares of the plane."""
    corner, step = box * plane.shape
    y, x = corner + (step - 1) / 2  # of the first pixel's centre
    source = np.array([[step[1], 0, x], [0, step[0], y]])  # OpenCV: x first
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    border = cv2.BORDER_REPLICATE
    return cv2.warpAffine(plane, source, (size, size), flags=how, borderMode=border)

def crop_box(volume, extent, edge, size):
    """crop_plane's `box` for a mask. `extent` (2, 2) is its first and last cell along Y and
    X, of `edge` cells. The crop is square in mm, with BOX_MARGIN cells around the mask."""
    plane_mm = np.multiply(volume.hu.shape, volume.spacing)[1:]  # (y, x)
    beyond = [[-BOX_MARGIN], [1 + BOX_MARGIN]]
    low_mm, high_mm = (extent.T + beyond) * plane_mm / edge
    side_mm = (high_mm - low_mm).max()
    corner_mm = (low_mm + high_mm - side_mm) / 2
    step_mm = np.full(2, side_mm / size)
    return np.array([corner_mm, step_mm]) / plane_mm

def slice_indices(extent, z_margin, edge, count):
    """(15, 5): the native slices of each step, of `count`; a border slice repeats. Step
    centres are evenly spaced over the slices that a vertebra covers: its first to last
    cell (`extent`) of the `edge` cells along Z, and `z_margin` cells beyond both."""
    first = max(extent[0] - z_margin, 0) * count / edge
    last = min(extent[1] + z_margin + 1, edge) * count / edge - 1
    last = max(first, last)  # a cell may be thinner than a slice
    places = np.linspace(first, last, STEPS)
    centres = np.rint(places).astype(int)
    neighbours = np.arange(SLICES_PER_STEP) - SLICES_PER_STEP // 2
    return (centres[:, None] + neighbours).clip(0, count - 1)

def mask_at(cells, z, count):
    """(D, D): a mask (D, D, D) at native slice z, between two planes of cells."""
    edge = len(cells)
    at = np.clip((z + 0.5) * edge / count - 0.5, 0, edge - 1.001)  # below + 1 exists
    below = int(at)
    share = np.float32(at % 1)
    return cells[below] * (1 - share) + cells[below + 1] * share

def interleave(images, masks):
    """(75, S, S), (15, S, S) -> (15, 6, S, S): images 5i .. 5i + 4, then mask i."""
    steps = images.reshape(STEPS, -1, *masks.shape[1:])  # (75, S, S) -> (15, 5, S, S)
    return np.concatenate([steps, masks[:, None]], 1)

def vertebra_slices(volume, probability, size=CROP, mask_of="last", z_margin=BOX_MARGIN):
    """The ninety images of every vertebra: uint8 (7, 15, 6, S, S), a mask after 5 slices.
    `probability` (7, D, D, D) covers the whole study. `mask_of` says which slice of a step
    its mask belongs to, the "last" or the "center". Steps cover the vertebra's mask and
    `z_margin` cells above and below it; slices are in BONE_WINDOW. A vertebra that is not
    seen is all 0; the mask of one that is seen has no 0."""
    count = len(volume.hu)
    out = np.zeros((7, STEPS, CHANNELS, size, size), np.uint8)
    for v, cells in enumerate(probability):
        extent = vertebra_box(cells)
        if extent is None:
            continue
        box = crop_box(volume, extent[1:], len(cells), size)
        index = slice_indices(extent[0], z_margin, len(cells), count)  # (15, 5)
        shown, which = np.unique(index, return_inverse=True)  # steps share slices
        grey = [apply_window(volume.hu[z], BONE_WINDOW) for z in shown]
        images = np.array([crop_plane(plane, box, size) for plane in grey])
        planes = [mask_at(cells, z, count) for z in index[:, MASKED_SLICES[mask_of]]]
        masks = np.array([crop_plane(plane, box, size) for plane in planes])
        masks = np.rint(masks * 255).clip(1)  # as 0 means: not seen
        out[v] = interleave(images[which.ravel()], masks)  # 75 slices, 15 masks
    return out


# ==== Classifiers ====
# In: the ninety images of vertebrae. Out: the logit of a fracture for every step.
# Pitfall: a vertebra that is not seen is all 0: it is neither computed nor answered.

def logit_head(width, hidden, dropout):
    """(..., width) -> (..., 1). Its LayerNorm is an InstanceNorm with a learned scale."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(0.1),
        nn.Dropout(dropout), nn.Linear(hidden, 1))

class StepEncoder(nn.Module):
    """Turns crops into features; a classifier's `answer` runs its LSTM over the steps."""
    def __init__(self, backbone, hidden, drop_path, dropout, checkpoint):
        super().__init__()
        self.backbone = create_backbone(backbone, in_chans=CHANNELS, num_classes=0,
                                        global_pool="avg", drop_path_rate=drop_path)
        probe = torch.zeros(1, CHANNELS, 64, 64)  # fails if the image size is fixed
        width = self.backbone.eval()(probe).shape[1]
        if checkpoint:  # the blocks run again in the backward pass
            self.backbone.set_grad_checkpointing()
        self.absent = nn.Parameter(torch.zeros(width))  # features of a step not in view
        self.lstm = nn.LSTM(
            width, hidden, 2, batch_first=True, dropout=dropout, bidirectional=True)

    def forward(self, crops):
        """(B, N, 6, S, S), uint8 or 0..1 -> (B, N, F) features of the steps."""
        seen = crops[:, :, -1].amax((2, 3)).flatten() > 0  # (B * N,); a seen mask: no 0
        features = self.absent.repeat(len(seen), 1)
        if seen.any():
            shown = crops.flatten(0, 1)[seen]  # (B, N, ...) -> (steps seen, ...)
            features[seen] = self.encode(shown).float()
        return features.unflatten(0, crops.shape[:2])

    def encode(self, shown):
        """(N, 6, S, S) -> (N, F), in parts that fit the GPU's memory or the CPU's cache."""
        scale = 2 if shown.is_floating_point() else 2 / 255

        def features(part):
            part = part.to(memory_format=torch.channels_last)
            return self.backbone(part * scale - 1)

        if self.training:
            return features(shown)
        if shown.device.type != "cpu":
            with suppress(torch.OutOfMemoryError):  # then in smaller parts, as on a CPU
                return torch.cat([*map(features, shown.split(CROPS_ON_GPU))])
        return torch.cat([*map(features, shown.split(CROPS_ON_CPU))])

class VertebraClassifier(nn.Module):
    """(B, 15, 6, S, S), uint8 or 0..1 -> (B, 15) logits: a fracture of this vertebra.
    `size`, `mask_of`, `z_margin` (0: an older file) are those of the crops it has seen."""
    def __init__(
            self, backbone="tf_efficientnetv2_s", size=CROP, mask_of="last", z_margin=0.0,
            hidden=256, drop_path=0, dropout=0, checkpoint=False, **_):  # see Segmenter
        super().__init__()
        self.settings = dict(
            backbone=backbone, size=size, mask_of=mask_of, hidden=hidden, z_margin=z_margin)
        self.encoder = StepEncoder(backbone, hidden, drop_path, dropout, checkpoint)
        self.head = logit_head(2 * hidden, hidden, dropout)

    def forward(self, crops):
        features = self.encoder(crops)
        with torch.autocast(crops.device.type, enabled=False):  # half would lose digits
            return self.answer(features)

    def answer(self, features):
        """(B, N, F) features -> (B, N) logits."""
        steps, _ = self.encoder.lstm(features)  # (B, N, 2 * hidden)
        return self.head(steps)[..., 0]

class PatientClassifier(VertebraClassifier):
    """(B, 105, 6, S, S) -> (B, 105) logits of the steps of C1..C7, (B,) of the patient."""
    def __init__(self, backbone="convnext_nano", hidden=256, dropout=0, **others):
        others |= dict(hidden=hidden, dropout=dropout)
        super().__init__(backbone, **others)
        self.patient_lstm = copy.deepcopy(self.encoder.lstm)
        self.patient_head = logit_head(4 * hidden, hidden, dropout)

    def answer(self, features):
        """(B, N, F) features -> (B, N) and (B,) logits."""
        steps, _ = self.patient_lstm(features)  # (B, N, 2 * hidden)
        both = torch.cat([steps.amax(1), steps.mean(1)], 1)  # (B, 4 * hidden)
        logits = super().answer(features)
        return logits, self.patient_head(both)[..., 0]

def classifier_loss(outputs, labels):
    """Log loss with the competition's weights; each step has the label of its vertebra.
    The sum is divided by the batch size and TARGET_WEIGHTS, not by the labels' weights.
    `outputs` are a classifier's: (B, N) logits with labels (B, 1), or ((B, N), (B,)) with
    labels (B, 8). A NaN label is unknown and ignored."""
    targets = labels.shape[1]
    patient = isinstance(outputs, tuple)
    logits = torch.column_stack(outputs) if patient else outputs  # (B, N + 1) or (B, N)
    steps = logits.shape[1] // min(7, targets)  # per vertebra
    which = np.arange(logits.shape[1]) // steps  # the target of each logit
    share = TARGET_WEIGHTS[which] / np.bincount(which)[which]  # a target's steps share it
    truth = labels[:, which]  # (B, targets) -> the shape of logits
    weight = torch.where(truth > 0, POSITIVE_FACTOR, 1.0) * labels.new_tensor(share)
    loss = F.binary_cross_entropy_with_logits(
        logits, truth.nan_to_num(), weight * ~truth.isnan(), reduction="sum")
    return loss / len(labels) / TARGET_WEIGHTS[:targets].sum()

class Output(NamedTuple):
    """One model's answer to a study; NaN: not in view, or a target it does not answer."""
    steps: Any  # (7, T) probability of a fracture
    patient: float  # probability of patient_overall
    name: str = ""  # of the model's files, before _fold: its folds share it

class Calibration(NamedTuple):
    """How outputs are blended, and the logits of the eight targets scaled and shifted."""
    scale: Any = (1.0,) * 8
    shift: Any = (0.0,) * 8
    unseen: Any = PRIOR  # the answer of a target that is not in view
    answers: Answers = Answers()
    weights: dict = {}  # {model name: its weight in the blend}; else 1
    trained_on: str = "unknown"  # the models' training data, in words

class Ensemble(NamedTuple):
    """The models that answer a study, and how their outputs become answers."""
    models: dict  # {kind: [model of a fold, ...]}
    device: torch.device
    calibration: Calibration = Calibration()
    on_cpu: Any = None  # its copy on the CPU, for when the device fails

@torch.inference_mode()
def classify(ensemble, crops, folds=None):
    """[Output], T = 15, of the first `folds` models of each kind, or of all.
    `crops` is uint8 (7, 15, 6, S, S). A vertebra that is not seen is NaN in `steps`;
    `patient` is NaN from a vertebra classifier, which has no such answer. Model i sees
    dihedral view i mod 8 (first place), so that their errors differ."""
    absent = ~crops.any((1, 2, 3, 4))
    vertebra, patient = (ensemble.models[kind][:folds] for kind in ("vertebra", "patient"))
    crops = torch.from_numpy(crops).to(ensemble.device)
    outputs = []

    @functools.cache  # most models share one size
    def resized(size):
        if size == crops.shape[-1]:
            return crops
        parts = (F.interpolate(part.float(), size, mode="bilinear") for part in crops)
        return torch.stack([part.round().byte() for part in parts])  # bytes save memory

    for k, model in enumerate(vertebra + patient):
        shown = resized(model.settings["size"])
        shown = torch.rot90(shown.flip(-1) if k & 4 else shown, k, (-2, -1))
        model.to(ensemble.device)
        overall = torch.tensor(math.nan)
        with autocast(ensemble.device):
            if k < len(vertebra):
                logits = finite_answer(model, shown)  # (7, 15, 6, S, S) -> (7, 15)
            else:
                flat = shown.flatten(0, 1)[None]  # (1, 105, 6, S, S)
                logits, overall = finite_answer(model, flat)
        steps = logits.sigmoid().view(7, STEPS).cpu().numpy()
        steps[absent] = np.nan
        name = model.settings.get("name", "")
        outputs.append(Output(steps, float(overall.sigmoid()), name))
    return outputs


# ==== Answers ====
# In: the outputs of all models. Out: eight probabilities, calibrated if there is a fit.
# Pitfall: positives weigh double, so the best answer lies above the true probability.

def vertebra_answers(steps, top_k):
    """(..., 7): the mean of the `top_k` largest of each vertebra's `steps` (..., 7, T)."""
    return np.sort(steps)[..., -top_k:].mean(-1)

def mean_logits(studies, calibration):
    """(N, 8): the mean logits of each study's outputs; NaN where no model answers.
    Each model name has its weight, by default 1, which its models (the folds) share."""
    mean = np.zeros((len(studies), 8))
    for row, outputs in zip(mean, studies):
        steps, patient, names = zip(*outputs)
        vertebrae = vertebra_answers(steps, calibration.answers.top_k)  # (M, 7)
        probability = np.column_stack([vertebrae, patient])  # (M, 8)
        share = [calibration.weights.get(name, 1) / names.count(name) for name in names]
        share = np.array(share)[:, None] * ~np.isnan(probability)
        logits = logits_of(probability)
        with np.errstate(invalid="ignore"):
            row[:] = (np.nan_to_num(logits) * share).sum(0) / share.sum(0)
    return mean

def logits_of(answers):
    """The logits of answers, which are first clipped to LEAST_ANSWER..1 - LEAST_ANSWER."""
    return torch.tensor(answers).logit(LEAST_ANSWER).numpy()

def calibrated(raw, calibration):
    """(N, 8) probabilities of mean logits (N, 8).
    The patient's answer blends its own and the vertebrae's noisy-or, P(at least one).
    Targets not in view get calibration.unseen; so does the patient if no vertebra is."""
    scale, shift, unseen = map(torch.tensor, calibration[:3])
    logits = torch.tensor(raw) * scale + shift
    intact = 1 - logits[:, :7].sigmoid()
    either = 1 - intact.nan_to_num(1).prod(1)  # not in view counts as intact
    either[intact.isnan().all(1)] = math.nan  # no vertebra in view: no answer
    own = torch.tensor(raw[:, 7]).sigmoid()
    own = torch.where(own.isnan(), either, own)  # without a patient classifier
    share = calibration.answers.noisy_or
    patient = share * either + (1 - share) * own
    logits[:, 7] = patient.logit(LEAST_ANSWER) * scale[7] + shift[7]

    answers = logits.sigmoid()
    answers = torch.where(answers.isnan(), unseen, answers)
    return answers.clamp(LEAST_ANSWER, 1 - LEAST_ANSWER).numpy()

def combine(outputs, calibration=Calibration()):
    """(8,) probabilities of classify's outputs: the mean logits, calibrated."""
    return calibrated(mean_logits([outputs], calibration), calibration)[0]


# ==== Prediction ====
# In: studies and an Ensemble. Out: submission.csv, and a report of every study beside it.
# Pitfall: a run may be killed at any moment; a complete submission is always on disk.

class Submission(NamedTuple):
    """The rows to be answered, and where the answers go."""
    out: Path
    rows: list  # (row_id, uid, target)
    made_by: str = ""  # hash of models and options; answers of another hash do not count

def rows_asked(path):
    """[(row_id, uid, target)] of test.csv, each row once."""
    columns = ["row_id", STUDY, "prediction_type"]
    table = read_csv(path, columns).astype(object).fillna("").astype(str)
    table = table.drop_duplicates("row_id")
    target = table.row_id.str.extract(f"_({'|'.join(TARGETS)})$")[0]
    target = target.fillna(table.prediction_type.str.strip())
    odd = target[~target.isin(TARGETS)]
    if len(odd):
        say_once(f"{path}: rows that ask for {odd.iloc[0]!r}, answered 0.5: {len(odd)}")
    return [*zip(table.row_id, table[STUDY], target)]

def strongest_steps(volume, probability, outputs, z_margin):
    """{C1: values} of each vertebra in view: where its most suspicious step lies.
    `slice` counts from 1 at the head; `lps_mm` is the centre of the crop in that slice;
    `steps` are the probabilities of all 15, the mean of the models that answer."""
    steps = torch.tensor(np.array([one.steps for one in outputs])).nanmean(0)  # (7, 15)
    steps = steps.nan_to_num()  # argmax would take NaN for the largest
    places = {}
    for name, cells, chances in zip(VERTEBRAE, probability, steps):
        found = vertebra_box(cells)
        if found is None:
            continue
        index = slice_indices(found[0], z_margin, len(cells), len(volume.hu))
        z = int(index[chances.argmax(), SLICES_PER_STEP // 2])
        _, y, x = (found.sum(1) + 1) / 2 / len(cells) * volume.hu.shape - 0.5
        file, uid = volume.sources[z] if volume.sources else ("", "")
        place = (volume.affine @ [z, y, x, 1])[:3].tolist()
        places[name] = dict(slice=z + 1, file=file, sop_instance_uid=uid, lps_mm=place,
                            steps=chances.tolist())
    return places

def as_columns(places):
    """{C1_slice: 57, ...} from {C1: {slice: 57, ...}, ...}; a list becomes one string."""
    columns = {}
    for name, values in places.items():
        for key, value in values.items():
            if isinstance(value, list):
                value = " ".join(f"{number:.4g}" for number in value)
            columns[f"{name}_{key}"] = value
    return columns

def crops_wanted(ensemble):
    """vertebra_slices' arguments for crops like those the classifiers were trained on."""
    classifiers = ensemble.models["vertebra"] + ensemble.models["patient"]
    wanted = {name: classifiers[0].settings[name] for name in ("mask_of", "z_margin")}
    sizes = [model.settings["size"] for model in classifiers]
    return wanted | dict(size=max(CROP, *sizes))  # classify shrinks them for the others

def answer_study(volume, read_s, ensemble, folds):
    """(row of the report, strongest_steps, segment's probability) of a study.
    The row: answers, what was seen, seconds of each stage. StudyError: no finite answer."""
    problems = [not_in_hu(volume.hu), *volume.problems[::-1]]  # reasons first, then files
    start = monotonic()
    segmenters = ensemble.models["segmenter"][:folds]
    probability = segment(segmenters, volume, ensemble.device, problems.append)
    segmented = monotonic()
    wanted = crops_wanted(ensemble)
    crops = vertebra_slices(volume, probability, **wanted)
    cropped = monotonic()
    outputs = classify(ensemble, crops, folds)
    seen = crops.any((1, 2, 3, 4))
    lost = np.array([np.isnan(one.steps[seen]).any(1) for one in outputs])  # (M, seen)
    if lost.size and lost.all():
        raise StudyError("no classifier gives a finite answer")
    failed = {one.name for one, some in zip(outputs, lost) if some.any()}
    problems += [f"no finite answer by {name}, left out there" for name in sorted(failed)]
    answers = combine(outputs, ensemble.calibration)
    classified = monotonic()

    places = strongest_steps(volume, probability, outputs, wanted["z_margin"])
    status = "ok" if len(places) == 7 else "partial" if places else "nothing seen"
    row = dict(zip(TARGETS, answers), status=status, slices=len(volume.hu))
    row |= dict(seen="+".join(places), read_s=read_s, segment_s=segmented - start)
    row |= dict(crops_s=cropped - segmented, classify_s=classified - cropped)
    row |= dict(device=ensemble.device, warnings="; ".join(filter(None, problems)))
    return row, places, probability

def answer_somewhere(volume, read_s, ensemble, folds=None):
    """What answer_study gives; computed on the CPU if the device fails."""
    try:
        return answer_study(volume, read_s, ensemble, folds)
    except RuntimeError as error:  # a lack of memory, or a fault of the device
        if not ensemble.on_cpu:
            raise
        say(f"study {volume.uid}: {ensemble.device}: {error!r:.200}; done on the CPU")
        return answer_study(volume, read_s, ensemble.on_cpu, folds)

def read_in_time(future, seconds, where=""):
    """The result of reading a study; StudyError after `seconds`, as a file may hang."""
    if not wait([future], seconds).done:
        raise StudyError(f"{where}reading it took over {seconds:.0f} s")
    return future.result()

def answer_or_prior(uid, future, ensemble, folds, seconds):
    """The report's row on the study that `future` reads; if it fails, the prior and why."""
    try:
        volume, read_s = read_in_time(future, seconds)
        row, places, _ = answer_somewhere(volume, read_s, ensemble, folds)
        if not places:
            say(f"study {uid}: nothing seen; answered with the prior")
        return row | as_columns(places)
    except Exception as error:  # damaged data raises nearly every kind
        reason = in_words(error)
        say(f"study {uid}: {reason}; answered with the prior")
        return dict(PRIOR_ANSWERS, status="failed", warnings=reason)

def tried_on_device(ensemble):
    """The Ensemble after a trial on its device; its CPU copy if the trial fails."""
    if not ensemble.on_cpu:
        return ensemble
    try:
        volume = Volume("", np.zeros((16, 16, 16), np.int16), (1, 1, 1), np.eye(4))
        segment(ensemble.models["segmenter"][:1], volume, ensemble.device, str)
        classify(ensemble, np.ones((7, STEPS, CHANNELS, 32, 32), np.uint8), 1)
        return ensemble
    except RuntimeError as error:
        say(f"{ensemble.device} runs no model ({error!r:.200}): going on with the CPU")
        return ensemble.on_cpu

def report_paths(out):
    """{rank: report} of all processes that have written one beside the submission."""
    paths = {k: out.with_name(f"predict_report{k or ''}.csv") for k in range(99)}
    return {k: path for k, path in paths.items() if path.exists()}

def read_reports(submission):
    """{uid: row} of the studies that are answered, by any process of this run."""
    rows = {}
    for path in report_paths(submission.out).values():
        try:
            table = read_csv(path, (STUDY, "status", *TARGETS))
        except UserError:
            if path.exists():
                raise
            continue  # another process has just deleted it, to begin anew
        failed = table.status.isin(("failed", "no time"))
        answered = table[~failed & (table.get("made_by", "") == submission.made_by)]
        rows |= {row[STUDY]: row for row in answered.to_dict("records")}
    return rows

def write_submission(submission, reports=()):
    """Write this process's report, and every row asked for: an answer, or the prior."""
    if reports:
        table = pd.DataFrame(reports).assign(made_by=submission.made_by)
        write_csv(submission.out.parent / f"predict_report{ranks()[0] or ''}.csv", table)
    answers = read_reports(submission)
    values = [(row_id, answers.get(uid, PRIOR_ANSWERS).get(target, 0.5))
              for row_id, uid, target in submission.rows]
    write_csv(submission.out, pd.DataFrame(values, columns=["row_id", "fractured"]))
    if len(read_reports(submission)) > len(answers):  # another process reported meanwhile
        write_submission(submission)

def predict_studies(images, submission, ensemble, stop, workers, resume=False):
    """Answer this process's share of the studies; everything is written after each of them.
    When time gets short, fewer folds answer; when it runs out, the prior does."""
    rank, world = ranks()
    done = read_reports(submission) if resume else {}
    if resume:
        say(f"--resume: {len(done)} studies have answers by these models and options")
    uids = [*dict.fromkeys(uid for _, uid, _ in submission.rows)]
    todo = [uid for uid in uids[rank::world] if uid not in done]
    reports = [*done.values()]
    all_folds = max(map(len, ensemble.models.values()))
    fold_s = 1e-9  # s that a fold needs for a study; not known yet

    def read(uid):
        start = stop.clock()
        until = start + min(MAX_READ_S, stop.left() / 4)
        if uid in ("", "..") or Path(uid).name != uid:  # stay in `images`
            raise StudyError(f"{uid!r}: not a folder's name")
        volume = read_volume(images / uid, workers, lambda: stop.clock() > until)
        return volume, stop.clock() - start

    studies = prefetch(read, todo, READING_THREADS)
    for k, (uid, future) in enumerate(progress(studies, "study", len(todo))):
        start, left = stop.clock(), stop.left()
        if fold_s > left:
            say(f"time is short: {len(todo) - k} studies get the prior")
            blank = dict(PRIOR_ANSWERS, status="no time")
            reports += [{STUDY: uid, **blank} for uid in todo[k:]]
            return write_submission(submission, reports)
        folds = all_folds
        while folds > max(left / (len(todo) - k) / fold_s, 1):
            folds //= 2
        if folds != all_folds:
            say(f"study {uid}: time is short, {folds} of {all_folds} folds")
        row = answer_or_prior(uid, future, ensemble, folds, min(MAX_READ_S, left / 4))
        reports.append({STUDY: uid, **row, "peak_gb": peak_gb()})
        write_submission(submission, reports)
        if stop.signal:
            raise Stopped(f"stopped by {stop.signal}; {submission.out} is complete, "
                          "--resume goes on", 130)
        fold_s = max((stop.clock() - start) / folds, 0.8 * fold_s)  # falls slowly


# ==== One's own study ====
# In: paths of CTs, an Ensemble. Out: answers.csv, masks, and where to look.
# Pitfall: what is not in view is answered with the prior, too; here it stays empty.

SLAB_MM = 3.0  # mm to either side of a vertebra's middle, where its canal is open
BODY_MM = 30.0  # mm; a deeper part of a mask is no vertebral body alone
LEAST_CM3 = 1.0  # cm3; a smaller mask is not a vertebra (C1, the smallest, has several)
LEAST_ROWS = 5  # voxels from front to back of a body, to fit a line to
ENDPLATE = (0.2, 0.8)  # shares of a body's depth between which its endplate is straight

def studies_in(path, left_out=()):
    """The studies of a path: itself, or those of a folder of folders and NIfTI files.
    Skips hidden files, the folders in `left_out`, and links to a folder above."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    above = {*left_out, path.resolve()}
    inside = sorted(path.iterdir()) if path.is_dir() else []
    inside = [one for one in inside if one.name[0] != "." and one.name != "__MACOSX"]
    inner = [one for one in inside if one.is_dir() or is_nifti(one)]
    others = [one for one in inside if one not in inner and one.is_file()]
    inner = [one for one in inner if one.resolve() not in above]
    nothing = not inner and (others or not inside)
    if nothing or sum(map(begins_as_dicom, others)) >= LEAST_SLICES:
        return [path]
    if others:
        say(f"{path}: a folder of studies; other files in it, left out: {len(others)}")
    found = []
    for one in inner:
        try:
            found += studies_in(one, above)
        except OSError as error:  # such as lost+found
            say(f"{one}: {error.strerror}; left out")
    return found

def named_studies(paths, left_out=()):
    """{name: path} of all studies. A name is the last parts of a path that are unique.
    Nothing inside the folders in `left_out` counts as a study."""
    if "" in paths:
        raise UserError("an empty PATH")
    paths = map(Path, paths)
    paths = [path.resolve() if ".." in path.parts else path.absolute() for path in paths]
    found = [*dict.fromkeys(sum([studies_in(path, left_out) for path in paths], []))]
    if not found:
        raise UserError(f"{paths[0]}: no study there")
    for count in range(1, max(len(path.parts) for path in found)):
        whole = ["_".join(path.parts[1:][-count:]) for path in found]
        short = [re.sub(r"(?i)\.(nii|nii\.gz|dcm)$", "", name) for name in whole]
        for names in (short, whole):
            if len(set(names)) == len(found):
                return dict(zip(names, found))
    raise UserError(f"{found[0]}: two studies of one name")

def largest_piece(mask):
    """The largest part of a mask (Z, Y, X) whose cells touch by their faces."""
    padded = np.pad(mask, 1)  # so that every cell has six neighbours
    _, rows, columns = padded.shape
    steps = (1, -1, columns, -columns, rows * columns, -rows * columns)
    left = set(np.flatnonzero(padded).tolist())
    largest = []
    while len(left) > len(largest):
        piece = [left.pop()]
        for cell in piece:  # a queue: it grows while it is read
            near = {cell + step for step in steps} & left
            left -= near
            piece += near
        largest = max(largest, piece, key=len)
    out = np.zeros(padded.size, bool)
    out[largest] = True
    return out.reshape(padded.shape)[1:-1, 1:-1, 1:-1]

def vertebra_labels(volume, probability):
    """uint8 (Z, Y, X), 1-7 = C1-C7, on the study's grid, of a probability (7, D, D, D).
    A voxel belongs to its most probable vertebra; only the largest piece of each counts."""
    whole = probability.copy()
    for cells in whole:
        inside = cells > LABEL_THRESHOLD
        cells[inside & ~largest_piece(inside)] = 0  # strays
    labels = np.zeros(volume.hu.shape, np.uint8)
    count, rows, columns = labels.shape
    for z, plane in enumerate(labels):
        highest = np.full((rows, columns), LABEL_THRESHOLD, np.float32)
        for v, cells in enumerate(whole, 1):
            chance = mask_at(cells, z, count)
            if chance.max() > LABEL_THRESHOLD:
                chance = cv2.resize(chance, (columns, rows))
                plane[chance > highest] = v
                np.maximum(highest, chance, out=highest)
    return labels

def endplate_angle(voxels, volume):
    """Degrees by which the lower endplate of a vertebral body falls from front to back.
    `voxels` (N, 3) are its mask's. In the midline the body ends where the spinal canal
    begins; None if no canal is found there, or too little of a body."""
    x = voxels[:, 2].mean()
    aside = abs(voxels[:, 2] - x) * volume.spacing[2]
    z, y, _ = voxels[aside < SLAB_MM].T
    rows = np.unique(y)
    body = parts_of(rows, rows, 1)[0]
    if len(body) < LEAST_ROWS or len(body) * volume.spacing[1] > BODY_MM:
        return None
    first, last = np.quantile(body, ENDPLATE)
    plate = body[(body >= first) & (body <= last)]
    ends = [(z[y == row].max(), row, x, 1) for row in plate]
    _, back, up, _ = volume.affine @ np.transpose(ends)
    slope, _ = np.polyfit(back, -up, 1)
    return math.degrees(math.atan(slope))

def measure(labels, volume, places):
    """The C2-C7 Cobb angle in degrees, or None; adds each mask's measures to its `places`.
    `labels` is uint8 (Z, Y, X). Height, depth and width are along the study's axes."""
    voxels = np.argwhere(labels)  # (N, 3)
    which = labels[labels > 0]
    voxel_mm3 = abs(np.linalg.det(volume.affine[:3, :3]))
    ends = {}
    for v, name in enumerate(VERTEBRAE, 1):
        mine = voxels[which == v]
        if len(mine) and name in places:
            height, depth, width = (np.ptp(mine, 0) + 1) * volume.spacing
            centre = (volume.affine @ [*mine.mean(0), 1])[:3].tolist()
            places[name] |= dict(cm3=len(mine) * voxel_mm3 / 1000, height_mm=height,
                                 depth_mm=depth, width_mm=width, centroid_lps_mm=centre)
            ends[name] = endplate_angle(mine, volume)
    upper, lower = ends.get("C2"), ends.get("C7")
    return None if None in (upper, lower) else upper - lower

def answer_own(name, future, ensemble, mask):
    """A study's row of the answers; its mask is written to the file `mask`, if there is
    one. StudyError if no vertebra is seen."""
    volume, read_s = read_in_time(future, MAX_READ_S, f"{name}: ")
    if why := not_in_hu(volume.hu):
        raise StudyError("; ".join([f"{volume.uid}: {why}", *volume.problems]))
    row, places, probability = answer_somewhere(volume, read_s, ensemble)
    labels = vertebra_labels(volume, probability)
    lordosis = measure(labels, volume, places)
    places = {v: one for v, one in places.items() if one.get("cm3", 0) >= LEAST_CM3}
    if not places:
        found = [f"{volume.uid}: no cervical vertebra seen", row["warnings"]]
        raise StudyError("; ".join(filter(None, found)))
    absent = [v for v in VERTEBRAE if v not in places]
    if mask:
        labels[np.isin(labels, [VERTEBRAE.index(v) + 1 for v in absent])] = 0
        write_nifti(mask, labels, volume)
    row |= dict.fromkeys(absent)  # None, not the prior
    row |= dict(status="ok" if len(places) == 7 else "partial", seen="+".join(places))
    return row | dict(lordosis_degrees=lordosis, vertebrae=places)

def write_answers(out, rows, note, with_json):
    """Write answers.csv, a row a study, and answers.json if asked for: the table."""
    lines = [dict(note=note) | row | as_columns(row.get("vertebrae", {})) for row in rows]
    table = pd.DataFrame(lines, dtype=object).drop(columns="vertebrae", errors="ignore")
    write_csv(out / "answers.csv", table)
    if with_json:
        lordosis = "angle between lines fitted to the lower ends of the masks of C2 and C7"
        content = dict(note=note, lordosis=lordosis, studies=rows)
        text = json.dumps(content, indent=1, default=str)
        write_atomic(out / "answers.json", lambda new: new.write_text(text))
    return table

def print_own(table):
    """Print the answers, a line a study, and the slice where each looks worst."""
    shown = table.reindex(columns=["study", "status", "slices", "seen", *TARGETS])
    shown = shown.astype(dict.fromkeys(TARGETS, float) | {"seen": object})
    shown["seen"] = shown.seen.str.replace("+C", " ")
    shown = shown.rename(columns={"patient_overall": "overall"})
    print(shown.to_string(index=False, na_rep="-", float_format="{:.2f}".format))
    for _, row in table[table.status != "failed"].iterrows():
        name = row[[*VERTEBRAE]].astype(float).idxmax()
        file = f", {row[f'{name}_file']}" if row[f"{name}_file"] else ""
        where = f"slice {row[f'{name}_slice']} of {row.slices} from the head{file}"
        print(f"{row.study}: look at {where}: {name}, {row[name]:.2f}")
        if row.warnings:
            say(f"study {row.study}: {row.warnings:.300}")


# ---- The road ends here; what follows makes the weights. ----


# ==== Metric and folds ====
# In: answers and labels. Out: the competition's score, its details, a calibration.
# Pitfall: whatever is fitted to a fold must not be scored on it.

RELIABILITY_BINS = (0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
LEAST_STUDIES = 20  # studies; fewer say nothing about reliability, nor about a blend
RESAMPLES = 1000  # bootstrap samples of the patients
INTERVAL = (2.5, 97.5)  # percentiles of these: a 95 % interval
FITTED_STEPS = (1, 3, 5, 10, 15)  # tried as top_k
FITTED_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # tried as noisy_or
FITTED_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # tried for every model name
LEAST_GAIN = 0.001  # of the score; a smaller gain may be chance and changes nothing
UNSEEN_PULL = 10.0  # studies that the prior counts for, in the rate of unseen vertebrae
CALIBRATION_PULL = 2.0  # towards the identity: a Gaussian of SD 0.5 on log scale, shift
FIT_ROUNDS = 200  # of L-BFGS; five to thirty are usual
LEAST_SLOPE = 1e-4  # of the fit; scale and shift are right to five digits

# The columns of a classifier's held-out answers: every step of C1..C7, and the patient.
STEP_TARGETS = [f"{name}_{step}" for name in VERTEBRAE for step in range(1, STEPS + 1)]
STEP_TARGETS += TARGETS[7:]
TRAINED_ON = "trained_on"  # an extra column if these studies were also trained on

def element_losses(answers, labels):
    """Log loss of each answer, clipped at 1e-15 as the metric's."""
    answers = np.asarray(answers)
    right = np.where(np.asarray(labels) > 0, answers, 1 - answers)
    return -np.log(np.clip(right, 1e-15, 1))

def element_weights(labels):
    """1 for a negative label, POSITIVE_FACTOR for a positive, 0 for an unknown (NaN)."""
    labels = np.asarray(labels, float)
    return np.where(labels > 0, POSITIVE_FACTOR, 1.0) * ~np.isnan(labels)

def study_scores(answers, labels):
    """(N,): the competition's score of each study; NaN where no label is known.
    An element weighs TARGET_WEIGHTS, a positive POSITIVE_FACTOR times that."""
    weight = element_weights(labels) * TARGET_WEIGHTS
    loss = element_losses(answers, labels) * weight
    with np.errstate(invalid="ignore"):
        return loss.sum(1) / weight.sum(1)

def competition_scores(answers, labels):
    """The competition's score of (N, 8) answers, lower is better: (per study, per column).
    The competition's page defines it per study; some scripts average per column instead."""
    weight = element_weights(labels)
    loss = element_losses(answers, labels) * weight
    columns = loss.sum(0) / weight.sum(0).clip(1e-9)
    counts = TARGET_WEIGHTS * weight.any(0)
    column = columns @ counts / (counts.sum() or math.nan)  # NaN: no label is known
    return pd.Series(study_scores(answers, labels)).mean(), column

def interval(scores):
    """(low, high): the 95 % interval of the mean of the studies' scores, by bootstrap."""
    known = scores[~np.isnan(scores)]
    drawn = np.random.default_rng(0).choice(known, (RESAMPLES, len(known)))
    return np.percentile(drawn.mean(1), INTERVAL)

def by_label(answers, labels):
    """(sorted answers of the fractured, of the intact); unknown labels are left out."""
    answers, labels = np.asarray(answers), np.asarray(labels)
    return np.sort(answers[labels == 1]), np.sort(answers[labels == 0])

def auc(answers, labels):
    """Area under the ROC curve: the share of pairs, one fractured and one intact, whose
    answers are in order; ties count half. NaN if all known labels are alike."""
    broken, intact = by_label(answers, labels)
    pairs = len(broken) * len(intact)
    won = np.searchsorted(intact, broken) + np.searchsorted(intact, broken, "right")
    return won.sum() / 2 / pairs if pairs else math.nan

def equal_point(answers, labels):
    """(threshold, sensitivity, specificity) where the latter two differ least.
    The radiology papers' operating point; answers from the threshold on say: fractured."""
    broken, intact = by_label(answers, labels)
    if not len(broken) or not len(intact):
        return (math.nan,) * 3
    thresholds = np.union1d(broken, intact)
    sensitivity = 1 - np.searchsorted(broken, thresholds) / len(broken)
    specificity = np.searchsorted(intact, thresholds) / len(intact)
    best = abs(sensitivity - specificity).argmin()
    return thresholds[best], sensitivity[best], specificity[best]

def dice_scores(probability, labels):
    """(7,) Dice of the masks in a probability (7, D, D, D) with labels (D, D, D);
    NaN where the labels have none."""
    space = (1, 2, 3)
    mask = probability > LABEL_THRESHOLD
    truth = labels == np.arange(1, 8).reshape(7, 1, 1, 1)
    size = truth.sum(space)
    dice = 2 * (mask & truth).sum(space) / (mask.sum(space) + size).clip(1)
    return np.where(size, dice, np.nan)

def named_right(probability, labels):
    """[7 bools]: whether most of each mask (7, D, D, D) lies in its true vertebra."""
    inside = [labels[mask] == v for v, mask in enumerate(probability > LABEL_THRESHOLD, 1)]
    return [cells.size > 0 and cells.mean() > 0.5 for cells in inside]

def assign_folds(table, folds, masked):
    """{uid: fold}: strata of mask, patient, number of fractures; then by the uid's hash."""
    uids = table[STUDY]
    has_mask = uids.isin(masked)
    table = table.fillna(0)  # an unknown label is no stratum of its own
    fractures = table[[*VERTEBRAE]].sum(axis=1)
    hashes = [hashlib.sha256(uid.encode()).digest() for uid in uids]
    strata = zip(has_mask, table.patient_overall, fractures.clip(upper=2), hashes, uids)
    ordered = [uid for *_, uid in sorted(strata)]
    return {uid: k % folds for k, uid in enumerate(ordered)}

def read_truth(path):
    """The labels of a csv, a study a row: 0, 1, or NaN for an empty cell, which is unknown.
    UserError that names the row and the column of anything else."""
    table = read_csv(path, (STUDY, *TARGETS))
    labels = table[[*TARGETS]].apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = table[[*TARGETS]].notna() & ~labels.isin((0, 1))
    wrong[STUDY] = table[STUDY].isna()
    if wrong.any(axis=None):
        row, column = np.argwhere(wrong.to_numpy())[0]
        name = wrong.columns[column]
        expected = "a uid" if name == STUDY else "0, 1 or nothing"
        found = f"row {row + 2}, {name}: {str(table[name][row])!r}"
        raise UserError(f"{path}: {found}; must be {expected}")
    table = pd.concat([table[STUDY], labels], axis=1).drop_duplicates()
    twice = table[STUDY][table[STUDY].duplicated()]
    if len(twice):
        raise UserError(f"{path}: {twice.iloc[0]} stands there twice, with unlike labels")
    return table

def read_labels(data):
    """The known labels (N, 8) by uid: train.csv, and the phantoms' test_labels.csv."""
    paths = [data / name for name in ("train.csv", "test_labels.csv")]
    table = pd.concat(read_truth(path) for path in paths if path.exists())
    labels = table.groupby(STUDY)[[*TARGETS]].first()
    return labels.dropna(how="all")

def read_answers(path):
    """The answers of a submission, a study a row; what is no probability is NaN.
    UserError if a row stands there twice."""
    if not Path(path).exists():
        raise UserError(f"no {path}: run predict first")
    table = read_csv(path, ("row_id", "fractured"))
    table[["uid", "target"]] = table.row_id.str.extract(f"^(.*)_({'|'.join(TARGETS)})$")
    twice = table.row_id[table.row_id.duplicated()].dropna()
    if len(twice):
        raise UserError(f"{path}: {twice.iloc[0]} stands there twice")
    values = pd.to_numeric(table.fractured, "coerce")
    table["fractured"] = values.where(values.between(0, 1))
    wide = table.pivot_table("fractured", "uid", "target").reindex(columns=TARGETS)
    return wide.reindex(table.uid.dropna().unique())

def read_held_out(weights):
    """({uid: outputs as classify's}, {uid: fold}) of the folds' held-out answers."""
    outputs, folds = {}, {}
    for path in sorted(weights.glob("*_heldout.csv")):
        named = re.fullmatch(r"((?:vertebra|patient)\w*)_fold(\d+)_heldout", path.stem)
        if not named:
            continue  # a segmenter's
        name, fold = named[1], int(named[2])
        table = read_csv(path, (STUDY, *STEP_TARGETS)).set_index(STUDY)
        if TRAINED_ON in table:
            say(f"{path}: with --folds 1, of studies that were trained on: no fair score")
        with errors_as(UserError, path):
            rows = table[STEP_TARGETS].to_numpy(float)
            if table.index.has_duplicates or (abs(rows - 0.5) > 0.5).any():
                raise ValueError("a study stands there twice, or one is no probability")
        for uid, row in zip(table.index, rows):
            steps = row[:-1].reshape(7, STEPS)
            outputs.setdefault(uid, []).append(Output(steps, row[-1], name))
            if folds.setdefault(uid, fold) != fold:
                raise UserError(f"{path}: study {uid} is held out by fold {folds[uid]}, "
                                "too: of other --folds; delete what is old")
    if not outputs:
        raise UserError(f"no vertebra_fold*_heldout.csv in {weights}: run train-cls first")
    return outputs, folds

def blend(outputs, calibration=Calibration()):
    """The answers to {uid: outputs}, a study a row, blended over models as predict does."""
    raw = mean_logits(outputs.values(), calibration)
    return pd.DataFrame(calibrated(raw, calibration), [*outputs], TARGETS)

def print_scores(answers, labels):
    """Print the score of (N, 8) answers, its interval, and that of the best constants."""
    study, column = competition_scores(answers, labels)
    prior, prior_column = competition_scores(np.broadcast_to(PRIOR, answers.shape), labels)
    low, high = interval(study_scores(answers, labels))
    print(f"{len(labels)} studies; weighted log loss, lower is better: "
          f"{study:.4f} per study, {column:.4f} per column; the best constants: "
          f"{prior:.4f}, {prior_column:.4f}")
    print(f"95 % interval per study, by bootstrap over patients: {low:.4f} to {high:.4f}")

def score_table(answers, labels):
    """What (N, 8) answers are worth for every target, and for C1 to C7 together."""
    rows = []
    for columns in [*range(8), slice(7)]:
        known = ~np.isnan(labels[:, columns])
        p = answers[:, columns][known]
        y = labels[:, columns][known]
        loss = element_losses(p, y).sum() / (y.size or math.nan)
        rows.append((y.sum(), loss, auc(p, y), *equal_point(p, y)))
    names = ["fractured", "log loss", "AUC", "threshold", "sensitivity", "specificity"]
    return pd.DataFrame(rows, [*TARGETS, "C1 to C7"], names)

def reliability(answers, labels):
    """Mean answer, and share fractured, by size of answer: of C1 to C7, and the patient."""
    table = pd.DataFrame({"mean answer": answers.ravel(), "fractured": labels.ravel()})
    table = table.where(table.fractured.notna())  # of unknown labels: in no group
    part = np.tile(["C1 to C7"] * 7 + ["patient_overall"], len(answers))
    size = pd.cut(table["mean answer"].clip(1e-9), RELIABILITY_BINS)  # 0 is in the first
    groups = table.groupby([part, size], observed=True)
    means = groups.mean()
    means.insert(0, "answers", groups.size())
    names = [f"{name} {answers}" for name, answers in means.index]
    return means.set_axis(names)

def mask_table(data, uids, models, workers):
    """Dice and share named right, of each of C1..C7 and of all together; empty without
    masks. All segmenters answer, also for studies that they were trained on."""
    masks = mask_files(data)
    device = next(models[0].parameters()).device
    # Found among the folders that are there: no path is made from a csv.
    there = sorted(data.glob("*_images/*"))
    folders = [path for path in there if path.name in masks and path.name in uids]
    rows = []
    for folder in progress(folders, "study"):
        try:
            volume = read_volume(folder, workers)
            probability = segment(models, volume, device, say_of(volume))
            labels = fitting_mask(masks[folder.name], volume, probability.shape[1:])
        except StudyError as error:
            say(f"study {folder.name}: {error}; no Dice")
            continue
        scores = dice_scores(probability, labels), named_right(probability, labels)
        row = pd.DataFrame(np.stack(scores, 1), VERTEBRAE, ["Dice", "named right"])
        rows.append(row.dropna())
    if not rows:
        return pd.DataFrame()
    table = pd.concat(rows)
    whole = table.mean().to_frame("C1 to C7").T
    return pd.concat([table.groupby(level=0).mean(), whole])

def fit_scale(answers, labels):
    """(2, 8) scale and shift in logit space that lower the score of (N, 8) answers.
    Weighted as the score, and pulled to the identity, which a target of one class keeps."""
    weight = element_weights(labels)
    weight /= (weight * TARGET_WEIGHTS).sum(1, keepdims=True).clip(1e-9)
    both = (labels == 1).any(0) & (labels == 0).any(0)
    weight *= both / weight.mean(0).clip(1e-9)  # mean 1 per target; 0 for one class
    known = logits_of(answers), np.nan_to_num(labels), weight
    logits, truth, weight = map(torch.from_numpy, known)
    fit = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)  # log scale, shift
    optimizer = torch.optim.LBFGS([fit], max_iter=FIT_ROUNDS, tolerance_grad=LEAST_SLOPE,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        moved = logits * fit[0].exp() + fit[1]
        entropy = F.binary_cross_entropy_with_logits(moved, truth, weight, reduction="sum")
        total = entropy + CALIBRATION_PULL * fit.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return torch.stack([fit[0].exp(), fit[1]]).detach().numpy()

def other_blends(fit, names):
    """The Calibrations that differ from `fit` in one choice of the blend."""
    answers = [replace(fit.answers, top_k=steps) for steps in FITTED_STEPS]
    answers += [replace(fit.answers, noisy_or=share) for share in FITTED_SHARES]
    yield from (fit._replace(answers=other) for other in answers)
    for name in names if len(names) > 1 else ():
        for weight in FITTED_WEIGHTS:
            weights = fit.weights | {name: weight}
            if any(weights.get(one, 1) for one in names):  # else nobody answers
                yield fit._replace(weights=weights)

def fit_moves(outputs, fit, labels):
    """(score, Calibration): `fit` with the scale and shift that suit its blend.
    The patient's answer blends calibrated vertebrae, and is fitted after them."""
    raw = mean_logits(outputs.values(), fit)
    fit = fit._replace(scale=np.ones(8), shift=np.zeros(8))
    for part in (slice(7), slice(7, 8)):
        scale, shift = fit_scale(calibrated(raw, fit), labels)
        fit.scale[part] = scale[part]
        fit.shift[part] = shift[part]
    return np.nanmean(study_scores(calibrated(raw, fit), labels)), fit

def fit_unseen(outputs, labels):
    """(Calibration of what is not in view, labels (N, 8) of what is; others are NaN).
    What is not in view gets its fracture rate, pulled to PRIOR by UNSEEN_PULL studies."""
    truth = labels.loc[[*outputs]].to_numpy()
    unseen = np.isnan(mean_logits(outputs.values(), Calibration()))  # by every model
    unseen[:, 7] = unseen[:, :7].all(1)  # as `calibrated` answers the patient
    broken = (truth > 0) & unseen
    known = unseen & ~np.isnan(truth)
    rate = PRIOR / (2 - PRIOR)  # whose best answer is the prior: 2 p / (1 + p)
    rate = (broken.sum(0) + UNSEEN_PULL * rate) / (known.sum(0) + UNSEEN_PULL)
    in_view = np.where(unseen, np.nan, truth)
    return Calibration(unseen=2 * rate / (1 + rate)), in_view

def fit_calibration(outputs, labels):
    """The Calibration of {uid: outputs} and labels (N, 8), a table by uid.
    Scale and shift are fitted to every blend that is tried; the one choice that lowers the
    score most is changed, as long as it gains LEAST_GAIN."""
    fit, in_view = fit_unseen(outputs, labels)
    score, fit = fit_moves(outputs, fit, in_view)
    names = {output.name for one in outputs.values() for output in one}
    while len(outputs) >= LEAST_STUDIES:
        blends = other_blends(fit, sorted(names))
        tried = [fit_moves(outputs, other, in_view) for other in blends]
        best, other = min(tried, key=lambda pair: pair[0])
        if not best <= score - LEAST_GAIN:  # or NaN: no label is known
            break
        score, fit = best, other
    return fit

def cross_fitted(outputs, folds, labels):
    """The answers to {uid: outputs}, blended and calibrated by a fit to the other folds."""
    parts = []
    for fold in sorted({folds[uid] for uid in outputs}):
        here = {uid: one for uid, one in outputs.items() if folds[uid] == fold}
        others = {uid: one for uid, one in outputs.items() if uid not in here}
        fit = fit_calibration(others, labels) if others else Calibration()
        parts.append(blend(here, fit))
    return pd.concat(parts)

def write_calibration(weights, fit):
    """Write calibration.json: scale, shift, unseen of each target; blend; the models."""
    content = dict(zip(TARGETS, np.transpose(fit[:3]).tolist()))
    content["files"] = model_hashes(weights)
    content |= dict(answers=asdict(fit.answers), weights=fit.weights)
    path = Path(weights) / "calibration.json"
    write_atomic(path, lambda new: new.write_text(json.dumps(content, indent=1)))
    print(f"{path} is written: predict uses it from now on, with these models alone\n"
          f"Blended by {fit.answers}, weights {fit.weights or 'alike'}")

def read_calibration(weights, hashes=None):
    """The Calibration of a folder of models; if fitted to others, the default and a word.
    `hashes` are model_hashes of the folder, if known. UserError if it is damaged."""
    path = Path(weights) / "calibration.json"
    if not path.exists():
        return Calibration()
    with errors_as(UserError, f"{path}: not as evaluate --calibrate writes it"):
        content = json.loads(path.read_text())
        rows = np.asarray_chkfinite([content.pop(target) for target in TARGETS], float)
        if content.pop("files", None) != (hashes or model_hashes(weights)):
            say(f"{path} was fitted to other models: not used")
            return Calibration()
        answers = Answers(**content.pop("answers", {}))
        fit = Calibration(*rows.reshape(8, 3).T, answers=answers, **content)
        within = type(answers.top_k) is int and 0 < answers.top_k <= STEPS
        within &= all(0 <= one <= 1 for one in [*fit.unseen, answers.noisy_or])
        sizes = [*fit.scale, *fit.weights.values()]
        within &= all(0 <= one < math.inf for one in sizes)
        if not within:
            raise ValueError(f"{answers}, scale, unseen or a weight is out of bounds")
        return fit


# ==== Batches and augmentation ====
# In: samples from the disk, each with its own random generator. Out: a batch on the device.
# Pitfall: whatever moves an image must move its mask with it, and labels are never mixed.

# Ranges of the augmentation, from -value to +value. rotation: degrees; scale, gamma: in
# logarithms; shift, edge (of a hole, at most): shares of the image's edge; window, noise:
# in grey levels 0..1; mirror, blur, hole, still (not moved): probabilities; beyond: what
# lies outside the image; by_step: whether each step of a sample is drawn by itself.
VOLUME_RANGES = dict(  # shift: first place's
    rotation=15, scale=0.35, shift=0.3, mirror=0.5, window=0.2, gamma=0.3, noise=0.06,
    blur=0.3, hole=0, still=0.4)
MILD = dict(
    rotation=20, scale=0.15, shift=0.1, mirror=0.5, window=0.15, gamma=0.25, noise=0.04,
    blur=0.15, hole=0.3, edge=0.25, still=0.2, beyond="zeros", by_step=False)
STRONG_MOVES = dict(rotation=45, scale=0.3, shift=0.3, still=0.3, beyond="reflection")
STRONG_GREYS = dict(blur=0.25, hole=0.5, edge=0.5, by_step=True)
CROP_RANGES = dict(mild=MILD, strong=MILD | STRONG_MOVES | STRONG_GREYS)  # first place's
BEYOND = dict(zeros=cv2.BORDER_CONSTANT, reflection=cv2.BORDER_REFLECT)
NO_CROPS = "no crops; delete it and run extract again"  # of a damaged or older file

def write_crops(path, crops, z_margin=0.0, made_by=()):
    """Write a study's crops, uint8 (7, 15, 6, S, S): each different image once, as steps
    share slices. An image is stored as its differences to the pixels above and to the left,
    deflated: smaller than PNG, and read in half its time. A vertebra's images are a member
    of their own, so that the others need not be read. `z_margin` says how the crops were
    cut, `made_by` holds the hashes of the segmenters."""
    index = np.full(crops.shape[:3], -1, np.int16)  # its image's number; -1: nothing seen
    edge = crops.shape[-1]
    makers = np.array(sorted(made_by), "U16")
    content = dict(index=index, edge=edge, z_margin=z_margin, made_by=makers)
    for name, steps, numbers in zip(VERTEBRAE, crops, index):
        images = {}  # {bytes: number}
        for place in zip(*steps.any((2, 3)).nonzero()):
            pixels = steps[place].tobytes()
            numbers[place] = images.setdefault(pixels, len(images))
        packed = [pack_differences(pixels, edge) for pixels in images]
        whole = b"".join(packed)
        content[name] = np.frombuffer(whole, np.uint8)
        content[f"{name}_ends"] = np.cumsum([0, *map(len, packed)])
    write_atomic(path, lambda new: np.savez(new, **content))

def pack_differences(pixels, edge):
    """The deflated differences of an image's bytes, `edge` pixels a row."""
    image = np.frombuffer(pixels, np.uint8).reshape(edge, edge)
    for axis in (0, 1):
        image = np.diff(image, axis=axis, prepend=np.uint8(0))
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
    return packer.compress(image) + packer.flush()

def read_crops(path, vertebrae=range(7), steps=slice(None)):
    """uint8 (V, T, 6, S, S) of some vertebrae and steps. StudyError if it is damaged."""
    with errors_as(StudyError, f"{path}: {NO_CROPS}"), np.load(path) as file:
        index = file["index"][:, steps]
        edge = int(file["edge"])
        out = np.zeros((len(vertebrae), *index.shape[1:], edge, edge), np.uint8)
        for v, crops in zip(vertebrae, out):
            data, ends = (file[VERTEBRAE[v] + part] for part in ("", "_ends"))
            shown = index[v] >= 0  # the others stay 0
            numbers, which = np.unique(index[v][shown], return_inverse=True)
            packed = [data[ends[k] : ends[k + 1]] for k in numbers]
            if packed:
                crops[shown] = undo_differences(packed, edge)[which]
    return out

def undo_differences(packed, edge):
    """uint8 (N, S, S) of packed images of differences, S pixels an edge."""
    unpacked = bytearray(b"".join(map(zlib.decompress, packed)))
    images = torch.frombuffer(unpacked, dtype=torch.uint8).view(-1, edge, edge)
    for axis in (1, 2):
        images = images.cumsum(axis, dtype=torch.uint8)  # numpy's takes twice as long
    return images.numpy()

class CropsHead(NamedTuple):
    """What a file of crops says of itself, without its images. `made_by`, the segmenters'
    hashes, identifies crops even if another machine rounds differently."""
    edge: int  # pixels
    z_margin: float  # cells of the cube
    made_by: set
    seen: Any = ()  # bool (7,): whether C1..C7 are shown

def crops_head(path):
    """The CropsHead of a file. UserError if it is damaged, or of an older version."""
    with errors_as(UserError, f"{path}: {NO_CROPS}"), np.load(path) as file:
        if "made_by" not in file:
            raise ValueError("of an older version")
        seen = (file["index"] >= 0).any((1, 2))
        makers = {*file["made_by"].tolist()}
        return CropsHead(int(file["edge"]), float(file["z_margin"]), makers, seen)

def crops_heads(folder, uids, workers):
    """{uid: CropsHead} of the studies whose crops are in a folder, read in threads."""
    paths = filter(Path.exists, (folder / f"{uid}.npz" for uid in uids))
    heads = prefetch(crops_head, paths, workers, 4 * workers)  # a network disk is slow
    return {path.stem: future.result() for path, future in heads}

def draw_matrix(rng, ranges, axes):
    """A random matrix (A, A + 1) for affine_grid in A axes: turn, scale, mirror, shift."""
    moved = rng.random() >= ranges["still"]
    scale, shift, *angles = moved * rng.uniform(-1, 1, (2 + axes, axes))
    angles = np.triu(angles, 1) * math.radians(ranges["rotation"])
    turn = torch.matrix_exp(torch.from_numpy(angles - angles.T)).numpy()
    matrix = turn * np.exp(scale * ranges["scale"])
    flips = rng.random(3) < ranges["mirror"]
    mirrored = 4 - axes  # cubes: X, never Z; crops: X and Y, and both exchanged
    matrix[:, :mirrored] *= 1 - 2 * flips[:mirrored]
    if axes == 2 and flips[2]:
        matrix = matrix[::-1]
    return np.c_[matrix, 2 * ranges["shift"] * shift]

def draw_grid(rngs, ranges, shape, device):
    """The grid of F.grid_sample for a batch of this shape (B, C, ...), a generator each."""
    axes = len(shape) - 2
    matrices = np.array([draw_matrix(rng, ranges, axes) for rng in rngs])
    theta = torch.tensor(matrices, device=device)  # doubles: autocast would round them
    return F.affine_grid(theta, shape, align_corners=False).float()

class Greys(NamedTuple):
    """Random changes of grey levels 0..1, as by another scanner, made in this order."""
    stretch: float
    shift: float
    gamma: float
    blurred: bool
    noise: float  # standard deviation
    seed: int  # of the noise
    hole: tuple  # slices of y and x that are 0

def draw_greys(rng, ranges, width):
    """Greys of a sample `width` pixels wide."""
    window = ranges["window"] * rng.uniform(-1, 1, 2)
    stretch, shift = window.tolist()
    gamma = math.exp(ranges["gamma"] * rng.uniform(-1, 1))
    noise, blur, hole = rng.random(3)
    seed = int(rng.integers(2**31))
    edge = top = left = 0
    if hole < ranges["hole"]:
        edge = int(width * rng.uniform(0.05, ranges["edge"]))
        top, left = rng.integers(0, width - edge, 2)
    gone = slice(top, top + edge), slice(left, left + edge)
    noise = ranges["noise"] * noise**2
    return Greys(1 + stretch, shift, gamma, blur < ranges["blur"], noise, seed, gone)

def grey_levels(image, rng, ranges):
    """Change the grey levels of (N, C, ...) in 0..1, in place, as draw_greys says."""
    greys = draw_greys(rng, ranges, image.shape[-1])
    image.mul_(greys.stretch).add_(greys.shift).clamp_(0, 1).pow_(greys.gamma)
    if greys.blurred:
        mode = "trilinear" if image.ndim == 5 else "bilinear"
        half = F.interpolate(image, scale_factor=0.5, mode=mode)
        image[:] = F.interpolate(half, image.shape[2:], mode=mode)
    seeded = torch.Generator(image.device).manual_seed(greys.seed)
    grain = torch.empty_like(image).normal_(generator=seeded)
    image.add_(grain, alpha=greys.noise)
    image[(..., *greys.hole)] = 0
    image.clamp_(0, 1)

def augment_volumes(cubes, labels, rngs, ranges=VOLUME_RANGES):
    """Cubes (B, 1, D, D, D) in 0..1 and uint8 labels (B, D, D, D); both move alike."""
    grid = draw_grid(rngs, ranges, cubes.shape, cubes.device)
    cubes = F.grid_sample(cubes, grid, align_corners=False)
    labels = labels[:, None].float()
    labels = F.grid_sample(labels, grid, "nearest", align_corners=False)
    for cube, rng in zip(cubes.split(1), rngs):
        grey_levels(cube, rng, ranges)
    return cubes, labels[:, 0].byte()

def augment_crops(crops, rngs, size=CROP, ranges=MILD):
    """(B, N, K, S, S), uint8 or 0..1 -> (B, N, K, size, size) in 0..1.
    A sample moves as a whole, or each step by itself (`by_step`); the grey levels of masks
    stay. uint8 on a CPU takes a faster path."""
    shape = (*crops.shape[:3], size, size)
    if ranges["by_step"]:  # each is a sample of its own
        rngs = [own for rng in rngs for own in rng.spawn(crops.shape[1])]
        crops = crops.flatten(0, 1)[:, None]  # (B * N, 1, K, S, S)
    if crops.dtype == torch.uint8 and crops.device.type == "cpu":
        moved = torch.empty(*crops.shape[:3], size, size)
        for sample, out, rng in zip(crops.numpy(), moved.numpy(), rngs):
            augment_bytes(sample, out, rng, ranges)
        return moved.view(shape)
    if crops.dtype == torch.uint8:
        crops = crops / 255
    grid = draw_grid(rngs, ranges, (len(crops), 1, size, size), crops.device)
    beyond = ranges["beyond"]
    moved = F.grid_sample(crops.flatten(1, 2), grid, "bilinear", beyond, False)
    moved = moved.unflatten(1, crops.shape[1:3])
    for slices, rng in zip(moved[:, :, :-1], rngs):
        grey_levels(slices, rng, ranges)
    return moved.view(shape)

def augment_bytes(crops, out, rng, ranges):
    """Fill `out`, float32 (N, K, size, size), from a sample uint8 (N, K, S, S).
    Tables instead of arithmetic: what was moved is rounded to bytes, and noise is one of
    256 equally likely values of the normal distribution."""
    size = out.shape[-1]
    matrix = draw_matrix(rng, ranges, 2)
    greys = draw_greys(rng, ranges, size)
    plain = np.linspace(0, 1, 256, dtype=np.float32)
    levels = (plain * greys.stretch + greys.shift).clip(0, 1) ** greys.gamma
    chances = (torch.arange(256) + 0.5) / 256
    grain = torch.special.ndtri(chances).numpy() * np.float32(greys.noise)
    bits = np.random.PCG64(greys.seed)

    planes = crops.reshape(-1, *crops.shape[2:])
    moved = move_planes(planes, matrix, size, BEYOND[ranges["beyond"]])
    for step in out:
        for image in step[:-1]:
            cv2.LUT(next(moved), levels, image)
            if greys.blurred:
                half = cv2.resize(image, (size // 2, size // 2))
                cv2.resize(half, (size, size), image)
            noise = bits.random_raw(image.size // 8 + 1).view(np.uint8)
            noise = noise[: image.size].reshape(image.shape)
            image += cv2.LUT(noise, grain)
            image[greys.hole] = 0
            image.clip(0, 1, image)
        cv2.LUT(next(moved), plain, step[-1])  # the mask

def move_planes(planes, matrix, size, beyond):
    """Yields (size, size) of each of planes (N, S, S), moved by affine_grid's (2, 3);
    `beyond` is what OpenCV puts outside."""
    edge = planes.shape[-1]
    turn = matrix[:, :2] * edge / size
    shift = matrix[:, 2] * edge / 2
    middle = (edge - 1) / 2 - turn.sum(1) * (size - 1) / 2
    source = np.c_[turn, shift + middle]  # of pixels, not of -1 to 1
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    count = len(planes)
    for first in range(0, count, 4):  # OpenCV moves four at the price of two
        four = [planes[k % count] for k in range(first, first + 4)]  # all rounded alike
        whole = cv2.merge(four)
        moved = cv2.warpAffine(whole, source, (size, size), flags=how, borderMode=beyond)
        yield from cv2.split(moved)[: count - first]

def segmenter_batch(model, tensors, rngs, recipe):
    """The loss of a batch of cubes and labels, uint8 (B, D, D, D) both."""
    cubes, labels = augment_volumes(tensors[0][:, None] / 255, tensors[1], rngs)
    return segmenter_loss(model(cubes), labels)

def classifier_batch(model, tensors, rngs, recipe):
    """The loss of a batch of crops, uint8 (B, N, K, S, S), and labels (B, 1 or 8).
    Mixup mixes the losses (first place); a mixed label would count as a positive."""
    crops, labels = tensors
    crops = augment_crops(crops, rngs, recipe.size, CROP_RANGES[recipe.augment])
    share = rngs[0].random() if rngs[0].random() < recipe.mixup else 1.0
    if share < 1:
        crops = crops.flip(0).lerp(crops, share)
    outputs = model(crops)
    other = classifier_loss(outputs, labels.flip(0))
    return other.lerp(classifier_loss(outputs, labels), share)


# ==== Checkpoints ====
# In: files of weights. Out: models. A checkpoint says what builds its model again: kind,
# settings, tensors; <name>_last.pt holds the state of a training, and starts no other.
# Pitfall: a pickle can run code; everything is loaded with weights_only.

KINDS = dict(segmenter=Segmenter, vertebra=VertebraClassifier, patient=PatientClassifier)

def save_checkpoint(path, kind, recipe, **content):
    """Write a checkpoint of plain values and tensors; only process 0 writes."""
    content |= dict(program="cspine", kind=kind, recipe=asdict(recipe))

    def write(new):
        with new.open("wb") as file:  # a path's name would be stored in the file
            torch.save(content, file)

    if ranks()[0] == 0:
        write_atomic(path, write)

def load_checkpoint(path):
    """What save_checkpoint wrote; UserError for any other file."""
    try:
        with zipfile.ZipFile(path) as file:  # torch does not check what it maps
            if file.testzip():
                raise ValueError("damaged")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds, and advises to load pickles
        raise UserError(f"{path}: damaged, or no checkpoint: delete it") from error
    if not isinstance(content, dict) or content.get("program") != "cspine":
        raise UserError(f"{path}: not one of our checkpoints")
    epochs = content.get("recipe", {}).get("epochs", 0)
    if content.get("epoch", epochs) < epochs:
        say_once(f"{path}: NOT TRAINED TO ITS END: epoch {content['epoch']} of {epochs}")
    return content

def new_model(kind, settings, device="cpu"):
    """A model with random weights, in the fastest memory layout; UserError: no backbone."""
    layout = torch.channels_last
    if kind == "segmenter":
        layout = torch.channels_last_3d if str(device) == "cpu" else torch.contiguous_format
    with errors_as(UserError, f"--backbone {settings['backbone']}"):
        return KINDS[kind](**settings).to(memory_format=layout)

def load_model(path, kind, device="cpu"):
    """The model of a checkpoint, ready for inference; UserError if of another kind."""
    content = load_checkpoint(path)
    with errors_as(UserError, f"{path}: a {content.get('kind')}, not a {kind} that fits"):
        model = new_model(kind, content["settings"], device)
        model.load_state_dict(content["tensors"])
        model.settings["name"] = Path(path).stem.rpartition("_fold")[0]
        model = fuse_norms(model).to(device)
    return model

def model_name(kind, name, fold):
    """The name of a fold's files; `name` keeps a second set of models apart."""
    return f"{kind}_{name}_fold{fold}" if name else f"{kind}_fold{fold}"

def model_files(weights, kind):
    """[(fold, name, Path)] of all <kind>_fold<k>.pt and <kind>_<name>_fold<k>.pt."""
    found = []
    for path in Path(weights).glob(f"{kind}_*.pt"):
        if parts := re.fullmatch(rf"{kind}(?:_(\w+))?_fold(\d+)", path.stem):
            found.append((int(parts[2]), parts[1] or "", path))
    return sorted(found)

def load_models(weights, kind, device):
    """{Path: model} of all models of a kind in a folder."""
    return {path: load_model(path, kind, device) for *_, path in model_files(weights, kind)}

def held_out_of(path):
    """The uids that a model's training held out; none with --folds 1 or without its csv."""
    kept = path.with_name(f"{path.stem}_heldout.csv")
    if not kept.exists():
        return set()
    table = read_csv(kept, (STUDY,))
    return set() if TRAINED_ON in table else {*table[STUDY]}

def model_hashes(weights):
    """{file name: SHA-256} of the models of a folder."""
    files = sum([model_files(weights, kind) for kind in sorted(KINDS)], [])
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for *_, path in files}

def makers_of(weights):
    """The hashes of the segmenters in a folder, by which crops know their own."""
    return {hash_of(path) for *_, path in model_files(weights, "segmenter")}

def load_ensemble(weights, device, calibration=Calibration()):
    """The Ensemble of all models of a folder; UserError if a kind is missing."""
    models = {kind: [*load_models(weights, kind, "cpu").values()] for kind in KINDS}
    for kind in ("vertebra", "patient"):  # what weighs nothing would only cost time
        models[kind] = [
            m for m in models[kind] if calibration.weights.get(m.settings["name"], 1)]
    classifiers = models["vertebra"] + models["patient"]
    if not models["segmenter"] or not classifiers:
        lacking = "classifier" if models["segmenter"] else "segmenter"
        raise UserError(f"--weights {weights}: no {lacking} there, or none that counts by "
                        "calibration.json; the repository comes with some in weights/")
    if len({(m.settings["mask_of"], m.settings["z_margin"]) for m in classifiers}) > 1:
        raise UserError(f"--weights {weights}: classifiers of unlike --mask-of, --z-margin")
    on_cpu = Ensemble(models, torch.device("cpu"), calibration)
    if device.type == "cpu":
        return on_cpu
    copies = copy.deepcopy(models)
    for model in copies["segmenter"]:  # a GPU's fastest layout is another: see new_model
        model.to(memory_format=torch.contiguous_format)
    return on_cpu._replace(models=copies, device=device, on_cpu=on_cpu)

def fuse_norms(model):
    """The model for inference: each norm is fused into the convolution that feeds only it.
    A forward pass shows which convolution that is."""
    fed = {}

    def note(module, given, out):
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            out.made_by = module
        elif hasattr(module, "running_var"):
            fed[module] = given[0]
        elif isinstance(out, list):  # features, which a decoder uses
            for one in out:
                one.made_by = None

    shape = (1, 1, 32, 32, 32) if isinstance(model, Segmenter) else (1, 1, CHANNELS, 64, 64)
    with nn.modules.module.register_module_forward_hook(note):
        model.eval()(torch.ones(shape))
    for part in model.modules():
        for name, norm in part.named_children():
            conv = getattr(fed.get(norm), "made_by", None)
            if conv in part.modules():  # else other parts may use its output
                fused = nn.utils.fuse_conv_bn_eval(conv, norm)
                conv.weight, conv.bias = fused.weight, fused.bias
                setattr(part, name, getattr(norm, "act", nn.Identity()))
    return model

def fit_shape(tensor, like):
    """A 2-D network's weight in the shape of `like`: other input channels, or 3-D.
    Repeated weights are divided by their number, so that activations keep their scale."""
    channels = like.shape[1] if like.ndim >= 4 else 0
    if tensor.ndim == 4 and tensor.shape[1] == 3 and channels not in (0, 3):
        tensor = tensor.sum(1, True).repeat(1, channels, 1, 1) / channels  # (O, C, k, k)
    if tensor.ndim == 4 < like.ndim:  # (O, C, k, k) -> (O, C, k, k, k)
        depth = like.shape[2]
        tensor = tensor[:, :, None].repeat(1, 1, depth, 1, 1) / depth
    return tensor

def load_init(model, path):
    """Start from a file of weights: a checkpoint of ours, or a timm backbone's.
    Tensors match by name, else in order. UserError: a file of another architecture."""
    with errors_as(UserError, f"--init {path}: cannot be read"):
        import timm
        source = timm.models.load_state_dict(str(path), weights_only=True)
        ours = "program" in source
        made = f"a {source['kind']} of {source.get('settings')}" if ours else "another's"
        if ours and "tensors" not in source:
            raise ValueError("the state of a training, no finished model")
        source = {name: t for name, t in source.get("tensors", source).items() if t.ndim}
    part = model if ours else getattr(model.encoder, "backbone", model.encoder)
    target = {name: t for name, t in part.state_dict().items() if t.ndim}
    if not any(name.startswith("patient_") for name in source):  # then these stay random
        target = {n: t for n, t in target.items() if not n.startswith("patient_")}
    named = target.keys() <= source.keys()
    pairs = zip(target, target if named else source)
    taken = {name: fit_shape(source[other], target[name]) for name, other in pairs}
    if [t.shape for t in taken.values()] != [t.shape for t in target.values()]:
        raise UserError(f"--init {path}: {made}: not the architecture of {model.settings}")
    part.load_state_dict(taken, strict=False)
    how = "by name" if named else "in order"
    say_once(f"--init: {len(taken)} of {len(source)} tensors {how} from {path}")

def files_below(folder, levels):
    """Yields the files of a folder and `levels` of its subfolders, without *_images."""
    for path in sorted(folder.glob("*")):
        if path.is_file():
            yield path
        elif levels and not path.name.endswith("_images"):
            yield from files_below(path, levels - 1)

def in_underscores(name):
    """A name as it is compared: timm's dots, Kaggle's hyphens, spaces are underscores."""
    return re.sub(r"[-. ]", "_", str(name).lower())

def imagenet_file(backbone, data):
    """The Path of a timm file for a backbone, by its own or a folder's name; else None.
    Looks under /kaggle/input, in --data and in weights/pretrained. Prefers, as timm does,
    weights tuned to ImageNet-1k after a larger data set, then a .safetensors."""
    import timm
    at_start = rf"(?:^|/|timm_+){re.escape(in_underscores(backbone))}(?=[_/])"
    longer = timm.list_models(f"{backbone}_*")  # convnext_nano_ols is no convnext_nano
    others = tuple(name.removeprefix(backbone) for name in longer)
    own = HERE / "weights/pretrained"
    places = {KAGGLE / "input": INIT_LEVELS, Path(data): 1, own: INIT_LEVELS}
    for folder, levels in places.items():
        found = []
        for path in files_below(folder, levels):
            name = in_underscores(path.relative_to(folder))
            if path.suffix not in (".safetensors", ".bin", ".pth") or "optim" in path.name:
                continue
            ends = [match.end() for match in re.finditer(at_start, name)]
            if ends and not name.startswith(others, ends[-1]):  # the deepest name counts
                tuned = re.search(r"in\d+k?_?ft", name)
                found.append((not tuned, path.suffix != ".safetensors", len(name), path))
        if found:
            return min(found)[-1]
    return None

def init_file(options, kind, fold, held_out):
    """The Path that a training starts from, by --init, or None.
    A patient classifier's may be a vertebra classifier of its fold and backbone, first that
    of its own --name (without --name, no other: named sets come later), but none that has
    seen studies that are now held out. UserError if the file that is named is not there."""
    if options.init == "none":
        return None
    if options.init != "auto":
        path = Path(options.init)
        if not path.is_file():
            raise UserError(f"--init {path}: cannot be read: no such file")
        models = model_files(options.weights, kind)
        own = [file for _, name, file in models if name == options.name]
        if any(map(path.samefile, own)):
            raise UserError(f"--init {path}: may be overwritten: copy it elsewhere first")
        unseen = held_out_of(path)
        if unseen and options.folds > 1 and not unseen.issuperset(held_out):
            say_once(f"fold {fold}: --init {path} HAS SEEN studies that are held out here")
        return path
    files = model_files(options.weights, "vertebra") if kind == "patient" else []
    files = [file for file in files if file[0] == fold and (options.name or not file[1])]
    for _, _, path in sorted(files, key=lambda file: file[1] != options.name):
        made = load_checkpoint(path).get("settings", {})
        if made.get("backbone") != options.backbone:
            continue
        reason = "it may have seen studies held out here"
        if made["hidden"] != options.hidden:
            reason = f"its --hidden is {made['hidden']}"
        elif options.folds == 1 or held_out_of(path).issuperset(held_out):
            return path
        say_once(f"{path}: not started from: {reason}")
    return imagenet_file(options.backbone, options.data)


# ==== Training ====
# In: a Task. Out: <name>.pt, <name>_log.csv and <name>_heldout.csv in the weights folder.
# Pitfall: a killed run loses its generators. Whatever is random is drawn anew from (seed,
# step) or (seed, place in the order), so that a resumed run ends with the same bits.

class Task(NamedTuple):
    """What differs between the trainings of the three kinds of model."""
    kind: str
    recipe: Recipe
    device: torch.device
    load: Callable  # (sample, first step if thinned) -> arrays of a training sample
    loss: Callable  # (model, tensors, generators, recipe) -> the loss of a batch
    answer: Callable  # (model, what `read` gave) -> values of one study, for `columns`
    judge: Callable  # (table of these values) -> dict with "score", lower is better
    name: str = ""
    train: tuple = ()  # samples
    held_out: tuple = ()  # uids
    made_of: dict = {}  # {what: hash} of labels, data and weights to start from
    columns: Any = TARGETS  # names of what answer gives; cut to as many values
    every: int = 1  # epochs between two scorings
    read: Callable = str  # uid -> what `answer` needs of a held-out study

@dataclass
class TrainingState:
    """How far a training has come."""
    step: int = 0
    skipped: int = 0  # steps without a finite gradient
    in_a_row: int = 0  # how many of these came last, without a good one between
    seconds: float = 0.0  # of the steps since the last scoring
    slowest: float = 0.0  # seconds of the slowest step, with its scoring and saving
    losses: list = field(default_factory=list)  # since the last scoring
    history: list = field(default_factory=list)  # a dict a scoring

class Trainer:
    """A model in training: its weights, their average, optimiser, scaler and progress."""
    SAVED = ("model", "averaged", "optimizer", "scaler")
    def __init__(self, task, init=""):
        recipe, device = task.recipe, task.device
        torch.manual_seed(recipe.seed)
        self.model = new_model(task.kind, asdict(recipe), device)
        if init:
            load_init(self.model, init)
        self.averaged = copy.deepcopy(self.model.to(device)).eval()
        self.shared = self.model  # under torchrun: averages gradients over processes
        if dist.is_initialized():
            unused = task.kind != "segmenter"  # the backbone, if no vertebra is in view
            self.shared = nn.parallel.DistributedDataParallel(
                self.model, find_unused_parameters=unused)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [dict(params=matrices), dict(params=others, weight_decay=0)]
        self.optimizer = torch.optim.AdamW(
            groups, recipe.lr, weight_decay=recipe.weight_decay)
        in_float16 = half_type(device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=in_float16)
        self.state = TrainingState()
        # Not state_dict's tensors: on a GPU an LSTM's move when cuDNN flattens its weights.
        both = [[*one.parameters(), *one.buffers()] for one in (self.averaged, self.model)]
        self.floats = [[t for t in one if t.is_floating_point()] for one in both]

    def save(self, path, task):
        """Write the whole state of the training."""
        state = {name: getattr(self, name).state_dict() for name in self.SAVED}
        state["progress"] = asdict(self.state)
        content = dict(made_of=task.made_of, state=state)
        save_checkpoint(path, task.kind, task.recipe, **content)

    def load(self, path, task):
        """Go on from what save wrote; UserError if made with other options or data."""
        saved = load_checkpoint(path)
        then = asdict(type(task.recipe)()) | saved["recipe"]  # older ones lack new options
        now, before = task.made_of, saved.get("made_of", {})
        other = [name for name in now if now[name] != before.get(name)]
        for name, value in asdict(task.recipe).items():
            if value != then[name]:
                other.append(f"--{name.replace('_', '-')} (it was {then[name]})")
        if other:
            raise UserError(f"{path}: made with other {', '.join(other)}: give the same as "
                            "before, or delete it to begin anew")
        with errors_as(UserError, f"{path}: made with another version; delete it"):
            for name in self.SAVED:
                state = copy.deepcopy(saved["state"][name])  # the file is memory-mapped
                if state:  # empty for a scaler that was not enabled
                    getattr(self, name).load_state_dict(state)
            self.state = TrainingState(**saved["state"]["progress"])

    def gradient(self, task, batch):
        """Backpropagate a batch of [(arrays, generator)]; gives its mean loss."""
        samples, rngs = zip(*batch)
        tensors = [torch.from_numpy(np.stack(one)) for one in zip(*samples)]
        if task.device.type == "cuda":  # pinned memory is copied asynchronously
            tensors = [one.pin_memory() for one in tensors]
        tensors = [one.to(task.device, non_blocking=True) for one in tensors]
        with autocast(task.device, task.recipe.half or task.device.type == "cuda"):
            loss = task.loss(self.shared, tensors, rngs, task.recipe)
        self.scaler.scale(loss).backward()
        return loss.item()

    def update(self, task, batch, total):
        """One optimiser step of `total`, on a batch of [(arrays, generator)]."""
        recipe, now = task.recipe, self.state
        model = self.model.train()  # StepEncoder's probe has left its backbone in eval()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, now.step / total)
        # For dropout: the same in a resumed run, different on every process (up to 64).
        torch.manual_seed((recipe.seed * 1009 + now.step) * 64 + ranks()[0])
        self.optimizer.zero_grad()
        loss = self.gradient(task, batch)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if norm.isfinite():
            now.in_a_row = 0
            now.losses.append(loss)
            self.scaler.step(self.optimizer)
        else:
            now.skipped += 1
            now.in_a_row += 1
            buffers = dict(self.averaged.named_buffers())  # undoes the batch's statistics
            model.load_state_dict(buffers, strict=False)
        if now.in_a_row > MAX_SKIPPED_STEPS:
            raise UserError("too many steps without a finite gradient: lower --lr")
        self.scaler.update()
        now.step += 1
        decay = min(recipe.ema, (1 + now.step) / (10 + now.step))  # rises, as TensorFlow's
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        average(*self.floats, now.step)  # not the norms' integer counts, which nobody reads

    def close_epoch(self, task, weights, epoch, workers):
        """Score the averaged weights on the held-out studies, log the score, save them.
        The last epoch is kept, not the best, which would be chosen by the very studies that
        later calibrate and report."""
        now = self.state
        rank, world = ranks()
        if dist.is_initialized():  # norms saw other batches in each process: keep rank 0's
            for buffer in self.averaged.buffers():
                dist.broadcast(buffer, 0)
        mine = prefetch(task.read, task.held_out[rank::world], workers, workers)
        with torch.inference_mode(), autocast(task.device):
            rows = [(uid, *task.answer(self.averaged, one.result())) for uid, one in mine]
        rows = sum(over_ranks(rows), [])
        losses = sum(over_ranks(now.losses), [])
        table = pd.DataFrame(rows, columns=[STUDY, *task.columns][: len(rows[0])])
        line = dict(epoch=epoch, **task.judge(table.set_index(STUDY)))
        if {uid for uid, *_ in task.train}.intersection(task.held_out):
            table[TRAINED_ON] = 1  # with --folds 1
        line["train_loss"] = np.mean(losses or math.nan)
        line["lr"] = self.optimizer.param_groups[0]["lr"]
        line["samples_per_s"] = len(now.losses) * task.recipe.batch_size / now.seconds
        line |= dict(seconds=now.seconds, skipped_steps=now.skipped, peak_gb=peak_gb())
        line = {name: float(value) for name, value in line.items()}
        now.history.append(line)
        now.losses, now.seconds = [], 0.0
        if rank == 0:
            stem = weights / task.name
            self.write_model(task, f"{stem}.pt")
            write_csv(f"{stem}_heldout.csv", table)
            log = pd.DataFrame(now.history)
            write_csv(f"{stem}_log.csv", log)  # last: it tells what is done
            words = [f"{name} {value:.4g}" for name, value in line.items()]
            say("  ".join([task.name, *words]))

    def write_model(self, task, path):
        """Write the averaged weights as of the last scoring, for load_model."""
        # Copies: on a GPU an LSTM's weights share a storage, which each would save whole.
        tensors = {
            name: tensor.half() if tensor.ndim > 1 else tensor.clone()
            for name, tensor in self.averaged.state_dict().items()}
        epoch = int(self.state.history[-1]["epoch"])
        save_checkpoint(path, task.kind, task.recipe, settings=self.model.settings,
                        tensors=tensors, epoch=epoch, made_of=task.made_of)

def learning_rate(recipe, done):
    """The rate after a share `done` of all steps: linear warm-up, then a cosine to 1 %."""
    warm = min(1, (done + 1e-3) / (recipe.warm_up + 1e-3))
    return recipe.lr * warm * (0.505 + 0.495 * math.cos(math.pi * done))

def begin(task, path, last, go_on, init):
    """A task's Trainer, as far as an earlier run got by its state, the file `last`; None if
    its model, the file `path`, is finished and the state was deleted. UserError if --resume
    was not given, or the folder cannot be written to."""
    if ranks()[0] == 0:  # which alone writes; better now than after an epoch
        try_writing(path.parent)
    if last.exists() and not go_on:
        raise UserError(f"{last}: of an earlier run: --resume goes on with it; delete it "
                        "to begin anew")
    if path.exists() and not last.exists():
        log = path.with_name(f"{path.stem}_log.csv")  # written last
        made = load_checkpoint(path) if go_on and log.exists() else {}
        whole = task.recipe.epochs, asdict(task.recipe), task.made_of
        if (made.get("epoch"), made.get("recipe"), made.get("made_of")) == whole:
            say_once(f"{path}: finished before, and kept; delete it to train it anew")
            return None
        say_once(f"{path} is there already, and will be overwritten")
    run = Trainer(task, init)
    if last.exists():
        run.load(last, task)
    return run

def train(task, weights, stop, workers=2, go_on=False, init=""):
    """Train one fold to <name>.pt in `weights`: its history, a dict a scoring.
    Raises Stopped, with all of it saved, if a signal or the time ends the run."""
    rank, world = ranks()
    recipe, name, count = task.recipe, task.name, len(task.train)
    least = 2 if world > 1 and getattr(recipe, "mixup", 0) else 1  # mixup needs two
    size = world * max(least, math.ceil(recipe.batch_size / world))  # of all processes
    if size != recipe.batch_size:
        say_once(f"{name}: --batch-size {size}: {size // world} samples a process")
        recipe = replace(recipe, batch_size=size)
        task = task._replace(recipe=recipe)
    if not count or not task.held_out:
        raise UserError(f"{name}: too few studies: {count} samples to train on, "
                        f"{len(task.held_out)} studies held out; give fewer --folds")
    path, last = weights / f"{name}.pt", weights / f"{name}_last.pt"
    run = begin(task, path, last, go_on, init)
    if run is None:
        return []

    now = run.state
    now.slowest = min(now.slowest, max(stop.left() / 10, 0))  # else a past stall ends this
    steps = max(1, count // size)  # per epoch
    total = steps * recipe.epochs
    if now.step == total and rank == 0:
        say(f"{name}: finished before")
        if not path.exists():
            run.write_model(task, path)
        write_csv(weights / f"{name}_log.csv", pd.DataFrame(now.history))
    shuffles = [np.random.default_rng([recipe.seed, k]) for k in range(recipe.epochs)]
    order = [np.resize(rng.permutation(count), steps * size) for rng in shuffles]
    order = np.concatenate(order)  # of samples, all epochs; resize repeats or drops some
    mine = range(now.step * size + rank, len(order), world)  # places in `order`
    thin = getattr(recipe, "thin", 1)

    def load(k):
        of_step = np.random.default_rng([recipe.seed, k // size, 1])
        of_sample = np.random.default_rng([recipe.seed, k])
        sample = task.train[order[k]]
        return task.load(sample, of_step.integers(thin)), of_sample

    def note():
        mean = f", loss {np.mean(now.losses[-20:]):.3g}" if now.losses else ""
        return f"at {now.step} of {total}{mean}"

    loaded = prefetch(load, mine, workers, 2 * size)
    for step in progress(range(now.step, total), "step", note=note):
        started = stop.clock()
        reason = max(over_ranks(stop.reason(1.1 * now.slowest)))  # one ends all processes
        if reason:
            run.save(last, task)
            raise Stopped(f"{name}: stopped by {reason} at step {step} of {total}; "
                          "--resume goes on", stop.status())
        batch = [future.result() for _, future in islice(loaded, size // world)]
        run.update(task, batch, total)
        now.seconds += stop.clock() - started
        if now.step % (steps * task.every) == 0 or now.step == total:
            run.close_epoch(task, weights, now.step // steps, workers)
            run.save(last, task)
        now.slowest = max(now.slowest, stop.clock() - started)
    return now.history

def segmenter_task(recipe, device, images, masks):
    """The Task of a segmenter: studies in the folder `images`, masks {uid: file}."""
    @functools.cache  # 4 MB a study
    def read(uid):
        volume = read_volume(images / uid)
        cube = segmenter_input(volume, recipe.size)[0] * 255
        return cube.round().byte().numpy(), fitting_mask(masks[uid], volume, cube.shape)

    def answer(model, study):
        cube, labels = study
        cube = torch.from_numpy(cube)[None, None].to(device)  # (1, 1, D, D, D)
        probability = finite_answer(model, cube / 255)[0].float().sigmoid()
        return dice_scores(probability.cpu().numpy(), labels)

    def judge(table):
        dice = table.mean()
        return dict(dice.add_prefix("dice_"), score=1 - dice.mean())

    return Task("segmenter", recipe, device, lambda sample, first=0: read(*sample),
                segmenter_batch, answer, judge, read=read)

def usable(samples, load, workers):
    """The samples that can be loaded; the others are reported, each with its reason."""
    good = []
    loaded = prefetch(load, samples, min(workers, 4), workers)  # few: whole studies
    for sample, future in progress(loaded, "study", len(samples)):
        try:
            future.result()
            good.append(sample)
        except StudyError as error:
            say(f"study {sample[0]}: {error}; left out")
    return good

def classifier_task(kind, recipe, device, folder, truth):
    """The Task of a classifier: crops in `folder`, labels {uid: (8,)}.
    A sample is a uid and the targets asked for: one vertebra, or all eight."""
    def load(sample, first=0):
        uid, targets = sample
        steps = slice(first, None, recipe.thin)
        crops = read_crops(folder / f"{uid}.npz", targets[:7], steps)  # (V, T, K, S, S)
        labels = truth[uid][targets]  # a copy: targets is a list
        labels[: len(crops)][~crops.any((1, 2, 3, 4))] = np.nan  # not in view
        return np.concatenate(crops), labels  # (V * T, K, S, S)

    def answer(model, crops):
        models = dict.fromkeys(KINDS, []) | {kind: [model]}
        only = classify(Ensemble(models, device), crops)[0]
        return [*only.steps.ravel(), only.patient]

    def judge(table):  # the prior where nothing was asked or in view
        values = table.to_numpy(float)
        steps = values[:, :-1].reshape(-1, 7, STEPS)
        answers = np.column_stack([vertebra_answers(steps, Answers().top_k), values[:, -1]])
        answers = np.where(np.isnan(answers), PRIOR, answers)
        right = np.array([truth[uid] for uid in table.index])
        score, _ = competition_scores(answers, right)
        area = score_table(answers, right).AUC
        return dict(
            score=score, vertebra_auc=area["C1 to C7"], patient_auc=area[TARGETS[7]])

    return Task(kind, recipe, device, load, classifier_batch, answer, judge,
                columns=STEP_TARGETS, read=lambda uid: read_crops(folder / f"{uid}.npz"))


# ==== Tools ====
# What several rooms share: messages, files, threads, processes, devices, stopping.

def in_words(error):
    """The text of an exception, with its type unless it is a UserError."""
    return (str(error) if isinstance(error, UserError) else repr(error))[:300]

def say(text):
    """A line on stderr, above the bar of progress."""
    text = text.encode(errors="backslashreplace").decode()  # a file's name may be no UTF-8
    with suppress(OSError):  # the terminal may have gone
        tqdm.write(text, file=sys.stderr)

def say_once(text):
    """A line that all processes would say alike, by the first alone."""
    if ranks()[0] == 0:
        say(text)

def say_of(volume):
    """Say what was odd about a study; gives a function that says more about it."""
    def more(text):
        say(f"study {volume.uid}: {text}")
    for problem in volume.problems:
        more(problem)
    return more

def progress(items, unit, total=None, note=str):
    """Yields the items, with a bar on a terminal, or a line a minute in a log or notebook.
    note() gives a text to show beside the progress."""
    bar = tqdm(items, unit=unit, total=total, disable=None, leave=False)
    last = monotonic()
    for done, item in enumerate(bar, 1):
        yield item
        bar.set_postfix_str(note(), refresh=False)
        if bar.disable and monotonic() - last > LOG_S and not ranks()[0]:
            last = monotonic()
            say(f"{unit} {done} of {bar.total} {note()}")

def write_atomic(path, write):
    """Let write(temporary path) make a file, then move it into place: whole or not at all.
    Raises UserError if it cannot be written."""
    path = Path(path)
    new = path.parent / f".{os.urandom(4).hex()}.{path.name}"  # containers share pids
    try:
        if path.exists() and not path.is_file():  # a folder; a device would be replaced
            raise OSError("what is there is not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(new)
        new.replace(path)
    except (OSError, RuntimeError, ValueError) as error:
        full = " (a full disk?)" if isinstance(error, RuntimeError) else ""  # as torch says
        raise UserError(f"cannot write {path}: {error}{full}") from None
    finally:
        with suppress(OSError):
            new.unlink()

def try_writing(folder):
    """Make a folder, then write and delete a file in it. Raises UserError if that fails."""
    probe = Path(folder) / ".probe"
    write_atomic(probe, lambda new: new.touch())
    probe.unlink(missing_ok=True)  # others may try the same folder

def write_csv(path, table):
    """Write a table without its index."""
    write_atomic(path, lambda new: table.to_csv(new, index=False, errors="replace"))

def read_csv(path, columns):
    """A table that has these columns, names as text; else UserError."""
    text = dict.fromkeys((STUDY, "row_id", "made_by"), str)  # they may look like numbers
    with errors_as(UserError, f"{path}: no csv with {', '.join(columns)}"):
        table = pd.read_csv(  # also where lines end in ","
            path, dtype=text, index_col=False, skipinitialspace=True)
        if missing := [name for name in columns if name not in table]:
            raise ValueError(f"no column {missing[0]}")
    return table

def hash_of(*parts):
    """A short hash of plain values, and of the content of a Path."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return whole.hexdigest()[:16]

def prefetch(work, items, workers, ahead=1):
    """Yields (item, future of work(item)) in order, with `ahead` more under way in threads;
    with one, each has ALONE_S for itself. Leaving the loop cancels what has not begun."""
    pool = ThreadPoolExecutor(max(1, workers))
    waiting = []
    try:
        for item in items:
            if ahead == 1:  # two at once would delay the first
                wait([future for _, future in waiting], ALONE_S)
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > ahead:
                yield waiting.pop(0)
        yield from waiting
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # some may hang

def ranks():
    """(number of this process, number of all), as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def refuse_foreign_ranks():
    """UserError if ranks() are not torchrun's: one process of two does half of the work."""
    with errors_as(UserError, "RANK, WORLD_SIZE: not torchrun's; unset both"):
        rank, world = ranks()
        if not 0 <= rank < world or (world > 1 and "RANK" not in os.environ):
            raise ValueError(f"process {rank} of {world}")

def join_processes(device):
    """Let the processes of torchrun speak to each other, each on its device."""
    if ranks()[1] == 1:
        return
    with suppress(AttributeError):  # not on macOS
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: with torchrun
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL takes the current card
    # Objects go by gloo: the default of a machine with GPUs knows NCCL alone.
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    with errors_as(UserError, "no processes to join, as torchrun starts them"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    if len({*over_ranks(device.type)}) > 1:
        raise UserError("more processes than usable GPUs: lower --nproc_per_node")

def over_ranks(value):
    """[value of each process]."""
    values = [value] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def pick_device(name):
    """The torch.device of --device, on which something was computed; else UserError.
    auto takes the CPU where there is no GPU, or one that runs nothing: a card too old for
    today's torch counts as available, and fails at every launch."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name != "auto":
        with errors_as(UserError, f"--device {name}: not auto, cpu, cuda or cuda:0, ..."):
            return computed_on(own if name == "cuda" else name)
    if torch.cuda.is_available():
        try:
            return computed_on(own)
        except RuntimeError as error:
            say(f"{own} runs nothing ({error!r:.200}): going on with the CPU")
    return torch.device("cpu")

def computed_on(name):
    """The torch.device of this name, after a sum on it has been waited for."""
    ones = torch.ones(2, device=name)
    ones.sum().item()
    return ones.device

def half_type(device):
    """bfloat16 where it is native, else float16 on a GPU (T4), None on a CPU."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    flags = Path("/proc/cpuinfo")
    native = flags.exists() and "_bf16" in flags.read_text()
    return torch.bfloat16 if native else None

def autocast(device, wanted=True):
    """A context with half precision, if it is wanted and the device has it."""
    half = half_type(device) if wanted else None
    return torch.autocast(device.type, half, enabled=half is not None)

def finite_answer(model, given):
    """A model's answer; if half precision has overflowed, computed again in float32."""
    answer = model(given)
    parts = answer if isinstance(answer, tuple) else (answer,)
    if all(part.isfinite().all() for part in parts):
        return answer
    with torch.autocast(given.device.type, enabled=False):
        return model(given)

def keep_memory():
    """Have glibc keep the main thread's freed memory, for good: Linux would clear each page
    anew, up to a third of a training step on a CPU. The peak grows by a fifth at most."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries: no mallopt(3)
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is never given back
        mallopt(-4, 0)  # M_MMAP_MAX: large arrays lie in the heap, too

def peak_gb():
    """The most memory that this process has held, in GB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # of bytes there, else of KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

class Stop:
    """Whether a run should end, and why: by a signal that was noted, or its deadline."""
    def __init__(self, minutes=0.0, clock=monotonic, begun=None):
        self.clock = clock
        self.signal = ""
        self.noted = math.inf
        self.until = (begun or clock()) + (60 * minutes if minutes else math.inf)

    def note(self, number, _frame):
        """Signal handler. A second signal ends the run at once, unless it is an echo:
        torchrun forwards to its processes what they have already received."""
        if monotonic() > self.noted + ECHO_S:
            raise KeyboardInterrupt
        self.noted = min(self.noted, monotonic())
        self.signal = signal.Signals(number).name

    def left(self):
        """Seconds to the deadline."""
        return self.until - self.clock()

    def reason(self, needed=0.0):
        """The signal, or "--time-limit" if fewer than `needed` seconds are left, or ""."""
        return self.signal or ("--time-limit" if self.left() < needed else "")

    def status(self):
        """The exit status of a run that ends now: interrupted, or in time."""
        return 130 if self.signal else 0

@contextmanager
def stop_signals(minutes=0.0, begun=None):
    """A Stop that notes SIGINT, SIGTERM and SIGHUP; the old handlers are put back.
    The minutes count from `begun`, the start of the run: reading masks takes some, too.
    Raises Stopped at the end after a signal that has ended nothing."""
    stop = Stop(minutes, begun=begun)
    kinds = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else nohup has started the run
        kinds.append(signal.SIGHUP)
    with ExitStack() as handlers:
        with suppress(ValueError):  # outside of the main thread there are no handlers
            for kind in kinds:
                handlers.callback(signal.signal, kind, signal.signal(kind, stop.note))
        yield stop
    if stop.signal:  # after the last step or study; a script must end, too
        raise Stopped(f"stopped by {stop.signal}, with all done", 130)


# ==== Decoding ====
# In: a DICOM dataset. Out: its stored values; Kaggle has no plug-in for JPEG Lossless.
# Pitfall: headers lie; every size is checked before memory is allocated.

JPEG_PLUGINS = "pip install pylibjpeg pylibjpeg-libjpeg"
MAX_JPEG_2000 = 2**20  # pixels; more cost gigabytes
# Halves of the left, the upper and the corner sample, by predictor (ITU-T T.81 table H.1).
PREDICTOR_HALVES = {1: (2, 0, 0), 2: (0, 2, 0), 3: (0, 0, 2), 4: (2, 2, -2)}
PREDICTOR_HALVES |= {5: (2, 1, -1), 6: (1, 2, -1), 7: (1, 1, 0)}
STREAM_PARTS = 2048  # of a stream, walked side by side
LEAST_PART = 256  # bits; a code and its difference have 32 at most
FEW_PARTS = 64  # if no more are left, they are walked code by code
WALK_ROUNDS = 5  # at most; a round walks the parts that have not begun at the right bit
ONE_DECODES = threading.Lock()  # two threads wait for Python's lock at each NumPy call

def decode_pixels(data):
    """Stored values (frames, rows, columns), 16 or 32 bits, of a pydicom dataset.
    StudyError: they are no grey values, damaged, or need a plug-in that is not there."""
    with errors_as(StudyError, "pixel data"):
        shape = (int(data.get("NumberOfFrames") or 1), data.Rows, data.Columns)
        samples = data.get("SamplesPerPixel") or 1
        allocated = data.BitsAllocated
        stored = data.get("BitsStored") or allocated
        whole = allocated in (8, 16, 32) and 1 <= stored <= allocated
        fits = 0 < min(shape) and math.prod(shape) <= MAX_VOXELS
        if not (whole and fits and samples == 1):
            raise StudyError(
                f"{samples} samples of {stored} bits in {allocated}, shape {shape}")
        high = data.get("HighBit") or stored - 1
        if high != stored - 1:
            raise StudyError(f"highest bit {high} of {stored} bits: not right-justified")
        words = decode_words(data, shape, allocated)
        if words.ndim > 1 and words.shape[-2:] != shape[1:]:
            raise StudyError(f"{words.shape[-2:]} pixels in place of {shape[1:]}")
        signed = data.get("PixelRepresentation")
        if signed is None and ((words >> (stored - 1)) & 1).any():  # air, or metal?
            raise StudyError("no PixelRepresentation, and values that may be negative")
        return sign_extend(words.reshape(shape), stored, signed == 1)

def decode_words(data, shape, allocated):
    """The words of all frames as they are stored, by the transfer syntax."""
    syntax = data.file_meta.get("TransferSyntaxUID")
    if syntax is None:  # no file meta: pydicom has found the byte order out
        _, little = data.original_encoding
        kinds = pydicom.uid.ExplicitVRBigEndian, pydicom.uid.ImplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = syntax = kinds[little]
    if not syntax.is_transfer_syntax:
        raise StudyError(f"unknown transfer syntax {syntax}")
    is_jpeg_2000 = syntax in pydicom.uid.JPEG2000TransferSyntaxes
    is_lossless = syntax in (pydicom.uid.JPEGLossless, pydicom.uid.JPEGLosslessSV1)
    if syntax.is_little_endian and not syntax.is_encapsulated:
        if len(data.PixelData) >= 2 * max(2, math.prod(shape) * allocated // 8):
            raise StudyError(f"{len(data.PixelData)} bytes: at least twice the header's")
        return np.frombuffer(data.PixelData, f"<u{allocated // 8}", math.prod(shape))
    if not is_jpeg_2000 and pydicom.pixels.get_decoder(syntax).is_available:
        others = f", try {JPEG_PLUGINS}" if "JPEG" in syntax.name else ""
        advice = errors_as(StudyError, syntax.name + others)
        with suppress(Exception) if is_lossless else advice:  # if it fails: ours, below
            return pydicom.pixels.pixel_array(data, raw=True)  # big endian, RLE, plug-ins
    if not is_jpeg_2000 and not is_lossless:
        raise StudyError(f"{syntax.name}: {JPEG_PLUGINS}")
    frames = pydicom.encaps.generate_frames(data.PixelData, number_of_frames=shape[0])
    if is_lossless:
        return np.stack([*map(decode_lossless_jpeg, frames)])
    signed = data.get("PixelRepresentation") == 1
    return np.stack([decode_jpeg_2000(frame, signed) for frame in frames])

def sign_extend(words, stored, signed):
    """Whole numbers of the `stored` lowest bits; those above may hold overlays."""
    size = max(2, words.itemsize)
    spare = 8 * size - stored
    return (words.astype(f"u{size}") << spare).view(f"{'ui'[signed]}{size}") >> spare

def decode_jpeg_2000(jpeg, negative=False):
    """(rows, columns) uint16 by OpenCV, negative numbers as two's complement.
    Where they may be negative but the stream says unsigned, its highest bit is the sign."""
    stream = bytearray(jpeg[max(0, jpeg.find(b"\xff\x4f\xff\x51")) :])  # without JP2 boxes
    width, height, components, depth = struct.unpack_from(">2I24xHB", stream, 8)
    if width * height * components > MAX_JPEG_2000:
        raise StudyError(f"JPEG 2000 of {width}x{height}x{components}: too large")
    bits = depth % 128 + 1
    signed = depth > 127
    stream[42] = bits - 1  # OpenCV refuses signed; as unsigned, it adds half the range
    stream += b"\xff\xd9"  # its end, which some leave out
    words = cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_UNCHANGED)
    if words is None:
        raise StudyError("damaged JPEG 2000")
    if negative and not signed:
        return sign_extend(words, bits, True).astype(np.uint16)
    return words.astype(np.uint16) - np.uint16(signed << bits - 1)

def jpeg_segments(data):
    """({marker: body}, {destination: Huffman table}, start of the scan) (T.81 annex B)."""
    at = 2
    segments, tables = {}, {}
    while 0xFFDA not in segments:  # start of scan
        marker, length = struct.unpack_from(">HH", data, at)
        body = data[at + 4 : at + 2 + length]
        segments[marker] = body
        at += 2 + length
        while marker == 0xFFC4 and body:  # several tables may share a segment
            end = 17 + sum(body[1:17])
            tables[body[0]] = body[1:end]
            body = body[end:]
    return segments, tables, at

def decode_lossless_jpeg(data):
    """(rows, columns) uint16 of a one-component JPEG Lossless stream (ITU-T T.81 annex H).
    All predictors, restart intervals and point transforms. Raises StudyError for damage."""
    with ONE_DECODES, errors_as(StudyError, "JPEG Lossless"):
        segments, tables, at = jpeg_segments(data)
        frame = segments.get(0xFFC3, bytes(6))
        bits, rows, columns, components = struct.unpack_from(">BHHB", frame)
        _, _, destination, predictor, _, shift = segments[0xFFDA][:6]
        restart = int.from_bytes(segments.get(0xFFDD, b""), "big")
        known = components == 1 and predictor in PREDICTOR_HALVES and shift < bits <= 16
        too_many = rows * columns > 8 * len(data)  # a sample takes a bit
        if not known or restart % columns or too_many:
            raise StudyError(
                f"{rows}x{columns}x{components} pixels of {bits} bits in {len(data)} bytes")

        lookup = huffman_lookup(tables[destination >> 4])
        band = restart // columns or rows  # rows between two restarts
        intervals = split_scan(data[at:])
        grid = np.zeros((math.ceil(rows / band), band * columns), int)  # an interval a row
        for number, found in enumerate(grid):
            count = min(band, rows - number * band) * columns
            found[:count] = differences(intervals[number], count, *lookup)
        grid[:, 0] += 1 << (bits - shift - 1)
        grid = grid.reshape(-1, band, columns)
        samples = undo_prediction(grid, *PREDICTOR_HALVES[predictor])
        return samples.reshape(-1, columns)[:rows] << shift

def split_scan(scan):
    """The coded bytes between restart markers, without stuffed and fill bytes."""
    scan = re.sub(rb"\xff\xff+", b"\xff", scan)
    scan = re.split(rb"\xff[^\x00\xd0-\xd7]", scan, maxsplit=1)[0]
    parts = re.split(rb"\xff[\xd0-\xd7]", scan)
    return [part.replace(b"\xff\0", b"\xff") for part in parts]

def huffman_lookup(table):
    """For each value of the next 16 bits: category, and bits of code and difference, as
    int32 and uint8 (65536,). `table` holds the number of codes of each length, then their
    categories (T.81 annex C)."""
    counts, categories = [*table[:16], 1], [*table[16:], 255]  # a last entry for no code
    length = np.repeat(range(1, 18), counts)
    category = np.array(categories, np.int32)
    share = 2**16 >> length
    share[-1] = 2**16 - share.sum()
    advance = (length + category % 16).astype(np.uint8)
    return category.repeat(share), advance.repeat(share)

def differences(coded, count, category_of, advance_of):
    """(count,) differences of a restart interval. StudyError if it holds fewer."""
    coded = coded[: 4 * count]  # at most 32 bits each
    stream = np.frombuffer(coded + bytes(8), np.uint8).astype(np.int32)
    words = stream[:-2] << 16 | stream[1:-1] << 8 | stream[2:]  # 24 bits from each byte on
    places = code_places(words, 8 * len(coded), advance_of)
    ends = places[1 : count + 1]
    category = category_of.take(peek(words, places[:count]))
    if len(ends) < count or ends[-1] > 8 * len(coded) or category.max() > 16:
        raise StudyError("cut short or broken")
    extra = category & 15
    value = peek(words, ends - extra) >> (16 - extra)
    half = (1 << extra) >> 1  # the smallest difference that is positive; else 0
    value -= (value < half) * (2 * half - 1)
    return value + (category >> 4 << 15)  # category 16 stands for 32768

def peek(words, at):
    """(N,) the 16 bits of a stream from each of the bits `at` (N,) on; `words` holds the
    24 bits from each of its bytes on."""
    return (words.take(at >> 3, mode="clip") >> (8 - (at & 7))) & 0xFFFF

def code_places(words, bits, advance_of):
    """The bits where codes begin, in order, and where the last one ends.
    Parts of the stream are walked in parallel: a walk from a wrong bit soon falls in step
    with the codes, so that the second half of a part shows where the next one begins. Where
    it does not, as in runs of one value, parts are walked again; the last, code by code."""
    size = max(LEAST_PART, bits // STREAM_PARTS)
    first = np.arange(0, bits, size)
    end = np.minimum(first + size, bits)
    codes = np.zeros((len(first), size), bool)
    begin = np.full_like(first, -1)
    left = begin.copy()
    right = first + size // 2  # where walks should have begun; these are guessed
    for _ in range(WALK_ROUNDS):
        stale = np.flatnonzero(begin != right)
        if len(stale) <= FEW_PARTS:
            break
        begin[stale] = right[stale]
        codes[stale] = False
        left[stale] = walk(right[stale], end[stale], words, advance_of, codes.ravel())
        right = np.append(0, left[:-1])

    codes = codes.ravel()
    is_code = memoryview(codes)
    word_at = memoryview(words)
    advance = bytes(advance_of)
    at = 0
    for first, end, begin, left in np.stack([first, end, begin, left], 1).tolist():
        if at == begin:
            at = left
            continue
        codes[first:end] = False
        while at < end:
            is_code[at] = True
            at += advance[(word_at[at >> 3] >> (8 - (at & 7))) & 0xFFFF]
    return np.append(codes.nonzero()[0], at)

def walk(at, end, words, advance_of, codes):
    """Mark the codes from each bit `at` on, up to its `end`; gives the bits they end at."""
    left = at.copy()
    number = np.arange(len(at))
    while len(at):
        walking = at < end
        if not walking.all():
            left[number] = at
            at, end, number = at[walking], end[walking], number[walking]
        codes[at] = True
        at = at + advance_of.take(peek(words, at))
    return left

def undo_prediction(grid, left, above, corner):
    """uint16 samples of differences (bands, rows, columns), modulo 2**16 (T.81 H.1.2.1).
    The neighbours count by halves; a diagonal depends on the two before it alone."""
    bands, rows, columns = grid.shape
    grid[:, :, 0] = grid[:, :, 0].cumsum(1)
    if (left, above) == (2, 0):
        return grid.cumsum(2).astype(np.uint16)
    grid[:, 0] = grid[:, 0].cumsum(1)
    flat = grid.reshape(bands, -1).T & 0xFFFF  # (rows * columns, bands)
    for diagonal in range(2, rows + columns - 1):
        first, end = max(1, diagonal - columns + 1), min(rows, diagonal)
        at = np.arange(first, end) * (columns - 1) + diagonal
        up = at - columns
        halves = left * flat[at - 1] + above * flat[up]
        halves += corner * flat[up - 1]
        flat[at] = (flat[at] + (halves >> 1)) & 0xFFFF
    return flat.T.astype(np.uint16).reshape(grid.shape)


# ==== Modes ====
# In: the command line. Out: a mode's work, and an exit status.
# Pitfall: a pasted file has no __file__, and sys.argv belongs to the notebook.

TOOL_MODES = {  # they need the repository, and stand in tests/tools
    "phantom": "Make a synthetic data set in the competition's layout.",
    "eda": "Draw and tell what is in a data set.",
    "show": "Draw one study as the models see it.",
    "notebook": "Write a Kaggle notebook ready to push.",
    "demo": "Make phantoms, predict and score them, draw one."}

def data_folder(options, *needed):
    """The Path of --data, which must hold the files needed; else UserError."""
    for name in needed:
        if not (Path(options.data) / name).exists():
            own = "; a CT of your own: predict PATH" if options.mode == "predict" else ""
            raise UserError(f"no {name} in --data {options.data}{own}")
    return Path(options.data)

def training_data(options):
    """({uid: labels (8,)} of the studies with images, {uid: fold}, {uid: mask})."""
    data = data_folder(options, "train.csv", "train_images")
    table = read_truth(data / "train.csv")
    masks = mask_files(data)
    folds = assign_folds(table, options.folds, masks)  # of all: a study keeps its fold
    truth = zip(table[STUDY], table[[*TARGETS]].to_numpy(np.float32))
    folders = {path.name for path in (data / "train_images").glob("*") if path.is_dir()}
    here = {uid: labels for uid, labels in truth if uid in folders}
    if len(here) < len(table):
        say_once(f"{data}/train_images has {len(here)} of the {len(table)} studies of "
                 "train.csv")
    return here, folds, masks

def recipe_from(options, kind):
    """The Recipe that the options of a training make."""
    default = RECIPES[kind]
    return replace(default, **{n: getattr(options, n) for n in vars(default)})

def minutes_of(options):
    """--time-limit in minutes; if none is given, KAGGLE_MINUTES on Kaggle, else 0."""
    return options.time_limit or KAGGLE_MINUTES * KAGGLE.exists()

def say_start(options, starts):
    """Warn, with the scores to expect, if a fold starts from random weights."""
    if options.init == "auto" and not all(starts.values()):
        name = options.backbone  # scores: by the public code and write-ups of the top teams
        say_once(
            f"NO IMAGENET WEIGHTS of {name}: training from scratch, where a score of 0.43 "
            "to 0.52 is expected instead of 0.32 to 0.35; the third to sixth places and "
            "the starting solution began from ImageNet. Attach timm's file of it, "
            f"{name}*.safetensors, .bin or .pth, under {KAGGLE}/input, or put it into "
            "--data or weights/pretrained; --init none does without")

def say_plan(options):
    """Say before the first step what all modes of a preset cost, if one was asked for."""
    if "preset" in options.given:
        say_once(
            f"--preset {options.preset}, with its own values: train-seg to train-patient "
            f"need about {PLANS[options.preset]} on two T4 (counted, not timed: README)")

def training_asked(options, kind):
    """([fold to train], Recipe). UserError, before data is read, if an option cannot be."""
    wanted = [k for k in range(options.folds) if options.fold in ("all", str(k))]
    if not wanted:
        raise UserError(f"--fold {options.fold}: there are folds 0 to {options.folds - 1}")
    if not re.fullmatch(r"\w*", options.name):
        raise UserError(f"--name {options.name}: only letters, digits and _")
    recipe = recipe_from(options, kind)
    if kind == "segmenter" and recipe.size % 16:
        raise UserError(f"--size {recipe.size}: must be a multiple of 16")
    new_model(kind, asdict(recipe))  # raises where the backbone does not fit
    say_plan(options)
    return wanted, recipe

def run_training(options, wanted, samples, folds, task, **made_of):
    """Train the folds that are wanted, of samples (uid, ...); `made_of` names the data."""
    go_on = options.resume or options.fold == "all"
    join_processes(task.device)
    uids = [*dict.fromkeys(uid for uid, *_ in samples)]
    held_out = {k: [uid for uid in uids if folds[uid] == k] for k in wanted}
    starts = {k: init_file(options, task.kind, k, held_out[k]) for k in wanted}
    say_start(options, starts)
    if task.device.type == "cuda":  # batches have few shapes: cuDNN tries what is fastest
        torch.backends.cudnn.benchmark = True
    with stop_signals(minutes_of(options), options.begun) as stop:
        for fold, init in starts.items():
            rest = [s for s in samples if folds[s[0]] != fold or options.folds == 1]
            kept = held_out[fold]
            start = hash_of(init) if init else ""
            made = made_of | {"studies": hash_of(rest, kept), "--init": start}
            seldom = math.ceil(len(kept) / VALIDATION_SHARE / max(len(rest), 1))
            every = getattr(task.recipe, "thin", seldom)  # `thin` epochs show all steps
            name = model_name(task.kind, options.name, fold)
            one = task._replace(
                name=name, train=rest, held_out=kept, made_of=made, every=every)
            train(one, Path(options.weights), stop, options.workers, go_on, init)

def train_segmenters(options):
    """Train segmenters on the studies with masks.
    Reads train.csv, train_images and segmentations of --data; writes segmenter_fold<k>.pt,
    its log and held-out Dice to --weights."""
    wanted, recipe = training_asked(options, "segmenter")
    truth, folds, masks = training_data(options)
    samples = [(uid,) for uid in truth if uid in masks]
    images = Path(options.data) / "train_images"
    if not samples:
        raise UserError(f"no study of train.csv has images and a mask in {options.data}")
    strays = masks.keys() - {path.name for path in Path(options.data).glob("*_images/*")}
    if strays:
        say_once(f"{len(samples)} studies have a mask; {len(strays)} mask files are of no "
                 f"study here, as {masks[min(strays)]}")
    task = segmenter_task(recipe, pick_device(options.device), images, masks)
    samples = usable(samples, task.load, options.workers)
    sums = [(uid, hash_of(masks[uid])) for uid, *_ in samples]
    run_training(options, wanted, samples, folds, task, masks=hash_of(sums))

@dataclass(frozen=True)
class Extraction(Cut):
    """Options of extract."""
    size: int = setting(CROP, "edge of the crops, pixels", least=32, most=512)
    studies: int = setting(0, "studies to cut, drawn by hash; 0: all", least=0)

def refuse_other_crops(folder, heads, wanted):
    """UserError if crops, {uid: CropsHead}, are not as `wanted`, or by other segmenters."""
    for uid, head in heads.items():
        if (head.edge, head.z_margin) != (wanted.edge, wanted.z_margin):
            raise UserError(f"{folder}: has crops of --size {head.edge} --z-margin "
                            f"{head.z_margin}, as of {uid}; others need another --work")
        if not head.made_by <= wanted.made_by:
            raise UserError(f"{folder}: has crops by other segmenters, as of {uid}; these "
                            "need another --work")
    fewer = sum(head.made_by < wanted.made_by for head in heads.values())
    if heads:
        say_once(f"{folder}: crops of {len(heads)} studies exist already, and are kept; "
                 f"{fewer} of them are by fewer segmenters than there are now")

def extract(options):
    """Write the crops of all studies, for the classifiers.
    Reads train_images of --data and the segmenters of --weights; writes one file a study
    under --work. A study that some segmenters held out is masked by the mean of these; any
    other by the mean of all, as predict does. The masks go to --masks as NIfTI. A study
    that has all its files is not read again."""
    say_plan(options)
    truth, _, masks = training_data(options)
    device = pick_device(options.device)
    models = load_models(options.weights, "segmenter", device)
    if not models:
        raise UserError(f"no segmenter in {options.weights}: run train-seg first")
    out = Path(options.work) / options.mask_of
    makers = makers_of(options.weights)
    wanted = CropsHead(options.size, options.z_margin, makers)
    refuse_other_crops(out, crops_heads(out, truth, options.workers), wanted)
    held_out = {path: held_out_of(path) for path in models}
    unseen = set().union(*held_out.values())
    chosen = sorted(truth, key=hash_of)[:options.studies or None]
    if known := {*chosen} & masks.keys() - unseen:
        say_once(
            f"{len(known)} studies are masked by segmenters that may have trained on them")

    def written(uid):
        own_masks = [Path(options.masks, f"{uid}.nii.gz")] if options.masks else []
        return [out / f"{uid}.npz", *own_masks]

    rank, world = ranks()
    mine = chosen[rank::world]
    todo = [uid for uid in mine if not all(path.exists() for path in written(uid))]
    images = Path(options.data) / "train_images"
    volumes = prefetch(lambda uid: read_volume(images / uid, options.workers), todo, 1)
    with stop_signals(minutes_of(options), options.begun) as stop:
        for uid, future in progress(volumes, "study", len(todo)):
            if stop.reason():
                raise Stopped(f"extract: stopped by {stop.reason()}; the same command "
                              "goes on", stop.status())
            own = [models[path] for path, uids in held_out.items() if uid in uids]
            try:
                volume = future.result()
                probability = segment(
                    own or [*models.values()], volume, device, say_of(volume))
                crops = vertebra_slices(
                    volume, probability, options.size, options.mask_of, options.z_margin)
                file, *own_masks = written(uid)
                write_crops(file, crops, options.z_margin, makers)
                for mask in own_masks:
                    write_nifti(mask, vertebra_labels(volume, probability), volume)
            except StudyError as error:
                say(f"study {uid}: {error}; left out")
    print_crops(out, mine, options.workers)

def print_crops(folder, mine, workers):
    """Print in how many studies of this process each vertebra was found. Raises Stopped,
    with status 3, if most have no crops."""
    heads = crops_heads(folder, mine, workers)
    count = sum((head.seen.astype(int) for head in heads.values()), np.zeros(7, int))
    found = ", ".join(f"{name} in {n}" for name, n in zip(VERTEBRAE, count))
    print(f"{folder}: crops of {len(heads)} of {len(mine)} studies; {found}")
    if count.sum() < LEAST_SEEN * 7 * len(heads):
        say(f"{folder}: most vertebrae were not found: train better segmenters first")
    if ranks()[1] == 1 and 2 * len(heads) < len(mine):  # as in predict
        raise Stopped("most studies have no crops: the lines above say why", 3)

def crops_to_train_on(options, folder, truth):
    """({uid: CropsHead}, edge, z margin) of the crops in a folder. UserError if there are
    none, if they are cut in several ways, or if they show too few vertebrae."""
    heads = crops_heads(folder, truth, options.workers)
    if not heads:
        raise UserError(f"no crops in {folder}: run extract first")
    if len(heads) < len(truth):
        say_once(f"{folder}: crops of {len(heads)} of {len(truth)} studies; the others "
                 "are left out")
    share = np.mean([head.seen for head in heads.values()])
    if share < LEAST_SEEN:
        raise UserError(f"{folder}: only {share:.0%} of C1..C7 were found in {len(heads)} "
                        "studies: train better segmenters first")
    cuts = {(head.edge, head.z_margin) for head in heads.values()}
    if len(cuts) > 1:
        raise UserError(f"{folder}: crops of unlike (edge, z margin): {cuts}")
    edge, z_margin = cuts.pop()
    if "z_margin" in options.given and options.z_margin != z_margin:
        raise UserError(f"{folder}: has crops of --z-margin {z_margin}")
    sets = {frozenset(head.made_by) for head in heads.values()}
    if len(sets) > 1:
        say_once(f"{folder}: crops by {len(sets)} different sets of segmenters")
    present = makers_of(options.weights)
    if present and set().union(*sets) - present:
        say_once(f"{folder}: crops by other segmenters than those in --weights")
    return heads, edge, z_margin

def train_classifiers(options):
    """Train classifiers on the crops: of a vertebra, or of all seven and the patient.
    Reads the crops under --work and train.csv of --data; writes vertebra_fold<k>.pt or
    patient_fold<k>.pt (train-patient), its log and held-out answers to --weights."""
    kind = "patient" if options.mode == "train-patient" else "vertebra"
    asked = [[*range(8)]] if kind == "patient" else [[v] for v in range(7)]
    wanted, recipe = training_asked(options, kind)
    truth, folds, _ = training_data(options)
    folder = Path(options.work) / options.mask_of
    heads, edge, z_margin = crops_to_train_on(options, folder, truth)
    labels = np.array([truth[uid] for uid in heads])
    if np.isnan(labels[:, sum(asked, [])]).all():
        raise UserError(f"{options.data}/train.csv: no labels for {options.mode}")
    if recipe.size > edge:
        say_once(f"--size {recipe.size} only enlarges crops of {edge} pixels: extract "
                 "--size cuts larger ones")
    recipe = replace(recipe, z_margin=z_margin)
    task = classifier_task(kind, recipe, pick_device(options.device), folder, truth)
    makers = [(uid, sorted(head.made_by)) for uid, head in heads.items()]
    made_of = dict(labels=hash_of(labels.tolist()), crops=hash_of([*makers, edge]))
    samples = [(uid, targets) for uid in heads for targets in asked]
    run_training(options, wanted, samples, folds, task, **made_of)

def calibration_asked(options):
    """The Calibration of --weights, and {file name: hash} of the models there; an option of
    Answers that was given wins over a fit."""
    hashes = model_hashes(options.weights)
    fitted = read_calibration(options.weights, hashes)
    given = {n: getattr(options, n) for n in vars(Answers()) if n in options.given}
    if given and fitted.answers != Answers():
        say(f"{given} as asked for, in place of the fitted {fitted.answers}")
    return fitted._replace(answers=replace(fitted.answers, **given)), hashes

@dataclass(frozen=True)
class Asked(Answers):
    """All that predict may be given."""
    path: tuple = argument(
        "a CT: a NIfTI or DICOM file, a folder with one series, or of such folders", "*")
    json: bool = setting(False, "with PATH: write answers.json, all that is known")

def predict_own(options):
    """predict, of the paths given."""
    out = Path(options.out if "out" in options.given else "answers")
    folders = [Path(folder) for folder in (out, options.masks) if folder]
    for folder in folders:
        if folder.is_file() or folder.suffix == ".csv":
            raise UserError(f"{folder}: with a PATH, --out and --masks are folders")
    written = {folder.resolve() for folder in folders}
    studies = named_studies(options.path, written)
    for folder in folders:
        try_writing(folder)  # now, not after an hour
    if (out / "answers.json").exists() and not options.json:
        say(f"{out / 'answers.json'} is of an earlier run, and stays: --json renews it")
    masks = {
        name: Path(options.masks, f"{name}.nii.gz") for name in studies if options.masks}
    for mask in masks.values():
        refuse_to_overwrite(mask)
    calibration, hashes = calibration_asked(options)
    weights = f"weights {hash_of(hashes)}, trained on: {calibration.trained_on}"
    note = f"For research, not for diagnosis; {weights}"
    device = pick_device(options.device)
    ensemble = tried_on_device(load_ensemble(options.weights, device, calibration))

    def read(name):
        start = monotonic()
        return read_volume(studies[name], options.workers), monotonic() - start

    rows = []
    futures = prefetch(read, studies, READING_THREADS)  # some may hang
    for name, future in progress(futures, "study", len(studies)):
        rows.append(dict(study=name, path=str(studies[name])))
        try:
            rows[-1] |= answer_own(name, future, ensemble, masks.get(name))
        except Exception as error:  # of this study, or of its mask's file
            if masks and masks[name].resolve() != studies[name].resolve():
                masks[name].unlink(missing_ok=True)  # of an earlier run
            if len(studies) == 1:
                raise
            reason = in_words(error)
            say(f"study {name}: {reason}; no answer")
            rows[-1] |= dict(status="failed", warnings=reason)
        table = write_answers(out, rows, note, options.json)
    print(note)
    print_own(table)
    print(f"{out / 'answers.csv'}: {len(rows)} studies")
    if (table.status == "failed").all():
        raise Stopped("no study has an answer", 2)

def predict(options):
    """Answer every row of test.csv, or one's own studies.
    Reads test.csv and test_images of --data and the models of --weights; writes the
    submission to --out, and predict_report.csv beside it: a row a study, with what was seen
    and odd. With PATH: reads these studies; writes answers.csv to the folder --out (default
    answers), a row a study: where to look, sizes. For research, not for diagnosis."""
    if options.path:
        if options.resume or "time_limit" in options.given:
            raise UserError("--resume and --time-limit are for the competition, not a PATH")
        return predict_own(options)
    if options.json or options.masks:
        raise UserError("--json and --masks go with a PATH, as in: predict STUDY --json")
    data = data_folder(options, "test.csv")
    submission = Submission(Path(options.out), rows_asked(data / "test.csv"))
    rank, world = ranks()
    with stop_signals(minutes_of(options), options.begun) as stop:
        if not options.resume:
            for number, path in report_paths(submission.out).items():
                if number % world == rank:  # of an earlier run
                    path.unlink(missing_ok=True)
            write_submission(submission)  # the prior, whatever fails from here on
        calibration, hashes = calibration_asked(options)
        submission = submission._replace(made_by=hash_of(hashes, calibration))
        write_submission(submission)
        device = pick_device(options.device)
        ensemble = tried_on_device(load_ensemble(options.weights, device, calibration))
        images = data / "test_images"
        predict_studies(images, submission, ensemble, stop, options.workers, options.resume)
    uids = [*dict.fromkeys(uid for _, uid, _ in submission.rows)]
    mine = uids[rank::world]  # each process speaks of its share
    reports = read_reports(submission)
    good = sum(reports.get(uid, {}).get("status") in ("ok", "partial") for uid in mine)
    print(f"{submission.out}: {len(submission.rows)} rows, {len(mine)} studies, "
          f"{len(mine) - good} fell back to a prior")
    if world == 1 and 2 * good < len(mine):  # one of several would end the others
        raise Stopped("most studies got the prior: see predict_report.csv", 3)

@dataclass(frozen=True)
class Evaluation:
    """Options of evaluate."""
    folds: bool = setting(False, "score the held-out answers of the folds in --weights")
    calibrate: bool = setting(False, "with --folds: fit calibration.json, and the blend")

def calibrate(outputs, folds, truth, weights):
    """Write the fit to all held-out answers; gives them, each fold fitted by the others;
    of one fold alone, each fifth of its studies."""
    made = {f"{one.name}_fold{folds[uid]}.pt" for uid in outputs for one in outputs[uid]}
    for name in sorted(made):
        if not (weights / name).exists():
            say(f"{name} is not there, but its held-out answers are, and count in the fit")
        with suppress(UserError):
            load_checkpoint(weights / name)  # says what is not trained to its end
    write_calibration(weights, fit_calibration(outputs, truth))
    if len(outputs) < LEAST_STUDIES:
        say(f"under {LEAST_STUDIES} studies: the blend is not fitted, only scale and shift")
    if len({folds[uid] for uid in outputs}) == 1:
        folds = {uid: k % 5 for k, uid in enumerate(sorted(outputs, key=hash_of))}
    return cross_fitted(outputs, folds, truth)

def evaluate(options):
    """Score a submission, or the folds' held-out answers.
    Reads train.csv (and test_labels.csv of phantoms) of --data, and --submission or, with
    --folds, the *_heldout.csv of --weights; prints the score with its 95 % interval, each
    target's log loss, AUC, sensitivity and specificity where they are equal, Dice (by
    all segmenters: not held out) where there are masks, and how far to believe answers."""
    data, weights = data_folder(options, "train.csv"), Path(options.weights)
    if options.calibrate and not options.folds:
        raise UserError("--calibrate needs --folds: it is fitted to held-out answers")
    truth = read_labels(data)
    if options.folds:
        outputs, folds = read_held_out(weights)
        outputs = {uid: one for uid, one in outputs.items() if uid in truth.index}
        names = pd.Series([one.name for some in outputs.values() for one in some])
        if (counts := names.value_counts()).nunique() > 1:
            say(f"held-out answers by model: {counts.to_dict()}: some folds lack")
        answers = blend(outputs)
    else:
        answers = read_answers(options.submission)
    answered = len(answers)
    answers = answers[answers.index.isin(truth.index)]
    if missing := int(answers.isna().sum().sum()):
        say(f"{missing} answers are missing or no probabilities: scored as the prior")
    answers = answers.fillna(PRIOR_ANSWERS)
    labels = truth.loc[answers.index].to_numpy()
    if np.isnan(labels).all():
        raise UserError(f"nothing to score: no answered study has labels in {data}/")
    if len(answers) < max(answered, len(truth)) and not options.folds:
        say(f"{options.submission}: answers {len(answers)} of {len(truth)} labelled "
            f"studies; unscored: others, and {answered - len(answers)} without labels")
    print_scores(answers.to_numpy(), labels)
    if options.calibrate:
        answers = calibrate(outputs, folds, truth, weights).loc[answers.index]
        print("The same, each fold (of one alone, each fifth of its studies) blended and "
              "calibrated by a fit to the others:")
        print_scores(answers.to_numpy(), labels)
    table = score_table(answers.to_numpy(), labels)
    if not options.folds:
        models = [*load_models(weights, "segmenter", pick_device(options.device)).values()]
        if models:
            table = table.join(mask_table(data, answers.index, models, options.workers))
    print("\nEvery target; fractured: how many are; log loss: without weights:")
    print(table.round(4).to_string(na_rep=""))
    if len(labels) >= LEAST_STUDIES:
        print("\nAnswers of about a size; fewer are fractured, as positives weigh double:")
        print(reliability(answers.to_numpy(), labels).round(3).to_string())

class Mode(NamedTuple):
    """What a mode does, and its options: names of Shared's, and the fields of its own."""
    run: Callable
    shared: str
    own: Any

READING = "data weights device workers"
TRAINING = f"{READING} work fold folds resume time_limit init name preset"
MODES = {"train-seg": Mode(train_segmenters, TRAINING, RECIPES["segmenter"])}
MODES["extract"] = Mode(
    extract, f"{READING} work masks folds time_limit preset", Extraction())
MODES["train-cls"] = Mode(train_classifiers, TRAINING, RECIPES["vertebra"])
MODES["train-patient"] = Mode(train_classifiers, TRAINING, RECIPES["patient"])
MODES["predict"] = Mode(predict, f"{READING} out masks resume time_limit", Asked())
MODES["evaluate"] = Mode(evaluate, f"{READING} submission", Evaluation())

class Parser(argparse.ArgumentParser):
    """A parser that raises UserError, which main says; --fold is no --folds."""
    __init__ = functools.partialmethod(argparse.ArgumentParser.__init__, allow_abbrev=False)
    def error(self, message):
        raise UserError(f"{message}; --help after the mode tells its options")

class Given(argparse.Action):
    """Stores an option's value, if within its limits, and its name among those given."""
    def __init__(self, least, most, **others):
        super().__init__(**others)
        self.least, self.most = least, most

    def __call__(self, parser, namespace, values, option_string=None):
        if not isinstance(values, str):
            within = self.least <= values <= self.most  # NaN is not
            if not within or math.isinf(values):
                limits = f"from {self.least} to {self.most}".replace(" to inf", " on")
                raise argparse.ArgumentError(self, f"{values:g}: must be {limits}")
        setattr(namespace, self.dest, values)
        namespace.given = (*namespace.given, self.dest)

def add_option(parser, one, default):
    """Give a parser the option of a setting, with its meaning, limits and default."""
    name, about = one.name, one.metadata
    flag = "--" + name.replace("_", "-")
    how = dict(help=about["help"], default=default)
    if "positional" in about:
        parser.add_argument(name, nargs=about["count"], metavar=name.upper(), **how)
    elif isinstance(default, bool):
        how["help"] += f" (default: {'on' if default else 'off'})"
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **how)
    else:
        how |= dict(about, type=type(default), choices=about["choices"] or None)
        if default != "":
            how["help"] += " (default: %(default)s)"
        parser.add_argument(flag, action=Given, **how)

def preset_given(argv):
    """The --preset of a command line, known before the parser, whose defaults it sets."""
    parser = Parser("cspine.py", add_help=False)
    parser.add_argument("--preset")
    return parser.parse_known_args(argv)[0].preset

def presets_text(name, defaults):
    """What each preset sets in a mode, as a table."""
    table = pd.DataFrame({
        preset: pd.Series(values.get(name, {}), dtype=object)  # whole numbers stay whole
        for preset, values in PRESETS.items()})
    table["standard"] = [defaults[option] for option in table.index]
    table.index = [f"--{option}".replace("_", "-") for option in table.index]
    return f"What presets set; empty: as standard.\n\n{table.to_string(na_rep='')}"

def build_parser(modes, others=(), preset=""):
    """The parser of {name: Mode}; `others`, {name: text}, only stand in its --help.
    A preset's values become the defaults, so that options which are given win."""
    how = "MODE --help tells what a mode reads, writes and takes."
    parser = Parser("cspine.py", description=__doc__.splitlines()[0], epilog=how)
    parsers = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    for name, mode in modes.items():
        text = textwrap.fill(" ".join(mode.run.__doc__.split()), 79)
        first = mode.run.__doc__.partition("\n")[0]
        one = parsers.add_parser(name, help=first, description=text)
        one.formatter_class = argparse.RawDescriptionHelpFormatter
        one.set_defaults(given=(), begun=monotonic())
        defaults = vars(Shared()) | vars(mode.own)
        if "preset" in mode.shared:
            one.epilog = presets_text(name, defaults)
        defaults |= PRESETS.get(preset, {}).get(name, {})
        shared = [part for part in fields(Shared) if part.name in mode.shared.split()]
        for part in (*shared, *fields(mode.own)):
            add_option(one, part, defaults[part.name])
    for name in others:
        parsers.add_parser(name, help=others[name])
    return parser

@torch.random.fork_rng([])  # a notebook's draws go on
def run_mode(modes, argv, others=()):
    """Run a mode of {name: Mode}: its exit status, and one line if it failed."""
    keep_memory()
    threads, level = cv2.getNumThreads(), cv2.utils.logging.getLogLevel()
    cv2.setNumThreads(1)  # the threads of prefetch share the cores
    cv2.utils.logging.setLogLevel(0)  # else it prints a line a slice of JPEG 2000
    benchmark = torch.backends.cudnn.benchmark  # which trainings switch on
    try:
        refuse_foreign_ranks()
        options = build_parser(modes, others, preset_given(argv)).parse_args(argv)
        with pydicom.config.disable_value_validation():  # uids may be odd
            modes[options.mode].run(options)
        return 0
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        kinds = torch.OutOfMemoryError, MemoryError
        if isinstance(error, kinds) or "can't allocate memory" in text:  # the latter: a CPU
            say("cspine: out of memory: try --batch-size 1, --checkpoint, --device cpu")
            return 2
        if "CUDA error" not in text or "assert triggered" in text:
            raise  # a fault of ours, whose place is worth seeing
        say(f"cspine: the GPU failed: {text:.80}: go on by --resume, or use --device cpu")
        return 2
    except BrokenPipeError:  # whoever read it has gone, as in `| head`
        return 141
    except (UserError, Stopped, OSError) as error:  # such as a folder one may not read
        say(f"cspine: {error}")
        return getattr(error, "status", 2)
    except KeyboardInterrupt:
        say("cspine: interrupted")
        return 130
    finally:
        cv2.setNumThreads(threads)
        cv2.utils.logging.setLogLevel(level)
        torch.backends.cudnn.benchmark = benchmark

def main(argv=None):
    """Run a mode of the command line: its exit status."""
    argv = [*map(str, sys.argv[1:] if argv is None else argv)]
    if argv and argv[0] in TOOL_MODES:
        tools = HERE / "tests/tools"
        if not tools.exists():
            say(f"cspine: {argv[0]} needs the repository: no {tools}")
            return 2
        with suppress(KeyboardInterrupt):
            return subprocess.call([sys.executable, tools, *argv])
        return 130
    return run_mode(MODES, argv, TOOL_MODES)

if __name__ == "__main__" and "__file__" in globals():
    sys.stdout = sys.stdout or open(os.devnull, "w")  # `>&-` has closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")
    with suppress(AttributeError):  # a name that the terminal cannot show; not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")
    status = main()
    with suppress(BrokenPipeError):  # whoever read it has gone
        sys.stdout.flush()
    if "ipykernel" in sys.modules:  # %run in a notebook, whose kernel lives on
        sys.exit(status)
    os._exit(status)  # threads that hang in a file would be waited for
