"""I rely on predict: a valid submission at every moment, and one answer to every row."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import cspine
from cspine import STUDY, TARGETS, Calibration, Output, fit_scale
from limits import at_cells
from small_kernel import make_study, make_test_set, make_weights, write_test_csv

KERNEL = Path(cspine.__file__)
UIDS = ["1.2.1", "1.2.2"]
PRIOR = dict(zip(cspine.TARGETS, cspine.PRIOR))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    return make_test_set(tmp_path_factory.mktemp("data"), UIDS)


@pytest.fixture
def predict(tmp_path, weights, studies, monkeypatch):
    """predict(option, ...) -> (submission by row_id, report by study, exit status)."""
    monkeypatch.chdir(tmp_path)
    small = 32, *cspine.vertebra_slices.__defaults__[1:]  # crops, for speed
    monkeypatch.setattr(cspine.vertebra_slices, "__defaults__", small)

    def run(*options, data=studies, weights=weights):
        status = cspine.main(["predict", "--data", str(data), "--weights", str(weights),
                              "--workers", "1", *map(str, options)])
        return *read_results(tmp_path), status
    return run


def read_results(folder):
    submission = pd.read_csv(folder / "submission.csv", dtype={"row_id": str})
    reports = [pd.read_csv(path, dtype={cspine.STUDY: str})
               for path in folder.glob("predict_report*.csv")]
    report = pd.concat(reports).set_index(cspine.STUDY) if reports else None
    assert list(submission) == ["row_id", "fractured"]
    assert submission.fractured.between(0, 1, "neither").all()
    return submission.set_index("row_id").fractured, report


def assert_prior(submission, uid, targets=cspine.TARGETS):
    for target in targets:
        assert submission[f"{uid}_{target}"] == PRIOR[target]


def whole(**models):
    """An ensemble with these models on the CPU."""
    kinds = {kind: models.get(kind, []) for kind in cspine.KINDS}
    return cspine.Ensemble(kinds, torch.device("cpu"))


# -------------------------------------------------------------------------------- answers to all


def test_every_study_is_answered_and_reported(predict, capsys):
    submission, report, status = predict()
    assert status == 0 and list(submission.index) == [f"{u}_{t}" for u in UIDS for t in PRIOR]
    assert list(report.index) == UIDS and (report.status == "ok").all()
    assert (report.slices == 20).all() and (report.seen == "C1+C2+C3+C4+C5+C6+C7").all()
    assert (report[["read_s", "segment_s", "crops_s", "classify_s", "peak_gb"]] > 0).all(axis=None)
    answers = report[list(PRIOR)].to_numpy().ravel()
    assert np.allclose(answers, submission.to_numpy(), rtol=1e-12)
    assert len(set(answers)) > 8 and not set(answers) & set(PRIOR.values())
    assert "16 rows, 2 studies, 0 fell back" in capsys.readouterr().out


def test_public_placeholder_gets_a_complete_prior(predict, tmp_path):
    data = tmp_path / "data"
    make_study(data / "test_images" / "1.2.22327")
    rows = [(f"1.2.{n}_C1", f"1.2.{n}", "C1") for n in (10197, 10454, 10690)]
    write_test_csv(data, rows)
    submission, report, status = predict(data=data)
    assert status == 3 and list(submission.index) == [row[0] for row in rows]
    assert (submission == PRIOR["C1"]).all() and (report.status == "failed").all()


def test_rows_in_any_order_repeated_or_without_type_each_get_one_answer(predict, tmp_path):
    data = make_test_set(tmp_path / "data", ["a"])
    reference, _, _ = predict(data=data)
    rows = [(f"a_{t}", "a", t) for t in cspine.TARGETS[::-1]]
    rows += [rows[0], rows[3], ("gone_C2", "gone", "C2"), ("odd", "a", "C3"), ("none", "a", None)]
    rows[1] = ("a_C7", "a", None)
    rows[2] = ("a_C6", "a", "C1")  # the name of the row wins
    write_test_csv(data, rows)
    submission, _, status = predict(data=data)
    names = [row[0] for row in rows]
    assert status == 0 and list(submission.index) == [*dict.fromkeys(names)]
    for target in cspine.TARGETS:
        assert submission[f"a_{target}"] == reference[f"a_{target}"]
    assert submission["odd"] == reference["a_C3"]
    assert submission["none"] == 0.5  # nothing says what is asked
    assert submission["gone_C2"] == PRIOR["C2"]


def test_uids_that_are_paths_reach_nothing(predict, tmp_path):
    data, outside = tmp_path / "data" / "in", tmp_path / "data" / "out"
    make_study(outside)
    make_test_set(data, ["a"])
    uids = ["../../out", str(outside), "..", ".", "a/../a", "..\\out", "", "a"]
    write_test_csv(data, [(f"row{k}_C1", uid, "C1") for k, uid in enumerate(uids)])
    before = sorted(path for path in tmp_path.rglob("*"))
    submission, report, status = predict(data=data)
    assert status == 3 and (submission[:-1] == PRIOR["C1"]).all()
    assert submission.iloc[-1] != PRIOR["C1"]
    assert "not a folder's name" in report.loc["../../out"].warnings
    new = {path.name for path in set(tmp_path.rglob("*")) - set(before)}
    assert new == {"submission.csv", "predict_report.csv"}


# ------------------------------------------------------------------------------------- isolation


def test_each_failing_study_gets_the_prior_and_the_others_their_answers(predict, tmp_path, capsys):
    data = make_test_set(tmp_path / "data", ["good", "empty", "few", "bad", "file", "also_good"])
    images = data / "test_images"
    for name, left in (("empty", 0), ("few", 3)):
        for path in sorted((images / name).iterdir())[left:]:
            path.unlink()
    for path in (images / "bad").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    for path in (images / "file").iterdir():
        path.unlink()
    (images / "file").rmdir()
    (images / "file").write_text("no folder")
    submission, report, status = predict(data=data)
    out, errors = capsys.readouterr()
    assert status == 3 and "6 studies, 4 fell back" in out
    assert "most studies got the prior" in errors.splitlines()[-1]
    assert (report.status[["good", "also_good"]] == "ok").all()
    for name in ("empty", "few", "bad", "file"):
        assert_prior(submission, name)
        assert report.status[name] == "failed" and report.warnings[name]
        assert sum(f"study {name}:" in line for line in errors.splitlines()) == 1
    assert submission["good_C1"] != PRIOR["C1"]


def test_a_vertebra_out_of_sight_gets_its_prior_and_the_rest_is_predicted(predict, tmp_path):
    weights = make_weights(tmp_path / "weights", unseen=("C1", "C6"))
    submission, report, status = predict(weights=weights)
    assert status == 0 and (report.status == "partial").all()
    assert (report.seen == "C2+C3+C4+C5+C7").all()
    for uid in UIDS:
        assert_prior(submission, uid, ("C1", "C6"))
        for target in ("C2", "C3", "C4", "C5", "C7", "patient_overall"):
            assert submission[f"{uid}_{target}"] != PRIOR[target]


def test_a_study_without_any_vertebra_gets_the_prior_and_is_named(predict, tmp_path, capsys):
    weights = make_weights(tmp_path / "weights", unseen=cspine.VERTEBRAE)
    submission, report, status = predict(weights=weights)
    assert status == 3 and (report.status == "nothing seen").all()
    said = capsys.readouterr().err
    for uid in UIDS:
        assert_prior(submission, uid)
        assert f"study {uid}: nothing seen; answered with the prior" in said


def test_a_model_that_answers_nan_is_left_out(predict, tmp_path):
    healthy, _, _ = predict()
    weights = make_weights(tmp_path / "weights", folds=2)
    for kind in ("vertebra", "patient", "segmenter"):
        path = weights / f"{kind}_fold1.pt"
        content = torch.load(path, weights_only=True)
        for tensor in content["tensors"].values():
            tensor.fill_(np.nan) if tensor.is_floating_point() else None
        torch.save(content, path)
    submission, report, status = predict(weights=weights)
    assert status == 0 and submission.between(0, 1).all()
    assert not submission.isin(list(PRIOR.values())).any()
    assert report.warnings.str.contains("no finite answer by vertebra, left out there").all()
    mute = (weights / "segmenter_fold1.pt").rename(tmp_path / "mute.pt")
    for kind in ("vertebra", "patient"):
        (weights / f"{kind}_fold0.pt").unlink()
    submission, report, status = predict(weights=weights)
    assert status == 3 and (report.status == "failed").all()
    assert report.warnings.str.contains("no classifier gives a finite answer").all()
    mute.rename(weights / "segmenter_fold1.pt")
    for path in weights.glob("*fold0.pt"):
        path.unlink()
    submission, _, status = predict(weights=weights)
    assert status == 3
    for uid in UIDS:
        assert_prior(submission, uid)


class OutOfMemoryOnce(torch.nn.Module):
    """A model that does not fit the first times, as on a GPU."""

    def __init__(self, model, times=1):
        super().__init__()
        self.model, self.settings, self.times = model, model.settings, times

    def forward(self, x):
        self.times -= 1
        if self.times >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(x)


@pytest.mark.parametrize("times, status", ((0, "ok"), (1, "ok"), (2, "failed")))
def test_without_gpu_memory_a_study_is_repeated_on_the_cpu(times, status, weights, studies):
    ensemble = cspine.load_ensemble(weights, torch.device("cpu"))
    ensemble.models["vertebra"][0] = OutOfMemoryOnce(ensemble.models["vertebra"][0], times)
    ensemble = ensemble._replace(on_cpu=ensemble)
    future = Future()
    future.set_result((cspine.read_volume(studies / "test_images" / UIDS[0]), 1.0))
    row = cspine.answer_or_prior("a", future, ensemble, 1, 1)
    assert row["status"] == status and ("memory" in row["warnings"]) == (status == "failed")
    assert all(row[t] == PRIOR[t] for t in PRIOR) == (status == "failed")


class SmallMemory(torch.nn.Module):
    """A backbone that a card holds for few crops only, and that notes how many it was given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, crops):
        self.given.append(len(crops))
        if len(crops) > cspine.CROPS_ON_CPU:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return crops.mean((2, 3))


