"""Synthetic neck CTs in the layout of the competition: what `cspine.py phantom` writes."""

import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pydicom

VERTEBRAE = ("C1", "C2", "C3", "C4", "C5", "C6", "C7")
TARGETS = VERTEBRAE + ("patient_overall",)

# ============================ Phantoms: synthetic neck CTs ============================
# Every organ is made of blobs and rods in a local frame: x left, y back, z up, mm.

LEVELS, ANCHORS = 13, (2, 4, 6, 7, 12)  # C1 to T6; MEASURES (mm) are of C3, C5, C7, T1, T6
MEASURES = dict(height=(13.5, 13, 14.5, 16.5, 19), width=(9, 10, 12.5, 14, 14),
                depth=(7.8, 8, 8.5, 8.5, 11), pillar=(18, 19, 19, 17, 15), disc=(5, 5, 5, 4.5, 4),
                span=(27, 28, 34, 37, 32), spine=(12, 15, 29, 32, 30), drop=(4, 6, 9, 15, 32))
HU = dict(air=(-1000, -1000), skin=(-20, 60), fat=(-120, -75), fascia=(-70, 0), muscle=(35, 80),
          gland=(40, 160), vessel=(35, 330), brain=(25, 42), fluid=(0, 20), lung=(-900, -780),
          cartilage=(70, 260), bone=(650, 1300), diploe=(250, 600), table=(600, 1200),
          tooth=(1300, 2600), disc=(60, 130), metal=(2900, 3071), cloth=(-250, 100),
          foam=(-990, -900), spongy=(150, 420), grain=(20, 80), blood=(20, 110))
FRACTURED_PATIENTS = 0.476  # facts; with it the vertebrae's rates give the facts' prevalences
FRACTURE_RATES = (0.091, 0.178, 0.046, 0.067, 0.101, 0.173, 0.245)
GAP_MM = 0.5, 2.0  # width of a fracture
GAP_MM2, IN_VIEW_MM, JOINT_MM, SOFT_MM, FAR_MM = 60, 13, 0.8, 1.6, 9
STORAGE = ((1, 16, -1024, 1), (1, 16, 0, 1), (1, 12, 0, 1), (0, 12, -1024, 1), (0, 16, -8192, 1),
           (0, 13, -1000, 1), (1, 16, -1024, 0.5))  # signed, bits, intercept, slope
