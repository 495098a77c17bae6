"""I rely on: nothing that goes wrong between a label and an answer is silent.

Faults that users of such tools report, rebuilt as small inputs. Values follow from how the
input was made, or from the metric itself.
"""

import json
import math
import os
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import cspine
from cspine import PRIOR, STUDY, TARGETS, Calibration, Output, UserError, Volume, combine
from small_kernel import make_study, make_test_set, make_weights
from test_blend import sigmoid
from test_faults_reading import bony_study, write_mask

CPU = torch.device("cpu")
SMALL = 32  # pixels of a crop
PLAIN = Calibration()
SEVERAL = Calibration(np.full(8, 1.3), np.full(8, 0.2), PRIOR)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def said(capsys):
    """said(arguments, status) -> (stdout, stderr) of a mode that ends so."""
    def run(arguments, status=0):
        capsys.readouterr()
        found = cspine.main([*map(str, arguments)])
        out, errors = capsys.readouterr()
        assert found == status, errors
        return out, errors
    return run


def outputs_of(vertebrae, patient=math.nan):
    """What classify gives of one model: each vertebra's steps alike."""
    steps = np.repeat(np.array(vertebrae, float)[:, None], 15, 1)
    return [Output(steps, patient)]


def write_labels(data, labels, name="train.csv"):
    """A csv of {uid: 8 labels}."""
    data.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame.from_dict(labels, orient="index", columns=TARGETS)
    table.to_csv(data / name, index_label=STUDY)


def logit(p):
    return np.log(p) - np.log1p(-np.asarray(p))


# ---- 1 to 5: answers ----


@pytest.mark.parametrize("found", [PLAIN, SEVERAL])
def test_no_number_of_fractures_changes_another_answer(found):
    """And the patient's answer never falls with another fracture."""
    patients = []
    for broken in range(8):
        chances = [0.9] * broken + [0.1] * (7 - broken)
        answers = combine(outputs_of(chances), found)
        scale, shift = found.scale[0], found.shift[0]
        expected = sigmoid(scale * logit(chances) + shift)
        assert answers[:7] == pytest.approx(expected, abs=1e-9)
        patients.append(answers[7])
    assert patients == sorted(patients) and patients[-1] > 0.99


def test_a_calibration_of_the_identitys_numbers_answers_as_none():
    rng = np.random.default_rng(0)
    identity = Calibration(np.ones(8), np.zeros(8), PRIOR)
    for _ in range(20):
        outputs = outputs_of(rng.random(7), rng.random())
        plain = combine(outputs)
        assert np.array_equal(plain, combine(outputs, identity))


def folds_of_answers(weights, count=40, seed=0):
    """Held-out answers of two folds, too bold by a factor of 3, and their labels."""
    rng = np.random.default_rng(seed)
    weights.mkdir(parents=True, exist_ok=True)
    logits = rng.normal(-0.7, 1, (count, 8))
    labels = (rng.random((count, 8)) < sigmoid(logits)).astype(float)
    uids = [f"u{k}" for k in range(count)]
    steps = np.repeat(range(8), [cspine.STEPS] * 7 + [1])  # all alike
    table = pd.DataFrame(sigmoid(3 * logits)[:, steps], columns=cspine.STEP_TARGETS)
    table.insert(0, STUDY, uids)
    for fold in (0, 1):
        path = weights / f"vertebra_fold{fold}_heldout.csv"
        table[fold::2].to_csv(path, index=False)
    return dict(zip(uids, labels))


def test_evaluate_prints_the_score_before_and_the_cross_fitted_one_after(said, tmp_path):
    weights, data = tmp_path / "weights", tmp_path / "data"
    labels = folds_of_answers(weights)
    write_labels(data, labels)
    command = ["evaluate", "--folds", "--calibrate", "--data", data, "--weights", weights]
    out, _ = said(command)
    scores = re.findall(r"better: (\d\.\d+) per study, (\d\.\d+) per column", out)
    assert len(scores) == 2 and scores[0] != scores[1]

    outputs, folds = cspine.read_held_out(weights)
    truth = pd.DataFrame.from_dict(labels, orient="index", columns=TARGETS)
    parts = [cspine.blend(outputs)]
    fitted = []
    for fold in (0, 1):
        other = {uid: one for uid, one in outputs.items() if folds[uid] != fold}
        here = {uid: one for uid, one in outputs.items() if folds[uid] == fold}
        fitted.append(cspine.blend(here, cspine.fit_calibration(other, truth)))
    parts.append(pd.concat(fitted))
    for answers, printed in zip(parts, scores):
        right = truth.loc[answers.index].to_numpy()
        expected = cspine.competition_scores(answers.to_numpy(), right)
        assert printed == tuple(f"{score:.4f}" for score in expected)
    assert float(scores[1][0]) < float(scores[0][0])  # three times too bold


def test_a_studys_labels_do_not_move_its_own_cross_fitted_answer(tmp_path):
    labels = folds_of_answers(tmp_path)
    outputs, folds = cspine.read_held_out(tmp_path)
    truth = pd.DataFrame.from_dict(labels, orient="index", columns=TARGETS)
    mine = [uid for uid in outputs if folds[uid] == 0]
    before = cspine.cross_fitted(outputs, folds, truth)
    truth.loc[mine] = 1 - truth.loc[mine]
    after = cspine.cross_fitted(outputs, folds, truth)
    assert np.array_equal(before.loc[mine], after.loc[mine])
    others = [uid for uid in outputs if folds[uid] == 1]
    assert not np.allclose(before.loc[others], after.loc[others])


def fake_task(device=CPU, judge=None, load=None, recipe=None):
    """The Task of a vertebra classifier on four studies of noise."""
    recipe = recipe or cspine.ClassifierRecipe(
        "test_efficientnet", epochs=3, batch_size=2, lr=1e-3, size=SMALL, hidden=8)
    crops = np.random.default_rng(0).integers(1, 255, (15, 6, SMALL, SMALL), np.uint8)
    labels = np.ones(1, np.float32)
    return cspine.Task(
        "vertebra", recipe, device, load or (lambda *sample: (crops, labels)),
        cspine.classifier_batch, lambda model, uid: [0.5] * 8, judge, "vertebra_fold0",
        train=("a", "b", "c", "d"), held_out=("e",))


