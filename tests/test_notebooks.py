"""I rely on: my weights get to Kaggle by two commands, and are trained there in sessions."""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch

import cspine
import kaggle_training
import modes
import notebooks
import train_all
from small_kernel import make_weights


def test_the_models_and_nothing_else_become_a_data_set(tmp_path, capsys):
    weights = make_weights(tmp_path / "w", patient=False)
    for name in ("vertebra_fold0_last.pt", "vertebra_fold0_log.csv"):
        (weights / name).write_text("{}")
    cspine.write_calibration(weights, cspine.Calibration())
    capsys.readouterr()
    out = tmp_path / "kernel"
    assert modes.main(["notebook", "--weights", str(weights), "--out", str(out),
                       "--weights-dataset", "me/my-weights"]) == 0
    assert {path.name for path in (out / "weights").iterdir()} == {
        "segmenter_fold0.pt", "vertebra_fold0.pt", "calibration.json", "dataset-metadata.json"}
    meta = json.loads((out / "weights" / "dataset-metadata.json").read_text())
    assert meta["id"] == "me/my-weights" and meta["licenses"] and 6 <= len(meta["title"]) <= 50
    assert capsys.readouterr().out.splitlines() == [
        f"kaggle datasets create -p {out / 'weights'}", f"kaggle kernels push -p {out}"]


def notebook_of(out, *options):
    return modes.main(["notebook", "--out", str(out), *map(str, options)])


def test_models_of_an_earlier_data_set_do_not_stay(tmp_path):
    five, one = (make_weights(tmp_path / name, folds=n) for name, n in (("five", 3), ("one", 1)))
    cspine.write_calibration(five, cspine.Calibration())
    for weights in (five, one):
        named = ["--weights", weights, "--weights-dataset", "me/my-weights"]
        assert notebook_of(tmp_path / "out", *named) == 0
    names = {path.name for path in (tmp_path / "out" / "weights").iterdir()}
    assert names == {f"{kind}_fold0.pt" for kind in cspine.KINDS} | {"dataset-metadata.json"}


@pytest.mark.parametrize("wrong, said", [
    (["--weights", "nowhere", "--weights-dataset", "me/my-weights"], "no models there"),
    (["--weights-dataset", "me/gold"], "6 to 50 letters"),
    (["--weights-dataset", "me/my_weights"], "6 to 50 letters"),
    (["--weights-dataset", "weights"], "expected OWNER/NAME")])
def test_a_data_set_that_kaggle_would_refuse_is_refused(wrong, said, tmp_path, capsys):
    assert notebook_of(tmp_path / "out", *wrong) == 2
    assert said in capsys.readouterr().err


def test_a_data_set_does_not_replace_the_models_that_it_is_made_of(tmp_path, capsys):
    weights = make_weights(tmp_path / "weights")
    named = ["--weights", weights, "--weights-dataset", "me/my-weights"]
    assert notebook_of(tmp_path, *named) == 2
    assert "would be replaced by its own copy" in capsys.readouterr().err
    assert len([*weights.glob("*_fold0.pt")]) == 3


def test_a_folder_that_no_notebook_wrote_keeps_its_files(tmp_path, capsys):
    """A refused command leaves no notebook either."""
    weights, out = make_weights(tmp_path / "w", patient=False), tmp_path / "out"
    (out / "weights").mkdir(parents=True)
    (out / "weights" / "vertebra_fold3.pt").write_text("days of training")
    named = ["--weights", weights, "--weights-dataset", "me/my-weights"]
    assert notebook_of(out, *named) == 2
    assert f"{out / 'weights'}: has files" in capsys.readouterr().err
    left = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert left == {"weights", "weights/vertebra_fold3.pt"}


def test_models_that_predict_would_refuse_become_no_data_set(tmp_path, capsys):
    weights = make_weights(tmp_path / "w", patient=False)
    (weights / "vertebra_fold0.pt").unlink()
    named = ["--weights", weights, "--weights-dataset", "me/my-weights"]
    assert notebook_of(tmp_path / "out", *named) == 2
    assert "no classifier there" in capsys.readouterr().err


