"""I rely on: a training learns, stops when told, goes on as if nothing had happened, and shares.

Runs are real processes where a kill or an exit status is the point: a server imports the file
once and forks for each. Backbones are timm's tiny `test_` ones, cubes of 32, crops of 48.
"""

import itertools
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import cspine
from cspine import PRIOR, RECIPES, STUDY, Stop, Stopped, Task, Trainer, UserError
from limits import at_cells
from phantoms import make_phantom

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
    monkeypatch.setattr(cspine.vertebra_slices, "__defaults__", (SMALL_CROP, "last", 1.0))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def crops_folder(phantom_data, tmp_path_factory):
    """A --work folder with the crops of the training studies, cut by their true masks."""
    work = tmp_path_factory.mktemp("crops")
    for folder in sorted((phantom_data / "train_images").iterdir()):
        volume = cspine.read_volume(folder)
        labels = cspine.read_mask(phantom_data / "segmentations" / f"{folder.name}.nii", volume,
                                  (48, 48, 48))
        truth = np.stack([labels == v for v in range(1, 8)]).astype(np.float32)
        crops = cspine.vertebra_slices(volume, truth, SMALL_CROP)
        cspine.write_crops(work / "last" / f"{folder.name}.npz", crops)
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


def run_main(argv, stderr, cut=0, environment=(), keep=""):
    """main(argv) in a child; `cut`: die by SIGKILL half-way through writing that checkpoint;
    `keep`: a file for the parameters of this very process when it saves its state."""
    sys.stderr = open(stderr, "w", buffering=1)
    os.environ.update(environment)
    torch.set_num_threads(1)
    cspine.CROP = SMALL_CROP
    cspine.vertebra_slices.__defaults__ = SMALL_CROP, "last", 1.0
    save, count = torch.save, [0]

    def save_half(content, file):
        save(content, file)
        count[0] += 1
        if count[0] == cut:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def save_own(trainer, path, task):
        if keep:
            save([p.detach() for p in trainer.model.parameters()], keep)
        save_state(trainer, path, task)

    torch.save = save_half
    save_state, Trainer.save = Trainer.save, save_own
    sys.exit(cspine.main(argv))


@pytest.fixture(scope="module")
def launch(start_process, tmp_path_factory):
    """launch(argv, ...) -> a started process; its stderr goes to the file `process.stderr`."""
    folder = tmp_path_factory.mktemp("stderr")
    numbers = itertools.count()

    def start(argv, **options):
        stderr = folder / str(next(numbers))
        process = start_process(run_main, argv, stderr, **options)
        process.stderr = stderr
        return process
    return start


def finish(process):
    """Exit status and stderr; -n: died by signal n."""
    process.join(600)
    return process.exitcode, process.stderr.read_text()


def wait_for(path, process):
    while not path.exists() and process.is_alive():
        time.sleep(0.01)


def assert_same(one, other, path="state"):
    """Bit for bit, except what clocks and memory say."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"seconds", "slowest", "samples_per_s", "peak_gb"}:
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
    timed = ["seconds", "samples_per_s", "peak_gb"]
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
    """Checkpoint 1 holds the weights of epoch 1, 2 its state, 3 the weights of epoch 2."""
    argv = arguments("patient", tmp_path, "--resume")
    status, _ = finish(launch(argv, cut=cut))
    assert status == -signal.SIGKILL
    assert (tmp_path / "patient_fold0.pt").exists() == (cut > 1)
    assert (tmp_path / "patient_fold0_last.pt").exists() == (cut > 2)
    status, text = finish(launch(argv))
    assert status == 0, text
    assert text.count("patient_fold0  epoch 1 ") == (cut < 3)  # else not done again
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
    assert state["progress"]["step"] == step > 0


def test_finished_folds_are_not_repeated_and_the_unfinished_one_goes_on(
        arguments, tmp_path, capsys):
    """And `evaluate --folds` scores the held-out answers of all folds."""
    def run(*more):
        assert cspine.main(arguments("vertebra", tmp_path, *more)) == 0
        return capsys.readouterr().err
    run()
    first = (tmp_path / "vertebra_fold0.pt").stat().st_mtime_ns
    assert "vertebra_fold1: stopped by --time-limit" in run("--fold", "all", "--time-limit", "1e-6")
    assert not (tmp_path / "vertebra_fold1.pt").exists()
    assert "vertebra_fold1  epoch 2" in run("--fold", "all")
    second = (tmp_path / "vertebra_fold1.pt").stat().st_mtime_ns
    assert "epoch" not in run("--fold", "all")
    assert first == (tmp_path / "vertebra_fold0.pt").stat().st_mtime_ns
    assert second == (tmp_path / "vertebra_fold1.pt").stat().st_mtime_ns
    data = arguments("vertebra", tmp_path)[2]
    assert cspine.main(["evaluate", "--folds", "--data", data, "--weights", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("4 studies")
    tables = [pd.read_csv(tmp_path / f"vertebra_fold{k}_heldout.csv") for k in (0, 1)]
    assert list(tables[0]) == [STUDY, *cspine.STEP_TARGETS]  # 15 steps of each vertebra
    assert pd.concat(tables)[STUDY].nunique() == sum(map(len, tables)) == 4


@pytest.mark.parametrize("option, value", [("--lr", "0.1"), ("--hidden", "8"), ("--folds", "4")])
def test_a_run_of_other_options_or_data_is_not_gone_on_with(
        option, value, uninterrupted, arguments, capsys):
    folder = uninterrupted("vertebra")[0]
    before = (folder / "vertebra_fold0_last.pt").read_bytes()
    assert cspine.main(arguments("vertebra", folder, "--resume", option, value)) == 2
    assert "made with other" in capsys.readouterr().err
    assert (folder / "vertebra_fold0_last.pt").read_bytes() == before


def test_a_training_that_was_cut_short_is_not_begun_anew_unasked(
        uninterrupted, arguments, tmp_path, capsys):
    """Its work would be overwritten; a finished model is, and that is said."""
    folder = uninterrupted("vertebra")[0]
    last = tmp_path / "vertebra_fold0_last.pt"
    last.write_bytes((folder / last.name).read_bytes())
    assert cspine.main(arguments("vertebra", tmp_path)) == 2
    assert f"{last}: of an earlier run: --resume goes on" in capsys.readouterr().err
    last.unlink()
    (tmp_path / "vertebra_fold0.pt").write_bytes(b"a model")
    assert cspine.main(arguments("vertebra", tmp_path, "--time-limit", "1e-6")) == 0
    assert "vertebra_fold0.pt is there already, and will be" in capsys.readouterr().err


def test_with_one_fold_the_held_out_answers_say_that_they_are_none(
        arguments, tmp_path, capsys):
    argv = arguments("vertebra", tmp_path, "--folds", "1", "--epochs", "1")
    assert cspine.main(argv) == 0
    path = tmp_path / "vertebra_fold0_heldout.csv"
    assert (pd.read_csv(path).trained_on == 1).all()
    assert not cspine.held_out_of(tmp_path / "vertebra_fold0.pt")
    assert cspine.main(["evaluate", "--folds", "--data", argv[2], "--weights", str(tmp_path)]) == 0
    assert "were trained on: no fair score" in capsys.readouterr().err


def test_labels_that_are_all_unknown_are_nothing_to_train_on(
        phantom_data, arguments, tmp_path, capsys):
    table = pd.read_csv(phantom_data / "train.csv")
    table[list(cspine.VERTEBRAE)] = np.nan
    table.to_csv(tmp_path / "train.csv", index=False)
    (tmp_path / "train_images").symlink_to(phantom_data / "train_images")
    argv = arguments("vertebra", tmp_path / "w", "--data", str(tmp_path))
    assert cspine.main(argv) == 2
    assert "no labels for train-cls" in capsys.readouterr().err


def test_a_time_limit_counts_what_reading_the_masked_studies_took(
        arguments, tmp_path, monkeypatch):
    """87 studies take minutes to read."""
    usable, left = cspine.usable, []

    def slow(*given):
        time.sleep(0.5)
        return usable(*given)
    monkeypatch.setattr(cspine, "usable", slow)
    monkeypatch.setattr(
        cspine, "train", lambda task, weights, stop, *others: left.append(stop.left()))
    assert cspine.main(arguments("segmenter", tmp_path, "--time-limit", "10")) == 0
    assert 0 < left[0] < 599.5


def test_mask_files_of_no_study_are_told_of(phantom_data, arguments, tmp_path, capsys):
    for name in ("train.csv", "train_images"):
        (tmp_path / name).symlink_to(phantom_data / name)
    (tmp_path / "segmentations").mkdir()
    studies = {folder.name for folder in (phantom_data / "train_images").iterdir()}
    masks = sorted((phantom_data / "segmentations").iterdir())
    first, *others = [mask for mask in masks if mask.stem in studies]
    for mask in others:
        (tmp_path / "segmentations" / mask.name).symlink_to(mask)
    (tmp_path / "segmentations" / f"{first.stem}_seg.nii").symlink_to(first)
    argv = arguments("segmenter", tmp_path / "w", "--data", str(tmp_path), "--time-limit", "1e-6")
    assert cspine.main(argv) == 0
    said = capsys.readouterr().err
    assert f"{len(others)} studies have a mask; 1 mask files are of no study here, as " in said
    assert f"{first.stem}_seg.nii" in said


def test_a_checkpoint_of_another_version_is_refused_in_one_line(
        uninterrupted, arguments, tmp_path, capsys):
    path = tmp_path / "vertebra_fold0_last.pt"
    content = torch.load(uninterrupted("vertebra")[0] / path.name, weights_only=True)
    name = next(iter(content["state"]["model"]))
    content["state"]["model"]["older." + name] = content["state"]["model"].pop(name)
    torch.save(content, path)
    assert cspine.main(arguments("vertebra", tmp_path, "--resume")) == 2
    assert "made with another version" in capsys.readouterr().err.splitlines()[-1]


# ---- A toy: what the loop itself does ----

TOY = replace(RECIPES["vertebra"], backbone="test_convnext3", size=32, epochs=3, batch_size=4,
              hidden=16, dropout=0, drop_path=0, mixup=0)


def toy_load(sample, first=0):
    k = sample[0]
    noise = np.random.default_rng(k).integers(1, 256, (15, 6, 48, 48), dtype=np.uint8)
    return noise, np.array([k % 3 == 0], np.float32)


def toy_samples(count):
    return [(k,) for k in range(count)]


def toy_task(**changes):
    """Eight samples of noise, one fracture in three; no BatchNorm, so that samples are apart."""
    task = Task(kind="vertebra", name="vertebra_fold0", recipe=TOY, device=CPU,
                train=toy_samples(8), load=toy_load, loss=cspine.classifier_batch, held_out=["a"],
                answer=lambda model, uid: [0.5],
                judge=lambda table: {"score": (table.C1 - 0.2).abs().mean()})
    return task._replace(**changes)


def toy_batch(task, count=4):
    return [(task.load(k), np.random.default_rng(k)) for k in task.train[:count]]


def gradients(task, batch):
    trainer = Trainer(task)
    trainer.update(task, batch, 10)
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_blocks_computed_twice_have_the_same_loss_and_gradient():
    """--checkpoint; also where branches are left out at random."""
    for backbone in ("test_convnext3", "test_efficientnet"):
        recipe, trainers = replace(TOY, backbone=backbone, drop_path=0.3), []
        for twice in (False, True):
            task = toy_task(recipe=replace(recipe, checkpoint=twice))
            trainers.append((Trainer(task), task))
            trainers[-1][0].update(task, toy_batch(task), 10)
        plain, twice = ([p.grad for p in one.model.parameters()] for one, _ in trainers)
        assert trainers[0][0].state.losses == trainers[1][0].state.losses
        assert all((a is None) == (b is None) for a, b in zip(plain, twice))
        assert all(torch.equal(a, b) for a, b in zip(plain, twice) if a is not None)


def test_gradients_are_clipped_to_the_norm_of_the_recipe():
    task = toy_task(recipe=replace(TOY, clip=0.01))
    assert gradients(task, toy_batch(task)).norm() < 0.0101


def test_a_scaled_gradient_is_clipped_like_any_other():
    """A T4's float16 scales it by 65,536: clipped before it is divided, nothing would be left."""
    task = toy_task(recipe=replace(TOY, clip=0.01))
    trainer = Trainer(task)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
    trainer.update(task, toy_batch(task), 10)
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    plain = gradients(task, toy_batch(task))
    assert found.norm().item() == pytest.approx(plain.norm().item(), rel=1e-3)