def test_the_last_epochs_weights_are_kept_also_when_the_fold_liked_the_first(tmp_path):
    scores = iter([0.1, 0.2, 0.9])
    task = fake_task(judge=lambda table: dict(score=next(scores)))
    history = cspine.train(task, tmp_path, cspine.Stop(), 1)
    assert [line["score"] for line in history] == [0.1, 0.2, 0.9]
    kept = torch.load(tmp_path / "vertebra_fold0.pt", weights_only=True)["tensors"]
    last = torch.load(tmp_path / "vertebra_fold0_last.pt", weights_only=True)
    averaged = last["state"]["averaged"]
    assert last["state"]["progress"]["step"] == 6 and kept.keys() == averaged.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, averaged[name].to(tensor.dtype))


def test_an_unseen_vertebra_is_answered_by_how_often_unseen_ones_were_broken():
    """C7 is out of view in 30 studies, broken in 3 of them; C1 always seen."""
    rng = np.random.default_rng(0)
    outputs, labels = {}, {}
    for k in range(60):
        chances = rng.uniform(0.1, 0.9, 7)
        truth = (rng.random(8) < 0.5).astype(float)
        if k < 30:
            chances[6] = math.nan
            truth[6] = k < 3
        outputs[f"u{k}"], labels[f"u{k}"] = outputs_of(chances, 0.5), truth
    table = pd.DataFrame.from_dict(labels, orient="index", columns=TARGETS)
    found = cspine.fit_calibration(outputs, table)

    def best(rate):  # the answer that costs least, by trying them all
        answers = np.linspace(1e-4, 1 - 1e-4, 99999)
        loss = -2 * rate * np.log(answers) - (1 - rate) * np.log(1 - answers)
        return answers[loss.argmin()]

    rates = np.linspace(0, 1, 10001)
    prior = rates[np.abs(2 * rates / (1 + rates) - PRIOR[6]).argmin()]
    pull = cspine.UNSEEN_PULL
    assert best(prior) == pytest.approx(PRIOR[6], abs=2e-4)
    rate = (3 + pull * prior) / (30 + pull)
    assert found.unseen[6] == pytest.approx(best(rate), abs=3e-4)
    assert found.unseen[0] == pytest.approx(PRIOR[0])  # nothing is known
    answers = combine(outputs["u0"], found)
    assert answers[6] == pytest.approx(found.unseen[6])


def test_a_calibration_is_used_with_the_models_it_was_fitted_to_and_no_others(
        tmp_path, capsys):
    weights = make_weights(tmp_path / "a", folds=2, patient=False)
    found = Calibration(np.arange(1.0, 9), np.arange(8.0) / 7, PRIOR / 3)
    cspine.write_calibration(weights, found)
    same = cspine.read_calibration(weights)
    for one, other in zip(found, same):
        assert np.array_equal(one, other)
    capsys.readouterr()
    make_weights(tmp_path / "b", patient=False, seed=9)
    for name in ("vertebra_fold0.pt", "vertebra_fold3.pt"):  # another one, one more
        path = weights / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes((tmp_path / "b" / "vertebra_fold0.pt").read_bytes())
        assert cspine.read_calibration(weights) == Calibration()
        assert "fitted to other models: not used" in capsys.readouterr().err
        path.write_bytes(before) if before else path.unlink()
    assert cspine.read_calibration(weights).scale[7] == 8
    assert not capsys.readouterr().err


# ---- 6, 7: machines ----


class NoKernel(nn.Module):
    """A model on a card that launches nothing, or nothing after some calls."""
    def __init__(self, model, good=0):
        super().__init__()
        self.model, self.settings, self.good = model, model.settings, good

    def forward(self, x):
        self.good -= 1
        if self.good < 0:
            raise RuntimeError("CUDA error: no kernel image is available")
        return self.model(x)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"), patient=False)


def broken_ensemble(weights, good=0):
    """An Ensemble whose models fail on their device, with a sound one behind it."""
    sound = cspine.load_ensemble(weights, CPU)
    calls = dict(segmenter=good, vertebra=good - 1, patient=0)
    models = {
        kind: [NoKernel(model, calls[kind]) for model in part]
        for kind, part in sound.models.items()}
    return sound._replace(models=models, on_cpu=sound)


def test_a_device_that_runs_no_model_is_left_for_the_cpu_and_said(weights, capsys):
    ensemble = broken_ensemble(weights)
    assert cspine.tried_on_device(ensemble) is ensemble.on_cpu
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "no kernel image" in line and "CPU" in line


def test_a_device_that_works_is_kept_without_a_word(weights, capsys):
    ensemble = broken_ensemble(weights, good=10)
    assert cspine.tried_on_device(ensemble) is ensemble
    assert not capsys.readouterr().err


def test_a_device_that_fails_later_costs_no_study_its_answer(weights, tmp_path, capsys):
    make_study(tmp_path / "study")
    future = cspine.ThreadPoolExecutor(1).submit(
        lambda: (cspine.read_volume(tmp_path / "study"), 0.0))
    ensemble = broken_ensemble(weights, good=1)  # enough for one look at the neck
    row = cspine.answer_or_prior("study", future, ensemble, 1, 60)
    expected = cspine.answer_or_prior("study", future, ensemble.on_cpu, 1, 60)
    assert row["status"] == "ok" and [row[t] for t in TARGETS] == [
        expected[t] for t in TARGETS]
    assert "done on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("good, lines", [(0, 1), (2, 2)])
def test_predict_on_a_card_that_fails_answers_as_the_cpu_does(
        said, weights, tmp_path, monkeypatch, good, lines):
    """At every launch: one line in all. After the trial at the start: one a study."""
    data = make_test_set(tmp_path / "data", ["a", "b"])
    command = ["predict", "--data", data, "--weights", weights, "--workers", 1]
    said([*command, "--device", "cpu", "--out", tmp_path / "cpu.csv"])

    broken = broken_ensemble(weights, good)
    monkeypatch.setattr(cspine, "load_ensemble", lambda *_: broken)
    out, errors = said([*command, "--out", tmp_path / "card.csv"])

    assert sum("no kernel image" in line for line in errors.splitlines()) == lines
    assert "0 fell back to a prior" in out
    here, there = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("cpu", "card"))
    assert here.equals(there) and len(here) == 16


