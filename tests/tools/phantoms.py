"""Synthetic neck CTs in the layout of the competition: what `cspine.py phantom` writes.

Every organ is made of blobs and rods in a local frame: x left, y back, z up, mm. They stand
in phantoms.csv, in painting order: material, frame (head, neck, chest, lying; of a vertebra
the levels that it is for), on how many sides, radii, and the points that the rods join. In
the frame "neck" z counts levels down from C1. Body and skull are painted as shells in
shells. phantoms_measures.csv holds an adult's sizes by eye, in mm: of a body height, half
width, half depth and the disc below it; pillars from the midline; half the span of the
transverse processes; the spinous process behind the canal, and its tip's drop below the
body. phantoms_tissues.csv holds the range of each tissue's HU ("grain": of spongy bone),
phantoms_storage.csv the forms that pixels have in the competition's files, and odder ones.
"""

import functools
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pydicom
from writers import STUDY, VERTEBRAE, Phantom, Storage, dicom_header, label_row
from writers import lowest_value, stored_values, write_mask, write_slices, write_tables

HERE = Path(__file__).parent
UID_ROOT = "1.2.826.0.1.3680043.9999."
LEVELS = 13  # C1 to T6
FIRST_TEST = 50_000  # index of the first test study

# Levels of the sizes in phantoms_measures.csv; those between are interpolated.
ANCHORS = (2, 4, 6, 7, 12)
FRACTURED_PATIENTS = 0.476  # share of the training patients (facts)
# Of C1 to C7 of such a patient: with the share above they give the facts' prevalences.
FRACTURE_RATES = 0.091, 0.178, 0.046, 0.067, 0.101, 0.173, 0.245
GAP_MM = (0.5, 2.0)  # width of a fracture
GAP_MM2 = 60  # least area of a vertebra's fractures
IN_VIEW_MM = 13  # of a vertebra's centre from the scan's end, else its label is 0
JOINT_MM = 0.8  # between bones
SOFT_MM = 1.6  # voxel of the grid on which soft tissue is painted
FAR_MM = 9  # distances are not computed beyond
SLICE_MM = 1.3  # a thicker slice is the mean of finer ones

Part = namedtuple("Part", "material ends radii")  # two ends (equal: a blob); mm

# ---- Parts ----

@functools.cache
def read_rows(name):
    """Rows of phantoms_<name>.csv: a name, then numbers."""
    return pd.read_csv(HERE / f"phantoms_{name}.csv").to_numpy().tolist()

@functools.cache
def read_table(name):
    """Rows (material, frame, sides, radii, points) of a table in phantoms.csv."""
    table = pd.read_csv(HERE / "phantoms.csv", dtype={"radii_mm": str})
    rows = []
    for row in table[table.table == name].itertuples():
        radii = np.array(row.radii_mm.split(), float)
        points = [point.split() for point in row.points.split(";")]
        rows.append(
            (row.material, row.frame, row.sides, radii, np.array(points, float))
        )
    return rows

def draw_parts(rng, name, line=None):
    """(frame, Part) of each rod of a table, varied; `line`: the places of the levels."""
    for material, frame, sides, radii, points in read_table(name):
        radii = radii * rng.normal(1, 0.07) * np.ones(3)
        if frame == "neck":
            levels = np.r_[-3, 0:LEVELS]
            middle = [np.interp(points[:, 2], levels, axis) for axis in line.T]
            points = points * (1, 1, 0) + np.transpose(middle)
        for side in (1, -1)[:sides]:
            chain = points * (side, 1, 1) + rng.normal(0, 0.5, 3)
            following = chain[1:] if len(chain) > 1 else chain
            for ends in zip(chain, following):
                yield frame, Part(material, np.array(ends), radii.copy())

def region(local, shape, parts, margin):
    """Slices of the voxels near the parts, and local from those voxels (4x4)."""
    low = np.min([part.ends.min(0) - part.radii for part in parts], 0)
    high = np.max([part.ends.max(0) + part.radii for part in parts], 0)
    limits = zip(low - margin, high + margin)
    grid = np.reshape(np.meshgrid(*limits), (3, 8))
    corners = np.vstack([grid, np.ones(8)])
    voxel = (np.linalg.inv(local) @ corners)[:3]
    first = np.floor(voxel.min(1))
    last = np.ceil(voxel.max(1)) + 1
    start = np.clip(first, 0, shape).astype(int)
    stop = np.clip(last, start, shape).astype(int)
    origin = local @ [*start, 1]
    return tuple(map(slice, start, stop)), np.c_[local[:, :3], origin]

