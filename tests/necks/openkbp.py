"""The CTs of the public OpenKBP data, as the other scripts read them.

    git clone https://github.com/ababier/open-kbp
    python tests/necks/openkbp.py open-kbp NECKS

Writes `NECKS/<patient>.nii.gz` for every patient of landmarks.json whose `ct.csv` is in the
clone. The data are under the MIT licence (Babier et al., Medical Physics 48, 2021, pages
5549-5561); a `ct.csv` lists the places in a cube of 128 x 128 x 128 (y, x, z), the last axis
running fastest, and the CT number there plus 1024; elsewhere it is 0.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "tests/tools", "tests/necks")]

import cspine  # noqa: E402
import real_necks  # noqa: E402
import writers  # noqa: E402

EDGE = 128  # voxels of the cube


def read_ct(path, entry):
    """int16 HU (x, y, z) of a `ct.csv`: the box of the cube that the landmarks speak of."""
    table = pd.read_csv(path, index_col=0)
    cube = np.zeros(EDGE**3, np.int16)
    cube[table.index.to_numpy()] = table.iloc[:, 0].round()
    hu = cube.reshape(EDGE, EDGE, EDGE).transpose(1, 0, 2) + np.int16(real_necks.AIR_HU)
    low = np.array(entry["openkbp_offset"])
    high = low + entry["shape"]
    return hu[tuple(map(slice, low, high))]


def write_ct(path, hu, spacing):
    """int16 NIfTI-1 of HU (x, y, z) and its spacing in mm; x and y grow as in LPS, z to
    the feet."""
    ras = np.diag([*spacing, 1.0])[:3] * -1
    raw = writers.nifti_bytes(hu.T.astype("<i2"), 4, spacing, ras)
    data = gzip.compress(raw, mtime=0)
    cspine.write_atomic(path, lambda new: new.write_bytes(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path, help="folder of the clone of ababier/open-kbp")
    parser.add_argument("necks", type=Path, help="folder to write")
    o = parser.parse_args()
    found = {path.parent.name: path for path in o.clone.glob("provided-data/*/*/ct.csv")}
    if not found:
        parser.error(f"no provided-data/*/*/ct.csv in {o.clone}")

    entries = real_necks.read_landmarks()
    for name in sorted(entries.keys() & found):
        hu = read_ct(found[name], entries[name])
        path = o.necks / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_ct(path, hu, entries[name]["spacing_mm"])
        print(path, flush=True)
    missing = sorted(entries.keys() - found)
    if missing:
        print(f"{len(missing)} patients are not in {o.clone}, the first of them {missing[0]}")


if __name__ == "__main__":
    main()
