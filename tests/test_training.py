"""I rely on: a training learns, stops when told, goes on as if nothing had happened, and shares.

Runs are real processes where a kill or an exit status is the point: a server imports the file
once and forks for each. Backbones are timm's tiny `test_` ones, cubes of 32, crops of 48.
"""

import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import cspine
from cspine import RECIPES, STUDY, TARGETS, VERTEBRAE, Stop, Stopped, Task, Trainer, UserError

HERE = Path(__file__).parent
MODE = {"segmenter": "train-seg", "vertebra": "train-cls", "patient": "train-patient"}
BACKBONE = {"segmenter": "test_resnet", "vertebra": "test_efficientnet", "patient": "test_resnet"}
CPU, SMALL_CROP = torch.device("cpu"), 48


# ---- Data, processes, comparisons ----


@pytest.fixture(autouse=True)
def same_here_as_in_children(monkeypatch):
    """One thread, so that sums are made in the same order; small crops."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(cspine, "CROP", SMALL_CROP)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def crops_folder(phantom_data, tmp_path_factory):
    """A --work folder with the crops of the training studies, cut by their true masks."""
    work = tmp_path_factory.mktemp("crops")
    for folder in sorted((phantom_data / "train_images").iterdir()):
        volume = cspine.read_volume(folder)
        labels = cspine.cube_labels(phantom_data / "segmentations" / f"{folder.name}.nii",
                                    volume, 48)
        truth = np.stack([labels == v for v in range(1, 8)]).astype(np.float32)
        crops = cspine.vertebra_slices(volume, truth, SMALL_CROP)
        cspine.write_crops(work / "crops" / f"{folder.name}.npz", crops)
    return work


@pytest.fixture(scope="module")
def arguments(phantom_data, crops_folder):
    """arguments(kind, weights, ...) of a short training of one fold of two."""
    def make(kind, weights, *more):
        hidden = [] if kind == "segmenter" else ["--hidden", "16"]
        return [MODE[kind], "--data", str(phantom_data), "--work", str(crops_folder), "--weights",
                str(weights), "--backbone", BACKBONE[kind], "--size", "32", "--batch-size", "2",
                "--epochs", "2", "--folds", "2", "--fold", "0", "--workers", "1", "--device",
                "cpu", *hidden, *map(str, more)]
    return make


def run_main(argv, stderr, cut=0, environment=()):
    """main(argv) in a child; `cut`: die by SIGKILL half-way through writing that checkpoint."""
    sys.stderr = open(stderr, "w", buffering=1)
    os.environ.update(environment)
    torch.set_num_threads(1)
    cspine.CROP = SMALL_CROP
    save, count = torch.save, [0]

    def save_half(content, path):
        save(content, path)
        count[0] += 1
        if count[0] == cut:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half
    sys.exit(cspine.main(argv))


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """launch(argv, ...) -> a started process; its stderr goes to the file `process.stderr`."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cspine"])
    folder, started = tmp_path_factory.mktemp("stderr"), []

    def start(argv, **options):
        stderr = folder / str(len(started))
        process = context.Process(target=run_main, args=(argv, stderr), kwargs=options)
        process.start()
        process.stderr = stderr
        started.append(process)
        return process
    yield start
    for process in started:
        process.kill()
        process.join()


def finish(process):
    """Exit status and stderr; -n: died by signal n."""
    process.join(120)
    return process.exitcode, process.stderr.read_text()


def wait_for(path, process):
    while not path.exists() and process.is_alive():
        time.sleep(0.01)


def assert_same(one, other, path="state"):
    """Bit for bit, except what clocks and memory say."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"seconds", "evaluation_s", "samples_per_s", "peak_gb"}:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for k, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{path}.{k}")
    elif torch.is_tensor(one):
        assert one.dtype == other.dtype and one.shape == other.shape, path
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), path
    else:
        assert one == other or one != one and other != other, path


def assert_same_training(folder, other, name):
    for end in ("_last.pt", ".pt"):
        assert_same(*(torch.load(f / f"{name}{end}", weights_only=True) for f in (folder, other)))
    logs = [pd.read_csv(f / f"{name}_log.csv") for f in (folder, other)]
    timed = ["seconds", "evaluation_s", "samples_per_s", "peak_gb"]
    pd.testing.assert_frame_equal(*(log.drop(columns=timed) for log in logs))
    pd.testing.assert_frame_equal(*(pd.read_csv(f / f"{name}_heldout.csv")
                                    for f in (folder, other)))


@pytest.fixture(scope="module")
def uninterrupted(arguments, launch, tmp_path_factory):
    """uninterrupted(kind) -> (weights folder of a whole training, its seconds); made once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder, start = tmp_path_factory.mktemp(kind), time.monotonic()
            status, text = finish(launch(arguments(kind, folder)))
            assert status == 0, text
            made[kind] = folder, time.monotonic() - start
        return made[kind]
    return get


# ---- Going on where a run was ended ----


@pytest.mark.parametrize("kind", MODE)
def test_a_training_killed_at_random_moments_gives_the_same_bits(
        kind, uninterrupted, arguments, launch, tmp_path):
    whole, seconds = uninterrupted(kind)
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    argv = arguments(kind, tmp_path, "--resume")
    for waits_for_checkpoint in (False, True):
        process = launch(argv)
        if waits_for_checkpoint:
            wait_for(tmp_path / f"{kind}_fold0_last.pt", process)
        time.sleep(rng.uniform(0, seconds * (0.4 if waits_for_checkpoint else 1)))
        process.kill()
        process.join()
    status, text = finish(launch(argv))
    assert status == 0, (seed, text)
    assert_same_training(whole, tmp_path, f"{kind}_fold0")


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_training_killed_while_it_writes_a_checkpoint_gives_the_same_bits(
        cut, uninterrupted, arguments, launch, tmp_path):
    """Checkpoint 1 is the best of epoch 1, 2 its state, 3 the best or the state of epoch 2."""
    argv = arguments("patient", tmp_path, "--resume")
    status, _ = finish(launch(argv, cut=cut))
    assert status == -signal.SIGKILL
    assert (tmp_path / "patient_fold0.pt").exists() == (cut > 1)
    assert (tmp_path / "patient_fold0_last.pt").exists() == (cut > 2)
    status, text = finish(launch(argv))
    assert status == 0, text
    assert f"step {0 if cut < 3 else 1} of 2" in text
    assert_same_training(uninterrupted("patient")[0], tmp_path, "patient_fold0")


@pytest.mark.parametrize("kind, number", [("segmenter", signal.SIGINT),
                                          ("vertebra", signal.SIGTERM)])
def test_a_signal_ends_a_training_after_the_step_saved(
        kind, number, uninterrupted, arguments, launch, tmp_path):
    longer = [("--epochs", "200"), ("--epochs", "2")]
    process = launch(arguments(kind, tmp_path / "long", *longer[0]))
    wait_for(tmp_path / "long" / f"{kind}_fold0_log.csv", process)
    os.kill(process.pid, number)
    status, text = finish(process)
    assert status == 130
    assert signal.Signals(number).name in text.splitlines()[-1]
    assert "--resume" in text.splitlines()[-1] and "Traceback" not in text
    step = int(text.split(" at step ")[1].split()[0])
    state = torch.load(tmp_path / "long" / f"{kind}_fold0_last.pt", weights_only=True)["state"]
    assert state["step"] == step > 0