def part_distance(part, at):
    """Distance (mm, about) of points to a part: its radii stretch the space."""
    least = min(part.radii)
    scale = np.float32(least / part.radii)
    axis = np.float32(part.ends[1] - part.ends[0]) * scale
    offset = [
        (a - np.float32(e)) * s for a, e, s in zip(at, part.ends[0], scale)
    ]
    projection = sum(o * a for o, a in zip(offset, axis))
    along = np.clip(projection / max(axis @ axis, 1e-6), 0, 1)
    x, y, z = ((o - along * a) ** 2 for o, a in zip(offset, axis))
    square = x + y + z
    if part.material == "flat":  # with flat ends
        square = np.sqrt(np.sqrt((x + y) ** 4 + z**4))
    return np.sqrt(square) - np.float32(least)

def distance(parts, at, local, blend_mm=1.5):
    """Distance (mm, negative inside) to the smooth union of parts less holes."""
    out = np.full(at[0].shape, FAR_MM, np.float32)
    for part in sorted(parts, key=lambda part: part.material == "hole"):
        box, _ = region(local, out.shape, [part], 4)
        new = part_distance(part, [a[box] for a in at])
        old = out[box]
        if part.material == "hole":
            out[box] = np.maximum(old, -new)
            continue
        overlap = np.maximum(blend_mm - np.abs(old - new), 0) ** 2
        out[box] = np.minimum(old, new) - overlap / (4 * blend_mm)
    return out

# ---- Noise ----

def upsample(coarse, shape):
    """Linear interpolation of a coarse grid over the same space, float32."""
    z = (np.arange(shape[0]) + 0.5) * len(coarse) / shape[0] - 0.5
    planes = []
    for at in np.clip(z, 0, len(coarse) - 1.001):
        below, share = divmod(at, 1)
        k = int(below)
        upper, lower = np.float32(1 - share), np.float32(share)
        plane = coarse[k] * upper + coarse[k + 1] * lower
        planes.append(cv2.resize(plane, shape[:0:-1]))
    return np.stack(planes)

def lumps(rng, shape, cell):
    """Smooth noise of about unit size whose lumps span `cell` voxels, float32."""
    nodes = [int(n / cell) + 3 for n in shape]
    return upsample(rng.standard_normal(nodes, np.float32), shape)

# ---- Painting ----

def voxel_coordinates(shape, local):
    """Local coordinates x, y, z (mm, float32) of the voxels of a box."""
    k, j, i = np.ogrid[tuple(map(slice, np.float32(shape)))]
    return [a * k + b * j + (c * i + d) for a, b, c, d in np.float32(local[:3])]

def paint(scene, rng, parts, frame, tissue, grow=0, label=0, broken=False):
    """Fill parts grown by mm; a labelled bone keeps off others. Boxes of its gaps."""
    local = np.linalg.inv(frame) @ scene.affine
    box, local = region(local, scene.hu.shape, parts, grow + 3)
    old, mm = scene.hu[box], scene.mm
    if min(old.shape) < 2:
        return []
    at = voxel_coordinates(old.shape, local)
    if label:
        at = [a + np.float32(0.4) * lumps(rng, old.shape, 9 / mm) for a in at]
    gap = break_bone(rng, scene, parts, at, local) if broken else None

    surface = distance(parts, at, local) - np.float32(grow)
    look = np.float32(scene.tissue[tissue])
    if label:
        surface = np.maximum(surface, JOINT_MM - scene.near[box])
        scene.label[box][surface < 0] = label
    if tissue == "bone":
        scene.near[box] = np.minimum(scene.near[box], surface)
        grain = scene.tissue["grain"] * lumps(rng, old.shape, 1.2 / mm)
        spongy = scene.tissue["spongy"] + grain
        deep = np.clip(-surface / max(0.7, mm) - 1, 0, 1)
        look = look + deep * (spongy - look)
    boxes = []
    if broken:
        gap *= surface < 0
        look += gap * (scene.tissue["blood"] - look)
        boxes = gap_boxes(gap > 0.3, [s.start for s in box])

    cover = np.clip(0.5 - surface / mm, 0, 1)
    if tissue in ("muscle", "gland", "vessel", "cartilage"):
        cover *= old > -400  # none outside the skin
    scene.hu[box] += cover * (look - old)
    return boxes