def test_dropout_is_drawn_anew_at_every_step_on_every_process_and_by_every_seed(monkeypatch):
    def drawn(rank, seed):
        def loss(model, *_):
            seen.append(torch.rand(()).item())
            return model.head[0].bias.sum()

        seen = []
        monkeypatch.setenv("RANK", str(rank))
        task = toy_task(recipe=replace(TOY, seed=seed), loss=loss)
        trainer = Trainer(task)
        for _ in range(3):
            trainer.update(task, toy_batch(task, 1), 10)
        return seen

    whole = drawn(0, 0) + drawn(1, 0) + drawn(0, 1)
    assert len({*whole}) == 9 and drawn(0, 0) == whole[:3]


def broken_loss(steps):
    """The loss, but without a number at these steps."""
    done = [0]

    def loss(*arguments):
        done[0] += 1
        return cspine.classifier_batch(*arguments) * (math.nan if done[0] in steps else 1)
    return loss


def test_steps_without_a_finite_gradient_are_left_out_and_counted(tmp_path):
    task = toy_task(loss=broken_loss([2, 3]))
    cspine.train(task, tmp_path, Stop())
    log = pd.read_csv(tmp_path / "vertebra_fold0_log.csv")
    assert list(log.skipped_steps) == [1, 2, 2]
    assert log.train_loss.notna().all()
    tensors = torch.load(tmp_path / "vertebra_fold0.pt", weights_only=True)["tensors"]
    assert all(t.isfinite().all() for t in tensors.values())


def test_a_skipped_step_leaves_the_weights_alone():
    task = toy_task(loss=broken_loss([1]))
    trainer, fresh = Trainer(task), Trainer(task)
    trainer.update(task, toy_batch(task), 10)
    assert trainer.state.step == trainer.state.skipped == 1
    assert_same(trainer.model.state_dict(), fresh.model.state_dict())


def test_a_step_that_overflows_on_the_way_forward_leaves_the_norms_alone():
    """Norms measure a batch before its loss is known; averages would never lose a NaN."""
    task = toy_task(recipe=replace(TOY, backbone="resnet18d"))
    trainer, fresh = Trainer(task), Trainer(task)
    endless = [((np.full_like(crops, 255) * np.float32("inf"), labels), rng)
               for (crops, labels), rng in toy_batch(task)]
    trainer.update(task, endless, 10)
    assert trainer.state.skipped == 1
    for model in (trainer.model, trainer.averaged):
        assert_same(model.state_dict(), fresh.model.state_dict())
    trainer.update(task, toy_batch(task), 10)
    assert trainer.state.skipped == 1
    assert all(b.isfinite().all() for b in trainer.averaged.buffers())


def test_a_training_gives_up_when_no_gradient_is_finite_any_more(tmp_path):
    task = toy_task(loss=broken_loss(range(100)), recipe=replace(TOY, epochs=50))
    with pytest.raises(UserError, match="steps without a finite gradient: lower --lr"):
        cspine.train(task, tmp_path, Stop())


