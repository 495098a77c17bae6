"""All modes in the order of the work: those of cspine.py and those that stand beside it."""

import functools
import sys
import time
from pathlib import Path

import pandas as pd

import cspine

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import demo  # noqa: E402
import evaluation  # noqa: E402
import notebooks  # noqa: E402
import pictures  # noqa: E402


def with_curves(train, kind):
    """The mode, which then draws the logs it has written, also when it was stopped."""
    @functools.wraps(train)
    def run(o):
        start = time.time()
        try:
            train(o)
        finally:
            logs = Path(o.weights).glob(f"{kind}_fold*_log.csv") if cspine.ranks()[0] == 0 else ()
            for log in logs:
                if log.stat().st_mtime >= start:
                    path = log.with_name(log.name.replace("log.csv", "curves.png"))
                    pictures.draw_curves(path, pd.read_csv(log).to_dict("records"))
    return run


def train_modes():
    """The modes of cspine.py whose own options are a recipe's."""
    for name, (function, shared, own) in cspine.MODES.items():
        if isinstance(own, str):
            yield name, (with_curves(function, own), shared, own)


MODES = cspine.MODES | dict(train_modes()) | evaluation.MODES | pictures.MODES
MODES |= notebooks.MODES | demo.MODES
MODES = {"phantom": MODES["phantom"], **MODES}  # every road begins with data