def test_a_card_without_memory_for_many_crops_is_given_few_at_once(weights):
    """The device "meta" stands for a card: it has shapes, and no memory."""
    encoder = cspine.load_ensemble(weights, torch.device("cpu")).models["vertebra"][0].encoder
    encoder.backbone = SmallMemory()
    features = encoder.encode(torch.empty(40, 6, 8, 8, device="meta"))
    assert features.shape == (40, 6) and encoder.backbone.given == [40, 15, 15, 10]


def test_classifiers_of_unlike_crops_do_not_answer_together(tmp_path):
    weights = make_weights(tmp_path)
    path = weights / "patient_fold0.pt"
    content = torch.load(path, weights_only=True)
    content["settings"]["z_margin"] += 1
    torch.save(content, path)
    with pytest.raises(cspine.UserError, match="classifiers of unlike --mask-of, --z-margin"):
        cspine.load_ensemble(weights, torch.device("cpu"))


# -------------------------------------------------------------------- killed, continued, shared


def run_main(folder, argv, environment):
    """main(argv) in a folder, in a child."""
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(cspine.main(argv))


@pytest.fixture
def start(start_process):
    """start(folder, data, weights, ...) -> a process of its own that predicts."""
    def run(folder, data, weights, *options, **environment):
        argv = ["predict", "--data", str(data), "--weights", str(weights), "--workers", "1",
                *options]
        return start_process(run_main, folder, argv, environment)
    return run


def wait_for(path, process, lines):
    """Until a file has so many lines, or the process is over."""
    while process.is_alive():
        if path.exists() and len(path.read_bytes().splitlines()) >= lines:
            return
        time.sleep(0.002)