@pytest.mark.parametrize("missing, status", [(1, 0), (2, 3)])
def test_most_studies_at_the_prior_end_with_a_status_and_a_last_line(
        said, weights, tmp_path, missing, status):
    data = make_test_set(tmp_path / "data", ["a", "b", "c"])
    for uid in "abc"[:missing]:
        (data / "test_images" / uid).rename(tmp_path / uid)
    command = ["predict", "--data", data, "--weights", weights, "--device", "cpu",
               "--workers", 1, "--out", tmp_path / "s.csv"]
    out, errors = said(command, status)
    assert f"{missing} fell back to a prior" in out
    assert ("most studies got the prior" in errors.splitlines()[-1]) == (status == 3)
    assert len(pd.read_csv(tmp_path / "s.csv")) == 24


def test_the_report_of_the_twentieth_process_counts(said, weights, tmp_path, monkeypatch):
    uids = [f"{k}" for k in range(20)]
    rows = [(f"{uid}_C1", uid, "C1") for uid in uids]
    data = tmp_path / "data"
    make_study(data / "test_images" / "19")
    columns = ["row_id", STUDY, "prediction_type"]
    pd.DataFrame(rows, columns=columns).to_csv(data / "test.csv", index=False)
    monkeypatch.setenv("RANK", "19")
    monkeypatch.setenv("WORLD_SIZE", "20")
    out = tmp_path / "s.csv"
    said(["predict", "--data", data, "--weights", weights, "--device", "cpu",
          "--workers", 1, "--out", out])
    report = pd.read_csv(tmp_path / "predict_report19.csv")
    assert report[STUDY].tolist() == [19] and report.status.tolist() == ["ok"]
    answers = pd.read_csv(out).set_index("row_id").fractured
    assert answers["19_C1"] == report.C1[0] != PRIOR[0]
    assert (answers[:19] == PRIOR[0]).all()


# ---- 8 to 10: trainings ----


def test_weights_that_cannot_be_written_are_noticed_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("no folder")

    def load(sample, first):
        raise AssertionError("a sample was loaded")

    for weights in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write"):
            cspine.train(fake_task(load=load), weights, cspine.Stop(), 1)
    assert (tmp_path / "file").read_text() == "no folder"


LABELS = {f"u{k}": [k % 2, 0, 0, 1, 0, 0, 0, 1] for k in range(4)}


@pytest.fixture
def classes(tmp_path):
    """(data, work, command): crops of four studies, and a training of one fold of two."""
    data, work = tmp_path / "data", tmp_path / "work"
    write_labels(data, LABELS)
    for k, uid in enumerate(LABELS):
        (data / "train_images" / uid).mkdir(parents=True)
        write_noise_crops(work, uid, k)
    command = ["train-cls", "--data", data, "--work", work, "--weights", tmp_path / "w",
               "--backbone", "test_efficientnet", "--size", SMALL, "--batch-size", 7,
               "--epochs", 1, "--folds", 2, "--fold", 0, "--workers", 1, "--hidden", 8,
               "--device", "cpu"]
    return data, work, command


def write_noise_crops(work, uid, seed, seen=7):
    crops = np.random.default_rng(seed).integers(1, 255, (7, 15, 6, SMALL, SMALL))
    crops[seen:] = 0
    cspine.write_crops(work / "last" / f"{uid}.npz", crops.astype(np.uint8), made_by={f"{seed}"})


def test_a_training_goes_on_with_what_it_was_made_of_and_names_what_differs(
        said, classes, tmp_path):
    data, work, command = classes
    said(command)
    before = (tmp_path / "w" / "vertebra_fold0_last.pt").read_bytes()
    assert "vertebra_fold0: finished before" in said([*command, "--resume"])[1]

    def other(*more):
        errors = said([*command, "--resume", *more], 2)[1]
        return re.search("made with other (.*): give", errors)[1]

    changed = {uid: [1 - row[0], *row[1:]] for uid, row in LABELS.items()}
    write_labels(data, changed)
    assert "labels" in other()
    write_labels(data, LABELS)
    write_noise_crops(work, "u2", 99)
    assert other() == "crops"
    write_noise_crops(work, "u2", 2)
    assert "finished before" in said([*command, "--resume"])[1]
    (tmp_path / "init.pt").write_bytes((tmp_path / "w" / "vertebra_fold0.pt").read_bytes())
    assert other("--init", tmp_path / "init.pt") == "--init"
    (data / "train_images" / "u3").rmdir()
    assert "studies" in other()
    (data / "train_images" / "u3").mkdir()
    assert re.fullmatch(r"--lr \(it was \S+\)", other("--lr", "0.01"))
    assert (tmp_path / "w" / "vertebra_fold0_last.pt").read_bytes() == before


def test_predict_goes_on_with_answers_of_the_same_models_and_options_alone(
        said, weights, tmp_path):
    data = make_test_set(tmp_path / "data", ["a"])
    report = tmp_path / "predict_report.csv"

    def run(*more, models=weights):
        _, errors = said(["predict", "--data", data, "--weights", models, "--device", "cpu",
                          "--workers", 1, "--out", tmp_path / "s.csv", *more])
        return errors, pd.read_csv(report)

    _, first = run()
    errors, again = run("--resume")
    assert "1 studies have answers" in errors and again.equals(first)
    errors, moved = run("--resume", "--top-k", 1)
    assert "0 studies have answers" in errors
    assert len(moved) == 1 and moved.C1[0] > first.C1[0]  # the largest step alone
    others = make_weights(tmp_path / "others", patient=False, seed=5)
    errors, new = run("--resume", "--top-k", 1, models=others)
    assert "0 studies have answers" in errors and new.C1[0] != moved.C1[0]


@pytest.mark.parametrize("made_by", ["0123456789012345", "1234e56789012345"])
def test_a_hash_that_looks_like_a_number_keeps_the_answers(tmp_path, made_by):
    task = cspine.Submission(tmp_path / "s.csv", [("a_C1", "a", "C1")], made_by)
    row = {STUDY: "a", **dict.fromkeys(TARGETS, 0.25), "status": "ok"}
    cspine.write_submission(task, [row])
    assert pd.read_csv(task.out).fractured.tolist() == [0.25]


