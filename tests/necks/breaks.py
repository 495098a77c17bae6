"""Breaks drawn into the vertebrae of any CT that has labels, real necks too.

A break is a dark cleft along a rough plane that fades out within a bone, sometimes with a
step: what lies beyond the plane has moved. Harmless marks, of intact vertebrae, are thin
dark canals and bright planes: they keep every mark from meaning a break. Everything is
(z, y, x), mm, HU.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from phantoms import FRACTURE_RATES, GAP_MM, GAP_MM2, lumps

BLOOD_HU = 20, 110
BRIGHT_HU = 80, 300  # added along a bright plane
STEPS_MM = 0, 0.5, 1.5  # size of what moves beyond a break, one of these
REACH_MM = 8, 15  # of a plane; it fades out over FADE_MM
FADE_MM = 4
ROUGH_MM = 0.1, 0.6
CANAL_MM = 0.4, 0.9  # radius
CANAL_REACH_MM = 4, 10  # half its length
MARGIN_MM = 6  # around a vertebra
MOST_PLANES = 4
LEAST_MM3 = 1500  # a smaller mask shows too little of a vertebra
WHOLE_MM3 = 3000  # of a vertebra that may be broken
COUNTS = 0.55, 0.30, 0.15  # chances of one, two or three broken vertebrae
CANAL_SHARE = 0.3  # of the intact vertebrae
BRIGHT_SHARE = 0.12


@dataclass
class Bone:
    """A vertebra in its box: `hu`, a float32 view of the CT; its `mask`; the mm of every
    voxel in `at`; the voxels' `spacing`, and the edge of a cube as large, `mm`."""

    hu: np.ndarray
    mask: np.ndarray
    at: list
    spacing: np.ndarray
    mm: float
    noise: np.float32  # HU, standard deviation about


def cut_out(hu, mask, spacing):
    """The Bone of a bool mask in a CT."""
    inside = np.argwhere(mask)
    margin = np.ceil(MARGIN_MM / spacing).astype(int)
    low = np.maximum(inside.min(0) - margin, 0)
    high = np.minimum(inside.max(0) + 1 + margin, hu.shape)
    box = tuple(map(slice, low, high))
    at = [np.float32(k * s) for k, s in zip(np.ogrid[box], spacing)]
    part = hu[box]
    noise = np.median(abs(np.diff(part, axis=2))) / 0.95  # of two normal values
    mm = float(np.prod(spacing) ** (1 / 3))
    return Bone(part, mask[box], at, spacing, mm, np.float32(noise))


def draw_point(rng, bone):
    """mm of a voxel of the bone."""
    inside = np.argwhere(bone.mask)
    voxel = inside[rng.integers(len(inside))]
    return [axis.ravel()[k] for axis, k in zip(bone.at, voxel)]


def direction(vector):
    return np.float32(vector / np.linalg.norm(vector))


def offsets(bone, point):
    return [a - np.float32(p) for a, p in zip(bone.at, point)]


def cover(inside_mm, width, bone):
    """Share of a thing `width` mm wide in voxels that lie so far inside it."""
    return np.clip(inside_mm / bone.mm + 0.5, 0, min(1, width / bone.mm))


def draw_plane(rng, bone):
    """(signed mm to a rough plane, its weight, share of the gap), of every voxel."""
    normal = direction(rng.normal(0, 1, 3))
    width = max(rng.uniform(*GAP_MM), 0.75 * bone.mm)
    away = offsets(bone, draw_point(rng, bone) + rng.normal(0, 1, 3))
    rough = lumps(rng, bone.hu.shape, max(3 / bone.mm, 1.5))
    plane = sum(o * n for o, n in zip(away, normal))
    plane = plane + rough * np.float32(rng.uniform(*ROUGH_MM))
    reach = rng.uniform(*REACH_MM)
    weight = np.clip((reach - np.sqrt(sum(o * o for o in away))) / FADE_MM, 0, 1)
    return plane, weight, cover(width / 2 - abs(plane), width, bone) * weight, width


