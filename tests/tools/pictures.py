"""Pictures of studies and data sets: what `cspine.py show` and `cspine.py eda` draw.

In: studies, answers, tables. Out: PNGs. The trap: OpenCV's points are (x, y), its colours
BGR.
"""

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
    BONE_WINDOW,
    CHANNELS,
    LABEL_THRESHOLD,
    LEAST_SLICES,
    SLICES_PER_STEP,
    STUDY,
    VERTEBRAE,
    Answers,
    StudyError,
    UserError,
    apply_window,
    classify,
    combine,
    crops_wanted,
    data_folder,
    dice_scores,
    errors_as,
    load_ensemble,
    mask_files,
    not_in_hu,
    pick_device,
    prefetch,
    progress,
    read_calibration,
    read_csv,
    read_mask,
    read_truth,
    read_volume,
    say,
    say_of,
    segment,
    strongest_steps,
    studies_in,
    vertebra_box,
    vertebra_slices,
    write_atomic,
    write_csv,
)

PANEL = 465  # pixels, edge of a picture; three are as high as 15 steps
TILE = 72  # pixels, edge of a crop
MARGIN = 24  # pixels around what a picture shows
LETTERS = 16  # pixels from a line of words to the next
GREYS = 252  # a mask of bits: 64 greys make small files
COLOURS = (  # of C1 to C7 and the patient: Okabe and Ito's, for the colour-blind
    (0, 159, 230),
    (233, 180, 86),
    (115, 158, 0),
    (66, 228, 240),
    (178, 114, 0),
    (0, 94, 213),
    (167, 121, 204),
    (140, 140, 140),
)
BLUE, ORANGE = COLOURS[4], COLOURS[5]
SIDES = ("HF", "AP", "RL")  # the two ends of Z, Y and X


# ---- Drawing ----

def write_png(path, image):
    """Write an image (Y, X) or (Y, X, 3)."""
    how = [cv2.IMWRITE_PNG_COMPRESSION, 9]
    content = cv2.imencode(".png", image & GREYS, how)[1].tobytes()
    write_atomic(path, lambda new: new.write_bytes(content))


def text(image, words, x, y, anchor=(0, 0), grey=40, size=0.5):
    """Words with a shadow; the share `anchor` of their width and height lies at (x, y)."""
    width, height = cv2.getTextSize(words, 0, size, 1)[0]
    left = max(2, x - anchor[0] * width)
    x = int(min(left, image.shape[1] - width - 2))
    y = int(y + (1 - anchor[1]) * height)
    for shift, tone in ((1, 255 - grey), (0, grey)):
        at = (x + shift, y + shift)
        cv2.putText(image, words, at, 0, size, (tone,) * 3, 1, cv2.LINE_AA)


def blank_chart(title, axes, width, base):
    """A white image with the words and axes of a chart, whose ground is row `base`."""
    image = np.full((PANEL, width, 3), 255, np.uint8)
    corners = [(12, 64), (12, base), (width - 12, base)]
    cv2.polylines(image, [np.int32(corners)], False, (40, 40, 40))
    for words, y in ((title, 12), (axes[1], 40), (axes[0], PANEL - 22)):
        text(image, words, 12, y)
    return image


def chart(title, values, axes, peak=0, colours=(BLUE,), letters=0):
    """Bars of {label: number}; wider than PANEL if the labels, or `letters`, ask for it."""
    letters = letters or max([len(str(label)) for label in values], default=1)
    slot = max((PANEL - MARGIN) / max(1, len(values)), 9 * letters + 8)
    base = PANEL - 56
    scale = (base - 84) / (peak or max([*values.values(), 1e-9]))
    image = blank_chart(title, axes, int(MARGIN + slot * max(1, len(values))), base)
    for k, (label, value) in enumerate(values.items()):
        x = 12 + slot * (k + 0.5)
        y = base - value * scale
        left, right = int(x - 0.4 * slot), int(x + 0.4 * slot)
        colour = colours[k % len(colours)]
        cv2.rectangle(image, (left, round(y)), (right, base - 1), colour, -1)
        text(image, f"{value:.4g}", x, y - 5, (0.5, 1), size=0.45)
        text(image, str(label), x, base + 8, (0.5, 0), size=0.45)
    return image


