"""What `cspine.py evaluate` prints, and the calibration that it fits."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from cspine import (
    AS_IS, BLIND, FLOOR, POSITIVE_FACTOR, STUDY, TARGET_WEIGHTS, TARGETS, VERTEBRAE, Answers,
    UserError, auc, combine, competition_scores, data_folder, dice_scores, element_losses,
    load_models, pick_device, progress, read_csv, read_mask, read_volume, segment, study_errors,
    write_atomic)

BINS = (0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)  # of the reliability table
CALIBRATION_PULL = 2.0  # towards the identity: a spread of 0.5 in log scale and in shift


def read_answers(path):
    """The answers of a submission, a study a row; what is no number is NaN."""
    table = read_csv(path, ("row_id", "fractured"))
    table[["uid", "target"]] = table.row_id.str.extract(f"^(.*)_({'|'.join(TARGETS)})$")
    table["fractured"] = pd.to_numeric(table.fractured, "coerce")
    return table.pivot_table("fractured", "uid", "target").reindex(columns=TARGETS)


def held_out_answers(weights, calibration=AS_IS):
    """Out-of-fold answers, a study a row, blended over the kinds as predict does."""
    files = sorted(weights.glob("vertebra_fold*_heldout.csv"))
    files += sorted(weights.glob("patient_fold*_heldout.csv"))
    if not files:
        raise UserError(f"no vertebra_fold*_heldout.csv in {weights}: run train-cls first")
    table = pd.concat([read_csv(path, (STUDY, *TARGETS)) for path in files])
    blended = {uid: combine([(row[:7, None], row[7]) for row in rows.to_numpy()], Answers(),
                            calibration)
               for uid, rows in table.groupby(STUDY)[list(TARGETS)]}
    return pd.DataFrame.from_dict(blended, orient="index", columns=TARGETS)


def read_labels(data):
    """Labels (N, 8) by uid: train.csv, and the phantoms' test_labels.csv."""
    files = [p for p in (data / "train.csv", data / "test_labels.csv") if p.exists()]
    labels = pd.concat([read_csv(path, (STUDY, *TARGETS)) for path in files])
    with study_errors(f"{data}: labels that are no numbers"):  # an empty csv has objects
        return labels.groupby(STUDY)[list(TARGETS)].first().astype(float)


def score_table(answers, labels):
    """Log loss and AUC of every target, and of C1 to C7 together."""
    parts = {name: [k] for k, name in enumerate(TARGETS)} | {"C1 to C7": [*range(7)]}
    rows = []
    for columns in parts.values():
        p, y = answers[:, columns].ravel(), labels[:, columns].ravel()
        rows.append((y.sum(), element_losses(p, y).mean(), auc(p, y)))
    return pd.DataFrame(rows, parts, ["fractured", "log loss", "AUC"])


def reliability(answers, labels):
    """How often answers of about a size are right: a row a bin, C1 to C7 and the patient apart."""
    rows = []
    for name, part in (("C1 to C7", slice(7)), ("patient_overall", slice(7, 8))):
        p, y = answers[:, part].ravel(), labels[:, part].ravel()
        table = pd.DataFrame({"answers": p, "mean answer": p, "fractured": y})
        bins = pd.cut(table.answers, BINS).astype(str)
        table = table.groupby(bins.rename(name)).agg(
            {"answers": "size", "mean answer": "mean", "fractured": "mean"})
        rows.append(table.set_axis(f"{name} " + table.index))
    return pd.concat(rows)


def named_right(probability, labels):
    """Whether most of each mask (7, D, D, D) lies in its true vertebra."""
    return [np.append(labels[mask > 0.5] == v, False).mean() > 0.5
            for v, mask in enumerate(probability, 1)]


