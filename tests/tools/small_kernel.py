"""Tiny weights and studies for the tests of prediction: what they answer is known
beforehand."""

import pandas as pd
import numpy as np
import torch

import cspine
from dicom_files import dicom_bytes

BACKBONE = "mobilenetv3_small_050"


def make_weights(folder, folds=1, patient=True, unseen=(), size=32, seed=0):
    """Segmenters that see every vertebra everywhere, faintly (0.4), but for those named
    unseen."""
    recipe, settings = cspine.RECIPES["vertebra"], dict(backbone=BACKBONE, size=size)
    for fold in range(folds):
        for kind in ("segmenter", "vertebra", "patient")[: 3 if patient else 2]:
            torch.manual_seed(seed + fold)
            model = cspine.KINDS[kind](
                **settings, **({} if kind == "segmenter" else {"hidden": 8})
            )
            if kind == "segmenter":
                torch.nn.init.zeros_(model.head.weight)
                bias = [-9.0 if v in unseen else -0.4 for v in cspine.VERTEBRAE]
                model.head.bias.data = torch.tensor(bias).repeat_interleave(8)
            cspine.save_checkpoint(
                folder / f"{kind}_fold{fold}.pt",
                kind,
                recipe,
                settings=model.settings,
                tensors=model.state_dict(),
            )
    return folder


def make_study(folder, slices=20, edge=32, seed=0):
    """A folder of DICOM slices of noise."""
    folder.mkdir(parents=True)
    noise = (
        np.random.default_rng(seed)
        .integers(0, 2000, (slices, edge, edge))
        .astype(np.uint16)
    )
    for k, image in enumerate(noise):
        data = dicom_bytes(image, (0.0, 0.0, -float(k)), number=k + 1)
        (folder / f"{k + 1}.dcm").write_bytes(data)


def make_test_set(folder, uids, slices=20):
    """test_images and test.csv, eight rows a study."""
    for k, uid in enumerate(uids):
        make_study(folder / "test_images" / uid, slices, seed=k)
    write_test_csv(
        folder,
        [(f"{uid}_{target}", uid, target) for uid in uids for target in cspine.TARGETS],
    )
    return folder


def write_test_csv(folder, rows):
    columns = ["row_id", cspine.STUDY, "prediction_type"]
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=columns).to_csv(folder / "test.csv", index=False)
