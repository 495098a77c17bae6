"""All models of a preset, one command:

    python tests/tools/train_all.py --preset gold --data DIR --weights real

train-seg, extract, train-cls and train-patient, a process on each GPU, then evaluate
--folds --calibrate. After gold the same for gold-second, whose models of other backbones join
it. The same command goes on where it stopped. Options go to each mode; --time-limit is for
all of them together.
"""

import argparse
import math
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(1, str(ROOT))

import cspine  # noqa: E402
import kaggle_training  # noqa: E402

FOLLOWED = {"gold": ["gold-second"]}  # preset: those that are trained after it


def run(arguments, cards):
    """The exit status of a mode: in this process, or in one on each of several GPUs."""
    if cards < 2:
        return cspine.main(arguments)
    command = kaggle_training.torchrun(cards, ROOT / "cspine.py")
    return kaggle_training.call([*command, *arguments])


def parser():
    """The parser of the options that go to each of the modes."""
    how = "What a preset sets: cspine.py train-seg --preset NAME --help, and so on."
    one = cspine.Parser("train_all.py", description=__doc__, epilog=how,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    one.set_defaults(given=())
    known = [{*cspine.MODES[mode].shared.split()} for mode in kaggle_training.STEPS]
    for part in fields(cspine.Shared):
        if part.name in set.intersection(*known):
            cspine.add_option(one, part, part.default)
    return one


def train_preset(preset, options, argv, end):
    """Run the modes of a preset in a row, until the time `end`: the exit status; None if work
    is left."""
    cards = torch.cuda.device_count() if options.device == "auto" else 1
    folds = "--folds", str(options.folds)
    for mode, kind in kaggle_training.STEPS.items():
        if kind and kaggle_training.closed(options.weights, preset, mode, *folds):
            cspine.say(f"train_all: {mode} of {preset}: finished before in {options.weights}; "
                       "other --data needs another --weights")
            continue
        more = []
        if kind:  # extract always goes on
            batch = kaggle_training.batch_begun(options.weights, preset, mode, *folds)
            more = ["--resume", *batch]
        left = end - time.monotonic()
        if left < 1:
            cspine.say(f"train_all: the time is over before {mode}: the same command goes on")
            return None
        if left < math.inf:
            more += ["--time-limit", f"{left / 60:.3f}"]  # of all modes together
        status = run([mode, *argv, "--preset", preset, *more], cards)
        if status:
            return status
        whole = time.monotonic() < end
        if kind:
            whole = kaggle_training.trained(options.weights, preset, mode, *folds)
        elif whole and (few := kaggle_training.few_crops(options.data, options.work, preset)):
            cspine.say(f"train_all: {few}: the lines above say why")
            return 3
        if not whole:
            cspine.say(f"train_all: {mode} is not finished: the same command goes on")
            return None
    places = ["--data", options.data, "--weights", options.weights]
    if options.folds == 1:
        cspine.say("train_all: with --folds 1 the score is of studies that were trained on")
    else:
        places.append("--calibrate")
    return run(["evaluate", "--folds", *places], 1)


def main(argv=None):
    """Train all models of a preset, as far as each mode does its whole work; the status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parser().parse_args(argv)
    except cspine.UserError as error:
        cspine.say(f"train_all: {error}")
        return 2
    for later in FOLLOWED.get(options.preset, ()):
        cspine.say(f"train_all: then {later}, about {cspine.PLANS[later]}")
    end = time.monotonic() + 60 * (cspine.minutes_of(options) or math.inf)
    status = 0
    for preset in (options.preset, *FOLLOWED.get(options.preset, ())):
        if status == 0:
            status = train_preset(preset, options, argv, end)
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
