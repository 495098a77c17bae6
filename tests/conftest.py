"""What every test file shares: the way to cspine.py, DICOM series made to order,
phantoms; and the whole suite in two processes."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
ROOMS = [TESTS.parent, TESTS / "tools", TESTS / "necks", TESTS / "studies"]
sys.path[:0] = map(str, ROOMS)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

import cspine  # noqa: E402
from dicom_files import AXIAL, dicom_bytes  # noqa: E402
from phantoms import make_dataset  # noqa: E402

cspine.keep_memory()  # also where a test calls no mode

# What a second process runs beside the first when the whole suite is asked for: about half of
# the time. Most tests keep one core busy, and the other would wait.
SECOND_HALF = "test_training", "test_readme", "test_predict", "test_notebooks"
second_half = pytest.StashKey()


def pytest_configure(config):
    """Start the second half, if nothing was selected."""
    chosen = {"file_or_dir", "keyword", "markexpr", "lf", "collectonly", "deselect", "usepdb",
              "xmlpath"}  # a report would hold the half that ends last
    if any(config.getoption(name, None) for name in chosen) or (os.cpu_count() or 1) < 2:
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # of each half: threads that share a core wait
    torch.set_num_threads(1)
    files = [str(TESTS / f"{name}.py") for name in SECOND_HALF]
    printed = tempfile.TemporaryFile("w+")
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args, *files]
    process = subprocess.Popen(command, cwd=TESTS.parent, stdout=printed, stderr=printed)
    config.stash[second_half] = process, printed


def pytest_ignore_collect(collection_path, config):
    if second_half in config.stash and collection_path.stem in SECOND_HALF:
        return True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """The exit status is that of both halves."""
    if second_half in session.config.stash:
        process, _ = session.config.stash[second_half]
        if session.exitstatus == pytest.ExitCode.INTERRUPTED:
            process.kill()
        if process.wait() != 0 and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if plugin := session.config.pluginmanager.get_plugin("lfplugin"):  # for --lf
            plugin.lastfailed.update(session.config.cache.get("cache/lastfailed", {}))


def pytest_terminal_summary(terminalreporter, config):
    if second_half in config.stash:
        _, printed = config.stash[second_half]
        printed.seek(0)
        terminalreporter.section("the second half, run in another process")
        terminalreporter.write(printed.read())


def pytest_unconfigure(config):
    """Whoever interrupts the first half ends the second."""
    if second_half in config.stash:
        config.stash[second_half][0].kill()


@pytest.fixture
def one_thread():
    """Two threads that share a busy core wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fork_server():
    """A context of multiprocessing whose server has imported the file: a child starts at once.

    Whoever starts the real command instead pays 5 s of imports a process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cspine", "timm"])
    first = context.Process(target=os.getpid)
    with pytest.MonkeyPatch.context() as patch:  # the server's alone: commands have their own
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [TESTS, *ROOMS])))
        first.start()  # whoever comes first waits for the server, and measures no time
        first.join()
    return context


@pytest.fixture(scope="module")
def start_process(fork_server):
    """start_process(target, *args, **kwargs) -> a process, killed when its file's tests end."""
    started = []

    def start(target, *args, **kwargs):
        process = fork_server.Process(target=target, args=args, kwargs=kwargs)
        process.start()
        started.append(process)
        return process
    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def write_series(tmp_path):
    """write(stored (Z, Y, X), ...) -> folder of one DICOM file a slice.

    Slice k lies `step` * k from `origin` along the normal, or at positions[k] (LPS mm), and
    goes to the file <numbers[k]>.dcm; other arguments are those of dicom_bytes.
    """
    def write(stored, folder="study", origin=(-10.0, -20.0, 30.0), step=1.0, positions=None,
              numbers=None, directions=AXIAL, name="{}.dcm", **options):
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        normal = np.cross(directions[:3], directions[3:])
        if positions is None:
            positions = [np.add(origin, step * k * normal) for k in range(len(stored))]
        numbers = range(1, len(stored) + 1) if numbers is None else numbers
        for image, position, number in zip(stored, positions, numbers):
            place = [round(float(mm), 6) for mm in position]
            data = dicom_bytes(image, place, directions, number=int(number), **options)
            (folder / name.format(number)).write_bytes(data)
        return folder
    return write


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory):
    """A data set in the layout of the competition: 4 training and 2 test studies of 64 x
    64."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_dataset(folder, 4, 2, 7, 64, 1)
    return folder