def test_killed_at_any_moment_it_leaves_a_whole_submission_and_resumes(tmp_path, weights, start):
    uids = [f"1.2.{k}" for k in range(6)]
    data, out = make_test_set(tmp_path / "data", uids), tmp_path / "run"
    out.mkdir()
    answered = {}
    for options, lines in (((), 2), (("--resume",), 4)):
        process = start(out, data, weights, *options)
        wait_for(out / "submission.csv", process, 1)
        submission, _ = read_results(out)  # from the first second
        assert len(submission) == 8 * len(uids)
        wait_for(out / "predict_report.csv", process, lines)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        submission, report = read_results(out)
        assert len(submission) == 8 * len(uids) and submission.index.is_unique
        for uid, row in () if report is None else report.iterrows():
            assert answered.setdefault(uid, row.classify_s) == row.classify_s  # not repeated
    assert 1 <= len(answered) < 6
    assert cspine.main(["predict", "--data", str(data), "--weights", str(weights), "--resume",
                        "--out", str(out / "submission.csv")]) == 0
    submission, report = read_results(out)
    assert sorted(report.index) == sorted(uids) and (report.status == "ok").all()
    for uid, seconds in answered.items():
        assert report.classify_s[uid] == seconds
    assert cspine.main(["predict", "--data", str(data), "--weights", str(weights),
                        "--out", str(tmp_path / "again" / "submission.csv")]) == 0
    again, _ = read_results(tmp_path / "again")
    assert np.allclose(again, submission, atol=1e-6)


def test_resume_repeats_what_failed(predict, tmp_path):
    data = make_test_set(tmp_path / "data", ["a", "b"])
    (data / "test_images" / "b").rename(data / "later")
    _, first, _ = predict(data=data)
    assert list(first.status) == ["ok", "failed"]
    (data / "later").rename(data / "test_images" / "b")
    submission, second, status = predict("--resume", data=data)
    assert status == 0 and list(second.status) == ["ok", "ok"]
    assert second.classify_s["a"] == first.classify_s["a"]
    assert submission["b_C1"] != PRIOR["C1"]


def test_resume_says_where_there_is_nothing_to_go_on_with(predict, capsys):
    for said in (True, False):
        _, report, status = predict("--resume")
        assert status == 0 and len(report) == 2
        assert ("--resume: 0 studies have answers" in capsys.readouterr().err) == said


def test_without_resume_nothing_of_an_earlier_run_is_taken(predict, tmp_path):
    first, report, _ = predict()
    report.reset_index().assign(C1=0.125).to_csv(tmp_path / "predict_report.csv", index=False)
    report.reset_index().assign(C1=0.125).to_csv(tmp_path / "predict_report3.csv", index=False)
    again, _, _ = predict()
    assert (again == first).all()


