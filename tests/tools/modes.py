"""The modes that need the repository: their options, and the command line made from
them."""

import sys
from dataclasses import dataclass

import cspine
from cspine import Mode, argument, setting
from demo import demo, phantom
from notebooks import notebook
from pictures import eda, show


@dataclass(frozen=True)
class Phantoms:
    """Options of phantom."""
    target: str = argument("folder to write")
    studies: int = setting(20, "training studies", least=0)
    test_studies: int = setting(4, "test studies", least=0)
    seed: int = setting(0, "of everything random", least=0)
    matrix: int = setting(256, "rows of a slice, pixels", least=16)
    variety: float = setting(1.0, "how far ranges go: 1 real, 2 far beyond", least=1)
    fractures: float = setting(1.0, "factor of the real rates of fractures", least=0)


@dataclass(frozen=True)
class Eda:
    """Options of eda."""
    out: str = setting("eda", "folder to write")


@dataclass(frozen=True)
class Show:
    """Options of show."""
    study: str = argument("a CT as DICOM or NIfTI, its folder, or its uid in --data")
    out: str = setting("pictures", "folder to write")


@dataclass(frozen=True)
class Notebook:
    """Options of notebook."""
    out: str = setting("notebook", "folder to write")
    weights_dataset: str = setting(
        "", "OWNER/NAME of a Kaggle data set of weights to attach; with --train: ImageNet's")
    train: bool = setting(False, "write the notebook that trains, in sessions")
    preset: str = setting("standard", "of the training", tuple(cspine.PRESETS))


@dataclass(frozen=True)
class Demo:
    """Options of demo."""
    test_studies: int = setting(4, "how many phantoms to make", least=1)
    seed: int = setting(2, "of the phantoms; 2: the first with two of four fractured", least=0)


MODES = {
    "phantom": Mode(phantom, "workers", Phantoms()),
    "eda": Mode(eda, "data weights workers", Eda()),
    "show": Mode(show, "data weights device", Show()),
    "notebook": Mode(notebook, "weights", Notebook()),
    "demo": Mode(demo, "weights work out device workers", Demo()),
}


def main(argv=None):
    """Run a mode of the command line: its exit status."""
    return cspine.run_mode(MODES, sys.argv[1:] if argv is None else argv)