def line_chart(title, values, axes):
    """A line of {number: number}, PANEL wide."""
    slot = (PANEL - MARGIN) / max(1, len(values))
    base = PANEL - 56
    top = max([*values.values(), 1e-9])
    scale = (base - 84) / top
    image = blank_chart(title, axes, PANEL, base)
    for share in (0.5, 1.0):
        y = round(base - share * top * scale)
        cv2.line(image, (12, y), (PANEL - 12, y), (225,) * 3)
        text(image, f"{share * top:.3g}", 16, y + 3, grey=120, size=0.4)
    across = 12 + slot * (np.arange(len(values)) + 0.5)
    points = [(x, base - value * scale) for x, value in zip(across, values.values())]
    every = max(1, len(values) // 3)
    for k, ((x, y), label) in enumerate(zip(points, values)):
        if (len(values) - 1 - k) % every == 0:  # the last one always
            text(image, f"{values[label]:.4g}", x, y - 5, (0, 1), size=0.45)
            text(image, f"{label:g}", x, base + 8, (0.5, 0), size=0.45)
    cv2.polylines(image, [np.int32(points)], False, BLUE, 2, cv2.LINE_AA)
    return image


def draw_curves(path, history):
    """PNG of loss, score and learning rate; `history`: a dict of numbers an epoch."""
    table = pd.DataFrame(history).fillna(0).set_index("epoch")
    titles = {
        "train_loss": "Training loss",
        "score": "Held-out score, lower is better",
        "lr": "Learning rate",
    }
    charts = []
    for name, title in titles.items():
        charts.append(line_chart(title, table[name].to_dict(), ("epoch", "")))
    write_png(path, np.hstack(charts))


# ---- A study ----

def scale_bar(image, scale):
    """A bar of 1, 2 or 5 cm at the lower left; `scale`: pixels a mm."""
    fitting = [cm for cm in (5, 2, 1) if cm == 1 or 10 * cm * scale < PANEL / 3]
    cm = fitting[0]
    y = PANEL - 10
    cv2.line(image, (12, y), (12 + round(10 * cm * scale), y), (255,) * 3, 2)
    text(image, f"{cm} cm", 12, PANEL - 16, (0, 1), 255)


def name_sides(image, rows, columns):
    """The letters of the patient's sides on the four edges."""
    places = ((0.5, 0), (0.5, 1), (0, 0.5), (1, 0.5))
    for word, (x, y) in zip(SIDES[rows] + SIDES[columns], places):
        inner = PANEL - 12
        text(image, word, 6 + x * inner, 6 + y * inner, (x, y), 255, 0.6)


def spread(heights, room=LETTERS):
    """Heights of labels, moved apart until no two are closer than `room`, in the picture."""
    order = np.argsort(heights, kind="stable")
    places = np.array(heights, float)
    for above, below in zip(order, order[1:]):
        places[below] = max(places[below], places[above] + room)
    lowest = PANEL - MARGIN
    for k in order[::-1]:
        places[k] = min(places[k], lowest)
        lowest = places[k] - room
    return places


def panel(volume, probability, axis, cell, title, names, truth, mark=None):
    """(PANEL, PANEL, 3): a plane of the cube, mm to one scale, vertebrae coloured and
    named; a slice to mark, (number from 0, words), is a line across.
    """
    rows, columns = (k for k in range(3) if k != axis)
    size_mm = np.multiply(volume.hu.shape, volume.spacing)[[columns, rows]]
    scale = (PANEL - 2 * MARGIN) / size_mm.max()
    size = np.rint(size_mm * scale).astype(int).tolist()
    width, height = size
    left, top = (PANEL - width) // 2, (PANEL - height) // 2
    share = (int(cell) + 0.5) / probability.shape[-1]
    index = int(share * volume.hu.shape[axis])

    image = np.zeros((PANEL, PANEL, 3), np.uint8)
    view = image[top : top + height, left : left + width]
    plane = apply_window(volume.hu.take(index, axis), BONE_WINDOW)
    view[:] = cv2.resize(plane, size)[..., None]
    labels = []  # name, x, y
    for v, mask in enumerate(probability.take(int(cell), axis + 1)):
        y, x = np.nonzero(cv2.resize(mask, size) > 0.5)
        view[y, x] = view[y, x] * 0.55 + np.multiply(COLOURS[v], 0.45)
        if len(x):
            labels.append((names[v], left + x.max() + 6, top + y.mean()))
    for (name, x, _), y in zip(labels, spread([y for *_, y in labels])):
        text(image, name, x, y, (0, 0.5), 255)
    if mark:
        y = int(top + (mark[0] + 0.5) / volume.hu.shape[rows] * height)
        cv2.line(image, (left, y), (left + width - 1, y), ORANGE)
        text(image, mark[1], left + 4, y - 3, (0, 1), 255, 0.4)
    if truth is not None:
        right = truth.take(index, axis)
        right = cv2.resize(right, size, interpolation=cv2.INTER_NEAREST)
        edge = cv2.morphologyEx(right, cv2.MORPH_GRADIENT, np.ones((2, 2)))
        view[edge > 0] = 255
    name_sides(image, rows, columns)
    scale_bar(image, scale)
    text(image, title, 6, 6, grey=255)
    return cv2.rectangle(image, (0, 0), (PANEL - 1, PANEL - 1), (90,) * 3)


def chosen_planes(probability, answers):
    """(axis, cell, title) of the middle planes, and of the three most suspicious
    vertebrae."""
    cells = [np.argwhere(mask > LABEL_THRESHOLD) for mask in probability]
    edge = probability.shape[-1]
    found = [v for v in np.argsort(-answers[:7]) if len(cells[v])][:3]
    z, y, x = [edge / 2] * 3
    if found:
        z, y, x = np.concatenate(cells).mean(0)
    planes = [(2, x, "sagittal"), (1, y, "coronal")]
    for v in sorted(found):
        planes.append((0, cells[v][:, 0].mean(), f"axial, {VERTEBRAE[v]}"))
    for share in (1, 0.5, 1.5)[len(found) :]:
        planes.append((0, min(z * share, edge - 1), "axial"))
    return planes


def overview(path, volume, probability, answers, truth=None, dice=None, places=None):
    """PNG: middle planes, the three most suspicious vertebrae, the eight answers.

    `probability` (7, D, D, D), `answers` (8,). With a mask: read_mask's labels, outlined
    white, and Dice (7,). With strongest_steps' places, the sagittal view marks the slice of
    the most suspicious vertebra.
    """
    names = VERTEBRAE
    if dice is not None:
        names = [f"{name} Dice {value:.2f}" for name, value in zip(VERTEBRAE, dice)]
    mark = None
    if places:
        worst = max(places, key=dict(zip(VERTEBRAE, answers)).get)
        number = places[worst]["slice"]
        mark = number - 1, f"{worst}: slice {number}"
    panels = []
    for plane in chosen_planes(probability, answers):
        marked = mark if plane[0] == 2 else None
        panels.append(panel(volume, probability, *plane, names, truth, marked))
    bars = dict(zip((*VERTEBRAE, "patient"), np.round(answers, 2)))
    study = (f"study {volume.uid}"[-54:], "")
    title = "Probability of a fracture; research, no diagnosis"
    panels.insert(2, chart(title, bars, study, 1, COLOURS, 3))
    write_png(path, np.vstack([np.hstack(panels[:3]), np.hstack(panels[3:])]))


def heat_map(model, crops, device):
    """(15, S, S) in 0..1: gradient of a vertebra's logit at the centre slices of its
    steps."""
    size = model.settings["size"]
    crops = torch.tensor(crops / np.float32(255), device=device, requires_grad=True)
    with torch.backends.cudnn.flags(enabled=False):  # its LSTM has no gradient in eval mode
        logits = model(F.interpolate(crops, (size, size), mode="bilinear")[None])
        logits = logits if torch.is_tensor(logits) else logits[0]
        answer = logits.topk(Answers().top_k).values.mean()
        answer.backward(inputs=[crops])
    heat = crops.grad[:, SLICES_PER_STEP // 2].abs().cpu().numpy()
    heat = np.array([cv2.GaussianBlur(step, (0, 0), len(step) / 30) for step in heat])
    return heat / heat.max((1, 2), keepdims=True).clip(1e-12)


def step_rows(crops, steps):
    """The six images of every step, one below the other; the strongest is framed."""
    best = int(steps.argmax())
    rows = []
    for t, step in enumerate(crops):
        tiles = [cv2.resize(k, (TILE, TILE), interpolation=cv2.INTER_AREA) for k in step]
        row = np.pad(np.hstack(tiles), ((0, 21), (0, 12)), constant_values=255)
        strongest = ", strongest" * (t == best)
        text(row, f"step {t + 1}: {steps[t]:.2f}{strongest}", 4, TILE + 4)
        rows.append(row)
    image = cv2.cvtColor(np.vstack(rows), cv2.COLOR_GRAY2BGR)
    y = best * len(rows[0])
    corner = (CHANNELS * TILE - 2, y + TILE - 2)
    return cv2.rectangle(image, (2, y + 2), corner, ORANGE, 3)


def strip(title, crops, steps, heat):
    """A vertebra's (15, 6, S, S), a row and its probability a step; the strongest with its
    heat."""
    best = int(steps.argmax())
    centre = cv2.resize(crops[best, SLICES_PER_STEP // 2], (PANEL, PANEL))
    centre = cv2.cvtColor(centre, cv2.COLOR_GRAY2BGR)
    hot = cv2.resize(np.uint8(heat[best] * 255), (PANEL, PANEL))
    hot = cv2.applyColorMap(hot, cv2.COLORMAP_INFERNO)
    hot = cv2.addWeighted(centre, 0.6, hot, 0.6, 0)
    text(centre, f"{title}: centre slice of step {best + 1}", 6, 6, grey=255)
    text(hot, "what the answer hangs on: gradient", 6, 6, grey=255)
    percent = dict(enumerate(np.rint(100 * steps), 1))
    axes = ("step, head to foot", "")
    bars = chart("Probability of each step, %", percent, axes, 100)
    return np.hstack([step_rows(crops, steps), np.vstack([centre, hot, bars])])


def study_folder(options):
    """The path that a study's name stands for; UserError if there is none, or several."""
    data = Path(options.data)
    places = [Path(options.study)]
    places += [data / part / options.study for part in ("train_images", "test_images")]
    for place in places:
        if place.exists():
            studies = studies_in(place)
            if len(studies) > 1:
                raise UserError(f"{place}: {len(studies)} studies; name one")
            return studies[0].resolve()
    raise UserError(f"{options.study}: neither a CT nor a study in {options.data}/")


def true_mask(folder, volume, probability):
    """Labels of C1 to C7 and Dice of a study with a mask, else (None, None)."""
    path = mask_files(folder.parent.parent).get(folder.name)
    if path is None:
        return None, None
    truth = read_mask(path, volume)
    coarse = read_mask(path, volume, probability.shape[1:])
    return truth * (truth < 8), dice_scores(probability, coarse)


def extent_in_words(probability, cell_mm):
    """How large a mask (D, D, D) is."""
    cells = np.ptp(vertebra_box(probability), 1) + 1
    z, y, x = cells * cell_mm
    return f"seen, {z:.0f} mm high, {y:.0f} deep, {x:.0f} wide"


def show(options):
    """Draw one study as the models see it.

    Reads a study, its mask if there is one beside it, and the models of --weights; writes
    overview.png and C1.png to C7.png to --out. Example: cspine.py show test_images/1.2.826
    """
    out, folder = Path(options.out), study_folder(options)
    calibration = read_calibration(options.weights)
    ensemble = load_ensemble(options.weights, pick_device(options.device), calibration)
    models = ensemble.models["vertebra"] + ensemble.models["patient"]
    models[0].to(ensemble.device)  # moved by classify, it would have no gradients
    volume = read_volume(folder)
    say_more = say_of(volume)
    if why := not_in_hu(volume.hu):
        say_more(why)
    probability = segment(ensemble.models["segmenter"], volume, ensemble.device, say_more)
    wanted = crops_wanted(ensemble)
    crops = vertebra_slices(volume, probability, **wanted)
    outputs = classify(ensemble, crops)
    answers = combine(outputs, ensemble.calibration)
    truth, dice = true_mask(folder, volume, probability)
    places = strongest_steps(volume, probability, outputs, wanted["z_margin"])
    overview(out / "overview.png", volume, probability, answers, truth, dice, places)

    steps = np.mean([one.steps for one in outputs], 0)
    cell_mm = np.multiply(volume.hu.shape, volume.spacing) / probability.shape[1:]
    for v, name in enumerate(VERTEBRAE):
        image, words = chart(f"{name}: not seen", {}, ("", "")), "not seen"
        if crops[v].any():
            words = extent_in_words(probability[v], cell_mm)
            words += f", strongest in slice {places[name]['slice']}"
            heat = heat_map(models[0], crops[v], ensemble.device)
            image = strip(name, crops[v], steps[v], heat)
        write_png(out / f"{name}.png", image)
        line = f"{name}: {words}; probability {answers[v]:.3f}"
        known = dice is not None and not np.isnan(dice[v])  # NaN: not in the mask
        print(f"{line}; Dice {dice[v]:.3f}" if known else line)


# ---- A data set ----

def read_headers(files):
    """Headers of a study and where its slices lie (mm, growing to the feet).

    Three headers are enough if they agree on the order, else all are read.
    """
    for chosen in (files[:2] + files[-1:], files):
        heads = [pydicom.dcmread(path, stop_before_pixels=True) for path in chosen]
        at = -np.array([float(head.ImagePositionPatient[2]) for head in heads])
        step = at[1] - at[0]
        span = at[-1] - at[0]
        if abs(step * (len(files) - 1) - span) < abs(step) / 2:
            break
    return heads[0], at


def describe_study(folder):
    """A row of studies.csv, from headers alone; StudyError if they cannot be read."""
    with errors_as(StudyError, "headers"):
        files = sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name))
        if len(files) < LEAST_SLICES:
            raise StudyError(f"{len(files)} files of at least {LEAST_SLICES}")
        head, at = read_headers(files)
        steps = np.diff(at)
        down, up = min(steps) > 0, max(steps) < 0
        spacing = np.ptp(at) / (len(files) - 1)
        signed = "signed" if head.PixelRepresentation else "unsigned"
        return dict(
            slices=len(files),
            spacing_mm=spacing,
            pixel_mm=float(head.PixelSpacing[0]),
            extent_mm=np.ptp(at) + spacing,
            width_mm=float(head.PixelSpacing[1]) * head.Columns,
            matrix=f"{head.Rows} x {head.Columns}",
            order="head first" if down else "foot first" if up else "mixed",
            transfer_syntax=head.file_meta.TransferSyntaxUID.keyword,
            bits=f"{head.BitsStored} {signed}",
        )


def tally(values):
    """{label: count}; many or broken numbers in ten classes, named by where they begin."""
    if pd.api.types.is_float_dtype(values) or values.nunique() > 10:
        counts, edges = np.histogram(values.dropna(), 10)
        return dict(zip([f"{edge:.4g}+" for edge in edges], counts))
    return values.value_counts().sort_index().to_dict()


def unusual(table):
    """Sentences: numbers far from the middle half (Tukey's fences), rare kinds,
    problems."""
    for name, values in table.set_index(STUDY).items():
        values = values.dropna()
        if values.dtype.kind in "if":
            low, high = values.quantile([0.25, 0.75])
            odd = (values - (low + high) / 2).abs() > 2 * (high - low)
            usual = f"{low:.3g} to {high:.3g}"
            values = values.round(3)
        else:
            counts = values.value_counts()
            odd = values.map(counts) < 0.2 * len(values)
            usual = counts.index[0]
        if odd.any():
            examples = values[odd][:3].items()
            named = "; ".join(f"{value} ({uid})" for uid, value in examples)
            how_many = f"{odd.sum()} of {len(values)} studies differ from {usual}"
            yield f"{name}: {how_many}, as {named}"


def study_table(data, workers):
    """A row of describe_study, or its problem, of every study of a data set."""
    folders = sorted(path for path in data.glob("*_images/*") if path.is_dir())
    masks = mask_files(data)
    rows = []
    work = prefetch(describe_study, folders, workers, 2 * workers)
    for folder, future in progress(work, "study", len(folders)):
        try:
            row = future.result()
        except StudyError as error:
            row = {"problems": str(error)}
        known = {STUDY: folder.name, "problems": "none"}
        rows.append(known | row | {"mask": folder.name in masks})
    table = pd.DataFrame(rows)
    if "order" not in table:
        raise UserError(f"no readable study in {data}/")
    return table


def label_counts(labels):
    """{title: {label: count}} of what is fractured, alone, together and per patient."""
    broken = labels[[*VERTEBRAE]].fillna(0).astype(int)  # nothing: unknown
    both = broken.T @ broken
    pairs = {f"{a}+{b}": both.loc[a, b] for a, b in combinations(VERTEBRAE, 2)}
    return {
        "fractured vertebra": broken.sum().to_dict(),
        "fractured together": pairs,
        "fractured vertebrae per patient": tally(broken.sum(axis=1)),
    }


def box_places(path, table):
    """Where the boxes of fractures lie, % from head to foot, of studies in a known
    order."""
    boxes = read_csv(path, (STUDY, "slice_number")).merge(table, on=STUDY)
    share = 100 * boxes.slice_number / boxes.slices
    share = share.where(boxes.order == "head first", 100 - share)
    return share[boxes.order != "mixed"]


def draw_logs(weights, out):
    """Draw the curves of the trainings whose logs lie in a folder; how many. A damaged log
    is said, one that is not by epochs left out."""
    drawn = 0
    for log in sorted(weights.glob("*_fold*_log.csv")):
        path = out / log.name.replace("_log.csv", "_curves.png")
        try:
            with errors_as(UserError, f"{log}: not drawn"):
                history = pd.read_csv(log)
                if history.empty:
                    raise ValueError("no epoch in it")
                if "epoch" in history:
                    draw_curves(path, history.to_dict("records"))
                    drawn += 1
        except UserError as error:
            say(f"{error}")
    return drawn


def eda(options):
    """Draw and tell what is in a data set.

    Reads the headers and csv files of --data and the logs in --weights; writes studies.csv,
    charts and the logs' curves to --out, and says what is unusual. Example: cspine.py eda
    """
    data, out = data_folder(options, "train.csv"), Path(options.out)
    table = study_table(data, options.workers)
    labels = read_truth(data / "train.csv")
    write_csv(out / "studies.csv", table.merge(labels, "left", STUDY))
    charts = label_counts(labels)
    for name in ("slices", "spacing_mm", "extent_mm", "transfer_syntax", "order"):
        charts[name.replace("_", " ")] = tally(table[name])
    path = data / "train_bounding_boxes.csv"
    if path.exists():
        charts["boxes, % from head to foot"] = tally(box_places(path, table))

    for name, counts in charts.items():
        file = re.sub(r"\W+", "_", name)
        title = f"{name}, {len(table)} studies".capitalize()
        write_png(out / f"{file}.png", chart(title, counts, (name, "count")))
    trainings = draw_logs(Path(options.weights), out)
    drawn = f"{len(charts)} charts and the curves of {trainings} trainings"
    print(f"{len(table)} studies, {drawn} in {out}/. Unusual:")
    print(*unusual(table), sep="\n")