def gap_boxes(gap, corner):
    """(x, y, width, height, slice) around a gap in every slice that shows it."""
    boxes = []
    for k in np.flatnonzero(gap.sum((1, 2)) > 3):
        x, y, width, height = cv2.boundingRect(np.uint8(gap[k]))
        boxes.append(
            (x + corner[2], y + corner[1], width, height, k + corner[0])
        )
    return boxes

def break_bone(rng, scene, parts, at, local):
    """Share of gap in each voxel; the coordinates `at` of what is broken off jump."""
    mm = scene.mm
    bone = distance(parts, at, local) < 0
    gap = np.zeros(bone.shape, np.float32)
    area = 0
    rough = lumps(rng, bone.shape, 3 / mm) * np.float32(rng.uniform(0.1, 0.6))
    shift = np.float32(rng.normal(0, 1, 3) * rng.choice([0, 0.5, 1.5]))
    solid = [part for part in parts if part.material != "hole"]
    while area < GAP_MM2:
        chosen = rng.integers(len(solid)) * (rng.random() < 0.75)  # the first is the body
        centre, normal, reach = draw_plane(rng, solid[chosen])
        offset = [a - c for a, c in zip(at, centre)]
        plane = sum(o * n for o, n in zip(offset, normal)) + rough
        away = np.sqrt(sum(o * o for o in offset))
        weight = np.clip((reach - away) / 4, 0, 1)
        width = max(rng.uniform(*scene.gap_mm), 0.75 * mm)
        inside = (width / 2 - np.abs(plane)) / mm + 0.5
        cut = np.clip(inside, 0, min(1, width / mm)) * weight
        area += max(cut[bone].sum() * mm**3 / width, 5)
        gap = np.maximum(gap, cut)
        for a, s in zip(at, shift):
            a -= s * (plane > 0) * weight
    return gap

def draw_plane(rng, part):
    """Centre, normal and reach (mm) of a break of a part, mostly across a rod."""
    along = part.ends[1] - part.ends[0]
    normal = rng.normal(0, 1, 3)
    reach = 1.2 * max(part.radii)
    middle = part.ends[0] + along * rng.uniform(0.2, 0.8)
    centre = np.float32(middle + rng.normal(0, 1.5, 3))
    if along.any():
        normal = normal * 0.35 + along / np.linalg.norm(along)
        reach = 11
    return centre, np.float32(normal / np.linalg.norm(normal)), reach

# ---- The spine ----

def stretch(ends, size):
    """Points of C5 moved in place to where another level has them."""
    x, y, z = ends.T.copy()
    back = size.depth + 17
    side = np.interp(
        abs(x), (0, 10, 19, 28), (0, size.width, size.pillar, size.span)
    )
    ends[:, 0] = np.sign(x) * side
    behind = (-size.depth, size.depth, back, back + size.spine)
    ends[:, 1] = np.interp(y, (-8, 8, 25, 40), behind)
    ends[:, 2] = z * size.height / 13 - size.drop * np.clip((y - 25) / 15, 0, 1)

def vertebra(rng, level, size, broken):
    """Parts of a vertebra: wear, a nutrient canal, compression if broken."""
    own = (VERTEBRAE[level] if level < 2 else "cervical" if level < 7 else "thoracic")
    frames = {own} if level < 2 else {own, "any"}
    parts = [part for frame, part in draw_parts(rng, "spine") if frame in frames]
    if level > 1:
        for part in parts:
            stretch(part.ends, size)
        height = size.height / 2 * (rng.uniform(0.6, 1) if broken else 1)
        parts[0].radii[:] = size.width, size.depth, height
        low_or_high = (
            rng.normal(0, 4),
            -size.depth - 1,
            rng.choice([-0.5, 0.5]) * size.height,
        )
        spur = Part("bone", np.array([low_or_high] * 2), np.array((6, 3, 2)))
        parts += [spur] * (rng.random() < 0.3)

    canal = np.array([rng.normal(0, 1.5, 3), (0, 20, 0)])
    has_canal = level > 0 and rng.random() < 0.5
    hole = Part("hole", canal, np.full(3, rng.uniform(0.4, 0.9)))
    return parts + [hole] * has_canal