def test_a_notebook_without_models_says_what_it_will_do(tmp_path, capsys):
    assert notebook_of(tmp_path) == 0
    assert "submits the prior" in capsys.readouterr().out


def test_a_training_notebook_without_imagenets_files_says_so(tmp_path, capsys):
    assert notebook_of(tmp_path, "--train") == 0
    assert "add ImageNet's files to the notebook by hand" in capsys.readouterr().out


def test_the_notebook_that_trains_is_not_pushed_as_the_owner_of_the_imagenet_files(
        tmp_path, capsys):
    assert notebook_of(tmp_path, "--train", "--weights-dataset", "other/imagenet") == 0
    meta = json.loads((tmp_path / "kernel-metadata.json").read_text())
    assert meta["id"] == "OWNER/cspine-train" and meta["dataset_sources"] == ["other/imagenet"]
    assert "your name in place of OWNER" in capsys.readouterr().out


@pytest.mark.parametrize("place", ("", "one", "one/two"))
def test_the_notebook_finds_its_inputs_below_another_root(place, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    cell = {}
    exec(notebooks.RUN.partition("count = ")[0], cell)
    found = tmp_path / "input" / place / "my-weights"
    found.mkdir(parents=True)
    assert Path(cell["mounted"]("my-weights")) == found
    assert Path(cell["mounted"]("none")) == tmp_path / "input" / "none"


@pytest.mark.parametrize("reports", [(), ("", "1")])
def test_the_last_cell_looks_at_whatever_is_there(reports, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "submission.csv").write_text("row_id,fractured\na_C1,0.5\n")
    for k in reports:
        (tmp_path / f"predict_report{k}.csv").write_text(f"{cspine.STUDY},status\na{k},ok\n")
    exec(notebooks.LOOK, {})
    said = capsys.readouterr().out
    assert "1 rows;" in said and ("{'ok': 2}" if reports else "NO STUDY ANSWERED") in said


# ---- Training in sessions ----

NAME = Path(cspine.KAGGLE_DATA).name
TINY = dict(fold="0", folds=2, epochs=2, backbone="test_resnet", size=32, batch_size=2)


def tiny_preset(monkeypatch):
    """Make "fast" faster. Segmenters as tiny as these see nothing, so that all vertebrae are
    where extract looks."""
    monkeypatch.setitem(cspine.PRESETS, "fast", {
        mode: TINY | (dict(hidden=8, thin=15) if classifies else {})
        for mode, classifies in (("train-seg", 0), ("train-cls", 1), ("train-patient", 1))})
    everywhere = np.full((7, 32, 32, 32), 0.4, np.float32)
    monkeypatch.setattr(cspine, "segment", lambda *given: everywhere)


def free_disk(monkeypatch, **free):
    """Folders have these many bytes free, whatever this machine has."""
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda folder: SimpleNamespace(free=free[Path(folder).name]))