@pytest.mark.parametrize("kind", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_ends_the_run_in_order(kind, predict, studies, tmp_path, monkeypatch):
    whole_answer = cspine.answer_study

    def answer_study(*given):
        os.kill(os.getpid(), kind)
        return whole_answer(*given)

    monkeypatch.setattr(cspine, "answer_study", answer_study)
    submission, report, status = predict()
    assert status == 130 and list(report.index) == UIDS[:1] and len(submission) == 16
    assert_prior(submission, UIDS[1])
    assert submission[f"{UIDS[0]}_C1"] != PRIOR["C1"]


def test_processes_share_the_studies_and_none_is_lost(tmp_path, weights, start):
    data = make_test_set(tmp_path / "data", [f"1.2.{k}" for k in range(3)])
    assert cspine.main(["predict", "--data", str(data), "--weights", str(weights), "--out",
                        str(tmp_path / "submission.csv")]) == 0
    alone, _ = read_results(tmp_path)
    out = tmp_path / "shared"
    out.mkdir()
    both = [start(out, data, weights, WORLD_SIZE="2", RANK=str(k), LOCAL_RANK=str(k))
            for k in (0, 1)]  # as torchrun tells them
    for process in both:
        process.join()
        assert process.exitcode == 0
    shared, report = read_results(out)
    assert len(report) == 3 and (report.status == "ok").all()
    assert list(shared.index) == list(alone.index) and np.allclose(shared, alone, atol=1e-6)


@pytest.mark.parametrize("order", ((0, 1), (1, 0)))
def test_whichever_process_ends_last_the_answers_of_all_are_in(order, predict, studies, weights,
                                                               monkeypatch, tmp_path):
    alone, _, _ = predict()
    (tmp_path / "predict_report.csv").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in order:
        monkeypatch.setenv("RANK", str(rank))
        submission, report, status = predict()
        assert status == 0 and len(submission) == 16
    assert sorted(report.index) == UIDS and np.allclose(submission, alone, atol=1e-12)


def test_an_answer_reported_while_the_submission_is_written_is_in_it(tmp_path, monkeypatch):
    """Two processes that end at once: the slower writer must not bring back older answers."""
    out, rows = tmp_path / "submission.csv", [("a_C1", "a", "C1"), ("b_C1", "b", "C1")]
    report = dict.fromkeys(cspine.TARGETS, 0.25) | {"status": "ok", "made_by": "us"}
    plain = cspine.write_csv

    def write_csv(path, table):
        if path == out and not (tmp_path / "predict_report1.csv").exists():
            other = pd.DataFrame([report | {cspine.STUDY: "b"}])
            plain(tmp_path / "predict_report1.csv", other)
        plain(path, table)

    monkeypatch.setattr(cspine, "write_csv", write_csv)
    cspine.write_submission(cspine.Submission(out, rows, "us"))
    assert list(pd.read_csv(out).fractured) == [PRIOR["C1"], 0.25]


# -------------------------------------------------------------------------------------- on time


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("count", (1, 3, 20))
@pytest.mark.parametrize("seconds", (0.5, 2.0, 5.0, 11.0, 100.0))
def test_the_limit_is_kept_by_giving_up_folds_then_studies(
        count, seconds, tmp_path, monkeypatch, capsys):
    """`seconds` a fold, of 5 folds, against 100 s for all studies."""
    clock, limit, done = Clock(), 100.0, []

    def answer_study(volume, read_s, ensemble, folds):
        done.append(folds)
        clock.now += seconds * folds
        return dict.fromkeys(cspine.TARGETS, 0.5) | dict(status="ok"), {}, None

    monkeypatch.setattr(cspine, "answer_study", answer_study)
    monkeypatch.setattr(cspine, "read_volume", lambda *_: None)
    stop = cspine.Stop(limit / 60, clock)
    uids = [f"u{k}" for k in range(count)]
    rows = [(f"{u}_C1", u, "C1") for u in uids]
    task = cspine.Submission(tmp_path / "submission.csv", rows)
    cspine.predict_studies(tmp_path, task, whole(segmenter=[0] * 5), stop, 1)
    submission, report = read_results(tmp_path)
    assert len(submission) == len(report) == count
    assert clock.now <= max(limit, seconds * 5)  # at worst the first, of which nothing is known
    assert done[0] == 5 and len(done) == (report.status == "ok").sum()
    assert set(done) <= {5, 2, 1}
    if count == 1 or seconds * 5 * count <= limit:
        assert set(done) == {5}
    elif seconds * 5 + seconds * (count - 1) <= limit:
        assert len(done) == count and min(done) < 5
        assert "time is short" in capsys.readouterr().err
    else:
        assert (report.status == "no time").any()
        left = limit - clock.now
        assert left < seconds or len(done) == count  # no more than had to


def test_a_file_that_hangs_costs_its_study_only(studies, weights, tmp_path):
    """The real command: reading one study never returns; the others are answered, and it ends."""
    program = f"""
import runpy, sys, time, pydicom
sys.path.insert(0, {str(KERNEL.parent)!r})
read = pydicom.dcmread
pydicom.dcmread = lambda path, **how: time.sleep(
    9999 if {UIDS[1]!r} in str(path) else 0) or read(path, **how)
sys.argv = ["cspine.py", *sys.argv[1:]]
runpy.run_path({str(KERNEL)!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "predict", "--data", studies, "--weights", weights,
         "--workers", "1", "--time-limit", "0.4"], cwd=tmp_path, capture_output=True, text=True,
        timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    submission, report = read_results(tmp_path)
    assert len(submission) == 8 * len(UIDS) and "1 fell back to a prior" in done.stdout
    assert (report.status == "failed").sum() == 1 and report.status[UIDS[1]] == "failed"
    assert "reading it took over" in report.warnings[UIDS[1]]


def test_without_a_time_limit_too_a_study_is_given_up_and_its_threads_end(
        studies, monkeypatch, tmp_path):
    """A clock that jumps by the time that one study may cost."""
    ended, now = [], [0.0]

    def read(folder, workers, give_up):
        asked = give_up()
        now[0] += cspine.MAX_READ_S + 1
        ended.append((asked, give_up()))
        raise cspine.StudyError("out of time")

    monkeypatch.setattr(cspine, "read_volume", read)
    rows = cspine.rows_asked(studies / "test.csv")
    task = cspine.Submission(tmp_path / "submission.csv", rows[:8])
    stop = cspine.Stop(clock=lambda: now[0])
    cspine.predict_studies(studies / "test_images", task, whole(vertebra=[None]), stop, 1)
    assert ended == [(False, True)]


def test_where_time_is_short_the_models_of_other_folds_are_not_asked(
        studies, tmp_path, monkeypatch):
    small = 32, *cspine.vertebra_slices.__defaults__[1:]
    monkeypatch.setattr(cspine.vertebra_slices, "__defaults__", small)
    weights = make_weights(tmp_path, folds=2, patient=False)
    ensemble = cspine.load_ensemble(weights, torch.device("cpu"))
    asked = set()
    for model in sum(ensemble.models.values(), []):
        model.register_forward_pre_hook(lambda module, _: asked.add(module))
    volume = cspine.read_volume(studies / "test_images" / UIDS[0])
    cspine.answer_study(volume, 0, ensemble, 1)
    assert asked == {*sum((models[:1] for models in ensemble.models.values()), [])}


def test_lines_that_end_in_a_comma_keep_their_columns(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text(f"row_id,{cspine.STUDY},prediction_type\na_C1,a,C1,\na_C2,a,C2,\n")
    assert cspine.rows_asked(path) == [("a_C1", "a", "C1"), ("a_C2", "a", "C2")]


def test_a_report_of_another_name_is_none_of_ours(predict, tmp_path):
    (tmp_path / "predict_report_old.csv").write_text("a copy\n")
    (tmp_path / "predict_report (1).csv").write_text("")
    assert cspine.main(["predict", "--data", str(tmp_path / "nowhere")]) == 2
    found = cspine.report_paths(tmp_path / "submission.csv")
    (tmp_path / "predict_report3.csv").write_text("")
    assert not found and [*cspine.report_paths(tmp_path / "submission.csv")] == [3]


def test_a_report_that_goes_while_it_is_read_is_left_out(tmp_path, monkeypatch):
    """Another process begins anew; what is damaged is refused all the same."""
    path = tmp_path / "predict_report1.csv"
    task = cspine.Submission(tmp_path / "submission.csv", [])
    monkeypatch.setattr(cspine, "report_paths", lambda out: {1: path})
    assert cspine.read_reports(task) == {}
    path.write_text("no table\n")
    with pytest.raises(cspine.UserError):
        cspine.read_reports(task)


def test_too_little_time_in_a_real_run_leaves_priors_and_says_so(predict, tmp_path, capsys):
    uids = [f"1.2.{k}" for k in range(100)]
    data = make_test_set(tmp_path / "data", uids[:20])
    write_test_csv(data, [(f"{uid}_C1", uid, "C1") for uid in uids])
    submission, report, status = predict("--time-limit", 1.5 / 60, data=data)
    out, errors = capsys.readouterr()
    assert status == 3 and len(submission) == len(report) == 100
    assert (report.status == "no time").any()
    assert "time is short" in errors and "fell back" in out


def test_on_kaggle_the_limit_is_eight_and_a_half_hours(predict, tmp_path, monkeypatch):
    limits = []
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/kaggle" or exists(path))
    monkeypatch.setattr(cspine, "predict_studies", lambda *given: limits.append(given[3].left()))
    predict()
    predict("--time-limit", 3)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) != "/kaggle" and exists(path))
    predict()
    assert 509 * 60 < limits[0] <= 510 * 60 and limits[1] <= 180 and limits[2] > 1e8


def test_a_study_that_reads_for_ever_takes_only_its_share(tmp_path, monkeypatch):
    clock = Clock()

    def read_volume(folder, workers, give_up):
        while folder.name == "slow" and not give_up():
            clock.now += 1
        raise cspine.StudyError(f"read until {clock.now}")

    monkeypatch.setattr(cspine, "read_volume", read_volume)
    rows = [("slow_C1", "slow", "C1"), ("b_C1", "b", "C1")]
    task = cspine.Submission(tmp_path / "submission.csv", rows)
    cspine.predict_studies(tmp_path, task, whole(segmenter=[0]), cspine.Stop(10, clock), 1)
    _, report = read_results(tmp_path)
    assert 100 < clock.now < 200 and list(report.status) == ["failed", "failed"]


# ------------------------------------------------------------------- small in the field of view


class Marker(torch.nn.Module):
    """A segmenter that calls dense cells C3, and notes how many voxels it was shown."""

    def __init__(self, size=32):
        super().__init__()
        self.settings, self.cubes = dict(size=size, window=cspine.SEGMENTER_WINDOW), []

    def forward(self, cube):
        self.cubes.append(cube)
        logits = torch.full((1, 7, *cube.shape[2:]), -9.0)
        logits[:, 2] = (cube[:, 0] - 0.5) * 40
        return logits


def dense_box(shape, low, high):
    hu = np.full(shape, -1000, np.int16)
    hu[tuple(map(slice, low, high))] = 1000
    return cspine.Volume("a", hu, (1.0,) * 3, np.eye(4))


def test_vertebrae_that_fill_a_small_part_of_the_view_are_looked_at_again():
    model, volume = Marker(), dense_box((128, 192, 160), (40, 18, 95), (72, 36, 130))
    probability = cspine.segment([model], volume, torch.device("cpu"))
    assert len(model.cubes) == 2 and probability.shape == (7, 32, 32, 32)
    first, second = ((cube > 0.9).float().mean() for cube in model.cubes)
    assert second > 5 * first  # it fills more of the second view
    truth = volume.hu.reshape(32, 4, 32, 6, 32, 5).mean((1, 3, 5)) > 0
    found = probability[2] > 0.5
    assert (found & truth).sum() > 0.9 * truth.sum() and (found & ~truth).sum() < 0.1 * truth.sum()
    assert probability[[0, 1, 3, 4, 5, 6]].max() < 0.01


@pytest.mark.parametrize("edge", (133, 140, 150))
def test_a_second_look_lies_where_the_vertebrae_are(edge):
    """To the cell but for some on its border, though cells and voxels share none: the mean with
    the first look, which sees half a cell there, moves 26 of 262,144 at most."""
    model, low = Marker(64), np.array((edge // 2, edge // 3, edge // 2 + 5))
    volume = dense_box((edge, edge, edge), low, low + (31, 22, 27))
    found = cspine.segment([model], volume, torch.device("cpu"))[2] > 0.5
    assert len(model.cubes) == 2
    assert (found != at_cells(volume.hu > 0, 64)).mean() < 2e-4


@pytest.mark.parametrize("low, high", (((20, 40, 40), (108, 90, 90)), ((0, 0, 0), (0, 0, 0)),
                                       ((0, 0, 0), (128, 128, 128))))
def test_one_look_is_enough_where_vertebrae_are_large_or_not_there(low, high):
    model = Marker()
    cspine.segment([model], dense_box((128, 128, 128), low, high), torch.device("cpu"))
    assert len(model.cubes) == 1


@pytest.mark.parametrize("corner", (0, 60))
def test_a_speck_in_a_study_of_few_slices_has_a_second_view(corner):
    model = Marker(128)
    low = np.array([corner // 4 + 1, corner, corner])  # in the first slice it would be cut
    volume = dense_box((20, 64, 64), low, low + [1, 4, 4])
    probability = cspine.segment([model], volume, torch.device("cpu"))
    assert len(model.cubes) == 2 and np.isfinite(probability).all() and probability[2].max() > 0.5


# ------------------------------------------------------------------------------- better answers


def steps(*rows):
    """(7, 15) probabilities, a row a vertebra; the rest not seen."""
    out = np.full((7, 15), np.nan)
    for row, values in zip(out, rows):
        row[:] = values
    return out


def test_a_vertebra_is_the_mean_of_its_largest_steps():
    one = steps(np.r_[[0.9, 0.8, 0.7], np.full(12, 0.1)])
    answer = cspine.combine([Output(one, np.nan)], Calibration(answers=cspine.Answers(top_k=3)))
    assert answer[0] == pytest.approx(0.8, abs=1e-9)
    answer = cspine.combine([Output(one, np.nan)], Calibration(answers=cspine.Answers(top_k=15)))
    assert answer[0] == pytest.approx((0.9 + 0.8 + 0.7 + 1.2) / 15)


def test_the_patient_is_blended_with_noisy_or():
    one = steps(0.5, 0.2)
    either = 1 - 0.5 * 0.8
    for share in (0, 0.3, 1):
        answer = cspine.combine([Output(one, 0.9)], Calibration(answers=cspine.Answers(noisy_or=share)))
        assert answer[7] == pytest.approx(share * either + (1 - share) * 0.9)
    assert cspine.combine([Output(one, np.nan)])[7] == pytest.approx(either)
    assert list(answer[2:7]) == list(cspine.PRIOR[2:7])


def test_the_patients_calibration_moves_the_blend_once():
    """By hand: what the vertebrae's noisy-or and the patient's head say together, 0.66."""
    scale, shift = np.append(np.ones(7), 0.5), np.append(np.zeros(7), -1.0)
    answer = cspine.combine([Output(steps(0.5, 0.2), 0.9)], Calibration(scale, shift))
    blended = 0.8 * (1 - 0.5 * 0.8) + 0.2 * 0.9
    logit = 0.5 * np.log(blended / (1 - blended)) - 1
    assert answer[7] == pytest.approx(1 / (1 + np.exp(-logit)))
    assert answer[:2] == pytest.approx([0.5, 0.2])


def test_models_are_averaged_as_logits():
    """Logits of 0.8 and 0.5: their mean has odds of 4 ** 0.5."""
    outputs = [Output(row, np.nan) for row in (steps(0.8), steps(0.5), steps())]
    assert cspine.combine(outputs)[0] == pytest.approx(1 / (1 + 0.25**0.5))


def test_answers_keep_away_from_zero_and_one():
    answer = cspine.combine([Output(steps(*range(2)), 1.0)])
    assert np.allclose([answer.min(), 1 - answer.max()], cspine.LEAST_ANSWER, rtol=1e-6)


class Recorder(torch.nn.Module):
    """A classifier that notes what it is shown."""

    def __init__(self, size, patient=False):
        super().__init__()
        self.settings, self.patient, self.shown = dict(size=size, mask_of="last"), patient, []

    def forward(self, crops):
        self.shown.append(crops)
        logits = torch.zeros(crops.shape[:2])
        return (logits, torch.zeros(len(crops))) if self.patient else logits


def test_model_i_sees_the_dihedral_view_i_and_crops_stay_bytes():
    crops = np.random.default_rng(0).integers(1, 255, (7, 15, 6, 8, 8)).astype(np.uint8)
    models = [Recorder(8) for _ in range(9)]
    outputs = cspine.classify(whole(vertebra=models, patient=[Recorder(8, True)]), crops)
    assert len(outputs) == 10
    for i, model in enumerate(models):
        (shown,), view = model.shown, i % 8
        seen = crops[..., ::-1] if view >= 4 else crops
        expected = np.rot90(seen, view % 4, (-2, -1))
        assert shown.dtype == torch.uint8 and np.array_equal(shown, expected), i


def test_absent_vertebrae_cost_no_pass_of_the_encoder(weights):
    ensemble, passed = cspine.load_ensemble(weights, torch.device("cpu")), []
    for kind in ("vertebra", "patient"):
        backbone = ensemble.models[kind][0].encoder.backbone
        backbone.register_forward_pre_hook(lambda module, given: passed.append(given[0]))
    crops = np.ones((7, 15, 6, 32, 32), np.uint8)
    crops[[1, 4]] = 0
    outputs = cspine.classify(ensemble, crops)
    assert sum(len(x) for x in passed) == 2 * 5 * 15  # kinds, vertebrae, steps
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in passed)
    assert np.isnan(outputs[0][0][[1, 4]]).all() and np.isfinite(outputs[0][0][[0, 2, 3]]).all()


def test_vertebrae_against_the_order_are_reported_and_repaired():
    """Whole ones far from each other exchange their names, of others the fainter is taken out."""
    probability = np.zeros((7, 32, 8, 8), np.float32)
    for v in range(7):
        probability[v, 4 * v: 4 * v + 3, 2:6, 2:6] = 0.9
    problems = []
    assert cspine.in_order(probability.copy(), problems.append).sum() == probability.sum()
    assert not problems
    probability[5] = 0
    probability[5, 4:6, 2:6, 2:6] = 0.6  # C6 on C2, and fainter
    repaired = cspine.in_order(probability.copy(), problems.append)
    assert not repaired[5].any() and (repaired[[0, 1, 2, 3, 4, 6]] > 0.5).any((1, 2, 3)).all()
    assert len(problems) == 1 and "C6" in problems[0]
    right = np.zeros((7, 32, 8, 8), np.float32)
    for v in range(7):
        right[v, 4 * v: 4 * v + 3, 2:6, 2:6] = 0.9
    for wrong in ([0, 1, 2, 4, 3, 5, 6], [1, 2, 0, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]):
        problems.clear()
        assert np.array_equal(cspine.in_order(right[wrong], problems.append), right), wrong
        assert problems and all("out of order" in line for line in problems)
    close = right.copy()  # C4 and C5 share a place: no two vertebrae
    close[3], close[4] = np.roll(right[4], 1, 0), 0.8 * right[4]
    repaired = cspine.in_order(close, problems.append)
    assert not repaired[4].any() and repaired[3].any()


def test_violations_of_the_order_are_in_the_report(predict, tmp_path):
    """Every vertebra seen everywhere, surely: none lies below another."""
    weights = make_weights(tmp_path / "weights")
    content = torch.load(weights / "segmenter_fold0.pt", weights_only=True)
    content["tensors"]["head.bias"] = torch.arange(1.0, 8).repeat_interleave(8)  # C7 the surest
    torch.save(content, weights / "segmenter_fold0.pt")
    _, report, status = predict(weights=weights)
    assert status == 0 and (report.seen == "C7").all() and (report.status == "partial").all()
    assert report.warnings.str.contains("C1").all()


# ----------------------------------------------------------------------------------- calibration


def draw_answers(count, scale=1.0, shift=0.0, seed=0):
    """Answers whose logits are those of the truth, divided by scale, less shift; and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-0.5, 1.4, (count, 8))
    labels = (rng.random((count, 8)) < 1 / (1 + np.exp(-logits))).astype(float)
    return 1 / (1 + np.exp(-(logits - shift) / scale)), labels


