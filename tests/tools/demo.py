"""What `cspine.py phantom` and `demo` do: data sets, answers, their score, a picture."""

from pathlib import Path

import numpy as np

from cspine import (
    STUDY, TARGETS, build_parser, load_models, pick_device, read_csv, read_volume, segment)
from evaluation import read_answers, read_labels
from phantoms import make_dataset
from pictures import overview


def phantom(o):
    """Make a data set of phantoms, in the competition's layout."""
    make_dataset(Path(o.target), o.studies, o.test_studies, o.seed, o.matrix, o.workers, o.variety,
                 o.fractures)
    print(f"{o.target}: {o.studies} training and {o.test_studies} test studies")


def mode(*arguments):
    """Run a mode without main, so that its errors end the demo."""
    o = build_parser().parse_args([*map(str, arguments)])
    o.function(o)


def demo(o):
    """Make phantoms in --work that no training saw, predict them to --out, score, draw one."""
    data, machine = Path(o.work) / "demo", ("--workers", o.workers, "--device", o.device)
    shipped = ("--data", data, "--weights", o.weights)
    mode("phantom", data, "--studies", 0, "--test-studies", o.test_studies, "--seed", o.seed,
         "--workers", o.workers)
    mode("predict", *shipped, *machine, "--out", o.out)
    labels = read_labels(data)
    test = read_csv(data / "test.csv", (STUDY,))[STUDY].unique()
    answers = read_answers(o.out).loc[test]
    table = answers.map("{:.2f}".format) + labels.loc[test].map({0: "  ", 1: " *"}.get)
    print("probabilities, * fractured:")
    print(table.rename(columns={"patient_overall": "patient"}).to_string())
    mode("evaluate", *shipped, *machine, "--submission", o.out)
    draw(o, data, answers)


def draw(o, data, answers):
    """overview.png of the most suspicious study."""
    uid = answers.patient_overall.idxmax()
    device = pick_device(o.device)
    models = [*load_models(o.weights, "segmenter", device).values()]
    volume = read_volume(data / "test_images" / uid, o.workers)
    path = data / "overview.png"
    overview(path, volume, segment(models, volume, device), np.array(answers.loc[uid, [*TARGETS]]))
    print(f"{path}: the most suspicious study")


SEED = (0, "of what is random")
DEMO_SEED = (2, "of the phantoms")  # by its truth: the first to have two of four fractured
MODES = {
    "phantom": (phantom, "workers", dict(
        target=(None, "folder to write"),
        studies=(20, "training studies"),
        test_studies=(4, "test studies"),
        seed=SEED,
        matrix=(256, "rows of a slice"),
        variety=(1.0, "2: far beyond the real"),
        fractures=(1.0, "2: twice as many"))),
    "demo": (demo, "weights work out device workers",
             dict(test_studies=(4, "phantoms"), seed=DEMO_SEED)),
}
