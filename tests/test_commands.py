"""I rely on the command line: help for every mode, and one line for what I can mend."""

import dataclasses
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import cspine
import demo
import modes
from small_kernel import make_test_set, make_weights, write_test_csv


def test_an_interrupted_tool_ends_without_a_traceback(monkeypatch):
    def interrupted(command):
        raise KeyboardInterrupt
    monkeypatch.setattr(subprocess, "call", interrupted)
    assert cspine.main(["demo"]) == 130


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A test study, and labels that make it a training study as well."""
    folder = make_test_set(tmp_path_factory.mktemp("data"), ["a"])
    shutil.copytree(folder / "test_images", folder / "train_images")
    row = pd.DataFrame([["a", 1, 1, *[0] * 6]],
                       columns=[cspine.STUDY, "patient_overall", *cspine.VERTEBRAE])
    row.to_csv(folder / "train.csv", index=False)
    return folder


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """refused(arguments) -> the one line that a mistake of the user ends in."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments):
        capsys.readouterr()
        assert run(arguments) == 2
        out, errors = capsys.readouterr()
        assert not out and errors.count("\n") == 1 and errors.startswith("cspine: ")
        return errors
    return refuse


MODES = cspine.MODES | modes.MODES


def run(arguments):
    """The exit status of a mode, in this process also where cspine.py starts another."""
    tool = arguments and arguments[0] in modes.MODES
    return (modes.main if tool else cspine.main)([*map(str, arguments)])


