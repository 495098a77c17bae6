"""I rely on: the modes work one after another, as the README's road says."""

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


def test_the_shipped_weights_see_and_name_vertebrae(tmp_path, capsys):
    """Two phantoms of 256 x 256 gave Dice 0.927, log loss 0.274 and every name right; the best
    constants score 0.455 there. The bounds leave room for other arithmetic, none for other pixels."""
    data, torch_threads = tmp_path / "data", torch.get_num_threads()
    main(["phantom", str(data), "--studies", "0", "--test-studies", "2", "--seed", "77"])
    torch.set_num_threads(2)
    try:
        assert main(["predict", "--data", str(data), "--out", str(tmp_path / "s.csv")]) == 0
    finally:
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
    assert dice > 0.88 and named > 0.97 and abs(score - 0.27) < 0.03, printed
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
