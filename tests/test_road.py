"""I rely on: the modes work one after another, as the README's road says."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

import cspine
from cspine import TARGETS, competition_scores, dice_scores, named_right
from limits import at_cells
from phantoms import make_phantom

import modes



def main(arguments):
    """cspine.main, in this process also for the modes that it starts a process for."""
    tool = arguments[0] in modes.MODES
    return (modes.main if tool else cspine.main)(arguments)


SMALL = ["--fold", "0", "--folds", "2", "--batch-size", "2", "--epochs", "2", "--workers", "2"]


def test_from_phantoms_to_a_scored_submission(tmp_path, monkeypatch, capsys):
    """The README's commands, on studies and networks as small as they come."""
    monkeypatch.chdir(tmp_path)
    commands = [
        ["phantom", "data", "--studies", "4", "--test-studies", "2", "--matrix", "64", "--seed", "5"],
        ["train-seg", "--data", "data", "--weights", "new", "--size", "32", "--backbone",
         "lcnet_050", "--lr", "0.005", *SMALL],
        ["extract", "--data", "data", "--weights", "new"],
        ["train-cls", "--data", "data", "--weights", "new", "--backbone", "lcnet_050", "--size",
         "32", "--hidden", "8", *SMALL],
        ["train-patient", "--data", "data", "--weights", "new", "--backbone", "lcnet_050", "--size",
         "32", "--hidden", "8", *SMALL],
        ["predict", "--data", "data", "--weights", "new"],
        ["evaluate", "--data", "data", "--weights", "new"],
        ["eda", "--data", "data", "--weights", "new"]]
    for command in commands:
        assert main(command) == 0, (command, capsys.readouterr().err)
    printed = capsys.readouterr().out
    answers = pd.read_csv("submission.csv")
    asked = pd.read_csv("data/test.csv")
    assert list(answers.row_id) == list(asked.row_id) and answers.fractured.between(0, 1).all()
    labels = pd.read_csv("data/test_labels.csv")[list(TARGETS)].to_numpy()
    score, _ = competition_scores(answers.fractured.to_numpy().reshape(-1, 8), labels)
    assert f"{score:.4f}" in printed
    report = pd.read_csv("predict_report.csv")
    assert len(report) == 2 and set(report.status) <= {"ok", "partial", "nothing seen"}
    for kind in ("segmenter", "vertebra", "patient"):
        assert len(pd.read_csv(f"new/{kind}_fold0_log.csv")) == 2
        assert Path(f"new/{kind}_fold0_heldout.csv").exists()
        assert Path(f"eda/{kind}_fold0_curves.png").exists()


def test_the_readme_names_every_mode():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    for mode in cspine.MODES | modes.MODES:
        assert f"`{mode}" in text, mode
    assert "pip install torch timm pydicom opencv-python numpy pandas tqdm pytest" in text


def test_the_shipped_weights_see_and_name_vertebrae(tmp_path, capsys):
    """Five phantoms of 256 x 256 gave Dice 0.931, log loss 0.119 and every name right; the best
    constants score 0.537 there. The bounds leave room for other arithmetic, none for other pixels."""
    data, torch_threads = tmp_path / "data", torch.get_num_threads()
    main(["phantom", str(data), "--studies", "0", "--test-studies", "5", "--seed", "77"])
    torch.set_num_threads(2)
    assert main(["predict", "--data", str(data), "--out", str(tmp_path / "s.csv")]) == 0
    torch.set_num_threads(torch_threads)
    report = pd.read_csv(tmp_path / "predict_report.csv")
    assert (report.seen.str.count(r"\+") >= 4).all()
    capsys.readouterr()
    assert main(["evaluate", "--data", str(data), "--submission", str(tmp_path / "s.csv")]) == 0
    printed = capsys.readouterr().out
    whole = next(line for line in printed.splitlines() if line.startswith("C1 to C7"))
    dice, named = map(float, whole.split()[-2:])
    labels = pd.read_csv(data / "test_labels.csv")[list(TARGETS)].to_numpy()
    answers = pd.read_csv(tmp_path / "s.csv").fractured.to_numpy().reshape(-1, 8)
    score, _ = competition_scores(answers, labels)
    assert dice > 0.9 and named > 0.97 and score < 0.2, printed
    assert np.ptp(answers) > 0.2, "answers that differ"


def test_the_shipped_weights_name_vertebrae_in_a_field_of_view_twice_as_wide():
    made, cpu = make_phantom([78, 0], 256), torch.device("cpu")
    around = [(n // 2,) * 2 for n in made.hu.shape]
    hu = np.pad(np.rint(made.hu).astype(np.int16), around, constant_values=-1000)
    models = [*cspine.load_models(cspine.HERE / "weights", "segmenter", cpu).values()]
    probability = cspine.segment(models, cspine.Volume("", hu, made.spacing, made.affine), cpu)
    truth = at_cells(np.pad(made.label, around), 128)
    dice = dice_scores(probability, truth)
    assert np.nanmin(dice) > 0.8 and np.all(named_right(probability, truth) | np.isnan(dice))