FIRST_TEST = 50_000  # index of the first test study
# Material, frame (head, neck, chest, lying) and number of sides, radii, points; "neck" counts z in
# levels down from C1. Painted in this order, body and skull as shells in shells.
SOFT = """cloth l1 230,14,14 0,128,-400 0,128,400; foam l1 226,11,11 0,128,-400 0,128,400
body h1 80,98,78 0,-8,80; body h1 62,58,62 0,-52,12; body h1 44,36,30 0,-68,-24
body h1 11,14,16 0,-110,12; body n1 60,66,60 0,8,0 0,10,3 0,6,7 0,-10,11
body c1 70,52,52 -150,20,-55 150,20,-55; body c2 34 160,14,-35 30,26,35
body c1 165,108,150 0,-20,-175; skull h1 71,89,65 0,-8,86; skull h1 54,40,32 0,26,41
muscle n2 9,7,9 48,8,-1 44,-8,3 24,-32,7.5; muscle n2 20,9,20 14,52,-1 22,56,4 60,46,8 110,40,9
muscle n2 13,12,13 16,36,0 17,38,4 18,42,9; muscle n2 9,8,9 34,26,0 36,24,4 38,36,9
muscle n2 8,9,8 30,4,1 32,2,4 36,-6,7 48,-16,8; muscle n2 5,4,5 8,-12,1 8,-13,4 9,-13,8
muscle h1 26,30,20 0,-56,-14; muscle h2 9,18,24 40,-36,-4; muscle n1 26,14,20 0,-34,3.5 0,-38,5.5
fluid h1 15,16,9 0,9,2 0,9,26; brain n1 7,5,6 0,15,-1 0,16,3 0,16,12
gland h2 9,14,20 52,-12,-4; gland n2 9,12,9 26,-44,2.6; gland n2 8,10,20 16,-31,6.2
vessel n2 3 26,-10,0 27,-18,3 21,-28,6 12,-36,9; vessel n2 5 31,-1,0 35,-16,3 29,-28,6 24,-42,8
vessel n2 2 27,3,0 20,2,1 15.5,1,2 16,1,5 20,-8,6.5; cartilage n2 2,3,11 0,-54,4.6 19,-28,4.4
cartilage n2 2.5,2.5,8 0,-45,5.6 10,-36,5.5 8,-26,5.4; lung c2 38,56,84 46,-6,-94
air h1 14,28,13 0,-74,16; air h2 12,15,14 26,-62,17; air h1 12,10,9 0,-44,36
air h1 13,7,9 0,-44,14 0,-25,6; air n1 12,6,9 0,-25,0.2 0,-22,2 0,-24,3
air n1 7,8,7 0,-27,3 0,-31,5 0,-31,8 0,-36,12"""
HARD = """bone h2 6,10,6 17,-1,14; bone h1 11,4,4 0,-10,20 0,-34,44; bone h2 12,14,19 51,4,20
bone h2 8,8,9 46,0,30 14,-24,36; bone h2 3.5 52,-14,32 51,-58,27 30,-80,20
bone h2 3 0,-88,2 20,-72,2 20,-48,2; bone h2 2,4,8 10,-88,12 12,-92,30
bone h2 4.5,4.5,8 0,-95,-34 20,-84,-32 38,-50,-28 46,-24,-18
bone h2 3,8,8 46,-24,-18 49,-20,8 50,-14,26; bone n2 2.2 0,-50,3.1 14,-46,3.1 22,-27,2.9
tooth h2 2.5,2.8,7 0,-92,-20 12,-86,-20 22,-70,-20 29,-50,-18
tooth h2 2.5,2.8,6 0,-91,-6 12,-85,-6 22,-69,-6 28,-50,-4
bone c2 6 18,-66,-44 60,-62,-32 100,-30,-20 150,-4,-6; bone c1 25,6,22 0,-74,-66
bone c2 3,4,24 70,62,-70 110,46,-40 140,20,-16; bone c2 23 168,12,-34"""
RIB = "bone r2 3.2,3.2,5 24,12,3 50,28,-4 85,0,-24 75,-60,-55 30,-85,-75"
# C1, C2, then C5, whose points are stretched to the MEASURES of the other levels: Cervical only,
# Thoracic only, Vertebrae both. The body, with flat ends, comes first.
SPINE = """bone 12 8,9,9 19,0,0; bone 12 2.8,2.8,4.5 17,-4,0 9,-9.5,0 0,-11.5,1
bone 12 2.6,2.6,4 19,6,1 18,14,1 11,24,0 0,29,0; bone 12 4 23,2,-1 36,5,-2
hole 12 3 27.5,2.5,-9 27.5,2.5,9; flat 21 9.5,8,10.5 0,0,0; bone 21 5.3 0,-0.5,4 0,-1.5,15 0,-1,21
bone 22 8.5,8,4.5 14.5,0,6; bone 22 4.5 14,3,3 18,10,-3 19,12.5,-9
bone 22 2.8,2.8,6 17,13,-5 9,23,-5 0,28,-4; bone 22 3,3,5 0,27,-4 4,40,-9
bone 22 3,4.5,3 13,2,-2 25,4,-5; hole 22 2.7 19.5,1,-12 20.5,2,6
flat V1 10,8,6.5 0,0,0; bone C2 2.2,5,3 8.5,1,5.5; bone V2 2.8,2.8,3.6 7.5,5,1 18,11,1
bone V2 5.6,4.2,5 19,9,5 19,15.5,-6; bone V2 2.6,2.6,6 18,16,-1 7,22,-2 0,25.5,-3
bone V1 2.6,3.5,4.2 0,25,-3 0,40,-3; bone C2 2.4 0,39,-3 4,43,-5; bone C2 3.4 17,10,0 28,5,-2
bone C2 2.4 8,-1,-1 28,0,-2; hole C2 2.7 14.5,1,-11 14.5,1,11; bone T2 3.4 17,14,0 28,20,-2"""


@dataclass(frozen=True)
class Phantom:
    """A study: hu and label (Z, Y, X), head first; affine LPS; boxes (N, 5): x y w h slice."""
    hu: np.ndarray
    label: np.ndarray
    spacing: tuple
    affine: np.ndarray
    fractured: np.ndarray
    boxes: np.ndarray


