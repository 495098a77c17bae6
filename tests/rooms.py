"""All modes in the order of the work: those of cspine.py and those that stand beside it."""

import cspine
import demo
import evaluation
import kaggle_kernel
import pictures

MODES = cspine.MODES | evaluation.MODES | pictures.MODES | kaggle_kernel.MODES | demo.MODES
MODES = {"phantom": MODES["phantom"], **MODES}  # every road begins with data
