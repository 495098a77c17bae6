"""What the generators share: a study, its files as the competition's, a command line.

A generator with a command line brings `make_study(rng)`, which gives (CT in HU (z, y, x),
labels, Grid, the indices 0..6 of its broken vertebrae); z ascends from the feet, x grows to
the left, y to the back.

    python tests/necks/GENERATOR.py OUT --studies 24 --seed 0

writes OUT/test_images/<uid>/<k>.dcm (k = 1 on top), OUT/segmentations/<uid>.nii (1..7 =
C1..C7, 8 and on = T1 and on) and the csv files of `write_tables`.
"""

import argparse
import struct
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom

VERTEBRAE = ("C1", "C2", "C3", "C4", "C5", "C6", "C7")
TARGETS = VERTEBRAE + ("patient_overall",)
STUDY = "StudyInstanceUID"
EXPLICIT = pydicom.uid.ExplicitVRLittleEndian

Storage = namedtuple("Storage", "signed bits intercept slope")
PLAIN = Storage(0, 16, -1024, 1)
Grid = namedtuple("Grid", "origin step")  # mm, both (x, y, z): of voxel 0, between voxels

@dataclass(frozen=True)
class Phantom:
    """A study: hu, label (Z, Y, X), head first; LPS mm; boxes (N, 5): x y w h slice."""

    hu: np.ndarray
    label: np.ndarray
    spacing: tuple
    affine: np.ndarray
    fractured: np.ndarray
    boxes: np.ndarray

# ---- DICOM ----

def lowest_value(storage):
    """The least whole number that a form of storage holds."""
    return -(1 << storage.bits - 1) if storage.signed else 0

def stored_values(hu, storage):
    """HU as the whole numbers of a form of storage, cut off at its bits."""
    lowest = lowest_value(storage)
    highest = lowest + (1 << storage.bits) - 1
    values = (hu - np.float32(storage.intercept)) / storage.slope
    values = np.rint(values).clip(lowest, highest)
    return values.astype("<i2" if storage.signed else "<u2")

def dicom_header(phantom, uid, storage):
    """What is the same in all slices of a study."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = EXPLICIT
    values = dict(
        SOPClassUID=pydicom.uid.CTImageStorage,
        StudyInstanceUID=uid,
        Rows=phantom.hu.shape[1],
        Columns=phantom.hu.shape[2],
        SeriesInstanceUID=uid + ".1",
        FrameOfReferenceUID=uid + ".2",
        SamplesPerPixel=1,
        BitsAllocated=16,
        BitsStored=storage.bits,
        HighBit=storage.bits - 1,
        PixelRepresentation=storage.signed,
        PhotometricInterpretation="MONOCHROME2",
        RescaleIntercept=storage.intercept,
        RescaleSlope=storage.slope,
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[round(phantom.spacing[1], 7)] * 2,
        SliceThickness=round(phantom.spacing[0], 4),
    )
    for name, value in values.items():
        setattr(data, name, value)
    return data

def write_slices(folder, data, stored, affine, numbers):
    """A file <number>.dcm for each slice, with the header `data`."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.dcm"):  # of a study of the same name with more slices
        old.unlink()
    for k, number in enumerate(numbers):
        position = (affine @ (k, 0, 0, 1))[:3]
        data.SOPInstanceUID = f"{data.StudyInstanceUID}.3.{number}"
        data.InstanceNumber = number
        data.ImagePositionPatient = position.round(6).tolist()
        data.PixelData = stored[k].tobytes()
        data.save_as(folder / f"{number}.dcm", enforce_file_format=True)

# ---- NIfTI and csv ----

def nifti_bytes(stored, code, spacing, ras):
    """NIfTI-1 of an array (K, J, I) of a datatype `code`; spacing (I, J, K), sform (3, 4)."""
    header = bytearray(352)
    for offset, kind, *values in (  # of nifti1.h
        (0, "i", 348),  # bytes of the header proper
        (40, "8h", 3, *stored.shape[::-1], 1, 1, 1, 1),
        (70, "2h", code, 8 * stored.itemsize),
        (108, "2f", 352, 1),  # where voxels begin, and their slope
        (76, "4f", 1, *spacing),
        (123, "B", 2),  # mm
        (254, "h", 1),  # the affine leads to the scanner's coordinates
        (280, "12f", *ras.flat),
        (344, "4s", b"n+1")):
        struct.pack_into("<" + kind, header, offset, *values)
    return header + stored.tobytes()

def write_mask(phantom, path):
    """NIfTI-1 whose array has the axes L, A, S; RAS+ mm in the sform."""
    z, y, _ = phantom.label.shape
    voxel_from_stored = np.array(
        [[0, 0, -1, z - 1], [0, -1, 0, y - 1], [1, 0, 0, 0], [0, 0, 0, 1]])
    ras = (np.diag([-1, -1, 1, 1]) @ phantom.affine @ voxel_from_stored)[:3]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(nifti_bytes(phantom.label[::-1, ::-1], 2, phantom.spacing[::-1], ras))

def label_row(uid, fractured):
    """A row of train.csv: uid, patient_overall, C1, ..., C7."""
    return uid, int(fractured.any()), *fractured.tolist()

def write_tables(out, train, test):
    """The csv files of such rows, and the truth of the test."""
    labels = [STUDY, "patient_overall", *VERTEBRAE]
    asked = ["row_id", STUDY, "prediction_type"]
    tests = [(f"{row[0]}_{kind}", row[0], kind) for row in test for kind in TARGETS]
    answers = [(row_id, 0.5) for row_id, _, _ in tests]
    for name, table, columns in (
        ("train", train, labels),
        ("test_labels", test, labels),
        ("test", tests, asked),
        ("sample_submission", answers, ["row_id", "fractured"]),
    ):
        table = pd.DataFrame(table, columns=columns)
        table.to_csv(out / f"{name}.csv", index=False)

# ---- A generator's command line ----

def on_grid(ct, labels, grid, broken):
    """The Phantom of what `make_study` gives."""
    spacing = grid.step[::-1]
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing * (-1, 1, 1))[::-1]
    affine[:3, 3] = grid.origin + (0, 0, spacing[0] * (len(ct) - 1))
    fractured = np.isin(np.arange(7), broken).astype(np.uint8)
    boxes = np.empty((0, 5), int)
    return Phantom(ct[::-1], labels[::-1], tuple(spacing), affine, fractured, boxes)

def main(make_study, uid_root, description, argv=None):
    """Draw the studies that the command line asks for, and write them with their tables."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--studies", type=int, default=24, help="how many (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="of what is random (default 0)")
    options = parser.parse_args(argv)

    cv2.setNumThreads(1)
    rows = []
    for k in range(options.studies):
        uid = f"{uid_root}.{options.seed}.{k}"
        study = on_grid(*make_study(np.random.default_rng([options.seed, k])))
        data = dicom_header(study, uid, PLAIN)
        stored = stored_values(study.hu, PLAIN)
        numbers = range(1, len(stored) + 1)
        write_slices(options.out / "test_images" / uid, data, stored, study.affine, numbers)
        write_mask(study, options.out / "segmentations" / f"{uid}.nii")
        rows.append(label_row(uid, study.fractured))
    write_tables(options.out, [], rows)