def test_extract_says_in_how_many_studies_it_found_each_vertebra(
        said, tmp_path, monkeypatch):
    small = SMALL, *cspine.vertebra_slices.__defaults__[1:]
    monkeypatch.setattr(cspine.vertebra_slices, "__defaults__", small)
    weights = make_weights(tmp_path / "w", patient=False, unseen=("C1", "C7"))
    data = tmp_path / "data"
    write_labels(data, LABELS)
    for k, uid in enumerate([*LABELS][:3]):
        make_study(data / "train_images" / uid, seed=k)
    out, _ = said(["extract", "--data", data, "--work", tmp_path / "work", "--weights",
                   weights, "--device", "cpu", "--workers", 1])
    assert "crops of 3 of 3 studies" in out
    found = dict(re.findall(r"(C\d) in (\d)", out))
    assert found == dict(C1="0", C2="3", C3="3", C4="3", C5="3", C6="3", C7="0")


def test_a_training_on_mostly_empty_crops_is_refused(said, classes, tmp_path):
    """Five of seven vertebrae empty in each of four studies: 29 % are there."""
    _, work, command = classes
    for k, uid in enumerate(LABELS):
        write_noise_crops(work, uid, k, seen=2)
    _, errors = said(command, 2)
    assert errors.count("\n") == 1 and "only 29% of C1..C7" in errors
    assert not (tmp_path / "w").exists()


# ---- 11 to 13: tables and options ----


GOOD = "a,1,0,0,1,0,0,0,1\n"
BAD_ROWS = {
    "commas": (",,,,,,,,\n", STUDY),
    "question": ("b,0,?,0,1,0,0,0,1\n", "C2"),
    "words": ("b,no,no,no,no,no,no,no,yes\n", "C1"),
    "half": ("b,0,0,0.5,1,0,0,0,1\n", "C3"),
}


@pytest.mark.parametrize("mode", ["train-seg", "train-cls", "evaluate"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_label_that_is_none_is_named_by_file_row_and_column(said, tmp_path, mode, name):
    row, column = BAD_ROWS[name]
    head = ",".join([STUDY, *TARGETS]) + "\n"
    (tmp_path / "train.csv").write_text(head + GOOD + row)
    (tmp_path / "train_images" / "a").mkdir(parents=True)
    _, errors = said([mode, "--data", tmp_path, "--weights", tmp_path / "w"], 2)
    assert errors.count("\n") == 1 and "train.csv" in errors
    assert "row 3" in errors and f"{column}:" in errors


def test_a_study_that_stands_twice_with_unlike_labels_is_refused(said, tmp_path):
    write_labels(tmp_path, {"a": [0] * 8, "b": [1] * 8})
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text + "a" + ",0" * 8 + "\n")
    assert len(cspine.read_truth(tmp_path / "train.csv")) == 2
    (tmp_path / "train.csv").write_text(text + "a" + ",1" * 8 + "\n")
    with pytest.raises(UserError, match="a stands there twice"):
        cspine.read_truth(tmp_path / "train.csv")


def test_answers_that_are_no_probabilities_count_as_missing_and_rows_stand_once(tmp_path):
    path = tmp_path / "submission.csv"
    path.write_text("row_id,fractured\na_C1,1.7\na_C2,inf\na_C3,-1\na_C4,0.5\na_C5,1\n")
    found = cspine.read_answers(path)
    assert found.loc["a"].notna().sum() == 2 and found.C4["a"] == 0.5 and found.C5["a"] == 1
    path.write_text("row_id,fractured\na_C1,0.3\na_C1,0.9\n")
    with pytest.raises(UserError, match="a_C1 stands there twice"):
        cspine.read_answers(path)


def test_a_row_that_asks_for_something_unknown_is_said(tmp_path, capsys):
    path = tmp_path / "test.csv"
    path.write_text(f"row_id,{STUDY},prediction_type\nr0,a,C1 \nr1,a,c1\nr2,a,C2\n")
    assert [target for *_, target in cspine.rows_asked(path)] == ["C1", "c1", "C2"]
    assert "rows that ask for 'c1', answered 0.5: 1" in capsys.readouterr().err


def test_nothing_but_a_plain_file_is_written_over(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            cspine.write_atomic(path, lambda new: new.write_text("x"))
    assert (tmp_path / "pipe").is_fifo()


def test_what_overflows_in_half_precision_is_computed_again():
    class Large(nn.Module):
        def forward(self, x):
            return x @ torch.full((1, 1), 7e4)

    given = torch.full((1, 1), 2.0)
    with torch.autocast("cpu", torch.half):
        assert Large()(given).isinf().all()
        answer = cspine.finite_answer(Large(), given)
    assert torch.allclose(answer.float(), torch.tensor([1.4e5]), rtol=0.01)


def test_an_empty_label_is_unknown_in_score_auc_loss_and_calibration(said, tmp_path):
    """Another answer to an unknown label changes no number that evaluate prints."""
    rng = np.random.default_rng(1)
    labels = (rng.random((30, 8)) < 0.4).astype(float)
    answers = rng.uniform(0.1, 0.9, (30, 8))
    labels[:10, 3] = labels[5, 7] = math.nan
    truth = {f"u{k}": row for k, row in enumerate(labels)}
    write_labels(tmp_path, truth)
    assert ",," in (tmp_path / "train.csv").read_text()
    printed = []
    for _ in range(2):
        table = pd.DataFrame(answers, [*truth], TARGETS).stack().reset_index()
        table["row_id"] = table.level_0 + "_" + table.level_1
        table = table.rename(columns={0: "fractured"})[["row_id", "fractured"]]
        table.to_csv(tmp_path / "s.csv", index=False)
        out, _ = said(["evaluate", "--data", tmp_path, "--weights", tmp_path,
                       "--submission", tmp_path / "s.csv"])
        printed.append(out.split("Answers of about a size")[0])
        unknown = np.isnan(labels)
        answers = np.where(unknown, 1 - answers, answers)
    assert printed[0] == printed[1]

    known = ~unknown
    weight = cspine.TARGET_WEIGHTS * np.where(labels == 1, 2, 1) * known
    loss = -np.log(np.where(labels == 1, answers, 1 - answers))
    score = ((loss * weight).sum(1) / weight.sum(1)).mean()
    assert f"better: {score:.4f} per study" in printed[0]
    y, p = labels[10:, 3], answers[10:, 3]
    pairs = p[y == 1][:, None] > p[y == 0]
    assert cspine.auc(answers[:, 3], labels[:, 3]) == pytest.approx(pairs.mean())
    row = printed[0].split("\nC4")[1].split()
    assert float(row[0]) == y.sum() and float(row[2]) == round(pairs.mean(), 4)


def test_an_unknown_label_moves_no_weight():
    """The loss of eight logits equals that of seven, where the eighth is unknown."""
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.1, 0.5, -0.2, 1.5]], requires_grad=True)
    patient = torch.tensor([0.7], requires_grad=True)
    labels = torch.tensor([[1, 0, math.nan, 0, 1, 0, 0, 1.0]])
    loss = cspine.classifier_loss((logits, patient), labels)
    loss.backward()
    assert logits.grad[0, 2] == 0 and (logits.grad[0, [0, 1]] != 0).all()
    x, y = [*logits[0].tolist(), 0.7], labels[0].tolist()
    terms = [
        w * (2 * math.log1p(math.exp(-a)) if b == 1 else math.log1p(math.exp(a)))
        for w, a, b in zip(cspine.TARGET_WEIGHTS, x, y) if b == b]
    assert loss.item() == pytest.approx(sum(terms) / 14, rel=1e-6)