@pytest.fixture
def kaggle(tmp_path, monkeypatch, phantom_data, one_thread):
    """start(root, cut, layout, earlier) -> what a session prints; Kaggle's folders under root.

    The commands run in this process, which saves their imports; the one named by `cut` gets a
    clock by which its time ends within its work."""
    tiny_preset(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    count = functools.cache(kaggle_training.training_flops)  # once in all sessions
    monkeypatch.setattr(kaggle_training, "training_flops", count)
    free_disk(monkeypatch, working=1e12)
    commands, real_stop = [], cspine.stop_signals

    def start(root, cut, layout, earlier, capsys):

        @contextlib.contextmanager
        def short(*given):
            yield cspine.Stop(1, itertools.count(0, 6).__next__)

        def call(command, cwd):
            if "evaluate" in command:
                return cspine.main(command[2:])
            assert command[1:5] == ["-m", "torch.distributed.run", "--standalone",
                                    "--nproc_per_node=1"] and cwd == root / "working"
            at = command.index("cspine.py") + 1
            commands.append(command[at:])
            limit = float(command[command.index("--time-limit") + 1])
            assert 680 < limit < 690 and (cwd / "cspine.py").exists()
            if command[at] == cut:
                monkeypatch.setattr(cspine, "stop_signals", short)
                monkeypatch.setattr(time, "monotonic", lambda: math.inf)  # the cell's clock
            return cspine.main([*command[at:], "--workers", "1"])

        monkeypatch.setattr(cspine, "stop_signals", real_stop)
        monkeypatch.setattr(time, "monotonic", cspine.monotonic)
        monkeypatch.setattr(cspine, "KAGGLE", root)
        (root / "working").mkdir(parents=True)
        for place, real in ((NAME, phantom_data), ("last-output", earlier)):
            if real:
                (root / "input" / layout).mkdir(parents=True, exist_ok=True)
                (root / "input" / layout / place).symlink_to(real)
        write, look, train, close = (cell["source"] for cell in json.loads(
            (tmp_path / "kernel" / "cspine-train.ipynb").read_text())["cells"])
        (root / "working" / "cspine.py").write_text(write.partition("\n")[2])
        kernel = {"__name__": "__main__"}
        commands.clear()
        look = look.replace('DEVICE = "cuda"', 'DEVICE = "cpu"')
        assert look.endswith("minutes=690)")
        look = look.replace("minutes=690)", "minutes=690, from_scratch=True)")
        exec(look, kernel)
        kernel["call"] = call
        for cell in (train, close):
            exec(cell, kernel)
        return capsys.readouterr().out, [command[0] for command in commands]

    out = tmp_path / "kernel"
    assert modes.main(["notebook", "--train", "--preset", "fast", "--out", str(out)]) == 0
    meta = json.loads((out / "kernel-metadata.json").read_text())
    assert meta["machine_shape"] == "NvidiaTeslaT4" and meta["code_file"] == "cspine-train.ipynb"
    return start


def test_sessions_cut_short_end_with_the_weights_of_one_uncut(kaggle, tmp_path, capsys):
    """Two sessions that are cut, in the middle of a training and of the crops, and a third; each
    has the output of the one before attached, in either layout of Kaggle."""
    all_steps = ["train-seg", "extract", "train-cls", "train-patient"]
    said, ran = kaggle(tmp_path / "whole", None, "", None, capsys)
    assert ran == all_steps and "ALL IS TRAINED AND CALIBRATED" in said
    assert (tmp_path / "whole" / "working" / "weights" / "calibration.json").exists()
    for line in ("GPU 0: runs", "4 studies with images, 4 with masks", "this is the first",
                 "crops are kept", "weights of test_resnet: NOT FOUND", "hours left by the plan"):
        assert line in said

    told, sessions, earlier = [], [("extract", ""), ("train-cls", "datasets/me"), ("", "")], None
    for k, (cut, layout) in enumerate(sessions):
        root = tmp_path / f"session{k}"
        told.append(kaggle(root, cut, layout, earlier, capsys))
        earlier = shutil.move(root / "working", tmp_path / f"output{k}")
    assert [ran for _, ran in told] == [all_steps[:2], all_steps[1:3], all_steps[1:]]
    for (said, _), cut in zip(told, ("in extract", "in train-cls")):
        assert f"the time was over {cut}" in said and "attach the output of this one" in said
    assert "Session 3: ALL IS TRAINED" in told[2][0]

    whole, parts = tmp_path / "whole" / "working" / "weights", tmp_path / "output2" / "weights"
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in parts.iterdir()}
    assert not any("_last" in name for name in names)
    for name in (f"{kind}_fold0.pt" for kind in cspine.KINDS):
        one, other = (cspine.load_checkpoint(folder / name)["tensors"] for folder in (whole, parts))
        assert one.keys() == other.keys() and all(torch.equal(one[t], other[t]) for t in one)


