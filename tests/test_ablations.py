"""The small trainings of ablations.py run, and differ in what they say they differ in; the
other measurements count what they say."""

import dataclasses
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import ablations
import choices
import cspine
import levels
import train_weights
import versions
from test_slices import block, numbered_volume


def test_stretched_crops_fill_the_box_on_both_axes():
    volume, wide = numbered_volume(), block(3, (8, 16), (12, 18), (6, 26))
    masks = {name: cut(volume, wide, 64)[3, 7, -1] > 127 for name, cut in (
        ("square", cspine.vertebra_slices), ("stretched", ablations.stretched_slices))}
    height, width = (masks["square"].any(axis).sum() for axis in (1, 0))
    assert height < 0.5 * width
    height, width = (masks["stretched"].any(axis).sum() for axis in (1, 0))
    assert height > 0.7 * width


def test_undivided_weights_are_larger_by_the_depth_of_the_kernel():
    plain, other = (cspine.Segmenter("mobilenetv3_small_050") for _ in range(2))
    copy = lambda model, _: model.load_state_dict(plain.state_dict())  # noqa: E731
    ablations.undivided(copy, other, "")
    for one, two in zip(plain.encoder.modules(), other.encoder.modules()):
        if isinstance(one, torch.nn.Conv3d):
            assert torch.equal(one.weight * one.kernel_size[0], two.weight)


def test_three_channels_show_the_encoder_its_input_three_times():
    torch.manual_seed(0)
    model = ablations.ThreeChannels("mobilenetv3_small_050").eval()
    stem = next(m for m in model.encoder.modules() if isinstance(m, torch.nn.Conv3d))
    assert stem.weight.shape[1] == 3
    folded = cspine.Segmenter("mobilenetv3_small_050").eval()
    state = model.state_dict()
    name = next(n for n, t in state.items() if t.ndim == 5)
    folded.load_state_dict(state | {name: state[name].sum(1, keepdim=True)})
    cube = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(cube), folded(cube), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant, found", (
    ("no mask", "auc"), ("segmenter", "dice"), ("3 channels", "dice")))
def test_a_run_trains_and_the_table_shows_it(variant, found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "BACKBONE", "tf_mobilenetv3_small_minimal_100")
    monkeypatch.setattr(ablations, "CROP", 32)
    monkeypatch.setattr(ablations, "EDGE", 64)
    monkeypatch.setattr(ablations, "SMALL", 32)
    rng = np.random.default_rng(0)
    for folder in ("cubes", *ablations.CUTS):
        (tmp_path / folder).mkdir()
    for k in range(10):
        np.save(tmp_path / f"cubes/{k}.npy", rng.integers(0, 8, (2, 64, 64, 64), np.uint8))
        np.save(tmp_path / f"square/{k}.npy", rng.integers(0, 255, (7, 15, 6, 32, 32), np.uint8))
    rows = ["C1,C2,C3,C4,C5,C6,C7,held_out", *["0,1,0,1,0,0,1,False"] * 8, *["1,0,0,0,1,1,0,True"] * 2]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    init = tmp_path / "imagenet.pth"
    torch.save(cspine.create_backbone(ablations.BACKBONE).state_dict(), init)
    command = ["run", str(tmp_path), variant, "--epochs", "1", "--device", "cpu"]
    with pytest.raises(SystemExit):
        ablations.main(command)  # from scratch, it would be another comparison
    assert f"{variant} needs --init" in capsys.readouterr().err
    ablations.main([*command, "--init", str(init)])
    ablations.main(["table", str(tmp_path)])
    head, row = capsys.readouterr().out.splitlines()[-2:]
    assert row.startswith(f"{variant}, seed 0")
    assert row.split()[head.split().index(found) - len(head.split())] != "-"


# ---- The other measurements ----


def test_choices_are_compared_with_the_calibration_that_ships():
    """One that inverts every answer: the row without it must differ."""
    rng = np.random.default_rng(0)
    studies = [dict.fromkeys(("last", "centre", "even"), [
        cspine.Output(rng.random((7, 15)), rng.random(), "vertebra")]) for _ in range(12)]
    truth = rng.integers(0, 2, (12, 8)).astype(float)
    fitted = cspine.Calibration(scale=-np.ones(8), answers=cspine.Answers(top_k=3))
    rows = choices.compare(studies, truth, fitted)
    assert rows["as shipped"] == rows["even mask"] != rows["no calibration"]
    assert rows["as shipped"] == pytest.approx(choices.rate(studies, truth, fitted, top_k=3))
    assert rows["mean of 15 steps"] != rows["as shipped"]


def test_the_segmenter_that_is_taught_t1_too_answers_as_the_stored_one():
    torch.manual_seed(0)
    stored = cspine.Segmenter("test_resnet", 32).eval()
    taught = train_weights.TeachingSegmenter(stored.settings, stored.state_dict()).eval()
    cube = torch.rand(1, 1, 32, 48, 32)
    with torch.inference_mode():
        both = taught(cube)
        assert both.shape == (1, 8, 32, 48, 32) and torch.allclose(both[:, :7], stored(cube))
    kept = taught.shipped_tensors()
    assert all(kept[name].shape == t.shape for name, t in stored.state_dict().items())


def test_a_training_of_the_weights_that_goes_on_says_no_step_twice(tmp_path):
    """Its state is saved less often than its loss is said."""
    recipe = cspine.Recipe("test_resnet", size=32)
    model, init = cspine.new_model("segmenter", dataclasses.asdict(recipe)), tmp_path / "init.pt"
    cspine.save_checkpoint(init, "segmenter", recipe, settings=model.settings,
                           tensors=model.state_dict())
    stage = train_weights.STAGES["windows"]
    run = train_weights.Run(init, stage, "cpu")
    for run.step in range(20, 161, 20):
        train_weights.report(tmp_path, run, 0.5)
        if run.step == 100:
            run.save(tmp_path)
    again = train_weights.Run(init, stage, "cpu")
    again.load(tmp_path)
    assert again.step == 100
    log = pd.read_csv(tmp_path / "segmenter_fold0_log.csv")
    assert log.step.tolist() == [20, 40, 60, 80, 100]


@pytest.mark.parametrize("status, failed", [(0, 0), (1, 1)])
def test_a_suite_that_ends_badly_counts_as_failed(status, failed, tmp_path, monkeypatch):
    """Whatever its report says."""
    report = tmp_path / "report.xml"
    text = '<testsuites><testsuite tests="5" failures="0" errors="0" skipped="1"/></testsuites>'

    def run(command, cwd):
        report.write_text(text)
        return subprocess.CompletedProcess(command, status)
    monkeypatch.setattr(subprocess, "run", run)
    passed, found, skipped, _ = versions.run_tests("python", report, [])
    assert (passed, found, skipped) == (4, failed, 1)


@pytest.mark.parametrize("part, said", [("test", "0 patients"), ("tset", "invalid choice")])
def test_the_parts_of_the_necks_are_known_to_the_measurement(part, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["levels.py", "necks", "--part", part, "--answers"])
    monkeypatch.setattr(levels, "answers", lambda *given: pd.DataFrame(columns=cspine.TARGETS))
    with pytest.raises(SystemExit) if part == "tset" else warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of nothing
        levels.main()
    assert said in "".join(capsys.readouterr())