def calibrated(answers, calibration):
    """Scaled and shifted in logit space, as the file says."""
    scale, shift = calibration
    return 1 / (1 + np.exp(-np.log(answers / (1 - answers)) * scale - shift))


def test_calibration_undoes_a_known_distortion_up_to_the_weight_of_positives():
    answers, labels = draw_answers(6000, scale=0.8, shift=-0.7)
    scale, shift = fit_scale(answers, labels)
    assert np.allclose(scale, 0.8, atol=0.08)  # standard error about 0.03
    # A positive weighs double, which moves the logit of the best answer by about log 2; less for
    # the patient, who brings 7 of the 17 (negative) or 14 of the 24 by which a study is divided.
    expected = -0.7 + np.log([2] * 7 + [2 * 17 / 24])
    assert np.allclose(shift, expected, atol=0.15)


def test_calibration_lowers_the_score_and_other_values_near_it_do_not():
    answers, labels = draw_answers(600, scale=0.5, shift=0.5, seed=1)
    fitted = fit_scale(answers, labels)
    best = cspine.competition_scores(calibrated(answers, fitted), labels)[0]
    assert best < cspine.competition_scores(answers, labels)[0] - 0.05
    for change in ((0.15, 0), (-0.15, 0), (0, 0.3), (0, -0.3)):
        other = calibrated(answers, fitted + np.reshape(change, (2, 1)))
        assert cspine.competition_scores(other, labels)[0] > best