def rotation(degrees):
    """Rotation (4x4) of a rotation vector."""
    out = np.eye(4)
    out[:3, :3] = cv2.Rodrigues(np.radians(degrees))[0]
    return out

def draw_spine(rng, measures, variety):
    """Frames of C1 to T6 (LEVELS, 4, 4) on a curve around C4."""
    base, top = rng.normal((24, -2), (7 * variety, 9 * variety))
    lean = np.interp(
        range(LEVELS), (0, 1, 7, 12), (top - 4, top, base, base + 6)
    )
    turn = np.outer(
        np.linspace(1, 0, LEVELS), rng.normal(0, (4 * variety, 7 * variety))
    )
    angles = np.c_[lean, turn]
    frames = np.stack(
        [rotation(degrees + rng.normal(0, 1.5, 3)) for degrees in angles]
    )
    height = measures["height"]
    steps = (height[1:] + height[:-1]) / 2 + measures["disc"][:-1]
    up = (frames[1:, :3, 2] + frames[:-1, :3, 2]) / 2
    frames[1:, :3, 3] = -np.cumsum(up * steps[:, None], 0)
    frames[:, :3, 3] -= frames[3, :3, 3].copy()
    return frames

def paint_ribs(rng, scene, frames):
    """The ribs of T1 to T6."""
    for level in range(7, LEVELS):
        size = np.interp(level, (7, 9, 12), (0.62, 0.95, 1.15))
        for _, part in draw_parts(rng, "rib"):
            rib = Part("bone", part.ends * size, part.radii)
            paint(scene, rng, [rib], frames[level], "bone")

def paint_spine(rng, scene, frames, measures, fractured):
    """Ribs, then discs and vertebrae; boxes of the fractures."""
    paint_ribs(rng, scene, frames)
    boxes = []
    for level, frame in enumerate(frames):
        size = SimpleNamespace(**{name: values[level] for name, values in measures.items()})
        if level:
            middle = np.array([(0, 0, -(size.height + size.disc) / 2)] * 2)
            disc = Part(
                "flat", middle, np.array((size.width, size.depth, size.disc))
            )
            paint(scene, rng, [disc], frame, "disc")
        broken = level < 7 and fractured[level]
        parts = vertebra(rng, level, size, broken)
        boxes += paint(scene, rng, parts, frame, "bone", 0, level + 1, broken)
    return boxes

# ---- Soft tissue ----

def shells_of(rng, variety):
    """{material: its shells (tissue, mm grown)} of body and skull."""
    wrapped = rng.random() < 0.12 * variety  # in a mask, collar or blanket
    wrap = [("cloth", 9), ("air", 6)] * wrapped
    fascia = ("fascia", -rng.uniform(5, 14))
    return dict(
        body=[*wrap, ("skin", 0), ("fat", -2), fascia],
        skull=[
            ("table", 0),
            ("diploe", -2.2),
            ("table", -4.5),
            ("brain", -6.5),
        ],
    )

def paint_soft(rng, scene, shape, frames, line, variety):
    """HU without bones, float32: painted on a grid of SOFT_MM, then brought to `shape`."""
    voxel = np.linalg.norm(scene.affine[:3, :3], axis=0)
    coarse = np.ceil(shape * voxel / SOFT_MM).astype(int)
    affine = scene.affine @ np.diag([*(shape / coarse), 1])
    affine[:, 3] = scene.affine @ [*(shape / coarse / 2 - 0.5), 1]
    empty = np.full(coarse, -1000, np.float32)
    soft = SimpleNamespace(hu=empty, affine=affine, mm=SOFT_MM, tissue=scene.tissue)

    shells = shells_of(rng, variety)
    drawn = draw_parts(rng, "soft", line)
    for material, rows in groupby(drawn, lambda row: row[1].material):
        rows = list(rows)
        for tissue, grow in shells.get(material, [(material, 0)]):
            for frame, part in rows:
                paint(soft, rng, [part], frames[frame], tissue, grow)
    texture = lumps(rng, soft.hu.shape, 3) * rng.uniform(4, 14)
    soft.hu += texture * (soft.hu > -300)
    return upsample(soft.hu, shape)

# ---- The scan ----