def draw_parts(rng, table, line=None):
    """(frame, part) of each row, varied; a part is a material, two ends (equal: a blob), radii."""
    for row in table.replace("; ", "\n").split("\n"):
        material, (frame, sides), radii, *points = row.split()
        points = np.array([p.split(",") for p in points], float)
        radii = np.array(radii.split(","), float) * rng.normal(1, 0.07) * np.ones(3)
        if frame == "n":
            at_level = [np.interp(points[:, 2], np.r_[-3, 0:LEVELS], axis) for axis in line.T]
            points = points * (1, 1, 0) + np.transpose(at_level)
        for side in (1, -1)[:int(sides)]:
            chain = points * (side, 1, 1) + rng.normal(0, 0.5, 3)
            for ends in zip(chain, chain[1:] if len(chain) > 1 else chain):
                yield frame, (material, np.array(ends), radii.copy())


def region(local, shape, parts, margin):
    """Slices of the voxels near the parts, and local coordinates from voxels (4x4) of that box."""
    low = np.min([ends.min(0) - radii for _, ends, radii in parts], 0) - margin
    high = np.max([ends.max(0) + radii for _, ends, radii in parts], 0) + margin
    corners = np.vstack([np.reshape(np.meshgrid(*zip(low, high)), (3, 8)), np.ones(8)])
    voxel = (np.linalg.inv(local) @ corners)[:3]
    start = np.clip(np.floor(voxel.min(1)), 0, shape).astype(int)
    stop = np.clip(np.ceil(voxel.max(1)) + 1, start, shape).astype(int)
    return tuple(map(slice, start, stop)), np.c_[local[:, :3], local @ [*start, 1]]


def distance(parts, at, local, blend_mm=1.5):
    """Distance (mm, negative inside) of the points to the smooth union of parts less holes."""
    out = np.full(at[0].shape, FAR_MM, np.float32)
    for part in sorted(parts, key=lambda part: part[0] == "hole"):
        material, ends, radii = part
        box, _ = region(local, out.shape, [part], 4)
        scale = np.float32(min(radii) / radii)
        axis = np.float32(ends[1] - ends[0]) * scale
        offset = [(a[box] - np.float32(e)) * s for a, e, s in zip(at, ends[0], scale)]
        along = np.clip(sum(o * a for o, a in zip(offset, axis)) / max(axis @ axis, 1e-6), 0, 1)
        x, y, z = ((o - along * a) ** 2 for o, a in zip(offset, axis))
        square = np.sqrt(np.sqrt((x + y) ** 4 + z ** 4)) if material == "flat" else x + y + z
        new, old = np.sqrt(square) - np.float32(min(radii)), out[box]
        blend = np.maximum(blend_mm - np.abs(old - new), 0) ** 2 / (4 * blend_mm)
        out[box] = np.maximum(old, -new) if material == "hole" else np.minimum(old, new) - blend
    return out


def upsample(coarse, shape):
    """Linear interpolation of a coarse grid over the same space, float32."""
    z = (np.arange(shape[0]) + 0.5) * len(coarse) / shape[0] - 0.5
    z = [divmod(a, 1) for a in np.clip(z, 0, len(coarse) - 1.001)]
    planes = (coarse[int(k)] * np.float32(1 - w) + coarse[int(k) + 1] * np.float32(w) for k, w in z)
    return np.stack([cv2.resize(plane, shape[:0:-1]) for plane in planes])


def lumps(rng, shape, cell):
    """Smooth noise of about unit size whose lumps span `cell` voxels, float32."""
    return upsample(rng.standard_normal([int(n / cell) + 3 for n in shape], np.float32), shape)


