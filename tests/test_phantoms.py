"""I rely on: the phantoms are necks in the layout of the competition, with its traps, from a seed."""

import hashlib
import io
import runpy
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import demo
import modes
import numpy as np
import pandas as pd
import pydicom
import phantoms
import pytest
from phantoms import make_dataset, make_phantom, write_phantom
import writers
from writers import TARGETS

from cspine import read_mask, read_volume
from modes import main


def digest(folder):
    """{file: hash} of all that lies below a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_seed_gives_the_same_files_whatever_the_number_of_workers(tmp_path):
    """Bit for bit: what a study is depends on (seed, index) alone."""
    make_dataset(tmp_path / "one", 1, 1, 3, 32, 1)
    make_dataset(tmp_path / "two", 1, 1, 3, 32, 2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Nine training and one test phantom of 48 x 48, made by the mode."""
    out = tmp_path_factory.mktemp("many") / "data"
    assert main(["phantom", str(out), "--studies", "9", "--test-studies", "1", "--matrix", "48",
                 "--seed", "66"]) == 0
    return out


def test_the_mode_writes_the_competitions_layout(many):
    train, test = pd.read_csv(many / "train.csv"), pd.read_csv(many / "test.csv")
    assert list(train) == ["StudyInstanceUID", "patient_overall", *TARGETS[:7]]
    assert list(test) == ["row_id", "StudyInstanceUID", "prediction_type"]
    assert list(test.prediction_type) == list(TARGETS)
    assert list(test.row_id) == [f"{u}_{t}" for u, t in zip(test.StudyInstanceUID, TARGETS)]
    truth = pd.read_csv(many / "test_labels.csv")
    assert list(truth.StudyInstanceUID) == [test.StudyInstanceUID[0]] and list(truth) == list(train)
    sample = pd.read_csv(many / "sample_submission.csv")
    assert list(sample.row_id) == list(test.row_id) and set(sample.fractured) == {0.5}
    boxes = pd.read_csv(many / "train_bounding_boxes.csv")
    assert list(boxes) == ["StudyInstanceUID", "x", "y", "width", "height", "slice_number"]
    for folder, uids in (("train_images", train), ("test_images", truth)):
        for uid in uids.StudyInstanceUID:
            numbers = sorted(int(p.stem) for p in (many / folder / uid).glob("*.dcm"))
            assert numbers == list(range(1, len(numbers) + 1)) and 60 <= len(numbers) <= 400
            assert (many / "segmentations" / f"{uid}.nii").exists()


def test_the_traps_of_real_studies_have_their_share(many):
    """Order, sign, intercept, padding, transfer syntax, rows != columns, slice spacing."""
    orders, signs, intercepts, syntaxes, padded, uneven, steps = set(), set(), set(), set(), 0, 0, []
    for folder in sorted((many / "train_images").iterdir()):
        heads = [pydicom.dcmread(folder / f"{n}.dcm") for n in (1, 2, 3)]
        z = [float(h.ImagePositionPatient[2]) for h in heads]
        first = heads[0]
        orders.add("down" if z[0] > z[1] > z[2] else "up" if z[0] < z[1] < z[2] else "shuffled")
        signs.add(first.PixelRepresentation)
        intercepts.add(float(first.RescaleIntercept))
        syntaxes.add(first.file_meta.TransferSyntaxUID)
        hu = first.pixel_array * float(first.RescaleSlope) + float(first.RescaleIntercept)
        padded += hu.min() < -1024
        uneven += first.Rows != first.Columns
        mask = (many / "segmentations" / f"{folder.name}.nii").read_bytes()
        steps.append(struct.unpack_from("<f", mask, 88)[0])  # pixdim[3] of nifti1.h
    assert orders == {"down", "up", "shuffled"} and signs == {0, 1} and len(syntaxes) == 2
    assert len(intercepts) >= 3 and padded >= 2 and uneven >= 1
    assert min(steps) >= 0.4 and max(steps) > 1


def test_labels_boxes_and_masks_of_a_data_set_agree(many):
    """Overall is any; a box lies on a vertebra that is broken, in the slice that it names."""
    table = pd.read_csv(many / "train.csv").set_index("StudyInstanceUID")
    assert (table.patient_overall == table[list(TARGETS[:7])].max(axis=1)).all()
    assert 1 <= table.patient_overall.sum() <= 8  # of 9 at the facts' 0.476: p < 0.005 outside
    boxes, on_bone = pd.read_csv(many / "train_bounding_boxes.csv"), []
    for uid, mine in boxes.groupby("StudyInstanceUID"):
        volume = read_volume(many / "train_images" / uid)
        labels = read_mask(many / "segmentations" / f"{uid}.nii", volume)
        broken = np.flatnonzero(table.loc[uid, list(TARGETS[:7])].to_numpy()) + 1
        files = {int(p.stem): pydicom.dcmread(p, stop_before_pixels=True).ImagePositionPatient[2]
                 for p in (many / "train_images" / uid).glob("*.dcm")}
        for _, x, y, width, height, number in mine.itertuples(index=False):
            z = round((volume.affine[2, 3] - files[number]) / volume.spacing[0])
            inside = labels[z, max(y - 1, 0) : y + height + 1, max(x - 1, 0) : x + width + 1]
            on_bone.append(np.isin(inside, broken).any())
    assert len(on_bone) > 10 and np.mean(on_bone) > 0.95  # motion may move a few off