def help_of(arguments, capsys):
    """What --help prints, on one line."""
    with pytest.raises(SystemExit) as end:
        run([*arguments, "--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def options_of(mode):
    """[(field, default)] of all options of a mode."""
    _, shared, own = MODES[mode]
    known = {one.name: one for one in dataclasses.fields(cspine.Shared)}
    found = [(known[name], known[name].default) for name in shared.split()]
    for one in dataclasses.fields(own) if own else ():
        found.append((one, getattr(own, one.name)))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_says_what_it_does_and_every_option_what_it_is(mode, capsys, monkeypatch):
    """Each option: a sentence, the default, and what it may be if not everything goes."""
    monkeypatch.setenv("COLUMNS", "1000")
    text = help_of([mode], capsys)
    assert " ".join(MODES[mode].run.__doc__.split()) in text
    assert "eads" in text or "rites" in text
    for one, default in options_of(mode):
        meaning = " ".join(one.metadata["help"].split())
        assert len(meaning.split()) > 1 and meaning in text
        assert (one.name.upper() if one.metadata.get("positional") else flag(one)) in text
        said = ("off", "on")[default] if isinstance(default, bool) else default
        assert default == "" or f"{meaning} (default: {said})" in text or "positional" in one.metadata
        for choice in one.metadata.get("choices", ()):
            assert str(choice) in text


@pytest.mark.parametrize("mode", MODES)
def test_help_is_readable_on_a_terminal_that_knows_ascii_alone(mode, capsys):
    assert help_of([mode], capsys).isascii()


def flag(one):
    return "--" + one.name.replace("_", "-")


def bounded(limit):
    """(mode, option, a value below or above its limit) of all that have such a limit."""
    for mode in MODES:
        for one, default in options_of(mode):
            value = one.metadata.get(limit, math.inf)
            if not math.isinf(value):
                beyond = value - 1 if limit == "least" else value + 1
                yield pytest.param(mode, one, type(default)(beyond), id=f"{mode} {flag(one)}")


@pytest.mark.parametrize("mode, one, value", [*bounded("least"), *bounded("most")])
def test_a_value_out_of_range_is_refused_by_the_options_own_name(mode, one, value, refused):
    given = ["x"] * sum(bool(other.metadata.get("positional")) for other, _ in options_of(mode))
    line = refused(mode, *given, f"{flag(one)}={value}")
    assert f"{flag(one)}: {value:g}: must be from" in line


@pytest.mark.parametrize("arguments, word", (
    (["train-cls", "--mask-of", "middle"], "--mask-of: invalid choice: 'middle'"),
    (["train-seg", "--epochs", "many"], "--epochs: invalid int value"),
    (["train-seg", "--lr", "nan"], "--lr: nan: must be from")))
def test_a_value_of_another_kind_is_refused(arguments, word, refused):
    assert word in refused(*arguments)


def test_every_shared_option_is_used_by_a_mode():
    used = {name for mode in MODES.values() for name in mode.shared.split()}
    assert used == {one.name for one in dataclasses.fields(cspine.Shared)}


def test_the_modes_of_the_design_are_there_in_the_order_of_the_work(capsys):
    text = help_of([], capsys)
    names = ("train-seg", "extract", "train-cls", "train-patient", "predict", "evaluate")
    places = [text.index(f" {mode} ") for mode in names]
    assert places == sorted(places)
    assert set(cspine.TOOL_MODES) == set(modes.MODES)
    for name, sentence in cspine.TOOL_MODES.items():
        assert name in text and sentence in text
        assert modes.MODES[name].run.__doc__.startswith(sentence)


@pytest.mark.parametrize("arguments", ([], ["fly"], ["predict", "--wings", "2"],
                                       ["predict", "--top-k", "many"], ["show"]))
def test_a_mistyped_command_is_refused(arguments, refused):
    refused(*arguments)


def test_a_mode_of_the_repository_runs_in_a_process_of_its_own(tmp_path, monkeypatch, capfd):
    """Its exit status and its one line come through."""
    monkeypatch.chdir(tmp_path)
    command = ["notebook", "--out", str(tmp_path)]
    assert cspine.main(command) == 0
    said = capfd.readouterr().out.splitlines()
    assert "in place of OWNER" in said[1] and said[2].startswith("kaggle kernels push")
    assert cspine.main([*command, "--weights-dataset", "../x"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_without_the_repository_its_modes_are_refused_in_one_line(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(cspine, "HERE", tmp_path)
    monkeypatch.setattr(modes, "MODES", {})
    assert "demo needs the repository" in refused("demo")


@pytest.mark.parametrize("mode", ("predict", "train-seg", "extract", "train-cls", "train-patient",
                                  "evaluate"))
def test_no_data_folder(mode, refused, tmp_path, weights):
    assert "--data" in refused(mode, "--data", tmp_path / "none", "--weights", weights)


def test_no_weights(refused, tmp_path, data):
    line = refused("predict", "--data", data, "--weights", tmp_path)
    assert "no segmenter" in line and "--weights" in line
    assert "train-seg" in refused("extract", "--data", data, "--weights", tmp_path)
    assert "heldout" in refused("evaluate", "--folds", "--data", data, "--weights", tmp_path)


@pytest.mark.parametrize("text", ("", "a,b\n1,2\n", "row_id,prediction_type\n1,2\n", "\0\1\2"))
def test_a_csv_without_its_columns(text, refused, tmp_path, weights):
    folder = tmp_path / "data"
    (folder / "train_images").mkdir(parents=True)
    (folder / "test.csv").write_text(text)
    (folder / "train.csv").write_text(text)
    assert "test.csv" in refused("predict", "--data", folder, "--weights", weights)
    assert "train.csv" in refused("train-seg", "--data", folder)
    assert "train.csv" in refused("evaluate", "--data", folder)


def test_a_submission_without_its_columns_or_of_other_studies(refused, tmp_path, data, weights):
    (tmp_path / "submission.csv").write_text("id,answer\n1,0.5\n")
    assert "row_id" in refused("evaluate", "--data", data, "--weights", weights)
    (tmp_path / "submission.csv").write_text("row_id,fractured\nother_C1,0.5\n")
    assert "nothing to score" in refused("evaluate", "--data", data, "--weights", weights)


def test_an_unknown_backbone(refused, data, tmp_path):
    crops = np.ones((7, 15, 6, 16, 16), np.uint8)
    cspine.write_crops(tmp_path / "work" / "last" / "a.npz", crops)
    line = refused("train-cls", "--data", data, "--backbone", "resnet1", "--folds", 1, "--fold", 0,
                   "--init", "none", "--size", 16)
    assert "--backbone resnet1" in line


@pytest.mark.parametrize("options, word", (
    (["--fold", "7"], "--fold 7"), (["--size", "0"], "--size"), (["--epochs", "-1"], "--epochs"),
    (["--hidden", "0"], "--hidden"), (["--lr", "-1"], "--lr"), (["--mixup", "7"], "--mixup"),
    (["--device", "cuda:77"], "--device"), (["--device", "moon"], "--device")))
def test_settings_that_cannot_be(options, word, refused, data, tmp_path):
    crops = np.ones((7, 15, 6, 16, 16), np.uint8)
    cspine.write_crops(tmp_path / "work" / "last" / "a.npz", crops)
    assert word in refused("train-cls", "--data", data, "--size", 16, *options)


def test_a_device_that_is_not_there(refused, data, weights):
    assert "--device cuda:77" in refused("predict", "--data", data, "--weights", weights,
                                         "--device", "cuda:77")


def test_weights_of_another_kind(refused, data, weights, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    shutil.copy(weights / "segmenter_fold0.pt", folder / "vertebra_fold0.pt")
    line = refused("predict", "--data", data, "--weights", folder)
    assert "vertebra_fold0.pt" in line and "segmenter" in line


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def tampered(content):
    """Ways to spoil a good checkpoint, by name."""
    tensors, settings = content["tensors"], content["settings"]
    name = next(iter(tensors))
    yield "a trap", content | {"recipe": Trap()}
    yield "of another program", content | {"program": "other"}
    yield "no dictionary", [1, 2, 3]
    yield "no tensors", {k: v for k, v in content.items() if k != "tensors"}
    yield "a tensor missing", content | {"tensors": {k: v for k, v in tensors.items() if k != name}}
    yield "a tensor of another shape", content | {"tensors": tensors | {name: torch.zeros(3)}}
    yield "no tensor at all", content | {"tensors": tensors | {name: "text"}}
    yield "tensors a list", content | {"tensors": [1]}
    yield "an unknown backbone", content | {"settings": settings | {"backbone": "none"}}
    yield "a backbone that is a number", content | {"settings": settings | {"backbone": 7}}
    yield "a backbone from the network", content | {"settings": settings | {
        "backbone": "hf-hub:timm/resnet18"}}
    yield "absurd sizes", content | {"settings": settings | {"hidden": "many"}}
    yield "negative sizes", content | {"settings": settings | {"hidden": -1}}
    yield "settings a list", content | {"settings": [1]}


@pytest.mark.parametrize("name, number", [(name, k) for k, (name, _) in enumerate(tampered(
    dict(tensors={"a": 0}, settings={})))])
def test_a_tampered_weights_file_is_refused(name, number, refused, data, weights, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    content = torch.load(weights / "vertebra_fold0.pt", weights_only=True)
    torch.save(list(tampered(content))[number][1], folder / "vertebra_fold0.pt")
    assert "vertebra_fold0.pt: " in refused("predict", "--data", data, "--weights", folder)


@pytest.mark.parametrize("content", (b"", b"text", b"PK\3\4" + bytes(100), None))
def test_a_foreign_or_cut_file_is_refused(content, refused, data, weights, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    path = folder / "patient_fold0.pt"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    assert "patient_fold0.pt" in refused("predict", "--data", data, "--weights", folder)


def test_a_file_whose_middle_is_lost_is_refused(refused, data, weights, tmp_path):
    """As by a copy that was cut short and filled up; its list of contents is whole."""
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    path = folder / "patient_fold0.pt"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(4096) + content[middle + 4096:])
    with pytest.raises(cspine.UserError, match="patient_fold0.pt: damaged, or no checkpoint"):
        cspine.load_checkpoint(path)
    assert "patient_fold0.pt" in refused("predict", "--data", data, "--weights", folder)


@pytest.mark.parametrize("rank, world", [
    ("1", None), ("2", "2"), ("-1", "2"), ("x", "2"), ("0", ""), (None, "2")])
def test_ranks_that_cannot_be_are_refused(rank, world, refused, monkeypatch):
    """Another program's: a process that takes itself for one of two does half."""
    for name, value in dict(RANK=rank, WORLD_SIZE=world).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert "RANK, WORLD_SIZE: not torchrun's; unset both: " in refused("predict")


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """failing(error) -> the exit status of a mode in which it is raised."""
    def run(error):
        def broken(path, columns):
            raise error
        write_test_csv(tmp_path, [("a_C1", "a", "C1")])
        monkeypatch.setattr(cspine, "read_csv", broken)
        return cspine.main(["predict", "--data", str(tmp_path)])
    return run


def test_a_card_that_fails_ends_a_mode_in_one_line_and_a_bug_of_ours_does_not(failing, capsys):
    advice = ("\nCUDA kernel errors might be asynchronously reported at some other API call.\n"
              "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n")
    assert failing(RuntimeError("CUDA error: unspecified launch failure" + advice)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "the GPU failed" in line and "launch failure" in line
    assert failing(RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: "
                                "can't allocate memory: you tried to allocate 9 bytes.")) == 2
    assert capsys.readouterr().err.startswith("cspine: out of memory: try")
    for fault in ("shapes do not fit", "CUDA error: device-side assert triggered" + advice):
        with pytest.raises(RuntimeError, match=fault[:10]):
            failing(RuntimeError(fault))


def test_whoever_stops_reading_ends_a_mode_as_a_shell_expects(failing, capsys):
    assert failing(BrokenPipeError(32, "Broken pipe")) == 141
    assert not capsys.readouterr().err


def test_a_closed_stdout_changes_no_status(tmp_path):
    command = [sys.executable, cspine.__file__, "predict", "--data", "nowhere"]
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_demo_goes_from_phantoms_to_scores_and_dice(weights, tmp_path, monkeypatch, capsys):
    """Each table after a line that says what it is; four studies have no reliability."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "MATRIX", 64)
    assert run(["demo", "--weights", weights, "--test-studies", "1"]) == 0
    text = capsys.readouterr().out
    labels = pd.read_csv(tmp_path / "work" / "demo" / "test_labels.csv")
    study = labels[cspine.STUDY][0].rpartition(".")[2]
    lines = text.splitlines()
    row = next(k for k, line in enumerate(lines) if line.startswith(f"study {study} "))
    assert lines[row].count("*") == labels[list(cspine.TARGETS)].to_numpy().sum()
    assert lines[row - 1].split() == [*cspine.VERTEBRAE, "patient"]
    assert lines[row - 2].startswith("Probability of a fracture")
    assert "1 studies; weighted log loss" in text and " Dice " in text
    assert "named right" in text and len(pd.read_csv("submission.csv")) == 8
    assert "mean answer" not in text and max(map(len, lines)) < 130
    assert (tmp_path / "work" / "demo" / "overview.png").exists()


def test_a_mode_leaves_the_notebooks_random_numbers_as_they_were():
    """Trainings seed torch's generator at every step."""
    def seed(options):
        """Seed it."""
        torch.manual_seed(1)

    before = torch.get_rng_state()
    mode = cspine.MODES["predict"]._replace(run=seed)
    assert cspine.run_mode({"predict": mode}, ["predict"]) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mode_leaves_opencv_as_it_was():
    """Its threads and its words are the notebook's."""
    before = cspine.cv2.getNumThreads(), cspine.cv2.utils.logging.getLogLevel()
    cspine.cv2.setNumThreads(3), cspine.cv2.utils.logging.setLogLevel(2)
    try:
        cspine.main(["predict", "--data", "nowhere"])
        assert (cspine.cv2.getNumThreads(), cspine.cv2.utils.logging.getLogLevel()) == (3, 2)
    finally:
        cspine.cv2.setNumThreads(before[0]), cspine.cv2.utils.logging.setLogLevel(before[1])


FAULTS = """
import resource, numpy as np, cspine

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        large, small = np.empty(2**27, np.uint8), np.empty(2**20, np.uint8)
        large.fill(1), small.fill(1)
        del large, small
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

before = faults()
cspine.main(["predict", "--data", "nowhere"])
faults()  # the heap grows once
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_mode_keeps_freed_memory_for_the_next_arrays():
    """An array of 128 MB is no new memory for Linux to clear, each time."""
    root = Path(cspine.__file__).parent
    text = subprocess.check_output([sys.executable, "-c", FAULTS], text=True, cwd=root)
    before, after = map(int, text.split())
    assert before > 10 * after, text


@pytest.mark.parametrize("library", [AttributeError, OSError, TypeError])
def test_without_glibc_memory_is_left_as_it_is(library, monkeypatch):
    """musl and macOS have no mallopt; Windows has no library without a name."""
    def none(name):
        raise library
    monkeypatch.setattr(cspine.ctypes, "CDLL", none)
    cspine.keep_memory()
