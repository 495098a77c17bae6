"""Pictures of studies and data sets: what `cspine.py show` and `cspine.py eda` draw."""

import re
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import torch
import torch.nn.functional as F

from cspine import (
    BONE_WINDOW, CHANNELS, MIN_SLICES, SLICES_PER_STEP, STUDY, TARGETS, VERTEBRAE, Answers, Effort,
    StudyError, UserError, apply_window, classify, combine, data_folder, dice_scores,
    load_ensemble, pick_device, prefetch, progress, read_csv, read_mask, read_volume,
    segment, study_errors, vertebra_box, vertebra_slices, write_atomic, write_csv)

# In: studies, answers, tables. Out: PNGs. The trap: OpenCV's points are (x, y), its colours BGR.

PANEL, TILE = 465, 72  # pixels: edge of a picture, of a crop; 3 pictures are as high as 15 steps
# C1 to C7, patient: Okabe and Ito's colours, which differ for the colour-blind
COLOURS = ((0, 159, 230), (233, 180, 86), (115, 158, 0), (66, 228, 240), (178, 114, 0),
           (0, 94, 213), (167, 121, 204), (140, 140, 140))
SIDES = ("HF", "AP", "RL")  # the two ends of Z, Y and X


def write_png(path, image):
    png = cv2.imencode(".png", image & 252, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1]  # 64 greys: small
    write_atomic(path, png.tofile)


def text(image, words, x, y, anchor=(0, 0), grey=40, size=0.5):
    """Words with a shadow; the share `anchor` of their width and height lies at (x, y)."""
    width, height = cv2.getTextSize(words, 0, size, 1)[0]
    x = int(min(max(2, x - anchor[0] * width), image.shape[1] - width - 2))
    y = int(y + (1 - anchor[1]) * height)
    for shift, tone in ((1, 255 - grey), (0, grey)):
        cv2.putText(image, words, (x + shift, y + shift), 0, size, (tone,) * 3, 1, cv2.LINE_AA)


def chart(title, values, axes, peak=0, colours=COLOURS[4:5], line=False):
    """Bars, or a line, of {label: number}; wider than PANEL if the labels ask for it."""
    letters, count = max([len(str(label)) for label in values], default=1), max(1, len(values))
    slot, base = max((PANEL - 24) / count, 0 if line else 9 * letters + 8), PANEL - 56
    every = max(1, count // 3) if line else 1
    image = np.full((PANEL, int(24 + slot * count), 3), 255, np.uint8)
    top = peak or max([*values.values(), 1e-9])
    scale = (base - 84) / top
    for share in (0.5, 1.0) if line else ():
        y = round(base - share * top * scale)
        cv2.line(image, (12, y), (image.shape[1] - 12, y), (225,) * 3)
        text(image, f"{share * top:.3g}", 16, y + 3, grey=120, size=0.4)
    points = [(12, 64), (12, base), (image.shape[1] - 12, base)]
    cv2.polylines(image, [np.int32(points)], False, (40, 40, 40))
    points = [(12 + slot * (i + 0.5), base - v * scale) for i, v in enumerate(values.values())]
    for i, ((x, y), label) in enumerate(zip(points, values)):
        if not line:
            corners = (int(x - 0.4 * slot), round(y)), (int(x + 0.4 * slot), base - 1)
            cv2.rectangle(image, *corners, colours[i % len(colours)], -1)
        if (count - 1 - i) % every == 0:  # the last one always
            text(image, f"{values[label]:.4g}", x, y - 5, (0 if line else 0.5, 1), size=0.45)
            text(image, f"{label:g}" if line else str(label), x, base + 8, (0.5, 0), size=0.45)
    if line:
        cv2.polylines(image, [np.int32(points)], False, colours[0], 2, cv2.LINE_AA)
    for words, y in ((title, 12), (axes[1], 40), (axes[0], PANEL - 22)):
        text(image, words, 12, y)
    return image


def draw_curves(path, history):
    """PNG of loss, score and learning rate; `history`: a dict of numbers an epoch."""
    table = pd.DataFrame(history).fillna(0).set_index("epoch")
    write_png(path, np.hstack([
        chart(title, table[key].to_dict(), ("epoch", ""), line=True) for key, title in (
            ("train_loss", "Training loss"), ("score", "Held-out score, lower is better"),
            ("lr", "Learning rate"))]))


def panel(volume, probability, axis, cell, title, names, truth):
    """(PANEL, PANEL, 3): a plane of the cube, mm to one scale, vertebrae coloured and named."""
    rows, columns = (k for k in range(3) if k != axis)
    size_mm = np.multiply(volume.hu.shape, volume.spacing)[[columns, rows]]
    scale = (PANEL - 48) / size_mm.max()
    width, height = size = np.rint(size_mm * scale).astype(int).tolist()
    left, top = (PANEL - width) // 2, (PANEL - height) // 2
    index = int((int(cell) + 0.5) / probability.shape[-1] * volume.hu.shape[axis])
    image = np.zeros((PANEL, PANEL, 3), np.uint8)
    view = image[top : top + height, left : left + width]
    view[:] = cv2.resize(apply_window(volume.hu.take(index, axis), BONE_WINDOW), size)[..., None]
    for v, mask in enumerate(probability.take(int(cell), axis + 1)):
        y, x = np.nonzero(cv2.resize(mask, size) > 0.5)
        view[y, x] = view[y, x] * 0.55 + np.multiply(COLOURS[v], 0.45)
        if len(x):
            text(image, names[v], left + x.max() + 6, top + y.mean(), (0, 0.5), 255)
    if truth is not None:
        labels = cv2.resize(truth.take(index, axis), size, interpolation=cv2.INTER_NEAREST)
        view[cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((2, 2))) > 0] = 255
    for word, x, y in zip(SIDES[rows] + SIDES[columns], (0.5, 0.5, 0, 1), (0, 1, 0.5, 0.5)):
        text(image, word, 6 + x * (PANEL - 12), 6 + y * (PANEL - 12), (x, y), 255, 0.6)
    cm = next(n for n in (5, 2, 1) if n == 1 or 10 * n * scale < PANEL / 3)
    cv2.line(image, (12, PANEL - 10), (12 + round(10 * cm * scale), PANEL - 10), (255,) * 3, 2)
    text(image, f"{cm} cm", 12, PANEL - 16, (0, 1), 255)
    text(image, title, 6, 6, grey=255)
    return cv2.rectangle(image, (0, 0), (PANEL - 1, PANEL - 1), (90,) * 3)


