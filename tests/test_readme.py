"""I rely on: the README is true. Its commands are taken from its text and run, smaller by SMALLER."""

import argparse
import contextlib
import gzip
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cspine
import demo
import modes
import train_all
import tubes
import writers
from small_kernel import make_weights
from test_masks import nifti

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
ALL_MODES = cspine.MODES | modes.MODES
GENERATORS = dict(tubes=tubes)

# What makes a command of the README small: every pattern is replaced, in this order.
SMALLER = (
    (r"--studies (?!0)\d+", "--studies 3"),
    (r"--test-studies (?!0)\d+", "--test-studies 1"),
    (r"tubes\.py (\w+) --studies \d+", r"tubes.py \1 --studies 1"),
    (r"cspine\.py phantom (\w+)", r"cspine.py phantom \1 --matrix 64"),
    (r"cspine\.py demo", "cspine.py demo --test-studies 1 --weights small"),
    (r"--data DIR", "--data data"),
    (r"(cspine\.py [\w-]+) --preset \w+", r"\1"),
    (r"cspine\.py extract", "cspine.py extract --size 32"),
    (r"predict neck", "predict --weights small neck"),
    (r"--(backbone|size|hidden|epochs) \S+ ?", ""),
    (r"--init weights/", "--init small/"),
    (r"(predict|evaluate) --data (\w+)$", r"\1 --data \2 --weights small"),
    (r"(train-\w+) (.*?)( --fold 0)?$", r"\1 \2 --fold 0 --size 32 --epochs 1"),
    (r"(train-\w+)", r"\1 --backbone mobilenetv3_small_050"),
    (r"(train-cls|train-patient)", r"\1 --hidden 8"))
TINY = dict(backbone="mobilenetv3_small_050", size=32, epochs=1, fold="0")
TINY_PRESET = {  # in place of every preset
    "train-seg": TINY, "extract": dict(size=32), "train-cls": TINY | dict(hidden=8),
    "train-patient": TINY | dict(hidden=8)}
EVERYWHERE = np.full((7, 32, 32, 32), 0.4, np.float32)  # what a segmenter says
FORM_ONLY = (
    "pip install ", "python -m pytest", "kaggle ", "git clone ",
    "python tests/necks/openkbp.py ", "python tests/studies/levels.py ")