def grown(bone, mm):
    """The bone's mask, float32, that much larger and with a soft edge."""
    mask = torch.from_numpy(np.float32(bone.mask))[None, None]
    for axis, cells in enumerate(np.rint(mm / bone.spacing).astype(int).tolist()):
        kernel = np.where(np.arange(3) == axis, 2 * cells + 1, 1).tolist()
        mask = F.max_pool3d(mask, kernel, 1, [k // 2 for k in kernel])
    return F.avg_pool3d(mask, 3, 1, 1)[0, 0].numpy()


def fill(rng, bone, share, hu):
    """Blend a value, as noisy as the CT, into the voxels' share."""
    noisy = hu + bone.noise * rng.standard_normal(bone.hu.shape, np.float32)
    bone.hu += share * (noisy - bone.hu)


def move(bone, moved):
    """Let every voxel show what lay `moved` (3, Z, Y, X) mm before it."""
    places = []
    for a, m, s, n in zip(bone.at, moved, bone.spacing, bone.hu.shape):
        voxel = (a - a.min() - m) / s
        places.append((2 * voxel + 1) / n - 1)
    grid = torch.from_numpy(np.stack(places[::-1], -1))[None].float()
    old = torch.from_numpy(bone.hu.copy())[None, None]
    new = F.grid_sample(old, grid, padding_mode="border", align_corners=False)[0, 0]
    bone.hu += grown(bone, 3) * (new.numpy() - bone.hu)


def planes_of(rng, bone, step):
    """The gaps of as many planes as make a break, and how far (3, ...) each voxel moves."""
    gap = np.zeros(bone.hu.shape, np.float32)
    moved = np.zeros((3, *gap.shape), np.float32)
    area = 0
    for _ in range(MOST_PLANES):
        plane, weight, cut, width = draw_plane(rng, bone)
        area += cut[bone.mask].sum() * bone.mm**3 / width
        gap = np.maximum(gap, cut)
        moved += np.reshape(step, (3, 1, 1, 1)) * ((plane > 0) * weight)
        if area >= GAP_MM2:
            break
    return gap, moved


def draw_break(rng, bone):
    """Break a bone, in place."""
    step = np.float32(rng.normal(0, 1, 3) * rng.choice(STEPS_MM))
    gap, moved = planes_of(rng, bone, step)
    if step.any():
        move(bone, moved)
    fill(rng, bone, gap * grown(bone, 1), rng.uniform(*BLOOD_HU))


def draw_bright(rng, bone):
    """Brighten planes of a bone, in place."""
    gap, _ = planes_of(rng, bone, np.zeros(3, np.float32))
    bone.hu += gap * bone.mask * np.float32(rng.uniform(*BRIGHT_HU))


def draw_canal(rng, bone):
    """A vessel's canal, about level, in place."""
    axis = direction(rng.normal(0, 1, 3) * (0.4, 1, 1))
    radius = rng.uniform(*CANAL_MM)
    away = offsets(bone, draw_point(rng, bone))
    along = sum(o * a for o, a in zip(away, axis))
    beside = np.sqrt(np.maximum(sum(o * o for o in away) - along**2, 0))
    share = cover(radius - beside, 2 * radius, bone)
    share = share * (abs(along) < rng.uniform(*CANAL_REACH_MM)) * bone.mask
    fill(rng, bone, share, rng.uniform(*BLOOD_HU))


def alter(rng, hu, mask, spacing, draw):
    """Draw into the vertebra of a bool mask, in place; False if it shows too little."""
    spacing = np.array(spacing, float)
    if mask.sum() * np.prod(spacing) < LEAST_MM3:
        return False
    draw(rng, cut_out(hu, mask, spacing))
    return True


def draw_harmless(rng, hu, labels, spacing, broken):
    """Harmless marks in the vertebrae 0..6 that are not `broken` (7,), in place."""
    for v in np.flatnonzero(np.equal(broken, 0)):
        for share, draw in ((CANAL_SHARE, draw_canal), (BRIGHT_SHARE, draw_bright)):
            if rng.random() < share:
                alter(rng, hu, labels == v + 1, spacing, draw)


def broken_copy(rng, hu, labels, spacing, broken):
    """(float32 HU, broken (7,)) with one to three more vertebrae broken, of those whole."""
    out, broken = hu.astype(np.float32), np.array(broken)  # copies
    large = [(labels == v).sum() * np.prod(spacing) > WHOLE_MM3 for v in range(1, 8)]
    cut_off = np.isin(range(1, 8), labels[[0, -1]])
    rate = np.where(large & ~cut_off & (broken == 0), FRACTURE_RATES, 0)
    count = min(rng.choice([1, 2, 3], p=COUNTS), (rate > 0).sum())
    for v in rng.choice(7, count, False, rate / rate.sum()) if count else ():
        broken[v] = alter(rng, out, labels == v + 1, spacing, draw_break)
    draw_harmless(rng, out, labels, spacing, broken)
    return out, broken