def overview(path, volume, probability, answers, truth=None, dice=None):
    """PNG: middle planes, the three most suspicious vertebrae, the eight answers.

    `probability` (7, D, D, D), `answers` (8,). With a mask: read_mask's labels, outlined white, and
    Dice (7,).
    """
    cells = [np.argwhere(mask > 0.5) for mask in probability]
    found = [v for v in np.argsort(-answers[:7]) if len(cells[v])][:3]
    z, y, x = np.concatenate(cells).mean(0) if found else [probability.shape[-1] / 2] * 3
    planes = [(2, x, "sagittal"), (1, y, "coronal")]
    planes += [(0, cells[v][:, 0].mean(), f"axial, {VERTEBRAE[v]}") for v in sorted(found)]
    planes += [(0, min(z * share, probability.shape[-1] - 1), "axial")
               for share in (1, 0.5, 1.5)[len(found):]]
    names = VERTEBRAE if dice is None else [f"{n} Dice {d:.2f}" for n, d in zip(VERTEBRAE, dice)]
    panels = [panel(volume, probability, *plane, names, truth) for plane in planes]
    bars = dict(zip((*VERTEBRAE, "all"), np.round(answers, 2)))
    panels.insert(2, chart("Probability of a fracture", bars, (f"study {volume.uid}"[-54:], ""),
                           1, COLOURS))
    write_png(path, np.vstack([np.hstack(panels[:3]), np.hstack(panels[3:])]))