def draw_ends(rng, level, variety):
    """Top and bottom (mm) of a scan; some lack C1 or C7, some hold the head."""
    cover = rng.random()
    top = level[0, 2] + rng.uniform(14, 55)
    bottom = level[7, 2] - rng.uniform(5, 60)
    if cover < 0.08:
        top = level[rng.integers(1, 3), 2] + rng.uniform(-5, 12)
    elif cover < 0.16:
        bottom = level[rng.integers(4, 7), 2] + rng.uniform(-10, 2)
    elif cover < 0.22 + 0.2 * (variety - 1):
        top += rng.uniform(40, 120)
    return top, bottom

def draw_grid(rng, level, matrix, variety):
    """Shape, spacing and LPS affine of a scan; level (LEVELS, 3): where C1 to T6 are."""
    wild = rng.random() < variety - 1
    usual = rng.random() < 0.7
    top, bottom = draw_ends(rng, level, variety)
    spacing_mm = rng.uniform(0.5, 3 if wild else 1.25)
    slices = int(np.clip((top - bottom) / spacing_mm, 60, 400))
    extent_mm = (140, 225) if usual else (90, 400) if wild else (120, 260)
    if not wild:  # pixels of 0.3 to 0.7 mm, but for matrices too small for a neck
        extent_mm = np.clip(extent_mm, 0.3 * matrix, max(0.7 * matrix, 170))
    pixel = rng.uniform(*extent_mm) / matrix
    spacing = ((top - bottom) / slices, pixel, pixel)
    other = int(matrix * min(1, rng.uniform(0.85, 1.4)))
    shape = (slices, *map(int, rng.permutation([matrix, other])))

    away = rng.normal(0, 0.04 * pixel * matrix, 3)
    middle = level[:7].mean(0) + away + (0, 8, 0)
    corner = middle[:2] - np.multiply(pixel / 2, shape[:0:-1])
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.multiply(spacing, (-1, 1, 1)))[::-1]
    affine[:3, 3] = (*corner, top)
    return shape, spacing, affine

def streaks_of(metal, k, rays, spacing, shape):
    """The star of streaks that metal (z, y, x) draws over slice k, or 0."""
    if metal is None or abs(k - metal[0]) * spacing[0] >= 6:
        return 0
    _, height, width = shape
    rows, columns = np.ogrid[:height, :width]
    y = rows - metal[1]
    x = columns - metal[2]
    angles = np.linspace(-np.pi, np.pi, len(rays))
    turned = np.roll(rays, 7 * k)
    star = np.interp(np.arctan2(y, x), angles, turned)
    near = np.exp(-np.hypot(y, x) / (0.2 * width))
    return np.float32(star * near)