def test_a_neck_is_a_neck():
    """C1 is a ring, the dens stands in it, C7's spinous process is the longest, the curve lordotic."""
    p = make_phantom([1, 4], 160)
    x, y, z = (np.indices(p.label.shape)[k] * p.spacing[k] for k in (2, 1, 0))
    present = [v for v in range(1, 8) if (p.label == v).sum() > 200]
    assert present == list(range(1, 8))
    centre = {v: np.array([a[p.label == v].mean() for a in (z, y, x)]) for v in present}
    assert all(centre[v][0] < centre[v + 1][0] for v in range(1, 7))
    ring = p.label == 1
    middle = tuple(np.rint(centre[1] / p.spacing).astype(int))
    assert p.label[middle] != 1, "the middle of C1 is no bone of C1"
    assert (p.label[: middle[0] + 1] == 2).any(), "the dens reaches up into C1"
    assert np.ptp(x[ring]) > 1.2 * np.ptp(x[p.label == 4])
    back = {v: y[p.label == v].max() for v in range(3, 8)}
    front = {v: y[p.label == v].min() for v in range(3, 8)}
    assert max(back, key=lambda v: back[v] - front[v]) in (6, 7)
    assert p.hu[p.label == 4].mean() > 250 > p.hu[p.label == 0].mean()


@pytest.mark.parametrize("matrix", [256, 512])
def test_spacings_are_those_of_real_studies(matrix):
    level = np.c_[np.zeros((13, 2)), -18.0 * np.arange(13)]
    grids = [phantoms.draw_grid(np.random.default_rng(k), level, matrix, 1.0) for k in range(200)]
    shapes, spacings = np.array([grid[0] for grid in grids]), np.array([grid[1] for grid in grids])
    assert (0.3 <= spacings[:, 1:]).all() and (spacings[:, 1:] <= 0.7).all()
    assert (0.4 < spacings[:, 0]).all() and (spacings[:, 0] < 1.26).all()
    assert (np.ptp(spacings, 0) > (0.5, 0.1, 0.1)).all()
    assert shapes[:, 0].min() >= 60 and shapes.max() <= 512


def test_the_share_of_fractures_is_an_option():
    whole, broken = (make_phantom([2, 0], 32, fractures=f).fractured.sum() for f in (0, 2.1))
    assert whole == 0 < broken


def test_whatever_the_storage_the_hu_come_back(tmp_path, monkeypatch):
    """Every stored form of a phantom is read back as its HU, but for what its bits cannot hold."""
    p = make_phantom([3, 0], 48)
    p = replace(p, hu=p.hu[:20], label=p.label[:20])
    for k, (signed, bits, intercept, slope) in enumerate(phantoms.read_storage()):
        form = writers.Storage(signed, bits, intercept, slope)
        monkeypatch.setattr(phantoms, "read_storage", lambda: [form])
        write_phantom(p, f"1.2.{k}", tmp_path, tmp_path / "masks", k)
        monkeypatch.undo()
        hu = read_volume(tmp_path / f"1.2.{k}").hu
        j, i = np.ogrid[: hu.shape[1], : hu.shape[2]]
        inner = np.hypot(j - hu.shape[1] / 2, i - hu.shape[2] / 2) < min(hu.shape[1:]) / 2 - 1
        low = intercept - slope * (2 ** (bits - 1) if signed else 0)
        high = low + slope * (2**bits - 1)
        expected = p.hu.astype(int).clip(max(low, -1024), high)
        assert np.array_equal(hu[:, inner], expected[:, inner]), k


# ---- What lies where phantoms go ----

NONE = "--studies", "0", "--test-studies", "0"
REAL = "1.2.826.0.1.3680043.9999"  # as the competition names its studies
TABLES = {
    "train.csv": f"StudyInstanceUID,C1\n{demo.UID_ROOT}0.0,1\n{REAL},1\n",
    "test.csv": f"row_id,StudyInstanceUID\n{REAL}_C1,{REAL}\n"}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_other_studies_are_not_overwritten(name, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(TABLES[name])
    assert main(["phantom", str(tmp_path), *NONE]) == 2
    assert capsys.readouterr().err.startswith(f"cspine: {path}: not a table of phantoms")
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == TABLES[name]


def test_a_submission_of_other_studies_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "submission.csv"
    path.write_text(f"row_id,fractured\n{REAL}_C1,0.9\n")
    assert main(["demo", "--out", str(path), "--work", str(tmp_path / "work")]) == 2
    assert "not a table of phantoms" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [path] and "0.9" in path.read_text()


def test_tables_of_phantoms_are_renewed(many, tmp_path):
    """Also those that name no study."""
    tables = sorted(path.name for path in many.glob("*.csv"))
    for name in tables:
        shutil.copy(many / name, tmp_path)
        demo.refuse_real_studies(tmp_path / name)
    for _ in range(2):
        assert main(["phantom", str(tmp_path), *NONE]) == 0
        assert all(pd.read_csv(tmp_path / name).empty for name in tables)


def test_phantoms_of_an_earlier_run_are_said(tmp_path, capsys):
    phantoms = f"phantom {tmp_path} --studies 1 --test-studies 1 --matrix 32 --seed ".split(" ")
    for seed, others in (("1", 0), ("1", 0), ("2", 2)):
        assert main([*phantoms[:-1], seed]) == 0
        said = f"{tmp_path}: {others} studies of an earlier run stay, without labels\n"
        assert capsys.readouterr().err == said * bool(others)


def test_a_folder_that_the_terminal_cannot_show_gets_its_data(tmp_path, monkeypatch):
    """What cspine.py starts for the mode, on a terminal of ASCII alone."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    monkeypatch.setattr(sys, "argv", ["tools", "phantom", str(tmp_path / "h\u00e4lse"), *NONE])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(modes.__file__).parent / "__main__.py"), run_name="__main__")
    sys.stdout.flush()
    assert end.value.code == 0 and b"h\\xe4lse: 0 training" in printed.getvalue()