def heat_map(model, crops, device):
    """(15, S, S) in 0..1: gradient of a vertebra's logit at the centre slices of its steps."""
    crops = torch.tensor(crops / np.float32(255), device=device, requires_grad=True)
    with torch.backends.cudnn.flags(enabled=False):  # its LSTM has no gradient in eval mode
        logits = model(F.interpolate(crops, (model.settings["size"],) * 2, mode="bilinear")[None])
        logits = logits if torch.is_tensor(logits) else logits[0]
        logits.topk(Answers().top_k).values.mean().backward(inputs=[crops])
    heat = crops.grad[:, SLICES_PER_STEP // 2].abs().cpu().numpy()
    heat = np.array([cv2.GaussianBlur(step, (0, 0), len(step) / 30) for step in heat])
    return heat / heat.max((1, 2), keepdims=True).clip(1e-12)


def strip(title, crops, steps, heat):
    """A vertebra's (15, 6, S, S), a row and its probability a step; the strongest with its heat."""
    best, rows = int(steps.argmax()), []
    for t, step in enumerate(crops):
        row = [cv2.resize(k, (TILE, TILE), interpolation=cv2.INTER_AREA) for k in step]
        row = np.pad(np.hstack(row), ((0, 21), (0, 12)), constant_values=255)
        text(row, f"step {t + 1}: {steps[t]:.2f}" + ", strongest" * (t == best), 4, TILE + 4)
        rows.append(row)
    left, y = cv2.cvtColor(np.vstack(rows), cv2.COLOR_GRAY2BGR), best * len(row)
    cv2.rectangle(left, (2, y + 2), (CHANNELS * TILE - 2, y + TILE - 2), COLOURS[5], 3)
    centre, hot = (cv2.resize(image, (PANEL, PANEL)) for image in
                   (crops[best, SLICES_PER_STEP // 2], np.uint8(heat[best] * 255)))
    centre = cv2.cvtColor(centre, cv2.COLOR_GRAY2BGR)
    hot = cv2.addWeighted(centre, 0.6, cv2.applyColorMap(hot, cv2.COLORMAP_INFERNO), 0.6, 0)
    text(centre, f"{title}: centre slice of step {best + 1}", 6, 6, grey=255)
    text(hot, "what the answer hangs on: gradient", 6, 6, grey=255)
    bars = chart("Probability of each step, %", dict(enumerate(np.rint(100 * steps), 1)),
                 ("step, head to foot", ""), 100)
    right = np.vstack([centre, hot, bars])
    return np.hstack([left, right])


@study_errors("headers")
def describe_study(folder):
    """A row of studies.csv, from three headers if they agree on the order, else from all."""
    files = sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name))
    if len(files) < MIN_SLICES:
        raise StudyError(f"{len(files)} files of at least {MIN_SLICES}")
    for chosen in (files[:2] + files[-1:], files):
        heads = [pydicom.dcmread(path, stop_before_pixels=True) for path in chosen]
        at = -np.array([float(h.ImagePositionPatient[2]) for h in heads])  # grows to the feet
        head = heads[0]
        step, span = at[1] - at[0], at[-1] - at[0]
        if abs(step * (len(files) - 1) - span) < abs(step) / 2:
            break
    steps, spacing = np.diff(at), np.ptp(at) / (len(files) - 1)
    return dict(
        slices=len(files), spacing_mm=spacing, pixel_mm=float(head.PixelSpacing[0]),
        extent_mm=np.ptp(at) + spacing, width_mm=float(head.PixelSpacing[1]) * head.Columns,
        matrix=f"{head.Rows} x {head.Columns}",
        order="head first" if min(steps) > 0 else "foot first" if max(steps) < 0 else "mixed",
        transfer_syntax=head.file_meta.TransferSyntaxUID.keyword,
        bits=f"{head.BitsStored} {'signed' if head.PixelRepresentation else 'unsigned'}")


def tally(values):
    """{label: count}; many or broken numbers in ten classes, named by where they begin."""
    if pd.api.types.is_float_dtype(values) or values.nunique() > 10:
        counts, edges = np.histogram(values.dropna(), 10)
        return dict(zip([f"{edge:.4g}+" for edge in edges], counts))
    return values.value_counts().sort_index().to_dict()


def unusual(table):
    """Sentences: numbers far from the middle half (Tukey's fences), rare kinds, problems."""
    for name, values in table.set_index(STUDY).items():
        values = values.dropna()
        if values.dtype.kind in "if":
            low, high = values.quantile([0.25, 0.75])
            odd = (values - (low + high) / 2).abs() > 2 * (high - low)
            usual, values = f"{low:.3g} to {high:.3g}", values.round(3)
        else:
            counts = values.value_counts()
            odd, usual = values.map(counts) < 0.2 * len(values), counts.index[0]
        if odd.any():
            examples = "; ".join(f"{value} ({uid})" for uid, value in values[odd][:3].items())
            yield f"{name}: {odd.sum()} of {len(values)} studies differ from {usual}, as {examples}"


def show(o):
    """Draw a study and its answers: overview.png, C1.png to C7.png in --out."""
    out, places = Path(o.out), [Path(o.study)]
    places += [Path(o.data) / part / o.study for part in ("train_images", "test_images")]
    folder = next((place.resolve() for place in places if place.is_dir()), None)
    if folder is None:
        raise UserError(f"{o.study}: neither a folder nor a study in {o.data}/")
    ensemble, truth, dice = load_ensemble(o.weights, pick_device(o.device)), None, None
    models, volume = ensemble.models["vertebra"] + ensemble.models["patient"], read_volume(folder)
    probability = segment(ensemble.models["segmenter"], volume, ensemble.device)
    crops = vertebra_slices(volume, probability, mask_of=models[0].settings["mask_of"])
    outputs = classify(ensemble, crops, Effort(1, len(models)))
    answers = combine(outputs, Answers(), ensemble.calibration)
    steps = np.mean([steps for steps, _ in outputs], 0)
    for mask in (folder.parent.parent / "segmentations").glob(f"{folder.name}.nii*"):
        truth, edge = read_mask(mask, volume), probability.shape[-1]
        dice = dice_scores(probability, read_mask(mask, volume, (edge,) * 3))
        truth = truth * (truth < 8)
    overview(out / "overview.png", volume, probability, answers, truth, dice)
    cell_mm = np.multiply(volume.hu.shape, volume.spacing) / probability.shape[1:]
    for v, name in enumerate(VERTEBRAE):
        image, line = chart(f"{name}: not seen", {}, ("", "")), f"{name}: not seen"
        if crops[v].any():
            z, y, x = (np.ptp(vertebra_box(probability[v]), 1) + 1) * cell_mm
            line = f"{name}: seen, {z:.0f} mm high, {y:.0f} deep, {x:.0f} wide"
            image = strip(name, crops[v], steps[v], heat_map(models[0], crops[v], ensemble.device))
        write_png(out / f"{name}.png", image)
        line += f"; probability {answers[v]:.3f}"
        print(line if dice is None else f"{line}; Dice {dice[v]:.3f}")


def eda(o):
    """Describe --data from headers: studies.csv and charts in --out, what is unusual in words."""
    data, out, rows = data_folder(o, "train.csv"), Path(o.out), []
    folders = sorted(path for path in data.glob("*_images/*") if path.is_dir())
    masks = {path.name.split(".nii")[0] for path in data.glob("segmentations/*.nii*")}
    work = prefetch(describe_study, folders, o.workers, 2 * o.workers)
    for folder, future in progress(work, "study", len(folders)):
        try:
            row = future.result()
        except StudyError as error:
            row = {"problems": str(error)}
        rows.append({STUDY: folder.name, "problems": "none", **row, "mask": folder.name in masks})
    labels, table = read_csv(data / "train.csv", (STUDY, *TARGETS)), pd.DataFrame(rows)
    if "order" not in table:
        raise UserError(f"no readable study in {data}/")
    write_csv(out / "studies.csv", table.merge(labels, "left", STUDY))
    broken = labels[list(VERTEBRAE)]
    both = broken.T @ broken
    pairs = {f"{a}+{b}": both.loc[a, b] for a, b in combinations(VERTEBRAE, 2)}
    charts = {"fractured vertebra": broken.sum().to_dict(), "fractured together": pairs,
              "fractured vertebrae per patient": tally(broken.sum(axis=1))}
    for name in ("slices", "spacing_mm", "extent_mm", "transfer_syntax", "order"):
        charts[name.replace("_", " ")] = tally(table[name])
    path = data / "train_bounding_boxes.csv"
    if path.exists():
        boxes = read_csv(path, (STUDY, "slice_number")).merge(table, on=STUDY)
        share = 100 * boxes.slice_number / boxes.slices
        share = share.where(boxes.order == "head first", 100 - share)[boxes.order != "mixed"]
        charts["boxes, % from head to foot"] = tally(share)
    for name, counts in charts.items():
        file = re.sub(r"\W+", "_", name)
        image = chart(f"{name}, {len(table)} studies".capitalize(), counts, (name, "count"))
        write_png(out / f"{file}.png", image)
    print(f"{len(table)} studies, {len(charts)} charts in {out}/. Unusual:")
    print(*unusual(table), sep="\n")


MODES = {
    "eda": (eda, "data workers", dict(out=("eda", "folder to write"))),
    "show": (show, "data weights device", dict(
        study=(None, "folder, or uid in --data"), out=("pictures", "folder to write"))),
}
