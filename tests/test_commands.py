"""I rely on the command line: help for every mode, and one line for what I can mend."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import cspine
from rooms import MODES
from small_kernel import make_test_set, make_weights, write_test_csv


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

    def run(*arguments):
        capsys.readouterr()
        assert cspine.main([*map(str, arguments)]) == 2
        out, errors = capsys.readouterr()
        assert not out and errors.count("\n") == 1 and errors.startswith("cspine: ")
        return errors
    return run


def described(mode):
    """(function, shared options, {own option: its default}) of a mode, wherever it stands."""
    function, shared, own = MODES[mode]
    if isinstance(own, dict):
        return function, shared.split(), {name: default for name, (default, _) in own.items()}
    settings = cspine.RECIPES[own] if isinstance(own, str) else own
    return function, shared.split(), dataclasses.asdict(settings)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_answers_help_with_its_purpose_and_defaults(mode, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as end:
        cspine.main([mode, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    function, shared, own = described(mode)
    assert end.value.code == 0 and " ".join(function.__doc__.split()) in text
    for name in shared:
        default, meaning = cspine.OPTIONS[name]
        assert "--" + name.replace("_", "-") in text
        assert " ".join(f"{meaning} (default: {default})".split()) in text
    for name, default in own.items():
        assert (name if default is None else "--" + name.replace("_", "-")) in text
        assert default is None or " ".join(f"(default: {default})".split()) in text


def test_every_option_is_used_by_a_mode():
    assert set(cspine.OPTIONS) <= {name for mode in MODES for name in described(mode)[1]}


def test_the_modes_of_the_design_are_there_in_the_order_of_the_work(capsys):
    with pytest.raises(SystemExit):
        cspine.main(["--help"])
    text = capsys.readouterr().out
    modes = ("phantom", "train-seg", "extract", "train-cls", "train-patient", "predict",
             "evaluate", "notebook", "demo")
    places = [text.index(f"\n    {mode}") for mode in modes]
    assert places == sorted(places)


@pytest.mark.parametrize("arguments", ([], ["fly"], ["predict", "--wings", "2"],
                                       ["predict", "--views", "many"]))
def test_a_mistyped_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cspine.main(arguments)
    assert end.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("mode", ("predict", "train-seg", "extract", "train-cls", "train-patient",
                                  "evaluate"))
def test_no_data_folder(mode, refused, tmp_path, weights):
    assert "--data" in refused(mode, "--data", tmp_path / "none", "--weights", weights) or \
        mode == "evaluate"


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
    crops = np.ones((7, 15, 6, 8, 8), np.uint8)
    cspine.write_crops(tmp_path / "work" / "last" / "a.npz", crops)
    line = refused("train-cls", "--data", data, "--backbone", "resnet1", "--folds", 1, "--fold", 0)
    assert "--backbone resnet1" in line


@pytest.mark.parametrize("options, word", (
    (["--fold", "7"], "--fold 7"), (["--size", "0"], ""), (["--epochs", "-1"], "--epochs"),
    (["--device", "cuda:77"], "--device"), (["--device", "moon"], "--device")))
def test_settings_that_cannot_be(options, word, refused, data, tmp_path):
    cspine.write_crops(tmp_path / "work" / "last" / "a.npz", np.ones((7, 15, 6, 8, 8), np.uint8))
    if word:
        assert word in refused("train-cls", "--data", data, *options)


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
    refused("predict", "--data", data, "--weights", folder)


@pytest.mark.parametrize("content", (b"", b"text", b"PK\3\4" + bytes(100), None))
def test_a_foreign_or_cut_file_is_refused(content, refused, data, weights, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    path = folder / "patient_fold0.pt"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    assert "patient_fold0.pt" in refused("predict", "--data", data, "--weights", folder)


def test_files_that_only_look_like_folds_are_left_alone(data, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    for name in ("vertebra_fold0_last.pt", "vertebra_fold_old1.pt", "segmenter_fold0x2.pt"):
        (folder / name).write_text("no weights")
    assert list(cspine.load_models(folder, "vertebra", torch.device("cpu"))) == [0]
    assert list(cspine.load_models(folder, "segmenter", torch.device("cpu"))) == [0]


def test_an_output_that_cannot_be_written(refused, data, weights, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused("predict", "--data", data, "--weights", weights, "--out",
                   tmp_path / "file" / "submission.csv")
    assert "cannot write" in line


def test_evaluate_scores_a_submission_with_holes(data, weights, tmp_path, capsys):
    """What is missing or no number counts as the prior."""
    rows = [("a_C1", "0.9"), ("a_C2", "none"), ("odd", "0.5")]
    path = tmp_path / "submission.csv"
    pd.DataFrame(rows, columns=["row_id", "fractured"]).to_csv(path, index=False)
    assert cspine.main(["evaluate", "--data", str(data), "--weights", str(tmp_path),
                        "--submission", str(path)]) == 0
    answer, label = cspine.PRIOR.copy(), np.array([1, *[0] * 6, 1])
    answer[0] = 0.9
    weight = np.where(label, 2, 1) * [1, 1, 1, 1, 1, 1, 1, 7]
    loss = -np.where(label, np.log(answer), np.log(1 - answer))
    assert f"{(weight * loss).sum() / weight.sum():.4f} per study" in capsys.readouterr().out


def test_evaluate_reads_no_mask_outside_the_data(data, weights, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = pd.DataFrame([["../../x*", 1, 1, *[0] * 6]],
                        columns=[cspine.STUDY, "patient_overall", *cspine.VERTEBRAE])
    rows.to_csv(folder / "train.csv", index=False)
    path = tmp_path / "submission.csv"
    pd.DataFrame([("../../x*_C1", 0.5)], columns=["row_id", "fractured"]).to_csv(path, index=False)
    assert cspine.main(["evaluate", "--data", str(folder), "--weights", str(weights),
                        "--submission", str(path)]) in (0, 2)
    assert "Dice" not in capsys.readouterr().out


def test_a_bug_shows_its_traceback(monkeypatch, tmp_path):
    def broken(path, columns):
        raise ZeroDivisionError

    write_test_csv(tmp_path, [("a_C1", "a", "C1")])
    monkeypatch.setattr(cspine, "read_csv", broken)
    with pytest.raises(ZeroDivisionError):
        cspine.main(["predict", "--data", str(tmp_path)])


def test_demo_goes_from_phantoms_to_scores_and_dice(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = MODES["phantom"][2]
    monkeypatch.setitem(own, "matrix", (64, ""))
    assert cspine.main(["demo", "--weights", str(weights), "--test-studies", "1"]) == 0
    text = capsys.readouterr().out
    labels = pd.read_csv(tmp_path / "work" / "demo" / "test_labels.csv")
    shown = next(line for line in text.splitlines() if line.startswith(labels[cspine.STUDY][0]))
    assert shown.count("*") == labels[list(cspine.TARGETS)].to_numpy().sum()
    assert "1 studies; weighted log loss" in text and " Dice " in text
    assert "named right" in text and len(pd.read_csv("submission.csv")) == 8