def test_few_studies_move_calibration_little_and_one_class_not_at_all():
    answers, labels = draw_answers(4, scale=0.05, seed=3)
    labels[:, 2], labels[:, 3], labels[:2, 4], labels[2:, 4] = 0, 1, 0, 1
    fitted = fit_scale(answers, labels)
    assert np.allclose(fitted[:, 2:4].T, (1, 0), atol=1e-9)
    assert (0.1 < fitted[0]).all() and (fitted[0] < 2).all() and np.isfinite(fitted).all()
    assert not np.allclose(fitted[:, 4], (1, 0), atol=1e-3)


def test_the_patients_scale_is_fitted_to_calibrated_vertebrae():
    answers, labels = draw_answers(200, scale=0.4, shift=0.8)
    outputs = {k: [Output(np.repeat(row[:7, None], 15, 1), row[7])] for k, row in enumerate(answers)}
    _, found = cspine.fit_moves(outputs, Calibration(), labels)
    others = found._replace(scale=np.append(found.scale[:7], 1), shift=np.append(found.shift[:7], 0))
    blended = cspine.calibrated(cspine.mean_logits(outputs.values(), others), others)
    assert np.allclose(fit_scale(blended, labels)[:, 7], (found.scale[7], found.shift[7]), atol=1e-5)


