"""I rely on the file as a notebook cell: pasted it runs nothing, then main([...]) works."""

import ast
import json
import signal
import socket
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch

import cspine
import modes
from small_kernel import make_test_set, make_weights

KERNEL = Path(cspine.__file__)
IPYKERNEL = ["ipykernel_launcher.py", "-f", "/root/.local/share/jupyter/runtime/kernel-1.json"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"), patient=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_test_set(tmp_path_factory.mktemp("data"), ["a"])


@pytest.fixture
def offline(monkeypatch):
    """Whoever touches the network is found out."""
    touched = []

    def forbidden(*given, **named):
        touched.append(given)
        raise OSError("no network here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, forbidden)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, forbidden)
    yield touched
    assert not touched


def paste(monkeypatch, argv=IPYKERNEL):
    """The names of a cell into which the file was pasted."""
    monkeypatch.setattr(sys, "argv", [*argv])
    cell = {"__name__": "__main__"}
    exec(compile(KERNEL.read_text(), "<cell>", "exec"), cell)
    return cell


@pytest.mark.parametrize("argv", (IPYKERNEL, ["cell", "predict"], [""]))
def test_pasted_it_defines_everything_and_runs_nothing(argv, monkeypatch, tmp_path, capfd, offline):
    monkeypatch.chdir(tmp_path)
    before = (threading.active_count(), signal.getsignal(signal.SIGTERM), torch.get_num_threads(),
              torch.random.get_rng_state().sum())
    cell = paste(monkeypatch, argv)
    assert callable(cell["main"]) and callable(cell["read_volume"])
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert before == (threading.active_count(), signal.getsignal(signal.SIGTERM),
                      torch.get_num_threads(), torch.random.get_rng_state().sum())


def test_main_works_after_pasting_without_the_network(
        monkeypatch, tmp_path, data, weights, offline, one_thread):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    main = paste(monkeypatch)["main"]
    assert main(["predict", "--data", str(data), "--weights", str(weights), "--workers", "2"]) == 0
    report = pd.read_csv("predict_report.csv")
    assert list(report.status) == ["ok"] and len(pd.read_csv("submission.csv")) == 8
    assert main(["predict", "--data", str(tmp_path), "--weights", str(weights)]) == 2
    after = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    assert after == before  # a cell can be stopped as before


def test_main_works_in_another_thread(monkeypatch, tmp_path, data, weights):
    """Signals belong to the main thread; widgets and servers call from others."""
    monkeypatch.chdir(tmp_path)
    status = []
    arguments = ["predict", "--data", str(data), "--weights", str(weights)]
    thread = threading.Thread(target=lambda: status.append(cspine.main(arguments)))
    thread.start()
    thread.join()
    assert status == [0]


def test_a_network_from_a_hub_is_never_fetched(offline):
    for name in ("hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18.a1_in1k"):
        with pytest.raises(cspine.UserError):
            cspine.create_backbone(name)


def test_imports_stand_at_the_top_and_hold_no_network():
    allowed = {"cv2", "numpy", "pandas", "pydicom", "timm", "torch", "tqdm"}
    for node in ast.walk(ast.parse(KERNEL.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            package = name.partition(".")[0]
            assert node.col_offset == 0 or name == "timm"  # 0.2 GB
            assert package in allowed or package in sys.stdlib_module_names, name
            assert package not in ("socket", "urllib", "http", "requests"), name


# --------------------------------------------------------------------------------- the notebook


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    assert modes.main(["notebook", "--out", str(folder), "--weights-dataset", "me/my-weights"]) == 0
    return folder


def cells_of(folder):
    return json.loads((folder / "cspine.ipynb").read_text())["cells"]


def test_the_notebook_is_valid(notebook):
    content = json.loads((notebook / "cspine.ipynb").read_text())
    assert content["nbformat"] == 4 and set(content) == {"nbformat", "nbformat_minor", "cells",
                                                         "metadata"}
    for cell in content["cells"]:
        assert cell["cell_type"] == "code" and isinstance(cell["source"], str)
        assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(content)


def test_the_first_cell_writes_this_very_file(notebook):
    first, _, source = cells_of(notebook)[0]["source"].partition("\n")
    assert first == "%%writefile cspine.py" and source == KERNEL.read_text()


def test_the_kernel_is_ready_to_be_pushed(notebook):
    meta = json.loads((notebook / "kernel-metadata.json").read_text())
    assert meta["enable_internet"] is False and meta["enable_gpu"] is True
    assert meta["machine_shape"] == "NvidiaTeslaT4"
    assert meta["competition_sources"] == ["rsna-2022-cervical-spine-fracture-detection"]
    assert meta["dataset_sources"] == ["me/my-weights"] and meta["id"] == "me/cspine"
    assert (notebook / meta["code_file"]).exists() and meta["kernel_type"] == "notebook"
    assert meta["language"] == "python" and meta["is_private"] is True and len(meta["title"]) >= 5


@pytest.mark.parametrize("data_at, weights_at", (
    ("", ""), ("competitions", "datasets/me")), ids=("flat", "deep"))
def test_the_notebook_runs_from_its_first_cell_to_its_last(
        data_at, weights_at, notebook, tmp_path, weights, monkeypatch, capsys):
    """Cells as a notebook runs them, in one process: %%writefile, a process a GPU, and a look at
    the answers."""
    write, run, look = (cell["source"] for cell in cells_of(notebook))
    data = make_test_set(tmp_path / "data", ["a", "b"])
    (tmp_path / "cspine.py").write_text(write.partition("\n")[2])
    for place, name, real in ((data_at, Path(cspine.KAGGLE_DATA).name, data),
                              (weights_at, "my-weights", weights)):
        (tmp_path / "input" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "input" / place / name).symlink_to(real)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    kernel = {"__name__": "__main__"}
    exec(run, kernel)
    assert "[0, 0]" in capsys.readouterr().out and (tmp_path / "predict_report1.csv").exists()
    exec(look, kernel)
    seen = capsys.readouterr().out
    assert "16 rows" in seen and "'ok': 2" in seen


def test_without_weights_of_ones_own_the_notebook_names_none(tmp_path):
    assert modes.main(["notebook", "--out", str(tmp_path)]) == 0
    meta = json.loads((tmp_path / "kernel-metadata.json").read_text())
    assert meta["dataset_sources"] == [] and meta["id"].endswith("/cspine")
    assert '"--data", data, *[]]' in cells_of(tmp_path)[1]["source"]


@pytest.mark.parametrize("name", ("weights", "a/b/c", "a/b; rm -rf /", "../x", "a/$(id)", "a/b\n"))
def test_a_data_set_that_is_no_name_is_refused(name, tmp_path, capsys):
    assert modes.main(["notebook", "--out", str(tmp_path / "n"), "--weights-dataset", name]) == 2
    assert "OWNER/NAME" in capsys.readouterr().err and not (tmp_path / "n").exists()