def paint(scene, rng, parts, frame, tissue, grow=0, label=0, broken=False):
    """Fills parts grown by mm; a labelled bone keeps clear of others. Boxes of fracture gaps."""
    box, local = region(np.linalg.inv(frame) @ scene.affine, scene.hu.shape, parts, grow + 3)
    old, mm, boxes = scene.hu[box], scene.mm, []
    if min(old.shape) < 2:
        return boxes
    k, j, i = np.ogrid[tuple(map(slice, np.float32(old.shape)))]
    at = [a * k + b * j + (c * i + d) for a, b, c, d in np.float32(local[:3])]
    if label:
        at = [a + np.float32(0.4) * lumps(rng, old.shape, 9 / mm) for a in at]
    gap = break_bone(rng, parts, at, local, mm) if broken else None
    surface, look = distance(parts, at, local) - np.float32(grow), np.float32(scene.tissue[tissue])
    if label:
        surface = np.maximum(surface, JOINT_MM - scene.near[box])
        scene.label[box][surface < 0] = label
    if tissue == "bone":
        scene.near[box] = np.minimum(scene.near[box], surface)
        spongy = scene.tissue["spongy"] + scene.tissue["grain"] * lumps(rng, old.shape, 1.2 / mm)
        look = look + np.clip(-surface / max(0.7, mm) - 1, 0, 1) * (spongy - look)
    if broken:
        gap *= surface < 0
        look += gap * (scene.tissue["blood"] - look)
        for k in np.flatnonzero((gap > 0.3).sum((1, 2)) > 3):
            x, y, width, height = cv2.boundingRect(np.uint8(gap[k] > 0.3))
            boxes.append((x + box[2].start, y + box[1].start, width, height, k + box[0].start))
    cover = np.clip(0.5 - surface / mm, 0, 1)
    if tissue in ("muscle", "gland", "vessel", "cartilage"):
        cover *= old > -400  # none outside the skin
    scene.hu[box] += cover * (look - old)
    return boxes


def break_bone(rng, parts, at, local, mm):
    """Share of gap in each voxel; the coordinates `at` of what is broken off jump."""
    bone = distance(parts, at, local) < 0
    gap, area = np.zeros(bone.shape, np.float32), 0
    rough = lumps(rng, bone.shape, 3 / mm) * np.float32(rng.uniform(0.1, 0.6))
    shift = np.float32(rng.normal(0, 1, 3) * rng.choice([0, 0.5, 1.5]))
    solid = [part for part in parts if part[0] != "hole"]
    while area < GAP_MM2:
        _, ends, radii = solid[rng.integers(len(solid)) * (rng.random() < 0.75)]  # first: the body
        along, normal, reach = ends[1] - ends[0], rng.normal(0, 1, 3), 1.2 * max(radii)
        centre = np.float32(ends[0] + along * rng.uniform(0.2, 0.8) + rng.normal(0, 1.5, 3))
        if along.any():  # mostly across a rod
            normal, reach = normal * 0.35 + along / np.linalg.norm(along), 11
        normal = np.float32(normal / np.linalg.norm(normal))
        offset = [a - c for a, c in zip(at, centre)]
        plane = sum(o * n for o, n in zip(offset, normal)) + rough
        weight = np.clip((reach - np.sqrt(sum(o * o for o in offset))) / 4, 0, 1)
        width = max(rng.uniform(*GAP_MM), 0.75 * mm)
        cut = np.clip((width / 2 - np.abs(plane)) / mm + 0.5, 0, min(1, width / mm)) * weight
        area += max(cut[bone].sum() * mm ** 3 / width, 5)
        gap = np.maximum(gap, cut)
        for a, s in zip(at, shift):
            a -= s * (plane > 0) * weight
    return gap


def vertebra(rng, level, m, broken):
    """Parts of one vertebra: wear, a nutrient canal and, if broken, now and then compression."""
    kinds = str(level + 1) if level < 2 else "VC" if level < 7 else "VT"
    parts = [part for frame, part in draw_parts(rng, SPINE) if frame in kinds]
    if level > 1:
        back = m.depth + 17
        for _, ends, _ in parts:
            x, y, z = ends.T.copy()
            side = np.interp(abs(x), (0, 10, 19, 28), (0, m.width, m.pillar, m.span))
            ends[:, 0] = np.sign(x) * side
            ends[:, 1] = np.interp(y, (-8, 8, 25, 40), (-m.depth, m.depth, back, back + m.spine))
            ends[:, 2] = z * m.height / 13 - m.drop * np.clip((y - 25) / 15, 0, 1)
        parts[0][2][:] = m.width, m.depth, m.height / 2 * (rng.uniform(0.6, 1) if broken else 1)
        spur = rng.normal(0, 4), -m.depth - 1, rng.choice([-0.5, 0.5]) * m.height
        parts += [("bone", np.array([spur, spur]), np.array((6, 3, 2)))] * (rng.random() < 0.3)
    canal = np.array([rng.normal(0, 1.5, 3), (0, 20, 0)])
    canals = level > 0 and rng.random() < 0.5
    return parts + [("hole", canal, np.full(3, rng.uniform(0.4, 0.9)))] * canals