def write_calibration(weights, **targets):
    """Scale 1, shift 0 and the prior but for those given, for the models of the folder."""
    rows = np.transpose(Calibration()[:3])
    for target, row in targets.items():
        rows[cspine.TARGETS.index(target)] = row
    cspine.write_calibration(weights, Calibration(*rows.T))


def test_calibration_saved_with_the_weights_is_used(predict, tmp_path):
    weights = make_weights(tmp_path / "weights")
    plain, _, _ = predict(weights=weights)
    write_calibration(weights, C3=(0.5, -1.0, 0.3))
    moved, _, _ = predict(weights=weights)
    for row, p in plain.items():
        logit = np.log(p / (1 - p))
        expected = 1 / (1 + np.exp(1 - logit / 2)) if row.endswith("C3") else p
        if not row.endswith("_patient_overall"):
            assert moved[row] == pytest.approx(expected, abs=1e-6)
            continue
        whole, broken = (1 - np.prod([1 - answers[row.replace("patient_overall", v)]
                                      for v in cspine.VERTEBRAE]) for answers in (plain, moved))
        share = cspine.Answers().noisy_or  # of the calibrated vertebrae; the head stays
        assert moved[row] == pytest.approx(p + share * (broken - whole), abs=1e-6)


def test_a_calibration_fitted_to_other_models_is_not_used_and_that_is_said(
        predict, tmp_path, capsys):
    weights = make_weights(tmp_path / "weights")
    plain, _, _ = predict(weights=weights)
    write_calibration(weights, C3=(0.5, -1.0, 0.3))
    path = weights / "calibration.json"
    files = json.loads(path.read_text())
    files["files"]["vertebra_fold0.pt"] = "0" * 64
    path.write_text(json.dumps(files))
    other, _, _ = predict(weights=weights)
    assert (plain == other).all() and "fitted to other models" in capsys.readouterr().err
    table = {t: [0.5, -1.0] for t in cspine.TARGETS}  # as older versions wrote it
    path.write_text(json.dumps(table))
    other, _, _ = predict(weights=weights)
    assert (plain == other).all() and "fitted to other models" in capsys.readouterr().err


@pytest.mark.parametrize("text", ("{", '{"C1": [1, 0]}', "null", json.dumps(
    {t: [1, 0, float("nan")] for t in cspine.TARGETS})))
def test_a_calibration_of_another_form_is_refused(text, predict, tmp_path, capsys):
    weights = make_weights(tmp_path / "weights", patient=False)
    (weights / "calibration.json").write_text(text)
    submission, _, status = predict(weights=weights)
    assert status == 2 and "calibration.json" in capsys.readouterr().err
    for uid in UIDS:
        assert_prior(submission, uid)


@pytest.mark.parametrize("part", (
    dict(answers=dict(top_k=0)), dict(answers=dict(top_k="5")), dict(answers=dict(noisy_or=5)),
    dict(weights=dict(vertebra="x")), dict(weights=dict(vertebra=-1)), dict(weights=[1])))
