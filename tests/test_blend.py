"""I rely on: how models are blended is fitted to held-out answers, and never to its own fold."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import cspine
from cspine import STEPS, STUDY, TARGETS, Answers, Calibration, Output
from small_kernel import make_study, make_test_set, make_weights


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def labelled(count, seed=0):
    """{uid: labels} of studies whose vertebrae break by halves, and their table."""
    labels = (np.random.default_rng(seed).random((count, 8)) < 0.4).astype(float)
    labels[:, 7] = labels[:, :7].max(1)
    labels[::4] = 0
    uids = [f"u{k}" for k in range(count)]
    return pd.DataFrame(labels, uids, TARGETS)


def answering(labels, name, knows=2.0, seed=0, patient=True):
    """{uid: Output}: logits of +-`knows` by the label, with noise of 1, alike at all steps."""
    rng = np.random.default_rng(seed)
    logits = knows * (2 * labels.to_numpy() - 1) + rng.normal(0, 1, labels.shape)
    chances = sigmoid(logits)
    steps = np.repeat(chances[:, :7, None], STEPS, 2)
    heads = chances[:, 7] if patient else np.full(len(labels), np.nan)
    return {uid: Output(*row, name) for uid, row in zip(labels.index, zip(steps, heads))}


def together(*parts):
    return {uid: [part[uid] for part in parts] for uid in parts[0]}


def test_a_name_that_is_noise_gets_next_to_no_weight():
    labels = labelled(60)
    good = answering(labels, "vertebra", patient=False)
    noise = answering(labels, "vertebra_second", 0, 1, patient=False)
    found = cspine.fit_calibration(together(good, noise), labels)
    weights = {"vertebra": 1, "vertebra_second": 1} | found.weights
    assert weights["vertebra_second"] <= 0.25 * weights["vertebra"]
    alike = cspine.fit_calibration(together(good, good), labels)  # one name: nothing to weigh
    assert alike.weights == {}


def test_a_weight_is_of_a_name_however_many_folds_it_has():
    """By hand: logits 2, 2 of one name and -1 of another, which weighs three."""
    def one(logit, name):
        return Output(np.full((7, STEPS), sigmoid(logit)), np.nan, name)
    outputs = [one(2, "a"), one(2, "a"), one(-1, "b")]
    found = Calibration(weights={"b": 3})
    answers = cspine.combine(outputs, found)
    assert answers[:7] == pytest.approx([sigmoid((2 - 3) / 4)] * 7)
    assert cspine.combine(outputs)[:7] == pytest.approx([sigmoid(0.5)] * 7)


def test_the_number_of_steps_is_found_where_one_step_alone_knows():
    """One step of fifteen shows the fracture; the others are noise."""
    labels = labelled(60)
    rng = np.random.default_rng(1)
    outputs = {}
    for uid, row in zip(labels.index, labels.to_numpy()):
        logits = rng.normal(-3, 1, (7, STEPS))
        logits[:, 4] += 6 * row[:7]
        outputs[uid] = [Output(sigmoid(logits), np.nan, "vertebra")]
    assert cspine.fit_calibration(outputs, labels).answers.top_k < 5
    few = labels[: cspine.LEAST_STUDIES - 1]
    some = {uid: outputs[uid] for uid in few.index}
    assert cspine.fit_calibration(some, few).answers == Answers()  # they say nothing


def test_the_share_of_noisy_or_is_low_where_the_patients_head_knows_more():
    labels = labelled(60)
    vertebrae = answering(labels, "patient", 0, 1)
    heads = answering(labels, "patient", 3, 2)
    outputs = {uid: [vertebrae[uid]._replace(patient=heads[uid].patient)] for uid in heads}
    assert cspine.fit_calibration(outputs, labels).answers.noisy_or <= 0.4


def test_a_neck_that_is_surely_whole_is_not_taken_for_an_unseen_one():
    """A steep fit rounds every vertebra's chance to 0; only a NaN means: not in view."""
    steep = Calibration(scale=np.full(8, 5.0))
    raw = np.full((2, 8), -9.2)
    raw[1] = np.nan
    sure, unseen = cspine.calibrated(raw, steep)
    assert sure == pytest.approx([cspine.LEAST_ANSWER] * 8)
    assert unseen == pytest.approx(cspine.PRIOR)


def test_no_fold_is_blended_by_a_fit_to_itself():
    """A leak is planted: one name knows the labels of fold 0, and lies in fold 1."""
    labels = labelled(44)
    folds = {uid: k % 2 for k, uid in enumerate(labels.index)}
    right, wrong = answering(labels, "vertebra_leak", 4), answering(labels, "vertebra_leak", -4)
    leak = {uid: (wrong if folds[uid] else right)[uid] for uid in folds}
    honest = answering(labels, "vertebra", 1, 5)
    outputs = together(leak, honest)
    crossed = cspine.cross_fitted(outputs, folds, labels)
    zero = [uid for uid in folds if not folds[uid]]
    here = {uid: outputs[uid] for uid in zero}
    leaky = cspine.blend(here, cspine.fit_calibration(here, labels))
    scores = [cspine.competition_scores(table.loc[zero].to_numpy(), labels.loc[zero])[0]
              for table in (leaky, crossed)]
    assert scores[0] < 0.1 and scores[1] > 3 * scores[0]
    other = labels.copy()
    other.loc[zero] = 1 - labels.loc[zero]  # its own labels do not move its answers
    again = cspine.cross_fitted(outputs, folds, other)
    assert np.array_equal(crossed.loc[zero], again.loc[zero])