def rotation(degrees):
    out = np.eye(4)
    out[:3, :3] = cv2.Rodrigues(np.radians(degrees))[0]
    return out


def draw_spine(rng, measures, variety):
    """Frames of C1 to T6 (LEVELS, 4, 4) on a lordotic, straight or kyphotic curve around C4."""
    base, top = rng.normal((24, -2), (7 * variety, 9 * variety))
    lean = np.interp(range(LEVELS), (0, 1, 7, 12), (top - 4, top, base, base + 6))
    turn = np.outer(np.linspace(1, 0, LEVELS), rng.normal(0, (4 * variety, 7 * variety)))
    frames = np.stack([rotation(a + rng.normal(0, 1.5, 3)) for a in np.c_[lean, turn]])
    steps = (measures["height"][1:] + measures["height"][:-1]) / 2 + measures["disc"][:-1]
    up = (frames[1:, :3, 2] + frames[:-1, :3, 2]) / 2
    frames[1:, :3, 3] = -np.cumsum(up * steps[:, None], 0)
    frames[:, :3, 3] -= frames[3, :3, 3].copy()
    return frames


def draw_grid(rng, level, matrix, variety):
    """Shape, spacing and LPS affine of a scan; level (LEVELS, 3): where C1 to T6 are."""
    wild, usual, cover = rng.random() < variety - 1, rng.random() < 0.7, rng.random()
    top, bottom = level[0, 2] + rng.uniform(14, 55), level[7, 2] - rng.uniform(5, 60)
    if cover < 0.08:
        top = level[rng.integers(1, 3), 2] + rng.uniform(-5, 12)
    elif cover < 0.16:
        bottom = level[rng.integers(4, 7), 2] + rng.uniform(-10, 2)
    elif cover < 0.22 + 0.2 * (variety - 1):
        top += rng.uniform(40, 120)
    slices = int(np.clip((top - bottom) / rng.uniform(0.5, 3 if wild else 1.25), 60, 400))
    extent = (140, 225) if usual else (90, 400) if wild else (120, 260)  # mm
    if not wild:  # pixels of 0.3 to 0.7 mm, but for matrices that are too small for a neck
        extent = np.clip(extent, 0.3 * matrix, max(0.7 * matrix, 170))
    pixel = rng.uniform(*extent) / matrix
    spacing = (top - bottom) / slices, pixel, pixel
    other = int(matrix * min(1, rng.uniform(0.85, 1.4)))
    shape = (slices, *map(int, rng.permutation([matrix, other])))
    middle = level[:7].mean(0) + rng.normal(0, 0.04 * pixel * matrix, 3) + (0, 8, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.multiply(spacing, (-1, 1, 1)))[::-1]
    affine[:3, 3] = *(middle[:2] - np.multiply(pixel / 2, shape[:0:-1])), top
    return shape, spacing, affine