def test_a_time_limit_leaves_room_for_the_evaluation_and_is_kept(tmp_path):
    """10 s a step, 100 s an evaluation, two steps an epoch, 300 s: two epochs fit, not three."""
    now = [0.0]

    def loss(*arguments):
        now[0] += 10
        return cspine.classifier_batch(*arguments)

    def score(model, uid):
        now[0] += 100
        return [0.5]

    task = toy_task(loss=loss, answer=score)
    with pytest.raises(Stopped, match="--time-limit at step 4 of 6.*--resume"):
        cspine.train(task, tmp_path, Stop(5, lambda: now[0]))
    assert now[0] == 240
    cspine.train(task, tmp_path, Stop(5, lambda: now[0]), go_on=True)
    assert now[0] == 360
    assert list(pd.read_csv(tmp_path / "vertebra_fold0_log.csv").epoch) == [1, 2, 3]


def test_the_held_out_answers_are_the_last_epochs_whatever_it_scores(tmp_path):
    """The best would be chosen by the studies that then calibrate and report."""
    scores, epochs = [math.nan, 0.5, math.nan, 0.7, 0.4, 0.6], iter(range(6))
    task = toy_task(judge=lambda table: {"score": scores[int(table.C1.iloc[0])]},
                    answer=lambda model, uid: [next(epochs)], recipe=replace(TOY, epochs=6))
    cspine.train(task, tmp_path, Stop())
    assert list(pd.read_csv(tmp_path / "vertebra_fold0_heldout.csv").C1) == [5]
    content = torch.load(tmp_path / "vertebra_fold0.pt", weights_only=True)
    assert {"program", "kind", "recipe", "settings", "tensors"} <= content.keys()
    assert set(content["recipe"]) == set(type(TOY).__dataclass_fields__)


def test_the_weights_that_are_kept_are_those_that_answer_the_held_out_studies(tmp_path):
    """The average, without dropout: what calibrates and reports is of the model that ships."""
    def score(model, uid):
        assert not any(part.training for part in model.modules())
        return [model.head[0].bias.sum().item()]

    cspine.train(toy_task(answer=score), tmp_path, Stop())
    kept = torch.load(tmp_path / "vertebra_fold0.pt", weights_only=True)["tensors"]
    table = pd.read_csv(tmp_path / "vertebra_fold0_heldout.csv")
    assert table.C1[0] == pytest.approx(kept["head.0.bias"].sum().item(), rel=1e-6)


def test_held_out_studies_are_read_while_others_are_scored(tmp_path):
    """Before, each was read once the one before it was scored, and the device waited."""
    begun = {uid: threading.Event() for uid in "ab"}

    def score(model, uid):
        assert begun["b"].wait(60)  # while a is scored
        return [0.5]

    task = toy_task(recipe=replace(TOY, epochs=1), held_out=["a", "b"], answer=score,
                    read=lambda uid: begun[uid].set() or uid)
    cspine.train(task, tmp_path, Stop(), 1)
    assert list(pd.read_csv(tmp_path / "vertebra_fold0_heldout.csv")[STUDY]) == ["a", "b"]


def test_cudnn_tries_its_algorithms_in_trainings_on_a_gpu_and_not_after_them(
        arguments, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        cspine, "train", lambda *_: seen.append(torch.backends.cudnn.benchmark))
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(cspine, "pick_device", lambda _: torch.device(name))
        assert cspine.main(arguments("vertebra", tmp_path)) == 0
        assert not torch.backends.cudnn.benchmark
    assert seen == [False, True]


def test_the_log_has_a_row_an_epoch(tmp_path):
    cspine.train(toy_task(), tmp_path, Stop())
    log = pd.read_csv(tmp_path / "vertebra_fold0_log.csv")
    assert {"epoch", "lr", "train_loss", "score", "seconds", "samples_per_s", "peak_gb",
            "skipped_steps"} <= set(log)
    assert len(log) == 3 and log.lr.iloc[-1] < log.lr.iloc[0] <= TOY.lr


@pytest.mark.parametrize("kind", MODE)
def test_a_training_drops_what_its_recipe_says_and_an_answer_nothing(kind):
    recipe = replace(RECIPES[kind], backbone=BACKBONE[kind], dropout=0.3, drop_path=0.2)
    model = cspine.new_model(kind, vars(recipe))
    parts = [*model.modules()]
    dropped = [p.p for p in parts if isinstance(p, (torch.nn.Dropout, torch.nn.Dropout3d))]
    lstms = [p.dropout for p in parts if isinstance(p, torch.nn.LSTM)]
    assert 0.1 < max(getattr(p, "drop_prob", None) or 0 for p in parts) < 0.21
    assert (dropped.count(0.3), lstms) == dict(
        segmenter=(1, []), vertebra=(1, [0.3]), patient=(2, [0.3, 0.3]))[kind]
    assert not {"dropout", "drop_path"} & model.settings.keys()


def test_weight_decay_spares_norms_and_biases():
    trainer = Trainer(toy_task())
    matrices, flat = trainer.optimizer.param_groups
    assert matrices["weight_decay"] == TOY.weight_decay and flat["weight_decay"] == 0
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim < 2 for p in flat["params"])


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth():
    recipe, rates = replace(TOY, warm_up=0.1), []
    task = toy_task(loss=lambda model, *_: model.head[0].bias.sum(), recipe=recipe)
    trainer = Trainer(task)
    for _ in range(50):
        trainer.update(task, toy_batch(task, 1), 50)
        now, = {group["lr"] for group in trainer.optimizer.param_groups}  # of all alike
        rates.append(now / recipe.lr)
    top = int(np.argmax(rates))
    assert 4 <= top <= 6 and rates[0] < 0.05 and 0.95 < max(rates) <= 1
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert 0.01 <= rates[-1] < 0.02


# ---- Which samples ----


def test_an_epoch_shows_every_sample_once_in_its_own_order(tmp_path):
    def epochs(seed):
        seen = []
        task = toy_task(recipe=replace(TOY, seed=seed, epochs=2),
                        load=lambda sample, first: seen.append(sample) or toy_load(sample))
        cspine.train(task, tmp_path / str(seed), cspine.Stop(), 1)
        shutil.rmtree(tmp_path / str(seed))
        return seen[:8], seen[8:]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == toy_samples(8) and first != second
    assert epochs(0) == (first, second) and epochs(1)[0] != first


@pytest.mark.parametrize("rank, world", [(0, 1), (0, 2), (1, 2)])
def test_samples_and_their_randomness_do_not_depend_on_ranks_or_on_where_a_run_starts(
        rank, world, tmp_path, monkeypatch):
    seen, task = [], toy_task(train=toy_samples(10), held_out=["a", "b"])
    trained = cspine.train(task, tmp_path, Stop())

    def note(self, task, batch, total):
        seen.append([(arrays[0].sum(), rng.random()) for arrays, rng in batch])
        self.state.step += 1
    monkeypatch.setattr(Trainer, "update", note)
    cspine.train(task, tmp_path / "whole", Stop())
    whole = sum(seen, [])
    assert len(trained) == 3 and len(whole) == 24 and len(set(whole)) == 24
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for start in (0, 1, 4):
        state = Trainer(task)
        state.state.step, seen[:] = start, []
        monkeypatch.setenv("RANK", "0")
        path = tmp_path / f"from{start}" / "vertebra_fold0_last.pt"
        state.save(path, task)
        monkeypatch.setenv("RANK", str(rank))
        cspine.train(task, path.parent, Stop(), go_on=True)
        assert sum(seen, []) == whole[4 * start :][rank::world]