REFUSED = [
    *[("predict", "--noisy-or", value) for value in ("2", "-1", "nan")],
    *[("predict", "--top-k", value) for value in ("0", "16", "2.5")],
    *[("predict", "--time-limit", value) for value in ("-1", "nan")],
    *[("train-seg", "--ema", value) for value in ("2", "-0.1", "nan")],
    *[("train-cls", "--mixup", value) for value in ("7", "-1")],
    ("train-cls", "--clip", "0"), ("train-patient", "--weight-decay", "-1"),
    ("train-cls", "--hidden", "0"), ("train-seg", "--lr", "-1"),
    ("train-cls", "--mask-of", "middle"), ("extract", "--mask-of", "middle"),
    ("train-cls", "--thin", "2"), ("train-seg", "--epochs", "0"),
    ("train-seg", "--folds", "0"), ("train-seg", "--dropout", "1.5"),
    ("extract", "--workers", "-1"), ("train-seg", "--batch-size", "0"),
    ("train-seg", "--lr", "inf"), ("train-seg", "--weight-decay", "inf"),
    ("predict", "--time-limit", "inf")]


@pytest.mark.parametrize("mode, option, value", REFUSED)
def test_an_option_out_of_its_range_is_refused_by_name(said, mode, option, value):
    out, errors = said([mode, option, value], 2)
    assert not out and errors.count("\n") == 1
    assert f"argument {option}: " in errors and value in errors


# ---- 14: names ----


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_that_is_no_utf_8_ends_in_the_report(said, weights, tmp_path):
    """In a study that is read, and in one that is not."""
    data = make_test_set(tmp_path / "data", ["a", "b", "c"])
    images = data / "test_images"
    for uid in "ab":
        with open(os.fsencode(images / uid) + b"/\xff.dcm", "wb") as file:
            file.write(b"no image")
    for path in [*(images / "b").glob("[0-9]*.dcm")]:
        path.unlink()
    out = tmp_path / "s.csv"
    said(["predict", "--data", data, "--weights", weights, "--device", "cpu",
          "--workers", 1, "--out", out])
    report = pd.read_csv(tmp_path / "predict_report.csv").set_index(STUDY)
    assert report.status.to_dict() == dict(a="ok", b="failed", c="ok")
    assert ".dcm" in report.warnings["a"] and ".dcm" in report.warnings["b"]
    assert len(pd.read_csv(out)) == 24


# ---- 24, 25: masks of trainings ----


@pytest.fixture
def masked(tmp_path, write_series):
    """A data set of three studies with masks: blocks of bone in soft tissue."""
    data = tmp_path / "data"
    write_labels(data, {uid: [0] * 8 for uid in "abc"})
    for name in ("segmentations", "train_images"):
        (data / name).mkdir()
    for uid in "abc":
        volume, labels = bony_study()
        at = [volume.affine[:3] @ (z, 0, 0, 1) for z in range(len(labels))]
        write_series(volume.hu.astype(np.uint16), f"data/train_images/{uid}", positions=at,
                     spacing=(1, 1), intercept=0)
        write_mask(data / "segmentations" / f"{uid}.nii", labels, volume.affine)
    return data, volume, labels


