"""I rely on: the modes work one after another, as the README's road says."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cspine import TARGETS, competition_scores, main

SMALL = ["--fold", "0", "--folds", "2", "--batch-size", "2", "--epochs", "2", "--workers", "2"]


def test_from_phantoms_to_a_scored_submission(tmp_path, monkeypatch, capsys):
    """The README's seven commands, on studies and networks as small as they come."""
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
        ["evaluate", "--data", "data", "--weights", "new"]]
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


def test_the_readme_names_every_mode():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    from cspine import MODES
    for mode in MODES:
        assert f"`{mode}" in text, mode
    assert "pip install torch timm pydicom opencv-python numpy pandas tqdm pytest" in text


@pytest.mark.parametrize("seed", [0])
def test_the_shipped_weights_see_and_name_vertebrae(tmp_path, seed, capsys):
    """Three phantoms of 256 x 256; bounds well below what weights/README.md reports."""
    data, torch_threads = tmp_path / "data", torch.get_num_threads()
    main(["phantom", str(data), "--studies", "0", "--test-studies", "3", "--seed", "77"])
    torch.set_num_threads(2)
    assert main(["predict", "--data", str(data), "--out", str(tmp_path / "s.csv")]) == 0
    torch.set_num_threads(torch_threads)
    report = pd.read_csv(tmp_path / "predict_report.csv")
    assert (report.seen.str.count(r"\+") >= 4).all()
    capsys.readouterr()
    assert main(["evaluate", "--data", str(data), "--submission", str(tmp_path / "s.csv")]) == 0
    printed = capsys.readouterr().out
    dice = float(printed.split("Dice ")[1].split(";")[0])
    labels = pd.read_csv(data / "test_labels.csv")[list(TARGETS)].to_numpy()
    answers = pd.read_csv(tmp_path / "s.csv").fractured.to_numpy().reshape(-1, 8)
    score, _ = competition_scores(answers, labels)
    assert dice > 0.7 and score < 0.75, (dice, score)
    assert np.ptp(answers) > 0.2, "answers that differ"