def add_artefacts(rng, scene, spacing, shoulder, metal, variety):
    """Motion, blur, noise, streaks of the shoulders and of metal (z, y, x), slice by slice."""
    slices, rows, columns = scene.hu.shape
    sigma = np.exp(rng.uniform(np.log(5), np.log(60))) * rng.uniform(1, variety)
    blur = rng.uniform(0.2, 0.7) * rng.uniform(1, variety) / spacing[1]
    grain, streaks, rays = rng.uniform(0.6, 1.1), rng.uniform(0, 40), rng.normal(0, 200, 48)
    jerk = rng.normal(0, 2, 2) * (rng.random() < 0.2 * variety) / spacing[1]
    moved, (j, i) = rng.uniform(0, slices), np.ogrid[:rows, :columns]
    for k in range(slices):
        shift = np.rint(jerk * np.exp(-((k - moved) * spacing[0] / 8) ** 2)).astype(int)
        scene.label[k] = np.roll(scene.label[k], shift, (0, 1))
        plane = cv2.GaussianBlur(np.roll(scene.hu[k], shift, (0, 1)), (0, 0), blur)
        low = 1 / (1 + np.exp(np.clip((shoulder - k) * spacing[0] / 12, -9, 9)))  # 1: shoulders
        grit = cv2.GaussianBlur(rng.standard_normal((rows, columns), np.float32), (0, 0), grain)
        lines = rng.standard_normal((rows, columns // 24 + 2), np.float32)
        plane += grit * np.float32(3.5 * grain * sigma * (1 + low))  # 3.5: blur weakens noise
        plane += cv2.resize(lines, (columns, rows)) * np.float32(streaks * low)
        if metal is not None and abs(k - metal[0]) * spacing[0] < 6:
            y, x = j - metal[1], i - metal[2]
            angles = np.linspace(-np.pi, np.pi, len(rays))
            star = np.interp(np.arctan2(y, x), angles, np.roll(rays, 7 * k))
            plane += np.float32(star * np.exp(-np.hypot(y, x) / (0.2 * columns)))
        scene.hu[k] = plane


def paint_soft(rng, scene, shape, frames, line, variety):
    """HU without bones, float32: painted on a grid of SOFT_MM, then brought to `shape`."""
    voxel = np.linalg.norm(scene.affine[:3, :3], axis=0)
    coarse = np.ceil(shape * voxel / SOFT_MM).astype(int)
    affine = scene.affine @ np.diag([*(shape / coarse), 1])
    affine[:, 3] = scene.affine @ [*(shape / coarse / 2 - 0.5), 1]
    soft = SimpleNamespace(hu=np.full(coarse, -1000, np.float32), affine=affine, mm=SOFT_MM,
                           tissue=scene.tissue)
    wrap = [("cloth", 9), ("air", 6)] * (rng.random() < 0.12 * variety)  # mask, collar, blanket
    shells = dict(body=[*wrap, ("skin", 0), ("fat", -2), ("fascia", -rng.uniform(5, 14))],
                  skull=[("table", 0), ("diploe", -2.2), ("table", -4.5), ("brain", -6.5)])
    for material, rows in groupby(draw_parts(rng, SOFT, line), lambda row: row[1][0]):
        rows = list(rows)
        for tissue, grow in shells.get(material, [(material, 0)]):
            for frame, part in rows:
                paint(soft, rng, [part], frames[frame], tissue, grow)
    soft.hu += lumps(rng, soft.hu.shape, 3) * rng.uniform(4, 14) * (soft.hu > -300)
    return upsample(soft.hu, shape)


def paint_spine(rng, scene, frames, measures, fractured):
    """Ribs, then discs and vertebrae; boxes of the fractures."""
    boxes = []
    for level in range(7, LEVELS):
        size = np.interp(level, (7, 9, 12), (0.62, 0.95, 1.15))
        for _, (_, ends, radii) in draw_parts(rng, RIB):
            paint(scene, rng, [("bone", ends * size, radii)], frames[level], "bone")
    for level, frame in enumerate(frames):
        m = SimpleNamespace(**{name: values[level] for name, values in measures.items()})
        if level:
            middle = np.array([(0, 0, -(m.height + m.disc) / 2)] * 2)
            disc = "flat", middle, np.array((m.width, m.depth, m.disc))
            paint(scene, rng, [disc], frame, "disc")
        broken = level < 7 and fractured[level]
        parts = vertebra(rng, level, m, broken)
        boxes += paint(scene, rng, parts, frame, "bone", 0, level + 1, broken)
    return boxes


def make_phantom(seed, matrix=512, variety=1.0, fractures=1.0):
    """A neck CT drawn from `seed` (a number or several); `variety` widens every range.

    `fractures` multiplies the rates of fractured patients and vertebrae.
    """
    rng = np.random.default_rng(seed)
    tissue = {name: rng.uniform(*hu) + rng.normal(0, 0.35 * (variety - 1) * (np.ptp(hu) + 40))
              for name, hu in HU.items()}
    tissue.update({name: max(tissue[name], low) for name, low in (("bone", 300), ("spongy", 60))})
    measures = {name: np.interp(range(LEVELS), ANCHORS, mm) * rng.normal(1, 0.06 * variety)
                for name, mm in MEASURES.items()}
    measures["height"][:2] = 20, 21
    measures["disc"] *= np.where(rng.random(LEVELS) < 0.12, 0.5, 1)
    measures["disc"][0] = -2  # the dens stands inside C1
    pose = rotation(rng.normal(0, 5 * variety, 3).clip(-15 * variety, 15 * variety))
    pose[:3] *= rng.uniform(0.87, 1.13)
    spine = draw_spine(rng, measures, variety)
    line = np.vstack([spine[0] @ (0, 0, 54, 1), spine[:, :, 3]])[:, :3]
    spine = pose @ spine
    frames = dict(n=pose, h=spine[0], c=spine[7] @ rotation((-20.0, 0, 0)), l=pose.copy())
    frames["l"][:3, 3] = spine[7, :3, 3]
    shape, spacing, affine = draw_grid(rng, spine[:, :3, 3], matrix, variety)
    fine = int(np.ceil(spacing[0] / 1.3))  # a thick slice is the mean of finer ones
    painted = (shape[0] * fine, *shape[1:])
    scene = SimpleNamespace(
        near=np.full(painted, FAR_MM, np.float16), label=np.zeros(painted, np.uint8), tissue=tissue,
        affine=affine @ np.diag([1 / fine, 1, 1, 1]), mm=(np.prod(spacing) / fine) ** (1 / 3))
    scene.affine[:, 3] -= affine[:, 0] * (fine - 1) / (2 * fine)
    scene.hu = paint_soft(rng, scene, painted, frames, line, variety)
    for frame, part in draw_parts(rng, HARD, line):
        paint(scene, rng, [part], frames[frame], part[0])
    depth = affine[2, 3] - spine[:7, 2, 3]
    in_view = np.minimum(depth, shape[0] * spacing[0] - depth) > IN_VIEW_MM
    fractured, metal = np.zeros(7, np.uint8), None
    patient = in_view.any() and rng.random() < FRACTURED_PATIENTS * fractures
    while patient and not fractured.any():
        fractured[:] = rng.random(7) < np.multiply(FRACTURE_RATES, fractures) * in_view
    boxes = paint_spine(rng, scene, spine, measures, fractured)
    if rng.random() < 0.2 * variety:
        filling = np.array([(rng.choice([-25, 25]), -65, rng.choice([-9, -17]))] * 2)
        paint(scene, rng, [("metal", filling, np.array((3, 4, 3)))], frames["h"], "metal")
        metal = np.linalg.inv(affine) @ frames["h"] @ [*filling[0], 1]
    scene.hu = scene.hu.reshape(-1, fine, *shape[1:]).mean(1)
    scene.label = scene.label[fine // 2::fine].copy()
    add_artefacts(rng, scene, spacing, depth[6] / spacing[0], metal, variety)
    hu = np.rint(scene.hu.clip(-1024, 3071)).astype(np.int16)
    boxes = np.array(boxes, int).reshape(-1, 5) // (1, 1, 1, 1, fine)
    return Phantom(hu, scene.label, spacing, affine, fractured, boxes)


def write_phantom(phantom, uid, images, masks, seed):
    """Slices images/<uid>/<n>.dcm and the mask masks/<uid>.nii; the file number of each slice."""
    rng = np.random.default_rng(seed)
    slices, rows, columns = phantom.hu.shape
    numbers, order = np.arange(1, slices + 1), rng.random()
    if order < 0.25:
        numbers = numbers[::-1] if order < 0.15 else rng.permutation(numbers)
    signed, bits, intercept, slope = STORAGE[rng.integers(len(STORAGE))]
    low = -(1 << bits - 1) if signed else 0
    stored = np.rint((phantom.hu - np.float32(intercept)) / slope).clip(low, low + (1 << bits) - 1)
    stored, data = stored.astype("<i2" if signed else "<u2"), pydicom.Dataset()
    if rng.random() < 0.35:  # outside the scanner's circle
        padding, (j, i) = max(low, -2000), np.ogrid[:rows, :columns]
        stored[:, np.hypot(j - rows / 2, i - columns / 2) > max(rows, columns) / 2] = padding
        if rng.random() < 0.5:
            data.add_new("PixelPaddingValue", "SS" if signed else "US", padding)
    if rng.random() < 0.5:
        data.Modality, data.PatientSex = "CT", str(rng.choice(["M", "F", "O"]))
    data.file_meta = pydicom.dataset.FileMetaDataset()
    implicit = rng.random() < 0.3
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" + ("" if implicit else ".1")
    for name, value in dict(
            SOPClassUID=pydicom.uid.CTImageStorage, StudyInstanceUID=uid, Rows=rows,
            Columns=columns, SeriesInstanceUID=uid + ".1", FrameOfReferenceUID=uid + ".2",
            SamplesPerPixel=1, BitsAllocated=16, BitsStored=bits, HighBit=bits - 1,
            PixelRepresentation=signed,
            PhotometricInterpretation="MONOCHROME2", RescaleIntercept=intercept, RescaleSlope=slope,
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[round(phantom.spacing[1], 7)] * 2,
            SliceThickness=round(phantom.spacing[0] * rng.uniform(1, 1.6), 4)).items():
        setattr(data, name, value)
    (images / uid).mkdir(parents=True, exist_ok=True)
    for k, number in enumerate(numbers.tolist()):
        data.SOPInstanceUID, data.InstanceNumber = f"{uid}.3.{number}", number
        data.ImagePositionPatient = (phantom.affine @ (k, 0, 0, 1))[:3].round(6).tolist()
        data.PixelData = stored[k].tobytes()
        data.save_as(images / uid / f"{number}.dcm", enforce_file_format=True)
    write_mask(phantom, masks / f"{uid}.nii")
    return numbers


def write_mask(phantom, path):
    """NIfTI-1 whose array has the axes L, A, S; RAS+ mm in the sform."""
    z, y, x = phantom.label.shape
    voxel_from_stored = [[0, 0, -1, z - 1], [0, -1, 0, y - 1], [1, 0, 0, 0], [0, 0, 0, 1]]
    ras = (np.diag([-1, -1, 1, 1]) @ phantom.affine @ voxel_from_stored)[:3]
    header = bytearray(352)
    for offset, kind, *values in (
            (0, "i", 348), (40, "8h", 3, x, y, z, 1, 1, 1, 1), (70, "2h", 2, 8),
            (108, "2f", 352, 1), (76, "4f", 1, *phantom.spacing[::-1]), (123, "B", 2),
            (254, "h", 1), (280, "12f", *ras.flat), (344, "4s", b"n+1")):
        struct.pack_into("<" + kind, header, offset, *values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + phantom.label[::-1, ::-1].tobytes())


def make_study(out, seed, matrix, variety, fractures, index):
    """One study on disk; its row of labels and its rows of boxes."""
    uid = f"1.2.826.0.1.3680043.9999.{seed}.{index}"
    images = out / ("train_images" if index < FIRST_TEST else "test_images")
    share = np.random.default_rng([seed, index, 2]).random()  # from realistic to `variety`
    phantom = make_phantom([seed, index], matrix, 1 + (variety - 1) * share, fractures)
    numbers = write_phantom(phantom, uid, images, out / "segmentations", [seed, index, 1])
    boxes = [(uid, *box[:4], numbers[box[4]]) for box in phantom.boxes.tolist()]
    return (uid, int(phantom.fractured.any()), *phantom.fractured.tolist()), boxes


def write_tables(out, train, test):
    """The csv files of rows (uid, patient_overall, C1, ..., C7), and the truth of the test."""
    labels = ["StudyInstanceUID", "patient_overall", *VERTEBRAE]
    asked = ["row_id", "StudyInstanceUID", "prediction_type"]
    tests = [(f"{row[0]}_{kind}", row[0], kind) for row in test for kind in TARGETS]
    answer = [(row_id, 0.5) for row_id, _, _ in tests]
    for name, table, columns in (
            ("train", train, labels), ("test_labels", test, labels), ("test", tests, asked),
            ("sample_submission", answer, ["row_id", "fractured"])):
        pd.DataFrame(table, columns=columns).to_csv(out / f"{name}.csv", index=False)


def make_dataset(out, studies, test_studies, seed, matrix, workers, variety=1.0, fractures=1.0):
    """A data set in the RSNA layout under `out`, with the truth of the test studies."""
    out.mkdir(parents=True, exist_ok=True)
    indices = [*range(studies), *range(FIRST_TEST, FIRST_TEST + test_studies)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        made = list(pool.map(partial(make_study, out, seed, matrix, variety, fractures), indices))
    rows = [row for row, _ in made]
    write_tables(out, rows[:studies], rows[studies:])
    boxes = sum((found for _, found in made[:studies]), [])
    corners = ["StudyInstanceUID", "x", "y", "width", "height", "slice_number"]
    pd.DataFrame(boxes, columns=corners).to_csv(out / "train_bounding_boxes.csv", index=False)
