"""What the generators share: a grid, a command line, and studies written as the
competition's.

A generator brings `make_study(rng)`, which gives (CT in HU (z, y, x), labels, Grid, the
indices 0..6 of its broken vertebrae); z ascends from the feet, x grows to the left, y to
the back.

    python tests/necks/GENERATOR.py OUT --studies 24 --seed 0 [--train]

writes OUT/test_images/<uid>/<k>.dcm (k = 1 on top), OUT/segmentations/<uid>.nii (1..7 =
C1..C7, 8 and on = T1 and on), OUT/test.csv, OUT/test_labels.csv and an empty train.csv;
with --train, OUT/train_images and OUT/train.csv.
"""

import argparse
import struct
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

VERTEBRAE = ["C1", "C2", "C3", "C4", "C5", "C6", "C7"]
TARGETS = [*VERTEBRAE, "patient_overall"]
STORED_ZERO_HU = -1024  # the HU that a stored 0 stands for
NIFTI_UINT8 = 2  # code of the type of a voxel (nifti1.h)
NIFTI_SCANNER = 1  # the affine leads to the scanner's coordinates
NIFTI_HEADER = "<i36x8h14x2h2x8f3f3xB128x2h24x12f16x4s4x"
NIFTI_DATA_AT = 352  # bytes

Grid = namedtuple(
    "Grid", "origin step"
)  # mm, both (x, y, z): of voxel 0, between voxels


def write_dicom(folder, uid, ct, grid):
    """Write slices 1.dcm (top) to n.dcm (bottom)."""
    folder.mkdir(parents=True, exist_ok=True)
    tags = dict(
        SOPClassUID=CTImageStorage,
        StudyInstanceUID=uid,
        SeriesInstanceUID=f"{uid}.1",
        Modality="CT",
        PatientID=uid,
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        Rows=ct.shape[1],
        Columns=ct.shape[2],
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
        RescaleSlope=1,
        PixelRepresentation=0,
        RescaleIntercept=STORED_ZERO_HU,
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[round(grid.step[0], 6)] * 2,
        SliceThickness=round(grid.step[2], 6),
    )
    for number, plane in enumerate(ct[::-1], 1):
        height = grid.step * (0, 0, len(ct) - number)
        stored = (plane - STORED_ZERO_HU).astype("<u2")
        tags |= dict(
            SOPInstanceUID=f"{uid}.1.{number}",
            PixelData=stored.tobytes(),
            InstanceNumber=number,
            ImagePositionPatient=(grid.origin + height).round(4).tolist(),
        )
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        for name, value in tags.items():
            setattr(dataset, name, value)
        dataset.save_as(folder / f"{number}.dcm", enforce_file_format=True)


def write_nifti(path, labels, grid):
    """Write labels as uint8 NIfTI-1 in DICOM's voxel order, with an affine to RAS mm."""
    (x, y, z), (dx, dy, dz) = grid
    top = z + (len(labels) - 1) * dz
    header = struct.pack(
        NIFTI_HEADER,
        348,  # bytes of the header proper
        *(3, *labels.shape[::-1], 1, 1, 1, 1),
        *(NIFTI_UINT8, 8),  # and bits of a voxel
        *(1, dx, dy, dz, 1, 1, 1, 1),
        *(NIFTI_DATA_AT, 1, 0),  # slope and intercept
        2,  # mm
        *(0, NIFTI_SCANNER),  # no quaternion, an affine
        *(-dx, 0, 0, -x),
        *(0, -dy, 0, -y),
        *(0, 0, -dz, top),
        b"n+1",
    )
    path.write_bytes(header + labels[::-1].tobytes())


def write_tables(out, truth, train):
    """Write the csv files of studies {uid: indices of the broken vertebrae}."""
    rows = []
    for uid, broken in truth.items():
        marks = [int(v in broken) for v in range(7)]
        rows.append((uid, int(len(broken) > 0), *marks))
    columns = ["StudyInstanceUID", "patient_overall", *VERTEBRAE]
    labels = pd.DataFrame(rows, columns=columns)

    if train:
        labels.to_csv(out / "train.csv", index=False)
        return
    labels[:0].to_csv(out / "train.csv", index=False)
    labels.to_csv(out / "test_labels.csv", index=False)
    asked = [
        (f"{uid}_{target}", uid, target) for uid in truth for target in TARGETS
    ]
    test = pd.DataFrame(
        asked, columns=["row_id", "StudyInstanceUID", "prediction_type"]
    )
    test.to_csv(out / "test.csv", index=False)


def main(make_study, uid_root, description, argv=None):
    """Draw the studies that the command line asks for, and write them with their tables."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--studies", type=int, default=24, help="how many (default 24)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is random (default 0)"
    )
    parser.add_argument(
        "--train", action="store_true", help="studies to train on"
    )
    options = parser.parse_args(argv)

    cv2.setNumThreads(1)
    masks = options.out / "segmentations"
    masks.mkdir(parents=True, exist_ok=True)
    images = options.out / ("train_images" if options.train else "test_images")
    truth = {}
    for k in range(options.studies):
        uid = f"{uid_root}.{options.seed}.{k}"
        rng = np.random.default_rng([options.seed, k])
        ct, labels, grid, truth[uid] = make_study(rng)
        write_dicom(images / uid, uid, ct, grid)
        write_nifti(masks / f"{uid}.nii", labels, grid)
    write_tables(options.out, truth, options.train)
