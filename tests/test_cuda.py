"""The paths that only a GPU takes. Skipped where there is none."""

import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from torch import distributed as dist

import cspine
from small_kernel import make_test_set, make_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TINY = "--backbone mobilenetv3_small_050 --batch-size 2 --epochs 2 --folds 2 --fold 0 --workers 2"


@pytest.fixture(autouse=True)
def whole_memory():
    """A test changes how much of the card may be used."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """answers(device): of two studies, by small networks."""
    root = tmp_path_factory.mktemp("cuda")
    data, weights = make_test_set(root / "data", ["a", "b"]), make_weights(root / "weights", 2)

    def answers(device):
        out = root / f"{device}.csv"
        assert cspine.main(["predict", "--data", str(data), "--weights", str(weights),
                            "--out", str(out), "--device", device]) == 0
        return pd.read_csv(out), pd.read_csv(root / "predict_report.csv")
    return answers


def test_a_gpu_gives_the_cpus_answers(answered):
    (here, _), (there, report) = answered("cpu"), answered("cuda")
    assert (here.row_id == there.row_id).all() and set(report.status) == {"ok"}
    assert set(report.device) == {"cuda:0"}
    assert np.abs(here.fractured - there.fractured).max() < 0.01  # half precision


def test_float16_of_a_t4_gives_the_cpus_answers(answered, monkeypatch):
    here, _ = answered("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    there, report = answered("cuda")
    assert set(report.status) == {"ok"}
    assert np.abs(here.fractured - there.fractured).max() < 0.01


def test_a_full_card_answers_on_the_cpu(answered, monkeypatch, capsys):
    here, _ = answered("cpu")

    original = cspine.segment

    def segment(models, volume, device, report):
        if device.type == "cuda":
            torch.empty(2**45, device="cuda")  # a true lack of memory
        return original(models, volume, device, report)
    monkeypatch.setattr(cspine, "segment", segment)
    there, report = answered("cuda")
    assert set(report.status) == {"ok"} and set(report.device) == {"cpu"}
    assert np.abs(here.fractured - there.fractured).max() < 1e-6


@pytest.fixture(scope="module")
def crops(phantom_data, tmp_path_factory):
    """Options of the trainings' data, with crops made on the GPU."""
    root = tmp_path_factory.mktemp("crops")
    weights = make_weights(root / "seg", 1, patient=False)
    for path in weights.glob("vertebra*"):
        path.unlink()
    assert cspine.main(["extract", "--data", str(phantom_data), "--work", str(root / "work"),
                        "--weights", str(weights), "--device", "cuda", "--folds", "2"]) == 0
    return ["--data", str(phantom_data), "--work", str(root / "work"), "--device", "cuda"]


MODES = {"train-seg": "segmenter --size 32", "train-cls": "vertebra --size 32 --hidden 8",
         "train-patient": "patient --size 32 --hidden 8"}


@pytest.mark.parametrize("capability", ((9, 0), (7, 5)), ids=("bfloat16", "float16"))
@pytest.mark.parametrize("mode", MODES)
def test_a_training_on_a_gpu_learns_and_goes_on(mode, capability, crops, tmp_path, monkeypatch):
    if capability < (8, 0):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    kind, *more = MODES[mode].split()
    command = [mode, *crops, *TINY.split(), *more, "--weights", str(tmp_path), "--lr", "1e-3"]
    assert cspine.main(command) == 0
    log = pd.read_csv(tmp_path / f"{kind}_fold0_log.csv")
    assert len(log) == 2 and np.isfinite(log.train_loss).all()
    assert log.skipped_steps.iloc[-1] <= 1  # a scaler may start too high
    last = torch.load(tmp_path / f"{kind}_fold0_last.pt", weights_only=True)
    if capability < (8, 0):
        assert last["state"]["scaler"]["scale"] > 0
    assert cspine.main([*command, "--resume"]) == 0  # finished: nothing is trained again
    assert len(pd.read_csv(tmp_path / f"{kind}_fold0_log.csv")) == 2
    model = cspine.load_model(tmp_path / f"{kind}_fold0.pt", kind)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_training_cut_short_on_a_gpu_goes_on_with_its_state(crops, tmp_path):
    command = ["train-cls", *crops, *TINY.split(), "--size", "32", "--hidden", "8"]
    losses = {}
    for name in ("whole", "parts"):
        run = [*command, "--weights", str(tmp_path / name)]
        if name == "parts":  # the signal comes after the third step, within an epoch
            original = cspine.Trainer.update

            def update(self, *arguments):
                original(self, *arguments)
                if self.state.step == 3:
                    os.kill(os.getpid(), signal.SIGINT)
            cspine.Trainer.update = update
            try:
                assert cspine.main(run) == 130
            finally:
                cspine.Trainer.update = original
            run.append("--resume")
        assert cspine.main(run) == 0
        losses[name] = pd.read_csv(tmp_path / name / "vertebra_fold0_log.csv").train_loss
    np.testing.assert_allclose(losses["parts"], losses["whole"], rtol=0.02)  # bits differ on a GPU


def test_a_training_that_needs_more_than_the_card_has_is_one_line(crops, tmp_path, capsys):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-3)
    command = ["train-cls", *crops, *TINY.split(), "--weights", str(tmp_path)]
    assert cspine.main(command) == 2
    assert "out of memory: try --batch-size 1, --checkpoint, --device cpu" in capsys.readouterr().err


def test_objects_and_gradients_go_over_the_ranks_of_a_gpu(monkeypatch, tmp_path):
    place = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group()
    try:
        assert cspine.over_ranks("text") == ["text"]
        gradient = torch.ones(3, device="cuda")
        dist.all_reduce(gradient)
        assert gradient.tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()