ELSEWHERE = {
    "identity": np.eye(4),
    "centimetres": np.diag([0.1, 0.1, 0.1, 1]),
    "another study's": np.array(
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 160], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_mask_that_lies_elsewhere_is_left_out_with_its_figures(masked, name, capsys):
    data, volume, labels = masked
    placed = ELSEWHERE[name] @ (np.eye(4) if name == "identity" else volume.affine)
    write_mask(data / "segmentations" / "b.nii", labels, placed)
    recipe = cspine.Recipe("test_resnet", size=SMALL)
    masks = cspine.mask_files(data)
    task = cspine.segmenter_task(recipe, CPU, data / "train_images", masks)
    good = cspine.usable([(uid,) for uid in "abc"], task.load, 1)
    assert good == [("a",), ("c",)]
    line = capsys.readouterr().err.strip()
    assert re.fullmatch(
        r"study b: \d+% of its mask's labels 1 to 7, for C1 to C7, lie inside, \d+% on bone; left out", line), line


def test_a_training_whose_masks_all_lie_elsewhere_ends_before_its_first_step(
        said, masked, tmp_path):
    data, _, labels = masked
    for uid in "abc":
        write_mask(data / "segmentations" / f"{uid}.nii", labels, np.eye(4))
    _, errors = said(["train-seg", "--data", data, "--weights", tmp_path / "w", "--size",
                      SMALL, "--backbone", "test_resnet", "--device", "cpu", "--init",
                          "none"], 2)
    *left_out, last = errors.splitlines()
    assert len(left_out) == 3 and all("left out" in line for line in left_out)
    assert "0 samples" in last and not (tmp_path / "w").exists()


def test_a_training_of_segmenters_without_masks_says_so(said, tmp_path):
    write_labels(tmp_path, LABELS)
    (tmp_path / "train_images" / "u0").mkdir(parents=True)
    _, errors = said(["train-seg", "--data", tmp_path, "--weights", tmp_path / "w",
                      "--device", "cpu"], 2)
    first, last = errors.splitlines()
    assert "train_images has 1 of the 4 studies of train.csv" in first
    assert "no study" in last and "mask" in last


def test_a_card_that_counts_as_available_and_runs_nothing_is_left_by_every_mode(
        monkeypatch, capsys):
    def launch(name):
        raise RuntimeError("CUDA error: no kernel image is available for execution")

    assert cspine.computed_on("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cspine, "computed_on", launch)
    assert cspine.pick_device("auto") == torch.device("cpu")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cuda:0 runs nothing" in said and "no kernel image" in said
    with pytest.raises(cspine.UserError, match="--device cuda:0: .*no kernel image"):
        cspine.pick_device("cuda:0")


def test_what_a_calibration_counts_of_models_that_are_gone_is_told(said, tmp_path):
    weights, data = tmp_path / "weights", tmp_path / "data"
    write_labels(data, folds_of_answers(weights))
    (weights / "vertebra_fold1.pt").write_bytes(b"any")
    command = ["evaluate", "--folds", "--calibrate", "--data", data, "--weights", weights]
    _, errors = said(command)
    assert "vertebra_fold0.pt is not there" in errors and "vertebra_fold1.pt" not in errors


def test_a_calibration_names_the_models_that_are_half_trained(said, tmp_path):
    weights, data = tmp_path / "weights", tmp_path / "data"
    write_labels(data, folds_of_answers(weights))
    for fold, epoch in ((0, 6), (1, cspine.RECIPES["vertebra"].epochs)):
        path = weights / f"vertebra_fold{fold}.pt"
        cspine.save_checkpoint(path, "vertebra", cspine.RECIPES["vertebra"], epoch=epoch)
    command = ["evaluate", "--folds", "--calibrate", "--data", data, "--weights", weights]
    _, errors = said(command)
    assert "vertebra_fold0.pt: NOT TRAINED TO ITS END: epoch 6 of 20" in errors
    assert "vertebra_fold1.pt" not in errors


def test_a_calibration_by_folds_1_says_what_it_was_fitted_to(said, tmp_path):
    weights, data = tmp_path / "weights", tmp_path / "data"
    write_labels(data, folds_of_answers(weights))
    (weights / "vertebra_fold1_heldout.csv").unlink()
    path = weights / "vertebra_fold0_heldout.csv"
    command = ["evaluate", "--folds", "--calibrate", "--data", data, "--weights", weights]
    for trained in (False, True):
        if trained:
            pd.read_csv(path).assign(trained_on=1).to_csv(path, index=False)
        _, errors = said(command)
        assert ("trained on: no fair score" in errors) == trained
        assert "the blend is not fitted" not in errors


def test_the_fit_to_one_fold_is_scored_across_fifths_of_its_studies(said, tmp_path):
    """A study's own labels move the answers of others, and not its own."""
    weights, data = tmp_path / "weights", tmp_path / "data"
    labels = folds_of_answers(weights, 30)  # 15 of each fold
    (weights / "vertebra_fold1_heldout.csv").unlink()
    write_labels(data, labels)
    out, errors = said(["evaluate", "--folds", "--calibrate", "--data", data, "--weights", weights])
    assert "The same, each fold (of one alone, each fifth of its studies) blended" in out
    assert len(re.findall(r"better: (\d\.\d+) per study", out)) == 2
    assert "under 20 studies: the blend is not fitted, only scale and shift" in errors

    outputs, folds = cspine.read_held_out(weights)
    truth = pd.DataFrame.from_dict(labels, orient="index", columns=TARGETS)
    before = cspine.calibrate(outputs, folds, truth, weights)
    truth.loc["u0"] = 1 - truth.loc["u0"]
    after = cspine.calibrate(outputs, folds, truth, weights).loc[before.index]
    moved = (after != before).any(axis=1)
    assert len(before) == 15 and not moved["u0"] and moved.sum() == 12


def test_a_score_of_unlike_models_a_study_is_told(said, tmp_path):
    weights, data = tmp_path / "weights", tmp_path / "data"
    write_labels(data, folds_of_answers(weights))
    command = ["evaluate", "--folds", "--data", data, "--weights", weights]
    assert "answers by model" not in said(command)[1]
    first = pd.read_csv(weights / "vertebra_fold0_heldout.csv")
    first.to_csv(weights / "patient_fold0_heldout.csv", index=False)
    found = f"'vertebra': {2 * len(first)}, 'patient': {len(first)}"
    assert f"held-out answers by model: {{{found}}}: some folds lack" in said(command)[1]


def test_a_study_that_two_folds_held_out_is_refused(said, tmp_path):
    """What was left of a training with other --folds would be scored as well."""
    weights, data = tmp_path / "weights", tmp_path / "data"
    write_labels(data, folds_of_answers(weights))
    first = weights / "vertebra_fold0_heldout.csv"
    first.with_name("vertebra_fold4_heldout.csv").write_text(first.read_text())
    _, errors = said(["evaluate", "--folds", "--data", data, "--weights", weights], 2)
    assert "fold4_heldout.csv: study u0 is held out by fold 0, too" in errors


def test_a_damaged_cell_of_held_out_answers_is_one_line(said, tmp_path):
    weights, data = tmp_path / "weights", tmp_path / "data"
    write_labels(data, folds_of_answers(weights))
    path = weights / "vertebra_fold0_heldout.csv"
    path.write_text(path.read_text().replace("0.", "x.", 1))
    _, errors = said(["evaluate", "--folds", "--data", data, "--weights", weights], 2)
    assert len(errors.splitlines()) == 1 and "vertebra_fold0_heldout.csv" in errors


def test_labelled_studies_without_an_answer_are_counted(said, tmp_path):
    write_labels(tmp_path, {"u0": [0] * 8, "u1": [0] * 8, "u2": [0] * 8})
    rows = [f"u{k}_{target},0.2" for k in (0, 1) for target in TARGETS]
    (tmp_path / "s.csv").write_text("\n".join(["row_id,fractured", *rows]))
    _, errors = said(["evaluate", "--data", tmp_path, "--submission", tmp_path / "s.csv",
                      "--weights", tmp_path / "none"])
    assert "s.csv: answers 2 of 3 labelled studies; unscored: others" in errors


def test_no_dice_is_told_of_a_mask_that_no_training_would_take(tmp_path, capsys):
    """Its mask lies a metre away: of another study."""
    weights = make_weights(tmp_path / "weights", patient=False)
    for name in ("good", "other"):
        make_study(tmp_path / "test_images" / name)
    volume = cspine.read_volume(tmp_path / "test_images" / "good")
    labels = np.zeros(volume.hu.shape, np.uint8)
    labels[2:18, 8:24, 8:24] = (np.arange(16) // 2 + 1).clip(max=7)[:, None, None]
    for name, up in (("good", 0), ("other", 1000)):
        affine = volume.affine.copy()
        affine[2, 3] += up
        path = tmp_path / "segmentations" / f"{name}.nii.gz"
        cspine.write_nifti(path, labels, volume._replace(affine=affine))
    models = [*cspine.load_models(weights, "segmenter", "cpu").values()]
    both = cspine.mask_table(tmp_path, ["good", "other"], models, 1)
    good = cspine.mask_table(tmp_path, ["good"], models, 1)
    pd.testing.assert_frame_equal(both, good)
    assert "other: 0% of its mask's labels 1 to 7" in capsys.readouterr().err


def test_reports_of_the_users_own_are_left_alone(tmp_path):
    for name in ("predict_report.csv", "predict_report1.csv", "predict_report2024.csv"):
        (tmp_path / name).write_text("")
    found = cspine.report_paths(tmp_path / "submission.csv")
    assert {rank: path.name for rank, path in found.items()} == {
        0: "predict_report.csv", 1: "predict_report1.csv"}


class Overflowing(nn.Module):
    """No number in half precision, 0 else."""
    def __init__(self, settings, shape):
        super().__init__()
        self.settings, self.shape = settings, shape

    def forward(self, given):
        value = math.inf if torch.is_autocast_enabled("cpu") else 0.0
        found = tuple(torch.full(shape, value) for shape in self.shape)
        return found if len(found) > 1 else found[0]


def test_every_kind_of_model_is_asked_again_where_half_precision_overflows(monkeypatch):
    monkeypatch.setattr(cspine, "half_type", lambda device: torch.bfloat16)
    models = dict(vertebra=[Overflowing(dict(size=8), [(7, 15)])],
                  patient=[Overflowing(dict(size=8), [(1, 105), (1,)])])
    crops = np.ones((7, 15, 6, 8, 8), np.uint8)
    vertebra, patient = cspine.classify(cspine.Ensemble(models, CPU), crops)
    assert (vertebra.steps == 0.5).all() and (patient.steps == 0.5).all() and patient.patient == 0.5
    segmenter = Overflowing(dict(size=16, window=(300, 1600)), [(1, 7, 16, 16, 16)])
    volume = Volume("u", np.zeros((16, 16, 16), np.int16), (1, 1, 1), np.eye(4))
    assert (cspine.mean_probability([segmenter], volume, CPU) == 0.5).all()


def test_values_that_are_no_hu_are_in_the_report(monkeypatch):
    volume = Volume("u", np.zeros((16, 16, 16), np.int16), (1, 1, 1), np.eye(4), ("odd",))
    monkeypatch.setattr(cspine, "segment", lambda *_: np.zeros((7, 16, 16, 16), np.float32))
    model = Overflowing(dict(size=8, mask_of="last", z_margin=1.0), [(7, 15)])
    ensemble = cspine.Ensemble(dict(segmenter=[], vertebra=[model], patient=[]), CPU)
    row, _, _ = cspine.answer_study(volume, 0, ensemble, 1)
    assert re.fullmatch("no CT in HU: values 0 to 0.*; odd", row["warnings"])


def test_a_training_knows_the_file_it_began_with_by_its_content(
        said, classes, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cspine, "train", lambda task, *_: seen.append(task.made_of["--init"]))
    init = tmp_path / "init.pth"
    for content in (b"one", b"other", b"one"):
        init.write_bytes(content)
        said([*classes[2], "--init", init])
    assert seen[0] != seen[1] and seen[0] == seen[2]


def test_folders_above_what_is_written_are_made(tmp_path):
    cspine.write_atomic(tmp_path / "a" / "b" / "c.txt", lambda new: new.write_text("x"))
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "x"


def test_dice_and_names_are_means_over_the_vertebrae_in_view(masked, monkeypatch):
    """Half of C4 is missed; a vertebra without a mask counts nothing."""
    data, _, labels = masked
    probability = np.stack([labels == v for v in range(1, 8)]).astype(np.float32)
    probability[3, 12:14] = 0
    monkeypatch.setattr(cspine, "segment", lambda *_: probability)
    table = cspine.mask_table(data, ["a"], [torch.nn.Linear(1, 1)], 1)
    assert [*table.index] == ["C3", "C4", "C1 to C7"]
    assert [*table.Dice] == pytest.approx([1, 2 / 3, 5 / 6])
    assert [*table["named right"]] == [1, 1, 1]


def unseen_c7():
    """({uid: outputs}, labels) of 60 studies, in half of which C7 is out of view."""
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 8)) < 0.5).astype(float)
    chances = rng.uniform(0.1, 0.9, (60, 7))
    chances[:30, 6] = math.nan
    uids = [f"u{k}" for k in range(60)]
    outputs = {uid: outputs_of(row) for uid, row in zip(uids, chances)}
    return outputs, pd.DataFrame(labels, uids, TARGETS)