def test_a_study_is_held_out_by_its_fold_and_trained_on_by_the_others(
        arguments, tmp_path, monkeypatch):
    tasks = []
    monkeypatch.setattr(cspine, "train", lambda task, *_: tasks.append(task))
    for kind in MODE:
        argv = arguments(kind, tmp_path, "--folds", "3", "--fold", "all")
        assert cspine.main(argv) == 0
        options = cspine.build_parser(cspine.MODES).parse_args(argv)
        _, folds, _ = cspine.training_data(options)
        for fold in range(3):
            task = tasks.pop(0)
            assert task.name == f"{kind}_fold{fold}"
            assert {*task.held_out} == {uid for uid in folds if folds[uid] == fold}
            assert {uid for uid, *_ in task.train} == folds.keys() - {*task.held_out}


def test_a_sample_has_the_labels_of_what_it_shows_and_none_of_what_is_not_in_view(tmp_path):
    crops = np.ones((7, 15, 6, 16, 16), np.uint8)
    crops[2] = 0
    cspine.write_crops(tmp_path / "u.npz", crops)
    truth = {"u": np.array([0, 1, 1, 0, 1, 0, 0, 1], np.float32)}
    load = cspine.classifier_task("vertebra", TOY, CPU, tmp_path, truth).load
    expected = [0, 1, math.nan, 0, 1, 0, 0, 1]
    whole, labels = load(("u", [*range(8)]))
    alone = [load(("u", [v]))[1].item() for v in range(7)]
    assert whole.shape == (105, 6, 16, 16)
    assert np.array_equal(labels, expected, equal_nan=True)
    assert np.array_equal(alone, expected[:7], equal_nan=True)
    assert truth["u"][2] == 1  # is not written over


class Grey(torch.nn.Module):
    """A classifier whose logits are the greys of its crops."""

    settings = dict(size=8)

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, crops):
        logits = crops.float().mean((2, 3, 4)) / 50 - 1
        return (logits, logits.amax(1)) if self.kind == "patient" else logits


@pytest.mark.parametrize("kind, patient", [("vertebra", math.nan), ("patient", 105 / 50 - 1)])
def test_held_out_answers_stand_in_the_columns_of_their_steps(kind, patient, tmp_path):
    """Step 1 of C1 is of grey 1, step 15 of C7 of grey 105."""
    greys = np.arange(1, 106, dtype=np.uint8)
    crops = np.tile(greys.reshape(7, 15, 1, 1, 1), (1, 1, 6, 8, 8))
    task = cspine.classifier_task(kind, TOY, CPU, tmp_path, {})
    found = dict(zip(task.columns, task.answer(Grey(kind), crops), strict=True))
    names = [f"{name}_{step}" for name in cspine.VERTEBRAE for step in range(1, 16)]
    logits = np.append(greys / 50 - 1, patient)
    answers = [found[name] for name in (*names, "patient_overall")]
    assert np.allclose(answers, 1 / (1 + np.exp(-logits)), equal_nan=True)


def test_a_classifier_knows_for_what_crops_it_was_trained(arguments, crops_folder, tmp_path):
    """So that predict cuts them alike, whatever extract was told."""
    for file in (crops_folder / "last").iterdir():
        cspine.write_crops(tmp_path / "center" / file.name, cspine.read_crops(file), 2.0)
    argv = arguments("vertebra", tmp_path / "w", "--work", tmp_path, "--mask-of", "center",
                     "--epochs", "1")
    assert cspine.main(argv) == 0
    model = cspine.load_model(tmp_path / "w" / "vertebra_fold0.pt", "vertebra")
    ensemble = cspine.Ensemble(dict(vertebra=[model], patient=[]), CPU)
    assert cspine.crops_wanted(ensemble) == dict(
        mask_of="center", z_margin=2.0, size=cspine.CROP)