def add_artefacts(rng, scene, spacing, shoulder, metal, variety):
    """Motion, blur, noise, streaks of shoulders and metal (z, y, x), slice by slice."""
    slices, rows, columns = scene.hu.shape
    sigma = np.exp(rng.uniform(np.log(5), np.log(60))) * rng.uniform(1, variety)
    blur = rng.uniform(0.2, 0.7) * rng.uniform(1, variety) / spacing[1]
    grain = rng.uniform(0.6, 1.1)
    streaks = rng.uniform(0, 40)
    rays = rng.normal(0, 200, 48)
    jerk = rng.normal(0, 2, 2) * (rng.random() < 0.2 * variety) / spacing[1]
    moved = rng.uniform(0, slices)
    for k in range(slices):
        near = np.exp(-(((k - moved) * spacing[0] / 8) ** 2))
        shift = np.rint(jerk * near).astype(int)
        scene.label[k] = np.roll(scene.label[k], shift, (0, 1))
        plane = cv2.GaussianBlur(
            np.roll(scene.hu[k], shift, (0, 1)), (0, 0), blur
        )
        depth = np.clip((shoulder - k) * spacing[0] / 12, -9, 9)
        low = 1 / (1 + np.exp(depth))  # 1: at the shoulders
        white = rng.standard_normal((rows, columns), np.float32)
        grit = cv2.GaussianBlur(white, (0, 0), grain)
        lines = rng.standard_normal((rows, columns // 24 + 2), np.float32)
        plane += grit * np.float32(
            3.5 * grain * sigma * (1 + low)
        )  # 3.5: blur weakens noise
        plane += cv2.resize(lines, (columns, rows)) * np.float32(streaks * low)
        scene.hu[k] = plane + streaks_of(metal, k, rays, spacing, scene.hu.shape)

def draw_tissue(rng, variety):
    """{tissue: HU} of a patient, the scanner and the contrast medium."""
    tissue = {}
    for name, *hu in read_rows("tissues"):
        odd = 0.35 * (variety - 1) * (np.ptp(hu) + 40)
        tissue[name] = rng.uniform(*hu) + rng.normal(0, odd)
    tissue["bone"] = max(tissue["bone"], 300)
    tissue["spongy"] = max(tissue["spongy"], 60)
    return tissue

def draw_measures(rng, variety):
    """{measure: mm of C1 to T6}."""
    measures = {}
    for name, *mm in read_rows("measures"):
        typical = np.interp(range(LEVELS), ANCHORS, mm)
        measures[name] = typical * rng.normal(1, 0.06 * variety)
    measures["height"][:2] = 20, 21
    measures["disc"] *= np.where(rng.random(LEVELS) < 0.12, 0.5, 1)
    measures["disc"][0] = -2  # the dens stands inside C1
    return measures

def draw_fractured(rng, in_view, fractures):
    """Which of C1 to C7 are broken, of those in view."""
    fractured = np.zeros(7, np.uint8)
    patient = in_view.any() and rng.random() < FRACTURED_PATIENTS * fractures
    while patient and not fractured.any():
        fractured[:] = (rng.random(7) < np.multiply(FRACTURE_RATES, fractures) * in_view)
    return fractured

def empty_scene(painted, fine, spacing, affine, tissue, gap_mm):
    """What is painted into: the slices of a scan, each in `fine` thinner ones."""
    scene = SimpleNamespace(
        near=np.full(painted, FAR_MM, np.float16),  # mm to the nearest bone
        label=np.zeros(painted, np.uint8),
        tissue=tissue,
        affine=affine @ np.diag([1 / fine, 1, 1, 1]),
        mm=(np.prod(spacing) / fine) ** (1 / 3),  # edge of a voxel, about
        gap_mm=gap_mm,
    )
    scene.affine[:, 3] -= affine[:, 0] * (fine - 1) / (2 * fine)
    return scene

def paint_filling(rng, scene, frame, affine):
    """A filling in a tooth; its voxel (z, y, x, 1) in the scan."""
    side = rng.choice([-25, 25])
    height = rng.choice([-9, -17])
    at = (side, -65, height)
    ends = np.array([at, at])
    filling = Part("metal", ends, np.array((3, 4, 3)))
    paint(scene, rng, [filling], frame, "metal")
    return np.linalg.inv(affine) @ frame @ [*at, 1]

def make_phantom(seed, matrix=512, variety=1.0, fractures=1.0, gap_mm=GAP_MM):
    """A neck CT drawn from `seed` (a number or several); `variety` widens every range.

    `fractures` multiplies the rates of fractured patients and vertebrae; `gap_mm` is the
    least and the greatest width of a fracture.
    """
    rng = np.random.default_rng(seed)
    tissue = draw_tissue(rng, variety)
    measures = draw_measures(rng, variety)
    limit = 15 * variety
    pose = rotation(rng.normal(0, 5 * variety, 3).clip(-limit, limit))
    pose[:3] *= rng.uniform(0.87, 1.13)
    spine = draw_spine(rng, measures, variety)
    crown = spine[0] @ (0, 0, 54, 1)
    line = np.vstack([crown, spine[:, :, 3]])[:, :3]
    spine = pose @ spine
    chest = spine[7] @ rotation((-20.0, 0, 0))
    frames = dict(neck=pose, head=spine[0], chest=chest, lying=pose.copy())
    frames["lying"][:3, 3] = spine[7, :3, 3]

    shape, spacing, affine = draw_grid(rng, spine[:, :3, 3], matrix, variety)
    fine = int(np.ceil(spacing[0] / SLICE_MM))
    painted = (shape[0] * fine, *shape[1:])
    scene = empty_scene(painted, fine, spacing, affine, tissue, gap_mm)
    scene.hu = paint_soft(rng, scene, painted, frames, line, variety)
    for frame, part in draw_parts(rng, "hard", line):
        paint(scene, rng, [part], frames[frame], part.material)

    depth = affine[2, 3] - spine[:7, 2, 3]
    in_view = np.minimum(depth, shape[0] * spacing[0] - depth) > IN_VIEW_MM
    fractured = draw_fractured(rng, in_view, fractures)
    boxes = paint_spine(rng, scene, spine, measures, fractured)
    metal = None
    if rng.random() < 0.2 * variety:
        metal = paint_filling(rng, scene, frames["head"], affine)

    scene.hu = scene.hu.reshape(-1, fine, *shape[1:]).mean(1)
    scene.label = scene.label[fine // 2 :: fine].copy()
    add_artefacts(rng, scene, spacing, depth[6] / spacing[0], metal, variety)
    hu = np.rint(scene.hu.clip(-1024, 3071)).astype(np.int16)
    boxes = np.array(boxes, int).reshape(-1, 5) // (1, 1, 1, 1, fine)
    return Phantom(hu, scene.label, spacing, affine, fractured, boxes)

# ---- Files ----

def add_padding(rng, stored, storage, data):
    """What lies outside the scanner's circle; its value is named in half of the studies."""
    padding = max(lowest_value(storage), -2000)
    slices, rows, columns = stored.shape
    j, i = np.ogrid[:rows, :columns]
    radius = np.hypot(j - rows / 2, i - columns / 2)
    stored[:, radius > max(rows, columns) / 2] = padding
    if rng.random() < 0.5:
        kind = "SS" if storage.signed else "US"
        data.add_new("PixelPaddingValue", kind, padding)

def read_storage():
    """Every Storage of phantoms_storage.csv."""
    return [Storage(*form) for _, *form in read_rows("storage")]

def draw_numbers(rng, slices):
    """The file number of each slice: mostly from the head down."""
    numbers = np.arange(1, slices + 1)
    order = rng.random()
    if order < 0.15:
        return numbers[::-1]
    return rng.permutation(numbers) if order < 0.25 else numbers

def write_phantom(phantom, uid, images, masks, seed):
    """Slices images/<uid>/<n>.dcm, mask masks/<uid>.nii; each slice's file number."""
    rng = np.random.default_rng(seed)
    numbers = draw_numbers(rng, len(phantom.hu))
    forms = read_storage()
    storage = forms[rng.integers(len(forms))]
    stored = stored_values(phantom.hu, storage)
    data = dicom_header(phantom, uid, storage)
    if rng.random() < 0.35:
        add_padding(rng, stored, storage, data)
    if rng.random() < 0.5:
        data.Modality, data.PatientSex = "CT", str(rng.choice(["M", "F", "O"]))
    if rng.random() < 0.3:
        data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    data.SliceThickness = round(phantom.spacing[0] * rng.uniform(1, 1.6), 4)
    write_slices(images / uid, data, stored, phantom.affine, numbers.tolist())
    write_mask(phantom, masks / f"{uid}.nii")
    return numbers

def make_study(out, seed, matrix, variety, fractures, index):
    """One study on disk; its row of labels and its rows of boxes."""
    uid = f"{UID_ROOT}{seed}.{index}"
    images = out / ("train_images" if index < FIRST_TEST else "test_images")
    share = np.random.default_rng([seed, index, 2]).random()
    own = 1 + (variety - 1) * share  # from realistic to `variety`
    phantom = make_phantom([seed, index], matrix, own, fractures)
    numbers = write_phantom(phantom, uid, images, out / "segmentations", [seed, index, 1])
    boxes = [(uid, *box[:4], numbers[box[4]]) for box in phantom.boxes.tolist()]
    return label_row(uid, phantom.fractured), boxes

def make_dataset(
    out, studies, test_studies, seed, matrix, workers, variety=1.0, fractures=1.0
):
    """A data set in the RSNA layout under `out`, with the truth of the test studies."""
    out.mkdir(parents=True, exist_ok=True)
    indices = [*range(studies), *range(FIRST_TEST, FIRST_TEST + test_studies)]
    make = partial(make_study, out, seed, matrix, variety, fractures)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        made = list(pool.map(make, indices))
    rows = [row for row, _ in made]
    write_tables(out, rows[:studies], rows[studies:])
    boxes = sum((found for _, found in made[:studies]), [])
    corners = [STUDY, "x", "y", "width", "height", "slice_number"]
    table = pd.DataFrame(boxes, columns=corners)
    table.to_csv(out / "train_bounding_boxes.csv", index=False)