def test_labels_of_what_is_not_in_view_move_neither_scale_nor_shift():
    outputs, labels = unseen_c7()
    found = cspine.fit_calibration(outputs, labels)
    labels.iloc[:30, 6] = 1 - labels.iloc[:30, 6]
    other = cspine.fit_calibration(outputs, labels)
    assert np.array_equal(found.scale, other.scale) and np.array_equal(found.shift, other.shift)


def test_the_patients_answer_is_calibrated_also_without_a_head_of_its_own():
    found = cspine.fit_calibration(*unseen_c7())
    assert found.scale[7] != 1 and found.shift[7] != 0


def test_cross_fitted_answers_are_scored_with_their_own_labels(said, tmp_path):
    """Also where the files do not begin with fold 0."""
    weights, data = tmp_path / "weights", tmp_path / "data"
    labels = folds_of_answers(weights)
    write_labels(data, labels)
    first = weights / "patient_fold1_heldout.csv"
    (weights / "vertebra_fold1_heldout.csv").rename(first)
    out, _ = said(["evaluate", "--folds", "--calibrate", "--data", data, "--weights", weights])
    truth = pd.DataFrame.from_dict(labels, orient="index", columns=TARGETS)
    answers = cspine.cross_fitted(*cspine.read_held_out(weights), truth)
    right = truth.loc[answers.index].to_numpy()
    expected = cspine.competition_scores(answers.to_numpy(), right)[0]
    assert re.findall(r"better: (\d\.\d+) per study", out)[1] == f"{expected:.4f}"


