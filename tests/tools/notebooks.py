"""What `cspine.py notebook` writes: a notebook for Kaggle, and the description that pushes
it."""

import json
import re
import shutil
from pathlib import Path

import torch

import cspine
from cspine import COMPETITION, HERE, KINDS, UserError, model_files, write_atomic

SLUG = r"([\w-]+/[A-Za-z0-9-]{6,50})?"  # of a data set; Kaggle refuses other names
METADATA = "dataset-metadata.json"  # of Kaggle
SESSION_MINUTES = 690  # of the 12 hours that Kaggle gives a session with GPUs

RUN = """\
import glob, os, subprocess, sys, torch
kaggle = os.environ.get("KAGGLE_ROOT", "/kaggle")
def mounted(name):  # Kaggle mounts at /kaggle/input, or a level or two below
    found = [f for k in range(3) for f in glob.glob(f"{kaggle}/input/" + "*/" * k + name)]
    return (found or [f"{kaggle}/input/{name}"])[0]
count = max(1, torch.cuda.device_count())
data = mounted("COMPETITION")
command = [sys.executable, "cspine.py", "predict", "--data", data, *ARGUMENTS]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
shares = [dict(zip(names, map(str, (k, k, count)))) for k in range(count)]
running = [subprocess.Popen(command, env={**os.environ, **share}) for share in shares]
print("exit status of a process on each GPU:", [process.wait() for process in running])"""
LOOK = """\
import glob
import pandas as pd
submission = pd.read_csv("submission.csv")
reports = [pd.read_csv(path) for path in glob.glob("predict_report*.csv")]  # one a process
counts = "NO STUDY ANSWERED: the prior"
if reports:
    found = pd.concat(reports).drop_duplicates("StudyInstanceUID", keep="last")
    counts = found.status.value_counts().to_dict()
print(len(submission), "rows;", counts)
submission.head(16)"""


def write_json(path, content):
    """Write plain values."""
    write_atomic(path, lambda new: new.write_text(json.dumps(content, indent=1)))


def code_cell(source):
    """A cell of a notebook, not yet run."""
    return dict(
        cell_type="code", metadata={}, outputs=[], execution_count=None, source=source)


def copy_weights(source, out, dataset):
    """The models and their calibration, without states of trainings, as a data set."""
    models = [path for kind in KINDS for _, _, path in model_files(source, kind)]
    if not models:
        raise UserError(f"--weights {source}: no models there")
    if out.resolve() == source.resolve():
        raise UserError(f"--weights {source}: would be replaced by its own copy; another --out")
    calibration = cspine.read_calibration(source)  # says if it is of other models
    cspine.load_ensemble(source, torch.device("cpu"), calibration)  # refused now, not on Kaggle
    if out.exists() and any(out.iterdir()) and not (out / METADATA).exists():
        raise UserError(f"{out}: has files, and is no data set that was written here; "
                        "another --out")
    title = dataset.partition("/")[2]
    write_json(out / METADATA, dict(  # first: by it the folder is known as ours
        id=dataset, title=title, licenses=[dict(name="other")]))
    for old in (*out.glob("*_fold*.pt"), out / "calibration.json"):
        old.unlink(missing_ok=True)
    for path in models:
        shutil.copy(path, out)
    if (source / "calibration.json").exists():
        shutil.copy(source / "calibration.json", out)


def prediction_cells(name):
    """Cells that predict with a process a GPU, and look at the answers."""
    arguments = f'["--weights", mounted("{name}")]' if name else "[]"
    run = RUN.replace("ARGUMENTS", arguments)
    return [run.replace("COMPETITION", COMPETITION), LOOK]


def training_cells(preset):
    """Cells that look whether all is there, train, and say what comes next."""
    source = (Path(__file__).parent / "kaggle_training.py").read_text()
    start = f'session = preflight("{preset}", minutes={SESSION_MINUTES:g})'
    return [f"{source}\n\n{start}", "stopped = train_all(session)", "close(session, stopped)"]


def notebook(options):
    """Write a Kaggle notebook ready to push.

    Writes a notebook, which holds this very file, and kernel-metadata.json to --out. It
    predicts with a process a GPU; with --weights-dataset also the models of --weights are
    written, ready to become that data set. With --train it trains by --preset, in sessions:
    each says what to attach to the next. Example: cspine.py notebook --weights-dataset
    me/weights
    """
    weights, out = options.weights_dataset, Path(options.out)
    if not re.fullmatch(SLUG, weights):
        raise UserError(f"--weights-dataset {weights}: expected OWNER/NAME, the name of 6 to "
                        "50 letters, digits and hyphens")
    owner, _, name = weights.partition("/")
    if options.train:
        owner = ""  # ImageNet's weights may be another's
    title = "cspine-train" if options.train else "cspine"
    source = (HERE / "cspine.py").read_text()
    cells = [f"%%writefile cspine.py\n{source}"]
    cells += training_cells(options.preset) if options.train else prediction_cells(name)
    kernel = dict(name="python3", display_name="Python 3")

    if name and not options.train:  # first: it may refuse
        copy_weights(Path(options.weights), out / "weights", weights)
    write_json(out / f"{title}.ipynb", dict(
        nbformat=4,
        nbformat_minor=4,
        cells=[code_cell(text) for text in cells],
        metadata=dict(kernelspec=kernel)))
    write_json(out / "kernel-metadata.json", dict(
        id=f"{owner or 'OWNER'}/{title}",
        title=title,
        code_file=f"{title}.ipynb",
        language="python",
        kernel_type="notebook",
        is_private=True,
        enable_gpu=True,
        machine_shape="NvidiaTeslaT4",  # else a P100, on which today's torch runs nothing
        enable_internet=False,
        dataset_sources=[weights] if weights else [],
        competition_sources=[COMPETITION]))
    if name and not options.train:
        print(f"kaggle datasets create -p {out / 'weights'}")
    elif not options.train:
        print("no --weights-dataset: this notebook finds no models, and submits the prior")
    elif not name:
        print("no --weights-dataset: add ImageNet's files to the notebook by hand (Add Input)")
    if not owner:
        print(f"{out / 'kernel-metadata.json'}: write your name in place of OWNER")
    print(f"kaggle kernels push -p {out}")
