"""How long everything takes, beside the starting solution's way, in one run.

    python tests/studies/bench.py [read|train|predict|scale|gpu|plan|all] [--quick]

Both ways take turns on the same made-up study (512x512, 300 slices; random weights, the true masks
in place of the untrained segmenter's), each in a process of its own; the medians are shown and the
median of the ratios. --quick shrinks study and networks: it shows that the bench works, not how
fast the program is.

The starting solution's way: 128 slices decoded for the cube, repeated to 3 channels; then every
slice decoded again from its file for each of the 7 x 75 crops; contiguous memory, all 105 crops in
one batch, nothing left out, nothing overlapped. Training: a plain contiguous fp32 loop, crops
augmented slice by slice on the CPU, a mask spread over 7 full-size channels that are resized each.

gpu, not part of all: steps of the three trainings at their recipes' batch sizes, with and without
half precision, channels_last and cuDNN's search for the fastest algorithm; how long the card waits
for samples; studies predicted on it.

plan, not part of all: hours, card memory and disk of every preset; nothing is measured.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import cv2
import numpy as np
import pandas as pd
import pydicom
import torch
import torch.nn.functional as F
from pydicom.pixels import get_decoder

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "tools")]

import cspine  # noqa: E402
import kaggle_training  # noqa: E402
from dicom_files import EXPLICIT, JPEG_2000, JPEG_LOSSLESS, dicom_bytes  # noqa: E402
from phantoms import make_phantom, write_mask  # noqa: E402

SYNTAXES = {"uncompressed": EXPLICIT, "JPEG Lossless": JPEG_LOSSLESS, "JPEG 2000": JPEG_2000}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SEED, PHANTOM_EDGE, NOISE_HU = 2, 128, 12  # of the study: C1 to C7 are in view
DISTINCT = 12  # compressed slices that differ; encoding each would take minutes
CPU = torch.device("cpu")
WAYS = "ours", "starting"
OURS = True  # whether this process measures our way
TURN = "your turn\n"


class Scale(NamedTuple):
    """How large the measured thing is."""

    matrix: int
    slices: int
    backbones: dict
    cube: int
    repeats: int
    studies: int  # one after another in a run of predict
    lengths: tuple  # slices, in `scale`


FULL = Scale(512, 300, {k: r.backbone for k, r in cspine.RECIPES.items()}, 128, 3, 2,
             (70, 300, 1000))
QUICK = Scale(128, 30, dict(segmenter="mobilenetv3_small_050", vertebra="lcnet_050",
                            patient="lcnet_050"), 64, 1, 2, (20, 40))


# ------------------------------------------- measuring -------------------------------------------

def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_in_turns(arguments):
    """Run topics in two processes, each of which measures one way when it is its turn: memory
    that one way has freed would serve the other. Ours also prints."""
    command = [sys.executable, __file__, *arguments, "--way"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ours, theirs = both = [subprocess.Popen([*command, way], **pipes) for way in WAYS]
    while waits(ours, print_rest=True) and waits(theirs):  # neither measures before both wait
        values = [measured(process) for process in both]
        for process in both:
            send(process, json.dumps(values))
    for process in both:
        process.stdin.close()  # else one whose fellow has died would wait for ever
    if any([process.wait() for process in both]):
        raise SystemExit("one of the two processes failed")


def waits(process, print_rest=False):
    """Read what a process says until it waits for its turn; False if it ends instead."""
    for line in process.stdout:
        if line == TURN:
            return True
        if print_rest:
            print(line, end="", flush=True)
    return False


def measured(process):
    """What a process measures, whose turn it is."""
    send(process)
    line = process.stdout.readline()
    if not line:
        raise SystemExit("one of the two processes failed")  # and has said why
    return json.loads(line)


def send(process, line=""):
    process.stdin.write(line + "\n")
    process.stdin.flush()


def in_turn(work):
    """[what work() gives in the process of our way, in that of the starting solution's]."""
    print(TURN, end="", flush=True)
    input()
    print(json.dumps(work()), flush=True)
    return json.loads(input())


def compare(ours, theirs, repeats):
    """(median seconds of ours, of theirs, median ratio), measured in turns. Ours has the
    settings that cspine's modes make, theirs has the defaults."""
    work = ours if OURS else theirs
    pairs = [in_turn(lambda: seconds(work)) for _ in range(repeats)]
    mine, other = (statistics.median(side) for side in zip(*pairs))
    return mine, other, statistics.median(b / a for a, b in pairs)


def heading(topic):
    print(f"\n{topic:52}{'ours':>10}{'starting':>10}{'ratio':>8}", flush=True)


def row(stage, ours, theirs=None, ratio=None):
    """One line; figures already in the unit that the stage names."""
    cells = [f"{v:10.4g}" if v is not None else f"{'-':>10}" for v in (ours, theirs)]
    print(f"  {stage:50}" + "".join(cells) + (f"{ratio:8.2f}" if ratio else ""), flush=True)


# ------------------------------------------ a made-up study --------------------------------------

class Study(NamedTuple):
    folder: Path
    mask: Path
    probability: np.ndarray  # (7, D, D, D), what a perfect segmenter would say


def make_study(root, uid, scale, syntax=EXPLICIT, slices=None):
    """A neck phantom of the wanted size as DICOM files and a NIfTI mask."""
    phantom, slices = make_phantom(SEED, PHANTOM_EDGE), slices or scale.slices
    planes = np.rint(np.linspace(0, len(phantom.hu) - 1, slices)).astype(int)
    shape, rng = (slices, scale.matrix, scale.matrix), np.random.default_rng(SEED)
    spacing = [s * n / m for s, n, m in zip(phantom.spacing, phantom.hu.shape, shape)]
    label = np.stack([cv2.resize(phantom.label[z], shape[:0:-1], interpolation=cv2.INTER_NEAREST)
                      for z in planes])
    noise = (rng.standard_normal(shape[1:]) * NOISE_HU).astype(np.float32)
    folder, mask = root / "images" / uid, root / f"{uid}.nii"
    folder.mkdir(parents=True)
    made = {}
    for k, z in enumerate(planes):
        if syntax == EXPLICIT or len(made) < DISTINCT:
            hu = cv2.resize(phantom.hu[z].astype(np.float32), shape[:0:-1]) + np.roll(noise, k, 0)
            stored = np.clip(hu + 1024, 0, 4095).astype(np.uint16)
            data = dicom_bytes(stored, (0.0, 0.0, 0.0), spacing=spacing[1:], bits=12, syntax=syntax)
            made[k] = pydicom.dcmread(io.BytesIO(data))
        dataset = made.pop(k) if syntax == EXPLICIT else made[k * 7 % len(made)]
        dataset.ImagePositionPatient, dataset.InstanceNumber = [0, 0, round(-k * spacing[0], 4)], k
        dataset.save_as(folder / f"{k + 1}.dcm", enforce_file_format=True)
    affine = np.array([[0, 0, spacing[2], 0], [0, spacing[1], 0, 0], [-spacing[0], 0, 0, 0],
                       [0, 0, 0, 1.0]])
    write_mask(phantom.__class__(None, label, spacing, affine, None, None), mask)
    cells = [np.minimum((np.arange(scale.cube) + 0.5) * n / scale.cube, n - 1).astype(int)
             for n in shape]
    small = label[np.ix_(*cells)]
    probability = np.stack([np.where(small == v, 0.9, 0.01) for v in range(1, 8)])
    return Study(folder, mask, probability.astype(np.float32))


def random_models(scale):
    """{kind: model} with random weights, whose batch norms have seen a batch."""
    torch.manual_seed(SEED)
    sizes = dict(segmenter=dict(size=scale.cube))
    models = {kind: cls(scale.backbones[kind], **sizes.get(kind, {}))
              for kind, cls in cspine.KINDS.items()}
    return {kind: model.eval() for kind, model in models.items()}


def write_models(folder, scale):
    """A fold of each kind as checkpoints."""
    folder.mkdir(parents=True)
    for kind, model in random_models(scale).items():
        content = dict(settings=model.settings, tensors=model.state_dict())
        path = folder / f"{kind}_fold0.pt"
        cspine.save_checkpoint(path, kind, cspine.RECIPES[kind], **content)


def write_test_csv(root, uid, count):
    """test.csv that asks for one study `count` times, under names that lead to one folder."""
    images, uids = root / "test_images", [f"{uid}.{k}" for k in range(count)]
    images.mkdir(exist_ok=True)
    for name in uids:
        if not (images / name).exists():
            (images / name).symlink_to((root / "images" / uid).resolve())
    rows = [(f"{name}_{target}", name, target) for name in uids for target in cspine.TARGETS]
    pd.DataFrame(rows, columns=["row_id", cspine.STUDY, "prediction_type"]).to_csv(
        root / "test.csv", index=False)


def see_truth(probability):
    """Make cspine.segment do its work and then answer with the true masks."""
    original = getattr(cspine.segment, "original", cspine.segment)

    def segment(*arguments, **options):
        original(*arguments, **options)
        return probability.copy()
    segment.original, cspine.segment = original, segment


def predict(root, weights):
    """Ours, from the command line's function on."""
    with contextlib.redirect_stdout(io.StringIO()):
        status = cspine.main(["predict", "--data", str(root), "--weights", str(weights), "--out",
                              str(root / "submission.csv"), "--device", "cpu"])
    report = pd.read_csv(root / "predict_report.csv")
    assert status == 0 and set(report.status) == {"ok"}, report.to_string()
    return report


# ------------------------------------ the starting solution's way --------------------------------

def old_decode(path):
    """HU float32 of one slice from its file, by a pydicom plug-in where there is one."""
    dataset = pydicom.dcmread(path)
    if get_decoder(dataset.file_meta.TransferSyntaxUID).is_available:
        stored = dataset.pixel_array
    else:
        stored = cspine.decode_pixels(dataset)[0]
    return stored.astype(np.float32) * dataset.RescaleSlope + dataset.RescaleIntercept


def old_paths(folder):
    return sorted(Path(folder).glob("*.dcm"), key=lambda path: int(path.stem))


def old_window(image, window):
    low = window[0] - window[1] / 2
    return ((image - low) * (255 / window[1])).clip(0, 255).astype(np.uint8)


def old_cube(folder, size):
    """float32 (1, 3, D, D, D) of D slices."""
    paths = old_paths(folder)
    which = np.linspace(0, len(paths) - 1, size).round().astype(int)
    planes = [cv2.resize(old_window(old_decode(paths[z]), cspine.SEGMENTER_WINDOW), (size, size))
              for z in which]
    return torch.from_numpy(np.stack(planes)).float().div(255).expand(1, 3, -1, -1, -1).contiguous()


def old_crops(folder, probability):
    """uint8 (7, 15, 6, S, S): each of 7 x 75 slices decoded from its file."""
    paths, size = old_paths(folder), probability.shape[-1]
    shape = np.array([len(paths), *old_decode(paths[0]).shape])
    steps, edge = cspine.STEPS, cspine.CROP
    out = np.zeros((7, steps, cspine.CHANNELS, edge, edge), np.uint8)
    for v, cells in enumerate(probability):
        inside = np.argwhere(cells > 0.2)
        first, last = inside.min(0), inside.max(0) + 1
        (_, y, x), (_, y1, x1) = first, last
        start, stop = np.floor(first * shape / size).astype(int), np.ceil(last * shape / size)
        stop = stop.astype(int)
        for i, centre in enumerate(np.linspace(start[0], stop[0] - 1, steps).round().astype(int)):
            for j in range(cspine.SLICES_PER_STEP):
                z = min(max(centre + j - 2, 0), len(paths) - 1)
                image = old_decode(paths[z])[start[1]:stop[1], start[2]:stop[2]]
                out[v, i, j] = cv2.resize(old_window(image, cspine.BONE_WINDOW), (edge, edge))
            plane = cells[min(int(z * size / len(paths)), size - 1)]
            out[v, i, -1] = cv2.resize(plane[y:y1, x:x1] * 255, (edge, edge))
    return out


def old_models(models):
    """Contiguous copies, the segmenter's stem for 3 channels."""
    models = {kind: copy.deepcopy(model).to(memory_format=torch.contiguous_format)
              for kind, model in models.items()}
    stem = next(m for m in models["segmenter"].encoder.modules() if isinstance(m, torch.nn.Conv3d))
    stem.in_channels = 3
    stem.weight = torch.nn.Parameter(stem.weight.detach().repeat(1, 3, 1, 1, 1) / 3)
    return models


def old_classifier(model, crops):
    """Outputs for crops uint8 (B, N, 6, S, S), all through the encoder at once."""
    count = crops.shape[:2]
    features = model.encoder.backbone(crops.flatten(0, 1).float().div(127.5).sub(1))
    features = features.unflatten(0, count)
    steps = model.head(model.encoder.lstm(features)[0])[..., 0]
    if not hasattr(model, "patient_head"):
        return steps
    whole = model.patient_lstm(features)[0]
    return steps, model.patient_head(torch.cat([whole.amax(1), whole.mean(1)], 1))[..., 0]


@torch.no_grad()
def old_predict(folder, probability, models, spent):
    """One study; adds the seconds of each stage to spent."""
    stages, clock = {}, time.perf_counter
    start = clock()
    cube = old_cube(folder, probability.shape[-1])
    stages["read"] = clock()
    models["segmenter"](cube).sigmoid().numpy()
    stages["segment"] = clock()
    crops = torch.from_numpy(old_crops(folder, probability))  # (7, 15, 6, S, S)
    stages["crops"] = clock()
    steps = [old_classifier(models["vertebra"], crops).sigmoid().numpy()]
    stages["vertebra"] = clock()
    outputs = old_classifier(models["patient"], crops.flatten(0, 1)[None])
    steps += [x.sigmoid().numpy() for x in outputs]
    stages["patient"] = clock()
    for name, now in stages.items():
        spent.setdefault(name, []).append(now - start)
        start = now


def old_sample(study, size):
    """(cube, masks float32 (7, D, D, D)): the mask as 7 full-size channels, resized each."""
    cube = old_cube(study.folder, size)
    return cube, old_mask(study.mask, size)


def old_mask(path, size):
    """float32 (7, D, D, D)."""
    labels, *_ = cspine.read_nifti(path)
    labels = labels.transpose(2, 1, 0)[::-1, ::-1]
    channels = np.stack([labels == v for v in range(1, 8)]).astype(np.uint8) * 255
    small = [F.interpolate(torch.from_numpy(c)[None, None].float(), (size,) * 3, mode="area")[0, 0]
             for c in channels]
    return torch.stack(small) / 255


def old_augment(image, rng):
    """One slice (S, S, 6) uint8: flips, brightness, affine, blur or noise, distortion, a hole."""
    edge = image.shape[0]
    for axis in (0, 1):
        image = np.flip(image, axis) if rng.random() < 0.5 else image
    image = image.transpose(1, 0, 2) if rng.random() < 0.5 else image
    image = np.ascontiguousarray(image)
    if rng.random() < 0.7:
        table = (np.arange(256) + 255 * rng.uniform(-0.1, 0.1)).clip(0, 255).astype(np.uint8)
        image = table[image]
    if rng.random() < 0.7:
        turn = cv2.getRotationMatrix2D((edge / 2, edge / 2), rng.uniform(-45, 45),
                                       rng.uniform(0.7, 1.3))
        turn[:, 2] += rng.uniform(-0.3, 0.3, 2) * edge
        image = warp(cv2.warpAffine, image, turn, (edge, edge), borderMode=cv2.BORDER_REFLECT_101)
    if rng.random() < 0.5:
        kind = rng.integers(4)
        if kind == 0:
            image = cv2.blur(image, (3, 3))
        elif kind == 1:
            image = np.dstack([cv2.medianBlur(c, 3) for c in np.moveaxis(image, 2, 0).copy()])
        elif kind == 2:
            image = cv2.GaussianBlur(image, (3, 3), 0)
        else:
            grain = rng.standard_normal(image.shape, np.float32) * 2.4
            image = (image + grain).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        camera = np.array([[edge, 0, edge / 2], [0, edge, edge / 2], [0, 0, 1]], np.float32)
        bend = np.float32([rng.uniform(-1, 1)] * 2 + [0, 0, 0])
        maps = cv2.initUndistortRectifyMap(camera, bend, None, camera, (edge, edge), cv2.CV_32FC1)
        image = warp(cv2.remap, image, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    if rng.random() < 0.5:
        y, x = rng.integers(0, edge // 2, 2)
        image[y:y + edge // 2, x:x + edge // 2] = 0
    return image


def warp(function, image, *arguments, **options):
    """OpenCV warps at most four channels at once."""
    parts = [function(np.ascontiguousarray(image[..., k:k + 3]), *arguments, **options)
             for k in (0, 3)]
    return np.concatenate(parts, 2)


def old_crop_sample(files, rng):
    """float32 (15, 6, S, S) of one vertebra: a file and an augmentation a step."""
    steps = [old_augment(np.load(path), rng) for path in files]
    return torch.from_numpy(np.stack(steps).transpose(0, 3, 1, 2).astype(np.float32) / 255)


def old_step(model, optimizer, inputs, loss):
    model.train()
    optimizer.zero_grad()
    loss(inputs).backward()
    optimizer.step()


# --------------------------------------------- topics --------------------------------------------

def our_crops(study, volume=None):
    volume = volume or cspine.read_volume(study.folder, CORES)
    cspine.segmenter_input(volume, study.probability.shape[-1])
    return cspine.vertebra_slices(volume, study.probability)


def old_both(study):
    old_cube(study.folder, study.probability.shape[-1])
    return old_crops(study.folder, study.probability)


def bench_read(scale, root):
    heading(f"read: a study of {scale.slices} slices, {scale.matrix} x {scale.matrix}")
    for name, syntax in SYNTAXES.items():
        study = make_study(root, name.replace(" ", ""), scale, syntax)
        own = syntax == JPEG_LOSSLESS and not get_decoder(syntax).is_available
        ours, theirs, ratio = compare(lambda: our_crops(study), lambda: old_both(study),
                                      scale.repeats)
        row(f"{name}: cube and crops, s", ours, theirs, ratio)
        files = old_paths(study.folder)
        part = files[:: 1 if syntax == EXPLICIT else 4]
        ours, theirs, ratio = compare(lambda: cspine.read_volume(study.folder, CORES),
                                      lambda: [old_decode(p) for p in part], scale.repeats)
        each = theirs / len(part)
        row(f"{name}: slices/s{' (no plug-in: both our decoder)' * own}", len(files) / ours,
            1 / each, each * len(files) / ours)


def bench_predict(scale, root):
    study = make_study(root, "study", scale)
    weights = root / "weights"
    write_models(weights, scale)
    old = old_models(random_models(scale))
    ensemble, load = cspine.load_ensemble(weights, CPU), cspine.load_ensemble
    cspine.load_ensemble = lambda *_: ensemble  # both ways are timed with their models at hand
    heading(f"predict: {scale.slices} slices, {scale.matrix} x {scale.matrix}, one fold of each")
    reports, spent = [], {}
    for name, syntax in SYNTAXES.items():
        if syntax != EXPLICIT:
            study = make_study(root, name.replace(" ", ""), scale, syntax)
        write_test_csv(root, study.folder.name, scale.studies)
        see_truth(study.probability)
        ours, theirs, ratio = compare(
            lambda: reports.append(predict(root, weights)),
            lambda: old_predict(study.folder, study.probability, old, spent), scale.repeats)
        if syntax == EXPLICIT:
            predict_stages(reports, spent, study, scale)
        row(f"{name}: end to end, s a study", ours / scale.studies, theirs, ratio * scale.studies)
    cspine.load_ensemble = load
    for count in (1, scale.studies + 1) if OURS else ():
        write_test_csv(root, "study", count)
        save_truth(root, study)
        row(f"peak memory, fresh process, {count} studies, GB", finish(child(root))["peak_gb"])


def predict_stages(reports, spent, study, scale):
    def medians():
        if OURS:
            return pd.concat(reports).median(numeric_only=True).to_dict()
        times = {stage: statistics.median(times) for stage, times in spent.items()}
        return times | dict(classify=times["vertebra"] + times["patient"])

    ours, theirs = in_turn(medians)
    for stage, name in (("read", "read (beside the networks)"), ("segment", "segmenter"),
                        ("crops", "crops"), ("classify", "classifiers")):
        mine = ours[f"{stage}_s"]
        row(f"{name}, s", mine, theirs[stage], theirs[stage] / mine)
    ours, other, ratio = compare(lambda: our_crops(study), lambda: old_both(study), scale.repeats)
    row("all but the networks, nothing else running, s", ours, other, ratio)


def save_truth(root, study):
    np.save(root / "truth.npy", study.probability)


def child(root, threads=CORES):
    """A fresh process that predicts; finish() waits for it."""
    command = [sys.executable, __file__, "child", "--root", str(root), "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process):
    """{"peak_gb", "seconds"} of a child."""
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"the fresh process failed:\n{output}")
    return json.loads(output.splitlines()[-1])


def run_child(root, threads):
    torch.set_num_threads(threads)
    see_truth(np.load(root / "truth.npy"))
    took = seconds(lambda: predict(root, root / "weights"))
    print(json.dumps(dict(peak_gb=own_peak_gb(), seconds=took)))


def own_peak_gb():
    """Of this program alone: getrusage counts what the process was before exec, its parent, too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return cspine.peak_gb()
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**20


def bench_train(scale, root):
    study = make_study(root, "study", scale)
    (root / "train_images").symlink_to(root / "images")
    heading("train: loading a sample")
    bench_loading(scale, root, study)
    heading("train: a step of batch 1, ours augmenting too, theirs in fp32")
    crops = our_crops(study)
    for kind, sample in training_samples(scale, study, crops).items():
        for half in sorted({False, cspine.half_type(CPU) is not None}):
            bench_step(scale, kind, sample, half)


def bench_loading(scale, root, study):
    def load():  # as train-seg does, once; later epochs find it in memory
        volume = cspine.read_volume(study.folder, CORES)
        cspine.segmenter_input(volume, scale.cube)
        cspine.read_mask(study.mask, volume, (scale.cube,) * 3)

    theirs = lambda: old_sample(study, scale.cube)  # noqa: E731
    row("cube with mask, first epoch, s", *compare(load, theirs, scale.repeats))
    volume = cspine.read_volume(study.folder, CORES)
    row("mask alone, s", *compare(lambda: cspine.read_mask(study.mask, volume, (scale.cube,) * 3),
                                  lambda: old_mask(study.mask, scale.cube), scale.repeats))
    crops, rng = our_crops(study, volume), np.random.default_rng(SEED)
    cspine.write_crops(root / "crops.npz", crops)
    files = [root / f"{k}.npy" for k in range(cspine.STEPS)]
    for path, step in zip(files, crops[3]):
        np.save(path, np.ascontiguousarray(step.transpose(1, 2, 0)))

    def ours():
        sample = torch.from_numpy(cspine.read_crops(root / "crops.npz", [3]))
        cspine.augment_crops(sample, [rng])

    def other():
        old_crop_sample(files, rng)

    repeat = 5 * scale.repeats
    mine, old, ratio = compare(ours, other, repeat)
    row("a vertebra's crops, loaded and augmented, samples/s", 1 / mine, 1 / old, ratio)


def training_samples(scale, study, crops):
    """{kind: a sample}, as the loaders give it."""
    labels = (study.probability.argmax(0) + 1) * (study.probability.max(0) > 0.5)
    cube = (old_cube(study.folder, scale.cube)[0, 0] * 255).byte().numpy()
    return dict(segmenter=(cube, labels.astype(np.uint8)),
                vertebra=(crops[3], np.zeros(1, np.float32)),
                patient=(crops.reshape(-1, *crops.shape[2:]), np.zeros(8, np.float32)))


def new_task(scale, kind, device, **changes):
    """A task to make steps with, of the recipe but for the scale and the changes."""
    if kind == "segmenter":
        changes["size"] = scale.cube
    recipe = replace(cspine.RECIPES[kind], backbone=scale.backbones[kind], **changes)
    batch = cspine.segmenter_batch if kind == "segmenter" else cspine.classifier_batch
    return cspine.Task(kind, recipe, device, None, batch, None, None)


def bench_step(scale, kind, sample, half):
    task = new_task(scale, kind, CPU, batch_size=1, half=half)
    recipe, trainer = task.recipe, cspine.Trainer(task)
    model = old_models(random_models(scale))[kind]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    tensors = [torch.from_numpy(x)[None] for x in sample]

    def loss(inputs):
        if kind == "segmenter":
            cube = inputs[0][:, None].expand(-1, 3, -1, -1, -1) / 255
            return cspine.segmenter_loss(model(cube), inputs[1])
        return cspine.classifier_loss(old_classifier(model, inputs[0]), inputs[1])

    row(f"{kind} ({recipe.backbone}){', --half' * half}, s", *compare(
        lambda: trainer.update(task, [(sample, np.random.default_rng(SEED))], 100),
        lambda: old_step(model, optimizer, tensors, loss), scale.repeats))


def bench_scale(scale, root):
    heading("scale: all but the networks, s a study")
    studies = {n: make_study(root, f"n{n}", scale, slices=n) for n in scale.lengths}
    for n, study in studies.items():
        row(f"{n} slices", *compare(lambda: our_crops(study), lambda: old_both(study),
                                    scale.repeats))
    if not OURS:
        return
    study = studies[scale.lengths[1]]
    write_models(root / "weights", scale)
    save_truth(root, study)
    write_test_csv(root, study.folder.name, 2 * scale.studies)
    seconds_alone = finish(child(root))["seconds"]
    rate = 3600 * 2 * scale.studies / seconds_alone
    heading("scale: predict from the command line, models' loading included")
    row(f"1 process, {CORES} threads, studies/hour", rate)
    roots = [half_of(root, k, study, scale.studies) for k in range(2)]
    both = [child(half, max(1, CORES // 2)) for half in roots]
    slowest = max(finish(process)["seconds"] for process in both)
    row(f"2 processes, {max(1, CORES // 2)} threads each, studies/hour",
        3600 * 2 * scale.studies / slowest)
    estimate_t4(scale, seconds(lambda: our_crops(study)))


def gpu_steps(kind, sample, scale, device, layout, half, search, count):
    """(seconds of a step, GB of the card), a batch as large as the recipe's."""
    flat = dict(channels_last=torch.contiguous_format, channels_last_3d=torch.contiguous_format)
    torch.backends.cudnn.benchmark = search
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, torch.backends.cudnn, "benchmark", False)
        if layout == "contiguous":
            stack.enter_context(mock.patch.multiple(torch, **flat))
        if not half:
            stack.enter_context(mock.patch.object(cspine, "half_type", lambda device: None))
        task = new_task(scale, kind, device, **{} if kind == "segmenter" else {"mixup": 0.0})
        trainer = cspine.Trainer(task)
        if kind == "segmenter" and layout == "channels_last":  # not what new_model chooses
            trainer.model.to(memory_format=torch.channels_last_3d)
        samples = [(sample, np.random.default_rng(k)) for k in range(task.recipe.batch_size)]
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):  # the first steps choose algorithms
            trainer.update(task, samples, 1000)
        step = functools.partial(trainer.update, task, samples, 1000)
        times = [seconds(step) for _ in range(count)]
    memory = torch.cuda.max_memory_allocated() / 2**30
    del trainer, step
    torch.cuda.empty_cache()
    return statistics.median(times), memory


def bench_gpu(scale, root):
    if not torch.cuda.is_available():
        return print("no GPU: nothing measured")
    device, count = torch.device("cuda", 0), 4 * scale.repeats
    print(f"\n{torch.cuda.get_device_name(0)}, {os.cpu_count()} cores: a step of training")
    study = make_study(root, "study", scale)
    crops = our_crops(study)
    samples, at_hand = training_samples(scale, study, crops), {}
    for kind, sample in samples.items():
        size = cspine.RECIPES[kind].batch_size
        for half in (True, False):
            for layout, search in (("channels_last", True), ("channels_last", False),
                                   ("contiguous", True)):
                took, memory = gpu_steps(kind, sample, scale, device, layout, half, search, count)
                at_hand.setdefault(kind, took)
                print(f"  {kind:10} batch {size}  {'half' if half else 'fp32'}  {layout:13} "
                      f"{'search' if search else '':6} {took * 1e3:8.1f} ms "
                      f"{size / took:8.1f} samples/s {memory:6.1f} GB", flush=True)
    cspine.write_crops(root / "crops.npz", crops)
    for kind, which in (("vertebra", [3]), ("patient", [*range(7)])):
        size, total = cspine.RECIPES[kind].batch_size, 8 * cspine.RECIPES[kind].batch_size
        load = cspine.prefetch(lambda k: cspine.read_crops(root / "crops.npz", which),
                               range(total), os.cpu_count(), total)
        each = seconds(lambda: [future.result() for _, future in load]) / total * size
        print(f"  {kind}: {os.cpu_count()} threads load a batch in {each * 1e3:.1f} ms; the card "
              f"waits {max(0, 1 - at_hand[kind] / each):.0%} of the time")
    gpu_predict(scale, root, study)


def gpu_predict(scale, root, study):
    write_models(root / "weights", scale)
    write_test_csv(root, study.folder.name, 4 * scale.studies)
    see_truth(study.probability)
    with contextlib.redirect_stdout(io.StringIO()):
        took = seconds(lambda: cspine.main([
            "predict", "--data", str(root), "--weights", str(root / "weights"), "--out",
            str(root / "submission.csv"), "--device", "cuda"]))
    report = pd.read_csv(root / "predict_report.csv")
    later = report.iloc[1:].mean(numeric_only=True)  # the first one chooses algorithms
    print(f"  predict: {len(report)} studies in {took:.1f} s, loading included; a study after the "
          f"first: read {later.read_s:.2f} (beside the others), segmenter {later.segment_s:.2f}, "
          f"crops {later.crops_s:.2f}, classifiers {later.classify_s:.2f} s; {set(report.status)}")


def half_of(root, k, study, count):
    """A data folder of its own for one of two processes."""
    half = root / f"half{k}"
    half.mkdir()
    for name in ("images", "weights"):
        (half / name).symlink_to(root / name)
    save_truth(half, study)
    write_test_csv(half, study.folder.name, count)
    return half


def estimate_t4(scale, others):
    """Hours for the hidden test set with 5 + 5 + 5 folds on two T4, and what that rests on."""
    from torch.utils.flop_counter import FlopCounterMode

    studies, folds, cards, tera = 1500, 5, 2, 10.0
    crops = 7 * cspine.STEPS
    shapes = dict(segmenter=(1, 1, *[scale.cube] * 3), vertebra=(7, cspine.STEPS),
                  patient=(1, crops))
    total = 0.0
    for kind, model in random_models(scale).items():
        shape = shapes[kind]
        if kind != "segmenter":
            shape += (cspine.CHANNELS, cspine.CROP, cspine.CROP)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.ones(shape))
        print(f"  {kind} ({scale.backbones[kind]}): {counter.get_total_flops() / 1e12:.3f} TFLOP "
              "a study")
        total += counter.get_total_flops() / 1e12
    card = folds * total / tera
    study = max(card, others)
    hours = studies * study / cards / 3600
    print(f"  estimate for {studies} studies, {folds} folds of each kind, {cards} x T4: "
          f"{hours:.1f} h of the 9 h\n"
          f"    rests on: {tera:.0f} TFLOP/s reached of a T4's 65 in half precision (assumed); "
          f"a study then takes\n    {card:.2f} s of a card, beside {others:.2f} s of reading and "
          f"cropping on {CORES} cores as measured here;\n    a process a card, each with half of "
          "Kaggle's 4 cores; reading overlaps with the networks")


# -------------------------------------------- the plan -------------------------------------------

TRAINED_STUDIES, MASKED_STUDIES = 2019, 87  # of the competition
MACHINES = {"2 x T4 16 GB": (2, kaggle_training.CARD_TFLOPS), "one 24 GB card": (1, 15.0)}
HEAD = """
The plan of each preset on {studies} studies, {masked} of them with masks. Counted: operations, and
what is kept for the backward pass (2 bytes a value) with 20 bytes a weight. Assumed, not measured:
{rates}, {extract:g} s a study and process for extract,
crops of {crops:g} MB a study at {edge} pixels. A second preset takes the crops of the first.
| preset | machine | train-seg h | extract h | train-cls h | train-patient h | trainings h | all h | \
card GB | disk GB |
|---|---|---|---|---|---|---|---|---|---|"""


def values_kept(module, shape):
    """How many values a module keeps for the backward pass of an input, counted on shapes."""
    module = module.to("meta").train()
    kept = {}

    def pack(tensor):
        kept[id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.empty(shape, device="meta"))
    own = {id(one) for one in module.parameters()}
    return sum(tensor.numel() for key, tensor in kept.items() if key not in own)


def card_gb(kind, recipe, cards):
    """GB on a card in a step: kept for the backward pass, and the weights with their average,
    gradient and AdamW's two moments."""
    model, edge = cspine.new_model(kind, asdict(recipe)), recipe.size
    part, shape, images = model, (1, 1, edge, edge, edge), 1
    if kind != "segmenter":
        part, shape = model.encoder.backbone, (1, cspine.CHANNELS, edge, edge)
        images = (7 if kind == "patient" else 1) * cspine.STEPS // recipe.thin
    weights = sum(one.numel() for one in model.parameters())
    samples = max(recipe.batch_size // cards, 2 if getattr(recipe, "mixup", 0) else 1)
    return (2 * values_kept(part, shape) * images * samples + 20 * weights) / 1e9


def bench_plan():
    """Print the table of the presets: hours, memory of a card and disk, by counts and guesses."""
    rates = ", ".join(f"{rate:g} TFLOP/s a card of {name}" for name, (_, rate) in MACHINES.items())
    print(HEAD.format(
        studies=TRAINED_STUDIES, masked=MASKED_STUDIES, rates=rates, edge=cspine.CROP,
        extract=kaggle_training.EXTRACT_S, crops=kaggle_training.CROPS_MB))
    for preset in cspine.PRESETS:
        disk = kaggle_training.crops_gb(preset, TRAINED_STUDIES)
        for name, (cards, rate) in MACHINES.items():
            hours = kaggle_training.planned_hours(
                preset, TRAINED_STUDIES, MASKED_STUDIES, cards, rate)
            needed = []
            for mode, kind in kaggle_training.STEPS.items():
                if kind:
                    options = kaggle_training.options_of(preset, mode)
                    needed.append(card_gb(kind, cspine.recipe_from(options, kind), cards))
            whole = sum(hours.values())
            shown = [*hours.values(), whole - hours["extract"], whole, max(needed), disk]
            print(f"| {preset} | {name} | " + " | ".join(f"{x:.1f}" for x in shown) + " |")


def main():
    global OURS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topic", nargs="?", default="all",
                        choices=[*TOPICS, "plan", "all", "child"])
    parser.add_argument("--quick", action="store_true", help="small networks and study, once")
    parser.add_argument("--repeats", type=int, help="turns of either way")
    parser.add_argument("--threads", type=int, default=CORES,
                        help="of torch in a process; 1 on a machine busy with other things")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.topic == "child":
        return run_child(o.root, o.threads)
    if o.topic == "plan":
        return bench_plan()
    scale = QUICK if o.quick else FULL
    scale = scale._replace(repeats=o.repeats or scale.repeats)
    torch.set_num_threads(o.threads)
    if not o.way:
        print(f"{platform.machine()}, {CORES} cores, {o.threads} threads, torch "
              f"{torch.__version__}, "
              f"{'quick: shows that the bench works' if o.quick else 'full size'}; median of "
              f"{scale.repeats}, ratio = starting / ours (of rates: ours / starting)", flush=True)
        if o.topic != "gpu":
            return measure_in_turns(sys.argv[1:])
    OURS = o.way != WAYS[1]
    cv2.utils.logging.setLogLevel(0)  # else a line a slice of JPEG 2000
    if OURS:
        cv2.setNumThreads(1)  # as cspine's modes do; the starting way has the defaults
        cspine.keep_memory()
    for name, bench in TOPICS.items():
        if o.topic == name or (o.topic == "all" and name != "gpu"):
            with tempfile.TemporaryDirectory() as folder:
                bench(scale, Path(folder))


TOPICS = dict(read=bench_read, train=bench_train, predict=bench_predict, scale=bench_scale,
              gpu=bench_gpu)

if __name__ == "__main__":
    main()