def test_spaces_after_the_commas_of_a_table_are_no_part_of_it(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text(f"row_id, {STUDY}, prediction_type\nu_C1, u, C1\n")
    assert cspine.rows_asked(path) == [("u_C1", "u", "C1")]


@pytest.mark.parametrize("part", (
    dict(weights=dict(vertebra=math.inf)), dict(answers=dict(top_k=5.0)),
    {target: [1] for target in TARGETS}, {target: [1, 0] for target in TARGETS},
    {target: [] for target in TARGETS}, dict(C1=[1, 0, 7]), dict(C1=[-1, 0, 0.1]),
    dict(C1=[1, 0, -0.1]), dict(answers=dict(top_k=True))))
def test_a_calibration_edited_to_nonsense_is_refused(part, tmp_path):
    content = {target: [1, 0, 0.1] for target in TARGETS} | {"files": {}} | part
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="calibration.json"):
        cspine.read_calibration(tmp_path)


def test_studies_without_labels_are_no_part_of_score_or_fit(said, tmp_path):
    """Fold 0 has none."""
    weights, data = tmp_path / "weights", tmp_path / "data"
    labels = folds_of_answers(weights, 30)
    write_labels(data, {uid: row if k % 2 else [math.nan] * 8
                        for k, (uid, row) in enumerate(labels.items())})
    out, errors = said(["evaluate", "--folds", "--calibrate", "--data", data, "--weights", weights])
    assert out.startswith("15 studies") and "Warning" not in errors


def test_a_fit_without_a_score_ends():
    outputs = {f"u{k}": [Output(np.full((7, 15), 0.3), 0.3, "vertebra")] for k in range(30)}
    labels = pd.DataFrame(math.nan, [*outputs], TARGETS)
    tries, fit_moves = [], cspine.fit_moves

    def counted(*given):
        tries.append(1)
        assert len(tries) < 100
        return fit_moves(*given)

    with pytest.MonkeyPatch.context() as patch, pytest.warns(RuntimeWarning):
        patch.setattr(cspine, "fit_moves", counted)
        assert cspine.fit_calibration(outputs, labels).answers == cspine.Answers()


def test_reliability_counts_no_answer_whose_label_is_unknown():
    answers, labels = np.full((20, 8), 0.3), np.zeros((20, 8))
    answers[:10], labels[:10] = 0.25, math.nan
    labels[10:15] = 1
    table = cspine.reliability(answers, labels)
    assert table.answers.tolist() == [70, 10]
    assert table["mean answer"].tolist() == pytest.approx([0.3, 0.3])
    assert table.fractured.tolist() == [0.5, 0.5]


def test_a_patient_of_whom_nothing_is_in_view_moves_no_scale_and_no_shift():
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 8)) < 0.5).astype(float)
    chances = rng.uniform(0.1, 0.9, (60, 8))
    chances[:20, :7] = math.nan
    uids = [f"u{k}" for k in range(60)]
    outputs = {uid: [Output(np.repeat(row[:7, None], 15, 1), row[7], "patient")]
               for uid, row in zip(uids, chances)}
    fits = []
    for label in (0, 1):
        labels[:20] = label
        fits.append(cspine.fit_calibration(outputs, pd.DataFrame(labels, uids, TARGETS)))
    assert np.array_equal(fits[0].scale, fits[1].scale)
    assert np.array_equal(fits[0].shift, fits[1].shift)
    assert fits[0].unseen[7] < PRIOR[7] < fits[1].unseen[7]


@pytest.mark.parametrize("damage", ("twice", "above"))
def test_held_out_answers_that_stand_twice_or_are_none_are_refused(
        said, tmp_path, damage):
    weights, data = tmp_path / "weights", tmp_path / "data"
    write_labels(data, folds_of_answers(weights))
    path = weights / "vertebra_fold0_heldout.csv"
    table = pd.read_csv(path)
    if damage == "twice":
        table = pd.concat([table, table[:1]])
    else:
        table.loc[0, "C1_1"] = 7.0
    table.to_csv(path, index=False)
    _, errors = said(["evaluate", "--folds", "--data", data, "--weights", weights], 2)
    assert len(errors.splitlines()) == 1 and "fold0_heldout.csv" in errors


def test_answers_of_studies_without_labels_are_counted(said, tmp_path):
    write_labels(tmp_path, {"u0": [0] * 8})
    rows = [f"u{k}_{target},0.2" for k in (0, 1) for target in TARGETS]
    (tmp_path / "s.csv").write_text("\n".join(["row_id,fractured", *rows]))
    _, errors = said(["evaluate", "--data", tmp_path, "--submission", tmp_path / "s.csv",
                      "--weights", tmp_path / "none"])
    assert "1 of 1 labelled studies; unscored: others, and 1 without labels" in errors