def mask_table(data, uids, models, workers):
    """Dice of every vertebra, and the share named right: most of the mask in the true one."""
    masks, rows = {p.name.split(".nii")[0]: p for p in data.glob("segmentations/*.nii*")}, []
    # found among the folders that are there: no path is made from a csv
    folders = [p for p in sorted(data.glob("*_images/*")) if p.name in masks and p.name in uids]
    for folder in progress(folders, "study", len(folders)):
        volume = read_volume(folder, workers)
        probability = segment(models, volume, next(models[0].parameters()).device)
        labels = read_mask(masks[folder.name], volume, (probability.shape[-1],) * 3)
        named = named_right(probability, labels)
        dice = dice_scores(probability, labels)
        rows.append(pd.DataFrame({"Dice": dice, "named right": named}, VERTEBRAE).dropna())
    if not rows:
        return pd.DataFrame()
    table = pd.concat(rows)
    whole = table.mean().to_frame("C1 to C7").T
    return pd.concat([table.groupby(level=0).mean(), whole])


def evaluate(o):
    """Score --submission, or the held-out answers, by the labels and masks of --data; prints."""
    data, weights = data_folder(o, "train.csv"), Path(o.weights)
    labels = read_labels(data)
    answers = held_out_answers(weights) if o.folds else read_answers(o.submission)
    answers = answers[answers.index.isin(labels.index)].fillna(BLIND)
    if not len(answers):
        raise UserError(f"nothing to score: no answered study has labels in {data}/")
    uids, labels = answers.index, labels.loc[answers.index].to_numpy()
    blind, answers = answers.assign(**BLIND).to_numpy(), answers.to_numpy()
    study, column = competition_scores(answers, labels)
    print(f"{len(labels)} studies; weighted log loss, lower is better: {study:.4f} per study, "
          f"{column:.4f} per column; the best constants: "
          "{:.4f}, {:.4f}".format(*competition_scores(blind, labels)))
    table = score_table(answers, labels)
    if o.calibrate:
        path, raw = weights / "calibration.json", answers
        if path.exists() and not o.folds:  # it is in the submission: taken back before the fit
            before = json.loads(path.read_text())
            scale, shift = torch.tensor([before[target] for target in TARGETS]).double().T
            raw = ((torch.tensor(answers).logit(FLOOR) - shift) / scale).sigmoid().numpy()
        fitted = fit_calibration(raw, labels)
        if o.folds:  # noisy-or blends calibrated vertebrae into the patient's answer
            fitted[7] = 1, 0
            blended = held_out_answers(weights, fitted.T).loc[uids].to_numpy()
            fitted[7] = fit_calibration(blended, labels)[7]
        elif not path.exists():
            print("patient_overall was blended from vertebrae that were not calibrated yet: predict "
                  "and evaluate --calibrate once more")
        write_calibration(path, fitted)
    models = [*load_models(weights, "segmenter", pick_device(o.device)).values()]
    if models and not o.folds:
        table = table.join(mask_table(data, uids, models, o.workers))
    print(table.round(4).to_string(na_rep=""))
    print(reliability(answers, labels).round(3).to_string())


def fit_calibration(answers, labels):
    """(8, 2) scale and shift that lower the score of (N, 8) answers, held near the identity."""
    weight = np.where(labels > 0, POSITIVE_FACTOR, 1.0)
    weight /= (weight * TARGET_WEIGHTS).sum(1, keepdims=True)
    weight *= (labels.min(0) < labels.max(0)) / weight.mean(0)  # one class says nothing
    logits, truth = torch.tensor(answers).logit(FLOOR), torch.tensor(labels).double()
    fit = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)  # log scale, shift
    optimizer = torch.optim.LBFGS([fit], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = CALIBRATION_PULL * fit.square().sum() + F.binary_cross_entropy_with_logits(
            logits * fit[0].exp() + fit[1], truth, torch.tensor(weight), reduction="sum")
        total.backward()
        return total

    optimizer.step(loss)
    scale, shift = fit.detach().numpy()
    return np.stack([np.exp(scale), shift], 1)


def write_calibration(path, fitted):
    text = json.dumps(dict(zip(TARGETS, fitted.tolist())), indent=1)
    write_atomic(path, lambda new: new.write_text(text))
    print(f"{path} is written: predict uses it from now on")


MODES = {"evaluate": (evaluate, "data weights device workers", dict(
    submission=("submission.csv", "file to score"),
    folds=(False, "score the held-out answers"),
    calibrate=(False, "write calibration.json to --weights")))}
