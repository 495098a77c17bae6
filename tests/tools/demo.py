"""What `cspine.py phantom` and `demo` do: data sets, answers, their score, a picture."""

from pathlib import Path

import cspine
import numpy as np
from cspine import (
    STUDY, TARGETS, UserError, errors_as, load_models, pick_device, read_csv, read_volume,
    segment)
from phantoms import UID_ROOT, make_dataset
from pictures import overview

MATRIX = 256  # rows of a demo's slice, pixels
TABLES = (  # that phantom writes
    "train.csv", "train_bounding_boxes.csv", "test.csv", "test_labels.csv",
    "sample_submission.csv")


def refuse_real_studies(path):
    """UserError if a csv, which would be overwritten, has rows of other studies than
    phantoms."""
    if path.exists():
        with errors_as(UserError, f"{path}: not a table of phantoms, and not overwritten"):
            first = read_csv(path, ()).iloc[:, 0].astype(str)
            if not first.str.startswith(UID_ROOT).all():
                raise ValueError("choose another")


def phantom(options):
    """Make a synthetic data set in the competition's layout.

    Writes train_images, train.csv, segmentations, boxes, test_images, test.csv and the
    truth of the test, test_labels.csv, to the folder. Example: cspine.py phantom data
    --studies 50
    """
    for name in TABLES:
        refuse_real_studies(Path(options.target) / name)
    make_dataset(
        Path(options.target), options.studies, options.test_studies, options.seed,
        options.matrix, options.workers, options.variety, options.fractures)
    counts = f"{options.studies} training and {options.test_studies} test studies"
    print(f"{options.target}: {counts}")
    known = cspine.read_labels(Path(options.target)).index
    studies = Path(options.target).glob("*_images/*")
    if others := sum(path.name not in known for path in studies):
        cspine.say(f"{options.target}: {others} studies of an earlier run stay, without labels")


def run_mode(*arguments):
    """Run a mode of cspine.py so that its errors end the demo."""
    options = cspine.build_parser(cspine.MODES).parse_args([*map(str, arguments)])
    cspine.MODES[options.mode].run(options)


def demo(options):
    """Make phantoms, predict and score them, draw one.

    Makes phantoms that no training saw in --work, answers them with the models of --weights
    to --out, prints the answers beside the truth and their score, and draws the most
    suspicious study. Example: cspine.py demo
    """
    refuse_real_studies(Path(options.out))
    data = Path(options.work) / "demo"
    make_dataset(data, 0, options.test_studies, options.seed, MATRIX, options.workers)
    print(f"{data}/test_images: {options.test_studies} phantoms that no training saw")
    machine = ("--workers", options.workers, "--device", options.device)
    shared = ("--data", data, "--weights", options.weights, *machine)
    run_mode("predict", *shared, "--out", options.out)

    labels = cspine.read_labels(data)
    uids = read_csv(data / "test.csv", (STUDY,))[STUDY].unique()
    answers = cspine.read_answers(options.out).loc[uids]
    print_answers(answers, labels.loc[uids])
    print("\nTheir score:")
    run_mode("evaluate", *shared, "--submission", options.out)
    draw_worst(options, data, answers)


def print_answers(answers, labels):
    """The answers of a few studies, and a star at what is fractured."""
    table = answers.map("{:.2f}".format) + labels.map({0: "  ", 1: " *"}.get)
    names = [uid.rpartition(".")[2] for uid in answers.index]
    table.index = [f"study {name}" for name in names]
    table.columns.name = None
    print("\nProbability of a fracture; * is fractured; studies named by the end of the uid:")
    print(table.rename(columns={"patient_overall": "patient"}).to_string())


def draw_worst(options, data, answers):
    """Write overview.png of the most suspicious study."""
    uid = answers.patient_overall.idxmax()
    device = pick_device(options.device)
    models = [*load_models(options.weights, "segmenter", device).values()]
    volume = read_volume(data / "test_images" / uid, options.workers)
    probability = segment(models, volume, device)
    path = data / "overview.png"
    overview(path, volume, probability, np.array(answers.loc[uid, [*TARGETS]]))
    print(f"\n{path}: the most suspicious study, {uid.rpartition('.')[2]}")