def write_held_out(folder, name, outputs):
    """The files of two folds."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(uid, *one.steps.ravel(), one.patient) for uid, one in outputs.items()]
    table = pd.DataFrame(rows, columns=[STUDY, *cspine.STEP_TARGETS])
    for fold in (0, 1):
        table[fold::2].to_csv(folder / f"{name}_fold{fold}_heldout.csv", index=False)


def test_held_out_answers_keep_their_steps_and_their_names(tmp_path, capsys):
    labels = labelled(10)
    one = answering(labels, "vertebra_v2s", patient=False)
    two = answering(labels, "patient", seed=1)
    for name, outputs in (("vertebra_v2s", one), ("patient", two)):
        write_held_out(tmp_path, name, outputs)
    pd.DataFrame({STUDY: ["u0"], "C1": [0.9]}).to_csv(tmp_path / "segmenter_fold0_heldout.csv")
    outputs, folds = cspine.read_held_out(tmp_path)
    assert {uid: [part.name for part in row] for uid, row in outputs.items()} == {
        uid: ["patient", "vertebra_v2s"] for uid in labels.index}
    for uid in labels.index:
        assert np.allclose(outputs[uid][1].steps, one[uid].steps)
        assert np.allclose(outputs[uid][0].patient, two[uid].patient)
    assert folds == {uid: k % 2 for k, uid in enumerate(labels.index)}
    assert not capsys.readouterr().err


def test_predict_blends_as_fitted_unless_it_is_told_otherwise(tmp_path, capsys):
    weights = make_weights(tmp_path / "weights")
    data = make_test_set(tmp_path / "data", ["a"])
    out = tmp_path / "submission.csv"

    def predict(*more):
        argv = ["predict", "--data", data, "--weights", weights, "--out", out, *more]
        assert cspine.main([*map(str, argv), "--device", "cpu", "--workers", "1"]) == 0
        return pd.read_csv(out).fractured.to_numpy(), capsys.readouterr().err

    def fitted(**options):
        cspine.write_calibration(weights, Calibration(**options))
        return predict()

    plain, _ = predict()
    one_step, said = fitted(answers=Answers(1, 0.0))
    assert not np.allclose(plain, one_step) and "asked for" not in said
    (weights / "calibration.json").unlink()
    asked, _ = predict("--top-k", 1, "--noisy-or", 0)
    assert np.allclose(asked, one_step, atol=1e-6)
    heavy, _ = fitted(weights={"vertebra": 0})
    assert not np.allclose(heavy, plain)
    cspine.write_calibration(weights, Calibration(answers=Answers(1, 0.0)))
    told, said = predict("--top-k", 5, "--noisy-or", 0.8)
    assert np.allclose(told, plain, atol=1e-6)
    assert "as asked for, in place of the fitted" in said


def test_a_calibration_file_carries_the_blend_and_refuses_what_it_does_not_know(tmp_path):
    found = Calibration(answers=Answers(3, 0.4), weights={"vertebra": 0.25, "patient": 2.0})
    cspine.write_calibration(tmp_path, found)
    same = cspine.read_calibration(tmp_path)
    assert same.answers == found.answers and same.weights == found.weights
    path = tmp_path / "calibration.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"answers": {"steps": 3}}))
    with pytest.raises(cspine.UserError, match="calibration.json"):
        cspine.read_calibration(tmp_path)
    for name in ("answers", "weights"):  # as older versions wrote it
        del content[name]
    path.write_text(json.dumps(content))
    assert cspine.read_calibration(tmp_path).answers == Answers()


def test_no_blend_is_tried_in_which_nobody_answers():
    """Two names that both know nothing; without weights every answer would be the prior."""
    found = Calibration(weights={"a": 0.0})
    tried = list(cspine.other_blends(found, ["a", "b"]))
    assert any(other.weights.get("b") == 4 for other in tried)
    assert all(any(other.weights.get(name, 1) for name in "ab") for other in tried)


def test_a_name_that_weighs_nothing_leaves_the_others_the_time_of_a_single_fold(tmp_path):
    """It came first, and a study with time for one fold got the prior."""
    weights = make_weights(tmp_path / "weights", patient=False)
    shutil.copy(weights / "vertebra_fold0.pt", weights / "vertebra_second_fold0.pt")
    found = Calibration(weights={"vertebra": 0})
    ensemble = cspine.load_ensemble(weights, torch.device("cpu"), found)
    make_study(tmp_path / "study")
    row, *_ = cspine.answer_study(cspine.read_volume(tmp_path / "study"), 0, ensemble, 1)
    assert not any(row[target] == prior for target, prior in zip(TARGETS, cspine.PRIOR))


def test_models_that_all_weigh_nothing_are_refused(tmp_path):
    weights = make_weights(tmp_path / "weights", patient=False)
    found = Calibration(weights={"vertebra": 0})
    with pytest.raises(cspine.UserError, match="no classifier there, or none that counts"):
        cspine.load_ensemble(weights, torch.device("cpu"), found)