def test_one_command_trains_all_models_of_a_preset_and_goes_on(
        phantom_data, tmp_path, monkeypatch, capsys, one_thread):
    """Cut short it says so; the same command ends in the weights and their calibration."""
    tiny_preset(monkeypatch)
    command = ["--preset", "fast", "--data", str(phantom_data), "--weights", str(tmp_path),
               "--work", str(tmp_path / "work"), "--workers", "1", "--device", "cpu"]
    assert train_all.main([*command, "--time-limit", "1e-6"]) == 0
    assert "the time is over before train-seg: the same command goes on" in capsys.readouterr().err
    assert train_all.main(command) == 0
    assert "weighted log loss" in capsys.readouterr().out
    assert {f"{kind}_fold0.pt" for kind in cspine.KINDS} <= {p.name for p in tmp_path.iterdir()}
    assert (tmp_path / "calibration.json").exists()
    assert train_all.main(command) == 0
    assert capsys.readouterr().err.count("finished before") == 3
    assert train_all.main([*command, "--fold", "0"]) == 2  # and no short form of --folds
    assert "unrecognized arguments: --fold" in capsys.readouterr().err


def test_what_two_gpus_have_begun_one_goes_on_with(phantom_data, tmp_path, monkeypatch):
    """Two processes had made a batch of two one of four; one asked for two, and was refused."""
    ran = []
    monkeypatch.setattr(train_all, "run", lambda arguments, cards: ran.append(arguments) or 1)
    recipe = replace(cspine.RECIPES["segmenter"], batch_size=6)
    cspine.save_checkpoint(tmp_path / "segmenter_fold3_last.pt", "segmenter", recipe)
    command = ["--data", str(phantom_data), "--weights", str(tmp_path)]
    assert train_all.main(command) == 1
    assert ran[0][0] == "train-seg" and ran[0][-3:] == ["--resume", "--batch-size", "6"]
    (tmp_path / "segmenter_fold3_last.pt").write_text("damaged, as the training will say")
    assert train_all.main(command) == 1 and ran[1][-1] == "--resume"