# ---- Several processes, devices, memory, network ----


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def test_two_processes_of_one_sample_each_get_a_second_to_mix_with(
        tmp_path, monkeypatch, capsys):
    """Mixup has a partner in the process's own part of a batch."""
    sizes = []
    task = toy_task(recipe=replace(TOY, batch_size=2, mixup=1.0), held_out=["a", "b"])

    def note(self, task, batch, total):
        sizes.append((len(batch), task.recipe.batch_size))
        self.state.step += 1
    monkeypatch.setattr(Trainer, "update", note)
    monkeypatch.setattr(Trainer, "close_epoch", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    cspine.train(task, tmp_path, Stop())
    assert set(sizes) == {(2, 4)} and len(sizes) == 6
    assert "--batch-size 4: 2 samples a process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    cspine.train(task, tmp_path / "alone", Stop())
    assert set(sizes[6:]) == {(2, 2)}


@pytest.mark.parametrize("ema, kept", [(0.998, 2 / 11), (0.1, 0.1)])
def test_the_average_follows_the_weights_and_what_the_norms_measure(ema, kept):
    task = toy_task(recipe=replace(TOY, backbone="resnet18d", ema=ema))
    trainer = Trainer(task)
    before = [t.clone() for t in trainer.averaged.state_dict().values()]
    trainer.update(task, toy_batch(task), 10)
    share = 1 - kept  # of step 1, whose average is short
    after = zip(before, *(m.state_dict().values() for m in (trainer.averaged, trainer.model)))
    for old, slow, fast in after:
        wanted = old.lerp(fast, share) if old.is_floating_point() else old
        assert torch.allclose(slow, wanted, atol=1e-6)
    assert all(part.training for part in trainer.model.modules())  # norms measure, dropout drops


def test_the_average_follows_an_lstm_whose_weights_change_their_storage(monkeypatch):
    """On a GPU, `to` puts an LSTM's weights elsewhere; here it is made to on the CPU."""
    def move(lstm):
        with torch.no_grad():
            for weight in lstm.parameters():
                weight.set_(weight.detach().clone())

    task = toy_task(recipe=replace(TOY, backbone="resnet18d"))
    trainer = Trainer(task)
    monkeypatch.setattr(torch.nn.RNNBase, "flatten_parameters", move)
    trainer.averaged.to("cpu")
    before = {n: p.detach().clone() for n, p in trainer.averaged.named_parameters()}
    trainer.update(task, toy_batch(task), 10)
    fast = dict(trainer.model.named_parameters())
    moved = [n for n, p in trainer.averaged.named_parameters()
             if torch.allclose(p, before[n].lerp(fast[n], 1 - 2 / 11), atol=1e-6)]
    assert moved == [*fast] and any("lstm" in name for name in moved)
    lstm = [n for n in moved if "lstm" in n and not torch.equal(fast[n], before[n])]
    assert lstm


def test_a_batch_of_fewer_samples_than_processes_grows(tmp_path, monkeypatch, capsys):
    sizes = []
    task = toy_task(recipe=replace(TOY, batch_size=2, epochs=1), held_out=list("abcd"))
    monkeypatch.setattr(cspine.Trainer, "update", lambda self, task, batch, total: (
        sizes.append((len(batch), task.recipe.batch_size)),
        setattr(self.state, "step", self.state.step + 1)))
    monkeypatch.setattr(Trainer, "close_epoch", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    cspine.train(task, tmp_path, Stop())
    assert set(sizes) == {(1, 4)} and "--batch-size 4" in capsys.readouterr().err


def test_a_thinned_batch_is_loaded_from_one_step_on_in_all_of_its_samples(tmp_path):
    seen = {}

    def load(sample, first):
        seen.setdefault(int(first), []).append(sample)
        return toy_load(sample)

    task = toy_task(recipe=replace(TOY, thin=3, epochs=6, batch_size=2), load=load)
    cspine.train(task, tmp_path, Stop(), 1)
    assert set(seen) == {0, 1, 2} and all(len(one) % 2 == 0 for one in seen.values())


def test_the_state_of_a_scaler_that_was_not_needed_goes_on_where_one_is(tmp_path):
    """Begun in bfloat16, gone on with on a T4: a scaler refuses the state of none."""
    task = toy_task()
    before = Trainer(task)
    before.save(tmp_path / "last.pt", task)
    after = Trainer(task)
    after.scaler = torch.amp.GradScaler("cpu", enabled=True)
    after.load(tmp_path / "last.pt", task)
    assert after.scaler.get_scale() == 2.0**16


def test_every_option_that_differs_is_named_with_its_value_of_then(tmp_path):
    task = toy_task()
    Trainer(task).save(tmp_path / "last.pt", task)
    other = toy_task(recipe=replace(TOY, batch_size=8, lr=0.5))
    lr = re.escape(f"--lr (it was {TOY.lr})")
    named = rf"made with other --batch-size \(it was 4\), {lr}: give the same"
    with pytest.raises(UserError, match=named):
        Trainer(other).load(tmp_path / "last.pt", other)


def test_a_slow_step_of_an_earlier_run_does_not_stop_a_later_one(tmp_path):
    """A machine's bad moment; --time-limit 1 would end every run before its first step."""
    task = toy_task(recipe=replace(TOY, epochs=1))
    trainer = Trainer(task)
    trainer.state.slowest = 1e6
    trainer.save(tmp_path / "vertebra_fold0_last.pt", task)
    cspine.train(task, tmp_path, Stop(1), go_on=True)
    assert (tmp_path / "vertebra_fold0.pt").exists()


def test_a_finished_training_writes_its_lost_weights_again(tmp_path):
    task = toy_task(recipe=replace(TOY, epochs=2))
    log = cspine.train(task, tmp_path, Stop())
    path = tmp_path / "vertebra_fold0.pt"
    before = path.read_bytes()
    for lost in (path, tmp_path / "vertebra_fold0_log.csv"):
        lost.unlink()
    again = cspine.train(task, tmp_path, Stop(), go_on=True)
    assert path.read_bytes() == before, "its hash is known to crops and calibration"
    logged = pd.read_csv(tmp_path / "vertebra_fold0_log.csv")
    assert list(logged.epoch) == [1, 2] and len(again) == len(log) == 2


def test_a_model_of_a_training_that_was_cut_short_says_so(tmp_path, capsys):
    """Stopped after its first scoring, whose weights are there; the finished one is silent."""
    def score(table):
        stop.note(signal.SIGINT, None)
        return {"score": 0.5}
    stop, path = Stop(), tmp_path / "vertebra_fold0.pt"
    with pytest.raises(Stopped, match="at step 2 of 6"):
        cspine.train(toy_task(judge=score), tmp_path, stop)
    capsys.readouterr()
    cspine.load_model(path, "vertebra")
    said, = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r".*vertebra_fold0.pt: NOT TRAINED TO ITS END: epoch 1(\.0)? of 3", said)
    cspine.train(toy_task(), tmp_path, Stop(), go_on=True)
    capsys.readouterr()
    cspine.load_model(path, "vertebra")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", MODE)
def test_two_processes_train_as_one(kind, arguments, launch, tmp_path):
    """Without what is drawn or measured per process (dropout, BatchNorm's batches) the same;
    also where blocks are computed twice."""
    plain = ["--dropout", "0", "--drop-path", "0"]
    plain += ["--checkpoint"] if kind == "patient" else []
    if kind != "segmenter":
        plain += ["--mixup", "0", "--backbone", "test_convnext3"]
    whole = launch(arguments(kind, tmp_path / "one", *plain))
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2")
    both = [launch(arguments(kind, tmp_path / f"rank{k}", *plain),
                   environment=shared | dict(RANK=str(k), LOCAL_RANK=str(k)),
                   keep=tmp_path / f"kept{k}") for k in (0, 1)]
    for process in (whole, *both):
        status, text = finish(process)
        assert status == 0, text
    assert not (tmp_path / "rank1").exists()
    name = f"{kind}_fold0"
    last = [torch.load(tmp_path / f / f"{name}_last.pt", weights_only=True)
            for f in ("one", "rank0")]
    (one, two), recipe = [content["state"] for content in last], last[0]["recipe"]
    assert one["progress"]["step"] == two["progress"]["step"] > 0
    torch.manual_seed(0)
    fresh = cspine.new_model(kind, recipe)
    at_start, alone, shared = (torch.cat([t.flatten().double() for t in state.values()])
                               for state in (fresh.state_dict(), one["model"], two["model"]))
    assert (alone - at_start).norm() > 0.01
    if kind != "segmenter":  # whose BatchNorm and Dice see a process's own batch
        assert (alone - shared).norm() < 1e-4 * (alone - at_start).norm()
    assert_same(*(torch.load(tmp_path / f"kept{k}") for k in (0, 1)))
    tables = [pd.read_csv(tmp_path / f / f"{name}_heldout.csv") for f in ("one", "rank0")]
    assert set(tables[0][STUDY]) == set(tables[1][STUDY])


def test_torchrun_trains_and_rank_0_alone_reports(arguments, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                f"--master_port={free_port()}", str(HERE.parent / "cspine.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *arguments("segmenter", tmp_path, "--epochs", "1")],
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("epoch 1 ") == 1
    assert len(pd.read_csv(tmp_path / "segmenter_fold0_heldout.csv")) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_names_the_options_to_lower(error, arguments, tmp_path, monkeypatch, capsys):
    def burst(*_):
        raise error
    monkeypatch.setattr(cspine, "segmenter_loss", burst)
    assert cspine.main(arguments("segmenter", tmp_path)) == 2
    line, = capsys.readouterr().err.splitlines()[-1:]
    assert "out of memory" in line and "--batch-size" in line


def test_out_of_memory_in_extract_is_one_line(extraction, tmp_path, monkeypatch, capsys):
    def burst(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(cspine, "segment", burst)
    assert cspine.main(extraction) == 2
    assert "out of memory" in capsys.readouterr().err.splitlines()[-1]


def test_half_precision_is_bfloat16_where_native_float16_on_a_t4_else_none(monkeypatch):
    for capability, kind in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert cspine.half_type(torch.device("cuda")) is kind
    for flags, kind in (("fma avx512_bf16 avx2", torch.bfloat16), ("fma amx_bf16", torch.bfloat16),
                        ("fma avx512f avx2", None)):
        monkeypatch.setattr(cspine.Path, "exists", lambda path: True)  # macOS has no such file
        monkeypatch.setattr(cspine.Path, "read_text", lambda path: flags)
        assert cspine.half_type(CPU) is kind
        with cspine.autocast(CPU):
            assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == (kind or torch.float32)
        with cspine.autocast(CPU, wanted=False):
            assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.float32


@pytest.mark.parametrize("kind, epochs, lr, ema", [
    ("segmenter", 50, 1e-2, 0.998), ("vertebra", 5, 2e-3, 0.998), ("patient", 6, 4e-3, 0.5)])
def test_a_training_on_phantoms_shows_a_falling_validation_loss(
        kind, epochs, lr, ema, arguments, tmp_path, monkeypatch, one_thread):
    """On the studies trained on (one fold), without a connection to anywhere."""
    def refuse(*_):
        raise AssertionError("a training opened a connection")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    more = ["--folds", "1", "--epochs", epochs, "--lr", lr, "--ema", ema]
    assert cspine.main(arguments(kind, tmp_path, *more)) == 0
    log = pd.read_csv(tmp_path / f"{kind}_fold0_log.csv")
    assert log.score.iloc[-1] < log.score.iloc[0]
    assert log.train_loss.iloc[-1] < log.train_loss.iloc[0]


@pytest.mark.parametrize("more, found", [
    (["--fold", "2"], "--fold 2: there are folds 0 to 1"), (["--fold", "x"], "--fold x"),
    (["--epochs", "-1"], "--epochs: -1: must be from 1"),
    (["--folds", "0"], "--folds: 0: must be from 1"), (["--lr", "-1"], "--lr: -1: must be"),
    (["--seed", "-1"], "--seed: -1"), (["--dropout", "1.5"], "--dropout: 1.5: must be from 0"),
    (["--ema", "3"], "--ema: 3: must be"),
    (["--size", "40"], "multiple of 16"), (["--backbone", "nothing"], "--backbone nothing"),
    (["--init", "none.pth"], "--init none.pth: cannot be read")])
def test_what_a_training_cannot_do_is_said_in_one_line(more, found, arguments, tmp_path, capsys):
    assert cspine.main(arguments("segmenter", tmp_path, *more)) == 2
    assert found in capsys.readouterr().err.splitlines()[-1]


def test_a_backbone_of_one_image_size_is_refused_in_one_line(arguments, tmp_path, capsys):
    argv = arguments("vertebra", tmp_path, "--backbone", "vit_tiny_patch16_224")
    assert cspine.main(argv) == 2
    assert "--backbone vit_tiny_patch16_224: " in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_is_one_line(tmp_path):
    """torch.save says so by a RuntimeError."""
    def full(new):
        new.write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")
    said = r"cannot write .*model.pt: unexpected pos .*\(a full disk\?\)$"
    with pytest.raises(cspine.UserError, match=said):
        cspine.write_atomic(tmp_path / "model.pt", full)
    assert not any(tmp_path.iterdir())


# ---- Crops on disk ----


def test_crops_with_masks_of_another_slice_are_not_trained_on(
        arguments, crops_folder, tmp_path, capsys):
    argv = arguments("vertebra", tmp_path, "--work", crops_folder, "--mask-of", "center")
    assert cspine.main(argv) == 2
    assert "center: run extract first" in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_file_of_crops_ends_a_training_in_one_line(
        arguments, crops_folder, tmp_path, capsys):
    (tmp_path / "last").mkdir()
    for file in (crops_folder / "last").iterdir():
        (tmp_path / "last" / file.name).write_bytes(file.read_bytes()[:1000])
    argv = arguments("vertebra", tmp_path / "weights", "--work", tmp_path)
    assert cspine.main(argv) == 2
    assert ".npz: no crops" in capsys.readouterr().err.splitlines()[-1]


def test_a_study_keeps_its_fold_when_images_of_others_are_missing(phantom_data, tmp_path):
    def folds(data):
        argv = ["extract", "--data", str(data), "--folds", "2"]
        return cspine.training_data(cspine.build_parser(cspine.MODES).parse_args(argv))[:2]
    (tmp_path / "train_images").mkdir()
    (tmp_path / "segmentations").symlink_to(phantom_data / "segmentations")
    (tmp_path / "train.csv").symlink_to(phantom_data / "train.csv")
    truth, whole = folds(phantom_data)
    kept = [*truth][-1]
    (tmp_path / "train_images" / kept).symlink_to(phantom_data / "train_images" / kept)
    truth, fewer = folds(tmp_path)
    assert list(truth) == [kept] and fewer == whole


def test_a_study_whose_folder_lies_outside_of_train_images_is_none(phantom_data, tmp_path):
    for name in ("train_images", "segmentations"):
        (tmp_path / name).symlink_to(phantom_data / name)
    table = pd.read_csv(phantom_data / "train.csv")
    outside = ["../x", str(tmp_path / "x"), ".", ".."]
    (tmp_path / "x").mkdir()
    rows = [table[:1].assign(**{STUDY: uid}) for uid in outside]
    pd.concat([table, *rows]).to_csv(tmp_path / "train.csv", index=False)
    argv = ["extract", "--data", str(tmp_path)]
    truth, *_ = cspine.training_data(cspine.build_parser(cspine.MODES).parse_args(argv))
    assert {*truth} == {*table[STUDY]}


@pytest.fixture
def extraction(phantom_data, tmp_path):
    """Options of `extract` with two segmenters that mark something, a study that is damaged, and
    one of four without a mask."""
    data = tmp_path / "data"
    (data / "segmentations").mkdir(parents=True)
    for mask in sorted((phantom_data / "segmentations").iterdir())[1:]:
        (data / "segmentations" / mask.name).symlink_to(mask)
    (data / "train_images" / "damaged").mkdir(parents=True)
    (data / "train_images" / "damaged" / "1.dcm").write_bytes(b"nothing")
    for folder in (phantom_data / "train_images").iterdir():
        (data / "train_images" / folder.name).symlink_to(folder)
    table = pd.read_csv(phantom_data / "train.csv")
    table = pd.concat([table, table[:1].assign(**{STUDY: "damaged"})])
    table.to_csv(data / "train.csv", index=False)
    for fold in (0, 1):
        torch.manual_seed(fold)
        model = cspine.Segmenter("test_resnet", 32)
        with torch.no_grad():
            model.head.weight.mul_(100)
        cspine.save_checkpoint(tmp_path / "weights" / f"segmenter_fold{fold}.pt", "segmenter",
                               RECIPES["segmenter"], settings=model.settings,
                               tensors=model.state_dict())
    argv = ["extract", "--size", str(SMALL_CROP), "--data", str(data), "--weights",
            str(tmp_path / "weights"), "--work", str(tmp_path / "work"), "--folds", "2",
            "--workers", "1", "--device", "cpu"]
    _, folds, masks = cspine.training_data(cspine.build_parser(cspine.MODES).parse_args(argv))
    for fold in (0, 1):
        held_out = [uid for uid in masks if folds.get(uid) == fold]
        path = tmp_path / "weights" / f"segmenter_fold{fold}_heldout.csv"
        pd.DataFrame({STUDY: held_out}).to_csv(path, index=False)
    return argv


def test_extract_goes_on_with_what_is_missing(extraction, tmp_path, monkeypatch, capsys):
    """A study with a mask is masked by the segmenter that did not train on it, one without by the
    mean of both; a damaged one is named."""
    assert cspine.main([*extraction, "--time-limit", "1e-6"]) == 0
    assert "the same command goes on" in capsys.readouterr().err
    assert cspine.main(extraction) == 0
    said = capsys.readouterr()
    assert "crops of 4 of 5 studies" in said.out and said.err.count("study damaged: ") == 1
    files = sorted((tmp_path / "work" / "last").iterdir())
    assert len(files) == 4 and all(f.suffix == ".npz" for f in files)
    before = [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    files[1].unlink()
    assert cspine.main([*extraction, "--masks", str(tmp_path / "masks")]) == 0
    after = [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    assert [a[0] for a in after] == [b[0] for b in before]  # made again: the same bytes
    options = cspine.build_parser(cspine.MODES).parse_args(extraction)
    _, folds, masks = cspine.training_data(options)
    models = cspine.load_models(tmp_path / "weights", "segmenter", CPU)
    assert [file.stem in masks for file in files] == [False, True, True, True]
    for file in files[:2]:
        volume = cspine.read_volume(tmp_path / "data" / "train_images" / file.stem)
        fold = tmp_path / "weights" / f"segmenter_fold{folds[file.stem]}.pt"
        own = [models[fold]] if file.stem in masks else [*models.values()]
        probability = cspine.segment(own, volume, CPU)
        crops = cspine.vertebra_slices(volume, probability)
        assert crops.any() and np.array_equal(cspine.read_crops(file), crops)
        labels = cspine.read_mask(tmp_path / "masks" / f"{file.stem}.nii.gz", volume)
        assert np.array_equal(labels, cspine.vertebra_labels(volume, probability))
    assert len([*(tmp_path / "masks").iterdir()]) == 4

    capsys.readouterr()
    first = next((tmp_path / "weights").glob("segmenter_fold*.pt"))
    first.write_bytes(first.read_bytes() + b"trained anew")
    assert cspine.main(extraction) == 2
    assert "crops by other segmenters, as of" in capsys.readouterr().err


def test_extract_cuts_as_many_studies_as_are_asked_for_and_adds_to_them(
        extraction, tmp_path, capsys):
    """The same ones for any order of the table; the damaged one counts as drawn."""
    folder = tmp_path / "work" / "last"
    table = pd.read_csv(tmp_path / "data" / "train.csv")
    drawn = sorted(table[STUDY], key=cspine.hash_of)
    assert cspine.main([*extraction, "--studies", "2"]) == 0
    assert {f.stem for f in folder.iterdir()} == {*drawn[:2]} - {"damaged"}
    assert f"crops of {len([*folder.iterdir()])} of 2 studies" in capsys.readouterr().out
    table[::-1].to_csv(tmp_path / "data" / "train.csv", index=False)
    assert cspine.main([*extraction, "--studies", "4"]) == 0
    assert {f.stem for f in folder.iterdir()} == {*drawn[:4]} - {"damaged"}
    assert cspine.main(extraction) == 0
    assert {f.stem for f in folder.iterdir()} == {*drawn} - {"damaged"}
    assert "crops of 4 of 5 studies" in capsys.readouterr().out


def test_each_process_counts_the_crops_of_its_share_of_the_studies_asked_for(
        extraction, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    drawn = sorted(pd.read_csv(tmp_path / "data" / "train.csv")[STUDY], key=cspine.hash_of)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        mine = drawn[:3][rank::2]
        assert cspine.main([*extraction, "--studies", "3"]) == 0
        cut = len({*mine} - {"damaged"})
        assert f"crops of {cut} of {len(mine)} studies" in capsys.readouterr().out


def test_an_extraction_that_finds_few_vertebrae_says_so(extraction, monkeypatch, capsys):
    monkeypatch.setattr(cspine, "segment", lambda *_: np.zeros((7, 16, 16, 16), np.float32))
    cspine.main(extraction)
    assert "most vertebrae were not found: train better segmenters" in capsys.readouterr().err


def test_an_extraction_of_which_most_studies_have_no_crops_ends_with_a_status(
        extraction, monkeypatch, capsys):
    def unreadable(*_):
        raise cspine.StudyError("no slices")
    monkeypatch.setattr(cspine, "read_volume", unreadable)
    assert cspine.main(extraction) == 3
    said = capsys.readouterr()
    assert "crops of 0 of 5 studies" in said.out
    assert "most studies have no crops" in said.err.splitlines()[-1]


def test_masks_by_segmenters_that_may_have_seen_the_study_are_told_of(
        extraction, tmp_path, capsys):
    """With one fold trained, as by --preset fast, the studies of the others."""
    (tmp_path / "weights" / "segmenter_fold1.pt").unlink()
    (tmp_path / "weights" / "segmenter_fold1_heldout.csv").unlink()
    kept = pd.read_csv(tmp_path / "weights" / "segmenter_fold0_heldout.csv")
    assert cspine.main(extraction) == 0
    said = capsys.readouterr().err
    assert f"{3 - len(kept)} studies are masked by segmenters that may have trained" in said


def test_what_is_odd_about_a_study_is_told_with_its_name_when_crops_are_cut(
        extraction, tmp_path, capsys):
    uid = next(path.stem for path in (tmp_path / "data" / "segmentations").iterdir())
    study = tmp_path / "data" / "train_images" / uid
    files = {path.name: path.read_bytes() for path in study.iterdir()}
    study.unlink()
    study.mkdir()
    for name, content in files.items():
        (study / name).write_bytes(content)
    (study / "2.dcm").write_bytes(b"nothing")
    assert cspine.main(extraction) == 0
    assert f"study {uid}: 2.dcm: " in capsys.readouterr().err


def test_crops_of_some_studies_alone_are_told_of(arguments, crops_folder, tmp_path, capsys):
    (tmp_path / "last").mkdir()
    files = sorted((crops_folder / "last").iterdir())
    for file in files[1:]:
        (tmp_path / "last" / file.name).symlink_to(file)
    argv = arguments("vertebra", tmp_path / "weights", "--work", tmp_path, "--time-limit", "1e-6")
    assert cspine.main(argv) == 0
    said = capsys.readouterr().err
    assert f"crops of {len(files) - 1} of {len(files)} studies; the others are left out" in said


@pytest.mark.parametrize("makers, said", [
    ([["own"]], ""), ([["own"], ["own", "second"]], "crops by 2 different sets of segmenters"),
    ([["gone"]], "crops by other segmenters than those in --weights")])
def test_crops_by_unlike_or_other_segmenters_are_told_of(
        makers, said, arguments, phantom_data, tmp_path, capsys):
    paths = {name: tmp_path / "w" / f"segmenter_{name}_fold0.pt" for name in ("own", "second")}
    paths["own"].parent.mkdir()
    hashes = dict(gone="0" * 16)
    for name, path in paths.items():
        path.write_text(name)
        hashes[name] = cspine.hash_of(path)
    crops = np.ones((7, 15, 6, 32, 32), np.uint8)
    for k, study in enumerate((phantom_data / "train_images").iterdir()):
        by = {hashes[name] for name in makers[k % len(makers)]}
        cspine.write_crops(tmp_path / "last" / f"{study.name}.npz", crops, made_by=by)
    argv = arguments("vertebra", tmp_path / "w", "--work", tmp_path, "--time-limit", "1e-6")
    assert cspine.main(argv) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "segmenters" in line]
    assert lines == [f"{tmp_path / 'last'}: {said}"] * bool(said)


def test_a_log_hears_once_a_minute_how_far_a_run_is(capsys, monkeypatch):
    """Where there is no terminal: in Kaggle's log, or behind `!python`."""
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(cspine, "monotonic", lambda: next(clock))
    notes = iter("abcdefghijkl")
    assert [*cspine.progress(range(7), "step", note=lambda: next(notes))] == [*range(7)]
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 3 and all(re.fullmatch(r"step \d of 7 [a-l]", line) for line in said)


def test_a_second_signal_ends_a_run_at_once():
    stop = cspine.Stop()
    stop.note(signal.SIGINT, None)
    stop.note(signal.SIGINT, None)  # an echo: torchrun passes on what its processes have got
    assert stop.reason() == "SIGINT" and stop.status() == 130
    stop.noted -= cspine.ECHO_S + 1
    with pytest.raises(KeyboardInterrupt):
        stop.note(signal.SIGINT, None)


@pytest.mark.parametrize("before, noted", [(lambda *_: None, "SIGHUP"), (signal.SIG_IGN, "")])
def test_a_terminal_that_closes_ends_a_run_in_order_unless_nohup_started_it(before, noted):
    kept = signal.signal(signal.SIGHUP, before)
    try:
        with pytest.raises(Stopped) if noted else nullcontext():
            with cspine.stop_signals() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.reason() == noted and stop.status() == (130 if noted else 0)
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_a_signal_during_the_last_scoring_ends_the_run_with_its_status(tmp_path):
    """It was swallowed: status 0, and `train_all.py` went on with the next mode."""
    task = toy_task(judge=lambda table: os.kill(os.getpid(), signal.SIGTERM) or {"score": 1},
                    recipe=replace(TOY, epochs=1))
    with pytest.raises(Stopped, match="SIGTERM, with all") as stopped:
        with cspine.stop_signals() as stop:
            cspine.train(task, tmp_path, stop)
    assert stopped.value.status == 130
    assert (tmp_path / "vertebra_fold0.pt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_processes_end_with_what_has_started_them(tmp_path):
    """Two that joined waited for each other for ever after torchrun was killed."""
    rank = ("import os, pathlib, sys, time, torch, cspine; "
            "cspine.join_processes(torch.device('cpu')); "
            "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid())); "
            "time.sleep(100)")
    outer = ("import os, subprocess, sys; "
             "both = [subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], env=os.environ "
             "| dict(RANK=rank)) for rank in '01']; both[0].wait()")
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2",
                  PYTHONPATH=str(Path(cspine.__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", outer, rank, str(tmp_path)],
                               env=os.environ | shared)

    def states():  # of the two; Z: ended, and nobody has asked yet
        files = [Path("/proc", path.read_text(), "stat") for path in tmp_path.iterdir()]
        return [file.read_text().split()[2] if file.exists() else "Z" for file in files]

    def wait_until(true):
        until = time.monotonic() + 60
        while not true():
            assert time.monotonic() < until
            time.sleep(0.1)

    wait_until(lambda: len(states()) == 2)
    assert "Z" not in states()
    process.kill()
    process.wait()
    wait_until(lambda: states() == ["Z", "Z"])


def test_processes_share_the_studies_of_extract_out(extraction, launch, tmp_path):
    """Two, told who they are as torchrun tells them."""
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2")
    both = [launch(extraction, environment=shared | dict(RANK=str(k), LOCAL_RANK=str(k)))
            for k in (0, 1)]
    said = ""
    for process in both:
        status, text = finish(process)
        assert status == 0, text
        said += text
    assert said.count("study damaged: ") == 1
    shared = {f.name: f.read_bytes() for f in (tmp_path / "work" / "last").iterdir()}
    assert cspine.main([*extraction, "--work", str(tmp_path / "alone")]) == 0
    alone = {f.name: f.read_bytes() for f in (tmp_path / "alone" / "last").iterdir()}
    assert len(alone) == 4 and alone == shared


def test_the_crops_of_a_study_take_less_than_a_quarter_of_their_bytes(tmp_path):
    made = make_phantom([11, 0], 192)
    volume = cspine.Volume("", made.hu, made.spacing, made.affine)
    labels = at_cells(made.label, 64)
    truth = np.stack([labels == v for v in range(1, 8)]).astype(np.float32)
    crops = cspine.vertebra_slices(volume, truth, 224)
    cspine.write_crops(tmp_path / "crops.npz", crops)
    assert crops.any((1, 2, 3, 4)).sum() >= 5 and crops.nbytes == 31_610_880
    assert (tmp_path / "crops.npz").stat().st_size < crops.nbytes / 4
    assert np.array_equal(cspine.read_crops(tmp_path / "crops.npz"), crops)


def test_a_thinned_sample_holds_every_third_step_from_the_one_asked_for(tmp_path):
    crops = np.broadcast_to(np.arange(1, 16, dtype=np.uint8)[:, None, None, None],
                            (7, 15, 6, 16, 16))
    cspine.write_crops(tmp_path / "u.npz", crops)
    truth = {"u": np.zeros(8, np.float32)}
    for thin in (1, 3, 5):
        recipe = replace(TOY, thin=thin)
        task = cspine.classifier_task("vertebra", recipe, CPU, tmp_path, truth)
        for first in range(thin):
            sample, _ = task.load(("u", [4]), first)
            assert (sample[:, 0, 0, 0] - 1).tolist() == [*range(first, 15, thin)]


def test_a_thinning_that_does_not_divide_the_steps_is_refused(arguments, tmp_path, capsys):
    assert cspine.main(arguments("vertebra", tmp_path, "--thin", "4")) == 2
    assert "--thin: invalid choice: 4 (choose from 1, 3, 5, 15)" in capsys.readouterr().err


def test_an_epochs_row_is_of_its_own_steps(tmp_path):
    """10 s a step, two steps of four samples an epoch."""
    now, losses = [0.0], []

    def loss(*given):
        now[0] += 10
        value = cspine.classifier_batch(*given)
        losses.append(value.item())
        return value
    log = pd.DataFrame(cspine.train(toy_task(loss=loss), tmp_path, Stop(clock=lambda: now[0])))
    assert list(log.seconds) == [20, 20, 20] and np.allclose(log.samples_per_s, 8 / 20)
    assert np.allclose(log.train_loss, np.reshape(losses, (3, 2)).mean(1))


def test_a_training_that_goes_on_holds_no_part_of_the_file_it_has_read(tmp_path, monkeypatch):
    """Which is mapped, and may be written over."""
    task, read, load = toy_task(), [], cspine.load_checkpoint
    monkeypatch.setattr(cspine, "load_checkpoint", lambda path: read.append(load(path)) or read[0])
    trainer = Trainer(task)
    trainer.update(task, toy_batch(task), 10)
    trainer.save(tmp_path / "last.pt", task)
    trainer.load(tmp_path / "last.pt", task)
    before = read[0]["state"]["optimizer"]["state"]
    for number, now in trainer.optimizer.state_dict()["state"].items():
        assert torch.equal(now["exp_avg"], before[number]["exp_avg"])
        assert now["exp_avg"].data_ptr() != before[number]["exp_avg"].data_ptr()


def test_steps_left_out_long_ago_end_no_training():
    task = toy_task(loss=broken_loss([1]))
    trainer = Trainer(task)
    trainer.state.skipped = 100
    trainer.update(task, toy_batch(task), 10)
    assert (trainer.state.skipped, trainer.state.in_a_row) == (101, 1)


def test_a_classifier_is_judged_with_the_prior_where_it_says_nothing(tmp_path):
    truth = {f"u{k}": np.float32([k % 2] * 8) for k in range(4)}
    judge = cspine.classifier_task("vertebra", TOY, CPU, tmp_path, truth).judge
    answers = np.array([[0.1 + 0.8 * (k % 2)] * 7 + [PRIOR[7]] for k in range(4)])
    steps = np.repeat(answers, [15] * 7 + [1], axis=1)
    steps[:, -1] = math.nan  # no head
    found = judge(pd.DataFrame(steps, [*truth], cspine.STEP_TARGETS))
    assert (found["vertebra_auc"], found["patient_auc"]) == (1, 0.5)
    expected, _ = cspine.competition_scores(answers, np.array([*truth.values()]))
    assert found["score"] == pytest.approx(expected)


def test_a_fold_without_a_known_label_has_no_score_and_ends_nothing(tmp_path):
    judge = cspine.classifier_task(
        "vertebra", TOY, CPU, tmp_path, {"u0": np.full(8, math.nan, np.float32)}).judge
    found = judge(pd.DataFrame([[0.5] * 106], ["u0"], cspine.STEP_TARGETS))
    assert all(map(math.isnan, found.values()))


def test_a_finished_model_whose_state_was_deleted_is_kept(tmp_path, capsys):
    """For its size, or by Kaggle's notebook; --fold all and --resume began anew, from epoch 1."""
    cspine.train(toy_task(), tmp_path, Stop())
    (tmp_path / "vertebra_fold0_last.pt").unlink()
    before = (tmp_path / "vertebra_fold0.pt").read_bytes()
    assert cspine.train(toy_task(), tmp_path, Stop(), go_on=True) == []
    assert "vertebra_fold0.pt: finished before, and kept" in capsys.readouterr().err
    assert (tmp_path / "vertebra_fold0.pt").read_bytes() == before
    for other in (dict(recipe=replace(TOY, lr=TOY.lr / 2)), dict(made_of=dict(labels="new"))):
        assert cspine.train(toy_task(**other), tmp_path, Stop(), go_on=True)
        assert "will be overwritten" in capsys.readouterr().err
        (tmp_path / "vertebra_fold0_last.pt").unlink()
    (tmp_path / "vertebra_fold0_log.csv").unlink()  # as after a kill before it was written
    assert cspine.train(toy_task(**other), tmp_path, Stop(), go_on=True)