def test_a_blend_that_cannot_be_is_refused(part, tmp_path):
    """Written by hand: it would answer wrongly, or fail in every study."""
    content = {target: [1, 0, 0.1] for target in cspine.TARGETS} | {"files": {}} | part
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(cspine.UserError, match="calibration.json"):
        cspine.read_calibration(tmp_path)


def write_held_out(weights, answers, uids):
    """Answers of a classifier, alike at all steps, for the held-out studies of two folds."""
    steps = answers[:, np.repeat(range(8), [cspine.STEPS] * 7 + [1])]
    table = pd.DataFrame(steps, columns=cspine.STEP_TARGETS).assign(**{cspine.STUDY: uids})
    for fold in (0, 1):
        table[fold::2].to_csv(weights / f"vertebra_fold{fold}_heldout.csv", index=False)


def test_evaluate_takes_its_labels_from_train_and_test_and_refuses_words(tmp_path, capsys):
    """Phantoms without training studies have an empty train.csv, and test_labels.csv."""
    uids = [f"u{k}" for k in range(40)]
    answers, labels = draw_answers(40, seed=5)
    table = pd.DataFrame(labels.astype(int), columns=cspine.TARGETS)
    table.insert(0, cspine.STUDY, uids)
    table[:0].to_csv(tmp_path / "train.csv", index=False)
    table.to_csv(tmp_path / "test_labels.csv", index=False)
    rows = [(f"{u}_{t}", answers[i, k]) for i, u in enumerate(uids)
            for k, t in enumerate(cspine.TARGETS)]
    pd.DataFrame(rows, columns=["row_id", "fractured"]).to_csv(tmp_path / "s.csv", index=False)
    evaluate = ["evaluate", "--data", str(tmp_path), "--weights", str(tmp_path),
                "--submission", str(tmp_path / "s.csv")]
    assert cspine.main(evaluate) == 0
    said = capsys.readouterr().out
    score = cspine.competition_scores(answers, labels)[0]
    assert f"better: {score:.4f}" in said and "mean answer" in said
    table.replace(1, "yes").to_csv(tmp_path / "train.csv", index=False)
    assert cspine.main(evaluate) == 2
    line = capsys.readouterr().err
    assert "train.csv: row " in line and "'yes'; must be 0, 1 or nothing" in line


def test_answers_of_few_studies_have_no_table_of_reliability(tmp_path, capsys):
    uids = [f"u{k}" for k in range(19)]
    answers, labels = draw_answers(19)
    table = pd.DataFrame(labels.astype(int), columns=cspine.TARGETS)
    table.insert(0, cspine.STUDY, uids)
    table.to_csv(tmp_path / "train.csv", index=False)
    write_held_out(tmp_path, answers, uids)
    evaluate = ["evaluate", "--folds", "--data", str(tmp_path), "--weights", str(tmp_path)]
    assert cspine.main(evaluate) == 0
    assert "mean answer" not in capsys.readouterr().out


def test_a_calibration_is_fitted_to_held_out_answers_alone(tmp_path, studies, capsys):
    (tmp_path / "train.csv").write_text("")
    evaluate = ["evaluate", "--data", str(tmp_path), "--calibrate"]
    assert cspine.main([*evaluate, "--weights", str(tmp_path)]) == 2
    assert "--calibrate needs --folds" in capsys.readouterr().err
    assert not (tmp_path / "calibration.json").exists()


def test_crops_made_smaller_are_rounded_not_cut_off():
    class Shown(torch.nn.Module):
        settings = dict(size=4)

        def forward(self, crops):
            self.crops = crops
            return torch.zeros(7, 15)

    crops = np.full((7, 15, 6, 8, 8), 7, np.uint8)
    crops[..., ::2] = 8
    crops[..., ::2, :] = 8  # the mean of four: 7.75
    model = Shown()
    cspine.classify(cspine.Ensemble(dict(vertebra=[model], patient=[]), torch.device("cpu")), crops)
    assert (model.crops == 8).all()


def test_resume_goes_on_with_what_got_no_time(tmp_path):
    states = ["ok", "partial", "nothing seen", "failed", "no time"]
    table = pd.DataFrame([dict.fromkeys(TARGETS, 0.5)] * 5).assign(
        **{STUDY: states, "status": states, "made_by": "h"})
    table.to_csv(tmp_path / "predict_report.csv", index=False)
    submission = cspine.Submission(tmp_path / "submission.csv", [], "h")
    assert [*cspine.read_reports(submission)] == states[:3]


def test_half_of_the_studies_at_the_prior_are_not_most(predict, tmp_path):
    data = make_test_set(tmp_path / "data", ["a", "b"])
    (data / "test_images" / "b").rename(data / "elsewhere")
    _, report, status = predict(data=data)
    assert list(report.status) == ["ok", "failed"] and status == 0


def test_a_few_cells_of_a_vertebra_put_none_out_of_order():
    probability = np.zeros((7, 32, 8, 8), np.float32)
    probability[2, 8:12, 2:6, 2:6] = 0.9
    probability[4, 2, 2:4, 2:4] = 0.9  # C5 above C3, in four cells
    problems = []
    assert np.array_equal(cspine.in_order(probability.copy(), problems.append), probability)
    assert not problems


def test_the_first_study_is_read_alone_and_a_slow_one_is_not_waited_for(monkeypatch):
    """Two at once share the cores and Python's lock: the first answer would come later."""
    begun, release = [], threading.Event()

    def work(item):
        begun.append(item)
        if item == "slow":
            release.wait(20)
        return item

    monkeypatch.setattr(cspine, "ALONE_S", 0.2)
    pairs = cspine.prefetch(work, ["a", "b", "slow", "c"], 9)
    name, future = next(pairs)
    assert future.done() and future.result() == name == "a"
    assert next(pairs)[0] == "b"
    name, future = next(pairs)  # "c" begins after ALONE_S
    cspine.wait([next(pairs)[1]], 20)
    assert name == "slow" and not future.done() and begun == ["a", "b", "slow", "c"]
    release.set()
    assert future.result() == "slow"