def test_several_gpus_get_a_process_each(monkeypatch):
    called = []
    monkeypatch.setattr(kaggle_training, "call", lambda command: called.append(command) or 7)
    assert train_all.run(["train-seg", "--data", "d"], 2) == 7
    assert called[0][1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert Path(called[0][5]).samefile(cspine.__file__)
    assert called[0][6:] == ["train-seg", "--data", "d"]


def test_a_run_that_is_ended_ends_its_processes_which_save():
    """SIGTERM is passed on; Ctrl-C they get from the terminal, and are waited for."""
    child = ("import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
             "print(flush=True); time.sleep(60)")
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert kaggle_training.call([sys.executable, "-c", child]) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_a_run_that_is_killed_ends_its_processes_too(tmp_path):
    """They trained on, and the same command began a second training beside them."""
    child = ("import pathlib, signal, sys, time; here = pathlib.Path(sys.argv[1]); "
             "save = lambda *_: ((here / 'saved').touch(), sys.exit()); "
             "signal.signal(signal.SIGTERM, save); (here / 'begun').touch(); time.sleep(60)")
    outer = (f"import sys; sys.path[:0] = {sys.path!r}; import kaggle_training; "
             f"kaggle_training.call([sys.executable, '-c', {child!r}, {str(tmp_path)!r}])")
    process = subprocess.Popen([sys.executable, "-c", outer])
    for name in ("begun", "saved"):
        until = time.monotonic() + 60
        while not (tmp_path / name).exists():
            assert process.poll() is None or name == "saved"
            assert time.monotonic() < until, name
            time.sleep(0.05)
        process.kill()
        process.wait()


@pytest.mark.parametrize("text", (
    '{"user": 1}', "[]", '{"session": "x"}', '{"session": 0}', "not json", ""))
def test_notes_of_other_programs_are_no_sessions(text, tmp_path, monkeypatch):
    monkeypatch.setattr(kaggle_training, "KAGGLE", tmp_path)
    other, ours = (tmp_path / "input" / name for name in ("other", "ours"))
    for folder, note, found in ((other, text, (None, 0)), (ours, '{"session": 1}', (ours, 1))):
        folder.mkdir(parents=True)
        (folder / "session.json").write_text(note)
        assert kaggle_training.earlier_session() == found


ROW = "epoch,lr\n60.0,1e-3\n"


@pytest.mark.parametrize("text, done", (
    (ROW, True), ("stage,step\nlong,100\n", False), ("", False), ("\0\1\2", False),
    (ROW[:9], False), (ROW[:10], False)))
def test_a_training_is_ended_by_a_whole_log_alone(text, done, tmp_path):
    """Another program's, and those that are cut short, tell of nothing."""
    (tmp_path / "segmenter_fold0_log.csv").write_text(text)
    assert kaggle_training.trained(tmp_path, "fast", "train-seg") is done


@pytest.fixture
def preflight(tmp_path, monkeypatch, phantom_data):
    """preflight(preset, before) -> the Session after one of the preset `before`, each of whose
    steps would take an hour."""
    monkeypatch.setattr(kaggle_training, "KAGGLE", tmp_path)
    monkeypatch.setattr(kaggle_training, "try_cards", lambda: 1)
    monkeypatch.setattr(kaggle_training, "find_imagenet", lambda *given: None)
    monkeypatch.setattr(kaggle_training, "planned_hours",
                        lambda *given: dict.fromkeys(kaggle_training.STEPS, 1.0))
    free_disk(monkeypatch, working=1e12)
    output = tmp_path / "input" / "last-output"
    (output / "weights").mkdir(parents=True)
    (tmp_path / "input" / NAME).symlink_to(phantom_data)

    def start(preset, before):
        (output / "session.json").write_text(json.dumps(dict(session=1, preset=before)))
        return kaggle_training.preflight(preset, 60)
    return start


@pytest.mark.parametrize("before, preset", (
    ("gold", "standard"), ("gold-second", "gold"), ("fast", "gold-second")))
def test_a_session_does_not_go_on_from_another_preset(before, preset, preflight):
    said = f"attached is of --preset {before}, and this notebook of {preset}: detach it"
    with pytest.raises(cspine.UserError, match=said):
        preflight(preset, before)


def test_the_second_set_goes_on_from_the_first(preflight):
    assert preflight("gold-second", "gold").number == 2


def test_a_damaged_log_of_an_earlier_session_is_planned_anew(preflight, tmp_path, capsys):
    logs = tmp_path / "input" / "last-output" / "weights"
    (logs / "segmenter_fold0_log.csv").write_text("")
    (logs / "vertebra_fold0_log.csv").write_text("epoch,lr\n16.0,1e-3\n")
    assert preflight("fast", "fast").number == 2
    assert "train-seg 1.0, extract 1.0, train-cls 0.0" in capsys.readouterr().out


@pytest.fixture
def second_session(tmp_path):
    """A session after one that left a model and what a kill left of a state."""
    left = tmp_path / "earlier" / "weights"
    left.mkdir(parents=True)
    for name in ("vertebra_fold0.pt", ".74f5.vertebra_fold0_last.pt"):
        (left / name).write_text("whole")
    return kaggle_training.Session("fast", 2, math.inf, 1, tmp_path, tmp_path / "weights",
                                   tmp_path / "work", tmp_path / "earlier")


def test_a_session_takes_over_whole_files_alone(second_session):
    kaggle_training.take_over(second_session)
    assert [path.name for path in second_session.weights.iterdir()] == ["vertebra_fold0.pt"]


def test_a_copy_that_is_cut_short_is_none(second_session, monkeypatch):
    def cut(source, target):
        Path(target).write_text("wh")
        raise OSError("disk full")
    with monkeypatch.context() as patch, pytest.raises((OSError, cspine.UserError)):
        patch.setattr(shutil, "copyfile", cut)
        kaggle_training.take_over(second_session)
    kaggle_training.take_over(second_session)
    assert (second_session.weights / "vertebra_fold0.pt").read_text() == "whole"


@pytest.mark.parametrize("mode, ended", (("train-cls", True), ("evaluate", False)))
def test_what_failed_is_mended_before_it_is_attached(
        mode, ended, second_session, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kaggle_training, "KAGGLE", tmp_path)
    (tmp_path / "working").mkdir()
    stopped = f"the time was over in {mode}" if ended else f"{mode} FAILED with exit status 2"
    kaggle_training.close(second_session, stopped)
    said = capsys.readouterr().out
    assert f"Session 2: {stopped}." in said and "NOT YET TRAINED" in said
    assert "attach the output of this one" in said
    assert ("First mend what those lines name" in said) is not ended


def test_folds_may_be_fewer_and_crops_that_are_cut_short_are_not_taken_for_all(
        phantom_data, tmp_path, monkeypatch, capsys, one_thread):
    """A clock that goes a minute a look lets every mode end, but extract's limit is over."""
    tiny_preset(monkeypatch)
    monkeypatch.setitem(cspine.PRESETS, "fast", {
        mode: {k: v for k, v in values.items() if k != "folds"} | dict(epochs=1)
        for mode, values in cspine.PRESETS["fast"].items()})
    command = ["--preset", "fast", "--data", str(phantom_data), "--weights", str(tmp_path),
               "--work", str(tmp_path / "work"), "--workers", "1", "--device", "cpu",
               "--folds", "2"]
    ran, limits = [], []

    def run(arguments, cards):
        ran.append(arguments[0])
        if "--time-limit" in arguments:
            limits.append(arguments[-1])
        return cspine.main(arguments)

    monkeypatch.setattr(train_all, "run", run)
    ticks = itertools.count(0, 60)
    monkeypatch.setattr(train_all.time, "monotonic", lambda: next(ticks))
    assert train_all.main([*command, "--time-limit", "4"]) == 0  # of all modes together
    assert ran == ["train-seg", "extract"] and limits == ["3.000", "1.000"]
    assert "extract is not finished" in capsys.readouterr().err
    monkeypatch.setattr(train_all.time, "monotonic", time.perf_counter)
    assert train_all.main(command) == 0
    assert ran[2:] == ["train-seg", "extract", "train-cls", "train-patient", "evaluate"]


@pytest.mark.parametrize("cut, status", [(1, 3), (2, 0)])
def test_classifiers_are_not_trained_if_most_studies_have_no_crops(
        cut, status, phantom_data, tmp_path, monkeypatch, capsys):
    """With a process a GPU `extract` ends with 0 whatever it has cut; the rest went on."""
    train = pd.read_csv(phantom_data / "train.csv")
    (tmp_path / "last").mkdir()
    for uid in train.StudyInstanceUID[: math.ceil(len(train) / 2) if cut > 1 else 1]:
        (tmp_path / "last" / f"{uid}.npz").touch()
    ran = []
    monkeypatch.setattr(train_all, "run", lambda arguments, cards: ran.append(arguments[0]) or 0)
    monkeypatch.setattr(kaggle_training, "trained", lambda *_: True)
    monkeypatch.setattr(kaggle_training, "closed", lambda *_: False)
    command = ["--data", str(phantom_data), "--work", str(tmp_path), "--weights", str(tmp_path)]
    assert train_all.main(command) == status
    assert ran[:2] == ["train-seg", "extract"] and (len(ran) > 2) == (status == 0)
    assert (f"crops of 1 of {len(train)} studies" in capsys.readouterr().err) == (status == 3)


def test_without_imagenet_a_session_ends_before_it_begins(phantom_data, monkeypatch, tmp_path):
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    with pytest.raises(cspine.UserError, match="attach timm's files of convnext_nano, tf_eff"):
        kaggle_training.find_imagenet("gold", phantom_data, False)
    kaggle_training.find_imagenet("gold", phantom_data, True)


def test_a_session_refuses_a_file_of_another_network_before_it_begins(
        phantom_data, monkeypatch, tmp_path, capsys):
    """convnext_nano_ols is found where convnext_nano is asked for, and does not fit it."""
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    tiny_preset(monkeypatch)
    path = tmp_path / "input" / "me" / "test_resnet.pth"
    path.parent.mkdir(parents=True)
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    with pytest.raises(cspine.UserError, match="attach timm's files of test_resnet"):
        kaggle_training.find_imagenet("fast", phantom_data, True)
    assert f"test_resnet: DO NOT FIT: --init {path}" in capsys.readouterr().out
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    kaggle_training.find_imagenet("fast", phantom_data, False)
    assert f"test_resnet: {path}" in capsys.readouterr().out


@pytest.mark.parametrize("status", (2, 3))
def test_what_fails_ends_the_row(status, monkeypatch, tmp_path):
    """Also crops that most studies lack, of which extract says 3."""
    ran = []

    def run(arguments, cards):
        ran.append(arguments[0])
        return status if arguments[0] == "extract" else 0

    monkeypatch.setattr(train_all, "run", run)
    monkeypatch.setattr(kaggle_training, "trained", lambda *given: bool(ran))
    given = ["--preset", "gold", "--data", "d", "--weights", str(tmp_path), "--device", "cpu"]
    assert train_all.main(given) == status
    assert ran == ["train-seg", "extract"]


def test_gold_is_followed_by_its_second_set(monkeypatch, tmp_path):
    """With the same options; what is trained already is not trained again."""
    ran = []
    monkeypatch.setattr(train_all, "run", lambda arguments, cards: ran.append(arguments) or 0)
    done = [("gold", "train-seg")]  # by a session whose states are gone

    def trained(weights, preset, mode, *folds):
        first = (preset, mode) not in done
        done.append((preset, mode))  # by the run that follows
        return not first

    monkeypatch.setattr(kaggle_training, "trained", trained)
    monkeypatch.setattr(kaggle_training, "few_crops", lambda *_: "")
    given = ["--preset", "gold", "--data", "d", "--weights", str(tmp_path)]
    assert train_all.main(given) == 0
    modes_run = [(one[0], cspine.preset_given(one)) for one in ran]
    fit = ("evaluate", None)
    later = ("extract", "train-cls", "train-patient")
    assert modes_run == [*((mode, "gold") for mode in later), fit,
                         *((mode, "gold-second") for mode in ("train-seg", *later)), fit]
    assert all(one[1:3] == ["--preset", "gold"] for one in ran if one[0] != "evaluate")


def test_the_plan_is_the_work_over_the_rate(monkeypatch):
    """Twice the cards or the rate halve the hours; of five folds each trains on four."""
    monkeypatch.setattr(kaggle_training, "training_flops", lambda kind, recipe, samples: 3.6e15 * samples)
    plan = kaggle_training.planned_hours
    hours = plan("standard", 100, 10, 1, 1.0)
    assert hours == pytest.approx({"train-seg": 5 * 8, "train-cls": 5 * 560, "train-patient": 5 * 80,
                                   "extract": 100 * kaggle_training.EXTRACT_S / 3600})
    assert plan("standard", 100, 10, 2, 1.0) == pytest.approx({m: h / 2 for m, h in hours.items()})
    assert plan("standard", 100, 10, 1, 2.0)["train-cls"] == pytest.approx(5 * 280)
    assert plan("fast", 100, 10, 1, 1.0)["train-cls"] == pytest.approx(560)


def test_a_preflight_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(kaggle_training, "KAGGLE", tmp_path)
    monkeypatch.setattr(kaggle_training, "TEMPORARY", tmp_path)
    with pytest.raises(cspine.UserError, match="attach it"):
        kaggle_training.mounted(NAME)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(cspine.UserError, match="T4 x2"):
        kaggle_training.try_cards()


@pytest.mark.parametrize("working, temporary, place", [
    (30e9, 50e9, "working"), (20e9, 50e9, "temporary"), (20e9, 25e9, "")])
def test_crops_go_where_they_fit(working, temporary, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kaggle_training, "KAGGLE", tmp_path)
    monkeypatch.setattr(kaggle_training, "TEMPORARY", tmp_path / "temporary")
    free_disk(monkeypatch, working=working, temporary=temporary)
    if place:
        assert kaggle_training.work_folder(25) == tmp_path / place / "work"
    else:
        with pytest.raises(cspine.UserError, match="too little disk"):
            kaggle_training.work_folder(25)
    assert capsys.readouterr().out.count("too little") == ["working", "temporary", ""].index(place)


def test_of_two_sessions_the_later_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(kaggle_training, "KAGGLE", tmp_path)
    assert kaggle_training.earlier_session() == (None, 0)
    for place, number in (("one", 2), ("notebooks/me/two", 10), ("datasets/me/three", 9)):
        (tmp_path / "input" / place).mkdir(parents=True)
        (tmp_path / "input" / place / "session.json").write_text(json.dumps(dict(session=number)))
    assert kaggle_training.earlier_session() == (tmp_path / "input/notebooks/me/two", 10)