def command_lines(text):
    """The commands of all blocks marked bash: continued lines joined, && parted, no comments."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.M | re.S)
    joined = "\n".join(blocks).replace("\\\n", " ")
    parts = re.split(r"\n|&&", re.sub(r"#.*", "", joined))
    return [" ".join(part.split()) for part in parts if part.strip()]


def smaller(command):
    """A command of the README with less to do."""
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)
    return command


def run(command):
    """What a command of the README prints; it must succeed."""
    program, script, *arguments = shlex.split(command)
    assert program == "python", command
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if script == "cspine.py":
            tool = arguments[0] in modes.MODES
            assert (modes.main if tool else cspine.main)(arguments) == 0, command
        elif script == "tests/tools/train_all.py":
            with pytest.MonkeyPatch.context() as patch:  # an untrained one finds nothing
                patch.setattr(cspine, "segment", lambda *given: EVERYWHERE)
                assert train_all.main([*arguments, "--device", "cpu"]) == 0, command
        else:
            assert (ROOT / script).is_file(), command
            generator = GENERATORS[Path(script).stem]
            writers.main(
                generator.make_study, generator.UID_ROOT, generator.__doc__, arguments)
    return printed.getvalue()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """({command of the README: what it printed}, the folder); each was run once, in order."""
    folder = tmp_path_factory.mktemp("readme")
    make_weights(folder / "small")
    noise = np.random.default_rng(0).integers(-900, 900, (32, 32, 40), np.int16)
    (folder / "neck.nii.gz").write_bytes(gzip.compress(nifti(noise, 4)))
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(cspine, "LEAST_CM3", 0.0)  # make_weights' vertebrae are faint
        patch.setattr(cspine, "PRESETS", dict.fromkeys(cspine.PRESETS, TINY_PRESET))
        patch.setattr(demo, "MATRIX", 64)
        patch.setattr(tubes, "MATRIX", 64)
        patch.setattr(cspine.vertebra_slices, "__defaults__", (64, "last", 1.0))  # crops
        for command in command_lines(TEXT):
            if not command.startswith(FORM_ONLY):
                short = smaller(command)
                printed[command] = printed.get(command, "") + run(short)
                keep_road(folder, command)
    return printed, folder


def keep_road(folder, command):
    """Keep the submission that the road ends in: later commands write over it."""
    if command.startswith("python cspine.py predict --data data"):
        for name in ("submission.csv", "predict_report.csv"):
            (folder / f"road_{name}").write_bytes((folder / name).read_bytes())


def test_every_command_runs_and_every_mode_but_show_is_among_them(ran):
    shown = {command.split()[2] for command in ran[0] if " cspine.py " in command}
    assert shown == set(ALL_MODES) - {"show"}


def test_the_road_ends_in_a_submission_and_its_score(ran):
    printed, folder = ran
    answers = pd.read_csv(folder / "road_submission.csv")
    asked = pd.read_csv(folder / "data" / "test.csv")
    assert list(answers.row_id) == list(asked.row_id) and answers.fractured.between(0, 1).all()
    labels = pd.read_csv(folder / "data" / "test_labels.csv")[[*cspine.TARGETS]].to_numpy()
    rows = answers.fractured.to_numpy().reshape(-1, 8)
    score, _ = cspine.competition_scores(rows, labels)
    assert f"{score:.4f}" in printed["python cspine.py evaluate --data data --weights new"]
    report = pd.read_csv(folder / "road_predict_report.csv")
    assert len(report) == 1 and set(report.status) <= {"ok", "partial", "nothing seen"}


def test_the_trainings_leave_what_the_table_of_modes_says(ran):
    folder = ran[1]
    for weights in ("new", "fast", "standard", "gold"):
        for kind in cspine.KINDS:
            stem = f"{weights}/{kind}_fold0"
            assert len(pd.read_csv(folder / f"{stem}_log.csv")) == 1
            assert (folder / f"{stem}.pt").exists() and (folder / f"{stem}_heldout.csv").exists()
    for kind in cspine.KINDS:
        assert (folder / "eda" / f"{kind}_fold0_curves.png").exists()
    fitted = json.loads((folder / "gold" / "calibration.json").read_text())
    assert all(np.isfinite(fitted[target]).all() for target in cspine.TARGETS)
    assert not (folder / "new" / "calibration.json").exists()


def test_what_the_demo_prints_has_the_form_that_the_readme_shows(ran):
    shown = re.search(r"```\n(Probability.*?)```", TEXT, re.S)[1].splitlines()
    printed = ran[0]["python cspine.py demo"].splitlines()
    assert shown[0] in printed and shown[1].split() == [*cspine.VERTEBRAE, "patient"]
    row = r"study \w+ ( +\d\.\d\d( \*)?){8} *"
    assert all(re.fullmatch(row, line) for line in shown[2:])
    assert sum(bool(re.fullmatch(row, line)) for line in printed) == 1


def test_the_notebook_is_pushed_from_where_it_is_written(ran):
    printed, folder = ran
    pushes = [line for line in command_lines(TEXT) if line.startswith("kaggle")]
    assert len(pushes) == 2 and all(line in "".join(printed.values()) for line in pushes)
    create, push = (folder / line.split()[-1] for line in pushes)
    assert (push / "cspine.ipynb").exists() and (create / "dataset-metadata.json").exists()


def test_ones_own_ct_gets_the_table_that_the_readme_shows(ran):
    printed, folder = ran
    shown = re.search(r"```\n(For research.*?)```", TEXT, re.S)[1].splitlines()
    command = next(line for line in printed if "predict neck" in line)
    lines = printed[command].splitlines()
    assert lines[1].split() == shown[1].split()
    assert [line.split()[0] for line in lines] == [line.split()[0] for line in shown]
    assert (folder / "answers" / "answers.json").exists()
    assert (folder / "masks" / "neck.nii.gz").exists()


def parsed(arguments):
    """Whether the parser of a mode takes these arguments."""
    tool = arguments[0] in modes.MODES
    parser = cspine.build_parser(modes.MODES if tool else cspine.MODES)
    try:
        return bool(parser.parse_args(arguments))
    except (cspine.UserError, argparse.ArgumentError):
        return False


def test_commands_that_are_not_run_have_the_right_form():
    lines = [line for line in command_lines(TEXT) if line.startswith(FORM_ONLY)]
    assert {line.split()[0] for line in lines} == {"pip", "python", "kaggle", "git"}
    scripts = [line.split()[1] for line in lines if line.startswith("python tests/")]
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    install = next(line for line in lines if line.startswith("pip"))
    head = (ROOT / "cspine.py").read_text().split("# ///")[1]
    packages = re.findall(r'"([\w-]+)>=', head)
    assert sorted(install.split()[2:]) == sorted([*packages, "pytest"])


def test_every_command_is_taken_as_it_stands_in_the_readme():
    """Without SMALLER: by the parsers."""
    for line in command_lines(TEXT):
        if line.startswith("python cspine.py"):
            assert parsed(line.split()[2:]), line


def test_files_and_options_named_in_the_text_exist():
    known = [cspine.Shared(), *(mode.own for mode in ALL_MODES.values() if mode.own)]
    names = {"--" + name.replace("_", "-") for own in known for name in vars(own)}
    prose = re.sub(r"^ *```.*?^ *```$", "", TEXT, flags=re.M | re.S)
    quoted = re.findall(r"`([^`]+)`", prose)
    options = {word for text in quoted for word in text.split() if word.startswith("--")}
    assert options - names <= {"--help"}
    for text in quoted:
        for path in re.findall(r"(?:tests|weights)/[\w./]*", text):
            assert (ROOT / path).exists(), path


def test_every_mode_has_its_row_and_every_room_its_name_in_order():
    table = re.findall(r"^\| `([\w-]+)(?: \w+)?` \|", TEXT, re.M)
    order = ["phantom", *cspine.MODES, "eda", "show", "notebook", "demo"]
    assert table == order and set(order) == set(ALL_MODES)
    banners = re.findall(r"^# ==== (.*) ====$", (ROOT / "cspine.py").read_text(), re.M)
    rooms = re.search(r"order of explaining: (.*?)\.\n", TEXT, re.S)[1]
    rooms = " ".join(rooms.split()).replace("; then what makes the weights:", ",")
    assert rooms.split(", ") == banners


def test_names_of_the_code_in_the_text_exist():
    source = (ROOT / "cspine.py").read_text() + (ROOT / "tests" / "test_segmenter.py").read_text()
    carry_on = TEXT[TEXT.index("## How to carry on"):]
    source += (ROOT / "tests" / "conftest.py").read_text()
    for name in re.findall(r"`([A-Za-z]+_?\w+)`", carry_on):
        assert re.search(rf"\b{name}\b", source), name


def test_the_readme_is_short_and_its_lines_fit():
    assert len(re.findall(r"\b[A-Za-z][\w'-]*", TEXT)) < 1570
    assert max(map(len, TEXT.splitlines())) <= 140
    assert not re.search(r"\b[0-9a-f]{7}\b(?<!\d{7})", TEXT), "commits stand in RESULTS.md"
