"""Real necks with landmarks, turned into studies with masks in the competition's layout.

    python tests/necks/real_necks.py NECKS OUT --views 2 --seed 0

NECKS holds `<patient>.nii.gz` (int16 HU; axes x, y front to back, z head to foot), as made
from the public OpenKBP data; `landmarks.json` beside this file says where the levels lie.
OUT gets what `cspine.py train-seg` and `evaluate` read. Here everything is (z, y, x), mm.
"""

import argparse
import gzip
import hashlib
import json
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
LANDMARKS = HERE / "landmarks.json"
LEVELS = ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "T1")

# Who is kept out: the first bytes of the SHA-256 of the patient's name, modulo 100.
TEST_BELOW = 22  # measured on, never trained on
CHOICE_BELOW = 28  # from TEST_BELOW on: choices between trainings
PARTS = "test", "choice", "train"

# The masks: what is bone, and the tube around the spine. Set by eye on a dozen patients.
FINE_MM = 1.5  # grid the source's 2.5 to 5 mm voxels are brought to
BONE_HU = 150
CERTAIN_HU = 230  # bone at any window; between the two nothing is taught
SOFT_HU = 90  # certainly no bone below
MARROW_HU = 0  # inside a body, where worn bone is no brighter than muscle
CORE_SIDE_MM = 8  # the inside of a body, around its centre
CORE_DEPTH_MM = -8, 6
CORE_FROM_DISC_MM = 3
STRAIGHT_MM = 7  # behind the centres of the bodies: the discs' planes end
FRONT_MM = 12  # of the tube, before the bodies' centres
ARCH_FRONT_MM = 8  # before the anterior arch of C1
BACK_MM = 22  # behind the spinous points
BODY_SIDE_MM = 26
PILLAR_SIDE_MM = 30
SPINOUS_SIDE_MM = 14
ATLAS_SIDE_MM = 42
ATLAS_ABOVE_MM = 9  # of the plane through both arches
ATLAS_BELOW_MM = 7
DENS_SIDE_MM = 6.5
DENS_BEHIND_MM = 3.5, 17  # the centre of the anterior arch
LEAST_BIT_MM3 = 300  # about six voxels of the source
ATLAS_DEPTH_MM = 36  # from arch to arch, where the posterior one was not seen

# The views: what studies of the competition measure.
LENGTH_MM = 148, 300
WIDTH_MM = 100, 360
USUAL_MM = 190  # wide
PARTIAL_MM = 50, 140  # long; lacks C1, C7 or both
CLOSER_REACH = 0.25, 0.75, 0.75  # around the vertebrae in `segment`'s second look
PARENTS = dict(whole=0.38, neck=0.42, partial=0.20)  # shares of what it looks into
MAX_TURN = 12  # degrees
MAX_STRETCH = 0.12  # log
AIR_HU = -1024


@dataclass(frozen=True)
class Neck:
    """A CT, `hu` int16 (Z, Y, X), its `spacing` (3,), and where the levels are."""

    name: str
    hu: np.ndarray
    spacing: np.ndarray
    points: dict  # name: (z, y, x) mm from the centre of the first voxel
    midline: np.ndarray  # x of the spinal cord in every slice, mm
    sure: bool = False
    ends: np.ndarray = None  # vertebrae_ends, for who cuts many views


@dataclass(frozen=True)
class View:
    """A box in a neck: its centre, and the half edges in the columns of `axes`, mm."""

    centre: np.ndarray
    axes: np.ndarray


# ==== Reading ====

def part_of(name):
    """What a patient is for: "test" (measured on), "choice" (chosen by) or "train"."""
    number = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    if number < TEST_BELOW:
        return "test"
    return "choice" if number < CHOICE_BELOW else "train"


def read_landmarks(path=LANDMARKS):
    """{patient: entry} of landmarks.json."""
    return json.loads(Path(path).read_text())


def read_neck(folder, name, entry):
    """The CT of one patient, with its landmarks in mm."""
    ct = Path(folder) / "ct"  # with the landmarks beside it, or the CTs alone
    path = (ct if ct.is_dir() else Path(folder)) / f"{name}.nii.gz"
    raw = gzip.decompress(path.read_bytes())
    shape = struct.unpack_from("<3h", raw, 42)
    start = int(struct.unpack_from("<f", raw, 108)[0])
    stored = np.frombuffer(raw, "<i2", np.prod(shape), start)
    hu = stored.reshape(shape[::-1])  # x runs fastest

    spacing = np.array(entry["spacing_mm"][::-1])
    points = {
        point: np.array(at[::-1]) * spacing
        for point, at in entry.get("points", {}).items()
    }
    midline = np.array(entry["midline_x"]) * spacing[2]
    return Neck(name, hu, spacing, points, midline, entry.get("sure", False))


def read_necks(folder, part="", landmarks=LANDMARKS):
    """The patients with reliable landmarks, all or those of one part, by name."""
    for name, entry in sorted(read_landmarks(landmarks).items()):
        if entry.get("sure") and part in ("", part_of(name)):
            yield read_neck(folder, name, entry)


def finer(neck, mm=FINE_MM):
    """The same neck on a grid of `mm`, by cubic interpolation."""
    shape = np.array(neck.hu.shape)
    new = np.rint(shape * neck.spacing / mm).astype(int)
    depth, height, width = new.tolist()

    planes = [
        cv2.resize(np.float32(plane), (width, height), interpolation=cv2.INTER_CUBIC)
        for plane in neck.hu
    ]
    flat = np.array(planes).reshape(len(planes), -1)
    columns = [  # OpenCV's rows end at 32,767 cells
        cv2.resize(part, (part.shape[1], depth), interpolation=cv2.INTER_CUBIC)
        for part in np.array_split(flat, flat.shape[1] // 16_000 + 1, 1)
    ]
    hu = np.concatenate(columns, 1).reshape(depth, height, width)

    spacing = shape * neck.spacing / new
    shift = (neck.spacing - spacing) / 2  # of the first voxel's centre
    points = {point: at + shift for point, at in neck.points.items()}
    below = (np.arange(depth) * spacing[0] - shift[0]) / neck.spacing[0]
    midline = np.interp(below, range(len(neck.midline)), neck.midline) + shift[2]
    hu = np.rint(hu.clip(AIR_HU, 3071)).astype(np.int16)
    return replace(neck, hu=hu, spacing=spacing, points=points, midline=midline)


# ==== Masks ====
# All surfaces stand upright on the sagittal plane: a height z for every depth y.

def axes_mm(shape, spacing):
    """Coordinates z, y, x (mm from the centre of the first voxel) of the voxels."""
    return [np.arange(n) * mm for n, mm in zip(shape, spacing)]


def off_midline(neck):
    """mm of every voxel from the spinal cord, (Z, X)."""
    x = axes_mm(neck.hu.shape, neck.spacing)[2]
    return abs(x - neck.midline[:, None])


def landmark_rows(points):
    """Bodies C2 to T2 and spinous points C2 to T2, each (8, 2) of (z, y); T2 is guessed."""
    bodies = [points[f"{level}_body"][:2] for level in LEVELS[1:]]
    given = [points.get(f"{level}_spinous") for level in LEVELS[1:]]
    offsets = [s[:2] - b for s, b in zip(given, bodies) if s is not None]
    spines = [
        body + np.mean(offsets, 0) if spinous is None else spinous[:2]
        for spinous, body in zip(given, bodies)
    ]
    for row in (bodies, spines):
        row.append(2 * row[-1] - row[-2])
    return np.array(bodies), np.array(spines)


def arches(points):
    """(z, y) of the anterior and the posterior arch of C1."""
    front = points["C1_anterior_arch"][:2]
    back = points.get("C1_posterior_arch")
    if back is None:  # open, or not seen
        back = front + (4, ATLAS_DEPTH_MM)
    return front, back[:2]


def line_height(y, start, end):
    """z at each y of the straight line through two points (z, y)."""
    slope = (end[0] - start[0]) / max(end[1] - start[1], 1)
    return start[0] + slope * (y - start[1])


def disc_height(y, bodies, spines):
    """z at each y of the surface between two neighbours, each given by two rows (z, y)."""
    middle = bodies.mean(0)
    down, back = bodies[1] - bodies[0]
    across = np.array([-back, down]) / np.hypot(down, back)  # (z, y): points backwards
    bend = middle + STRAIGHT_MM * across
    end = spines.mean(0)
    before = line_height(y, middle, bend)
    behind = line_height(y, bend, end)
    return np.where(y < bend[1], before, behind)


def level_map(shape, spacing, points):
    """uint8 (Z, Y): 1 to 8 for C1 to T1, 9 below, 0 above C1; the dens is not yet cut."""
    z, y = axes_mm(shape[:2], spacing)
    bodies, spines = landmark_rows(points)
    front, back = arches(points)

    plane = line_height(y, front, back)
    midway = (back[0] + spines[0][0]) / 2
    low = np.interp(y, (back[1] - 14, back[1]), (0, 1))  # share of the posterior arch
    surfaces = [
        plane - ATLAS_ABOVE_MM,
        (plane + ATLAS_BELOW_MM) * (1 - low) + midway * low,
    ]
    for k in range(7):
        surfaces.append(disc_height(y, bodies[k : k + 2], spines[k : k + 2]))
    surfaces = np.maximum.accumulate(surfaces)
    return (z[:, None] > surfaces[:, None]).sum(0).astype(np.uint8)


def tube(neck):
    """bool (Z, Y, X): near enough to the spine to be a vertebra."""
    z, y, _ = axes_mm(neck.hu.shape, neck.spacing)
    bodies, spines = landmark_rows(neck.points)
    front, back = arches(neck.points)

    front = front + (0, FRONT_MM - ARCH_FRONT_MM)
    centre_y = np.interp(z, *np.vstack([front, bodies]).T)
    spinous_y = np.interp(z, *np.vstack([back, spines]).T)
    behind = y - centre_y[:, None]  # (Z, Y)
    beyond = y - spinous_y[:, None]

    side = np.where(behind < STRAIGHT_MM, BODY_SIDE_MM, PILLAR_SIDE_MM)
    taper = np.interp(beyond, (-10, 0), (0, 1))
    side = side * (1 - taper) + SPINOUS_SIDE_MM * taper
    atlas = level_map(neck.hu.shape, neck.spacing, neck.points) == 1
    side = np.where(atlas, ATLAS_SIDE_MM, side)

    deep = (behind > -FRONT_MM) & (beyond < BACK_MM)
    near = off_midline(neck)[:, None] < side[:, :, None]
    return deep[:, :, None] & near


def dens(neck):
    """bool (Z, Y, X): where bone at the height of C1 belongs to C2."""
    y = axes_mm(neck.hu.shape, neck.spacing)[1]
    front, _ = arches(neck.points)
    low, high = front[1] + np.array(DENS_BEHIND_MM)
    deep = (y > low) & (y < high)
    near = off_midline(neck) < DENS_SIDE_MM  # (Z, X)
    return deep[:, None] & near[:, None]


def body_cores(neck):
    """uint8 (Z, Y, X): 2 to 8 surely inside the bodies of C2 to T1, else 0."""
    shape, spacing = neck.hu.shape, neck.spacing
    z, y, _ = axes_mm(shape, spacing)
    bodies, _ = landmark_rows(neck.points)
    behind = y - np.interp(z, *bodies.T)[:, None]  # (Z, Y)

    level = level_map(shape, spacing, neck.points)
    step = round(CORE_FROM_DISC_MM / spacing[0])
    above = np.roll(level, step, 0)
    below = np.roll(level, -step, 0)
    front, back = CORE_DEPTH_MM
    inside = (level > 1) & (level < 9)
    inside &= (level == above) & (level == below)
    inside &= (behind > front) & (behind < back)

    near = off_midline(neck) < CORE_SIDE_MM  # (Z, X)
    core = inside[:, :, None] & near[:, None] & (neck.hu > MARROW_HU)
    return np.where(core, level[:, :, None], 0).astype(np.uint8)


def nearby_share(mask, edge):
    """Share of a bool (Z, Y, X) within a cube of odd `edge` around each voxel, float32."""
    out = torch.from_numpy(mask)[None, None].float()
    for axis in range(3):
        kernel = [1, 1, 1]
        kernel[axis] = edge
        out = F.avg_pool3d(out, kernel, 1, [k // 2 for k in kernel])
    return out[0, 0].numpy()


def bounding_box(mask):
    """Slices around what is True."""
    out = []
    for others in ((1, 2), (0, 2), (0, 1)):
        inside = np.flatnonzero(mask.any(others))
        out.append(slice(inside[0], inside[-1] + 1))
    return tuple(out)


def without_bits(labels, spacing):
    """The labels less stray bits: voxels with too little of their level within 5 mm."""
    out = labels.copy()
    edge = 2 * round(5 / np.mean(spacing)) + 1
    least = LEAST_BIT_MM3 / np.prod(spacing) / edge**3
    for level in np.unique(labels[labels > 0]):
        box = bounding_box(labels == level)
        mine = labels[box] == level
        out[box][mine & (nearby_share(mine, edge) < least)] = 0
    return out


def make_mask(neck):
    """uint8 (Z, Y, X): 1 to 7 for C1 to C7, 8 for T1, else 0."""
    level = level_map(neck.hu.shape, neck.spacing, neck.points)
    bone = tube(neck) & (neck.hu > BONE_HU)
    bone &= ((level > 0) & (level < 9))[:, :, None]
    labels = np.where(bone, level[:, :, None], 0).astype(np.uint8)
    labels[(labels == 1) & dens(neck)] = 2
    labels = np.maximum(labels, body_cores(neck))
    return without_bits(labels, neck.spacing)


def highest_near(labels):
    """The highest of the 27 labels around each voxel."""
    labels = torch.from_numpy(labels)[None, None].float()
    return F.max_pool3d(labels, 3, 1, 1)[0, 0].numpy()


def uncertain(neck, labels):
    """bool (Z, Y, X): where so coarse a CT cannot teach: edges, borders between levels."""
    seen = labels > 0
    highest = highest_near(labels)
    lowest = 9 - highest_near(np.where(seen, 9 - labels, 0))  # of the vertebrae
    outermost = highest_near(np.uint8(~seen)) > 0

    between = seen & ((highest != labels) | (lowest != labels))
    faint_edge = seen & outermost & (neck.hu < CERTAIN_HU)
    faint = tube(neck) & (neck.hu > SOFT_HU) & ~seen
    unknown = between | faint_edge | faint | (~seen & (highest > 0))
    return unknown & (body_cores(neck) == 0)


# ==== Views ====

def extent_mm(neck):
    return np.array(neck.hu.shape) * neck.spacing


def vertebrae_ends(neck, labels):
    """First and last mm of C1 to C7 on each axis, (2, 3)."""
    if neck.ends is not None:
        return neck.ends
    box = bounding_box((labels > 0) & (labels < 8))
    return np.array([[s.start, s.stop - 1] for s in box]).T * neck.spacing


def random_turn(rng):
    """A rotation of up to MAX_TURN degrees about each axis, with a stretch, (3, 3)."""
    angles = np.radians(rng.uniform(-MAX_TURN, MAX_TURN, 3))
    skew = np.cross(np.eye(3), angles)
    turn = torch.matrix_exp(torch.from_numpy(skew)).numpy()
    return turn * np.exp(rng.uniform(-MAX_STRETCH, MAX_STRETCH, 3))


def box_view(low, high):
    return View((low + high) / 2, np.diag((high - low) / 2))


def whole_view(neck, labels, rng=None):
    """The whole volume."""
    half = neck.spacing / 2
    return box_view(-half, extent_mm(neck) - half)


def in_plane(neck, labels, rng):
    """First and last mm in y and x, (2, 2): a square, mostly 150 to 250 mm wide."""
    ends = vertebrae_ends(neck, labels)[:, 1:]
    middle = ends.mean(0)
    width = np.exp(rng.normal(np.log(USUAL_MM), 0.28)).clip(*WIDTH_MM)
    spare = max((width - np.ptp(ends, 0).max()) / 2, 0)

    off = rng.uniform(-0.7, 0.7, 2) * spare
    middle = middle + off * (1, 0.5) - (0.1 * width, 0)  # the spine lies at the back
    return middle + np.outer([-width / 2, width / 2], [1, 1])


def neck_view(neck, labels, rng):
    """As the competition's studies are cut: C1 to C7 in view."""
    ends = vertebrae_ends(neck, labels)[:, 0]
    least = np.ptp(ends)
    most = extent_mm(neck)[0]
    length = rng.uniform(*LENGTH_MM)
    length = min(max(length, least + 12), most)
    above = rng.uniform(0.1, 0.9) * (length - least)
    top = np.clip(ends[0] - above, 0, max(most - length, 0))
    low, high = in_plane(neck, labels, rng)
    return box_view(np.r_[top, low], np.r_[top + length, high])


def partial_view(neck, labels, rng):
    """A study that lacks C1, C7 or both."""
    ends = vertebrae_ends(neck, labels)[:, 0]
    length = rng.uniform(*PARTIAL_MM)
    middle = rng.uniform(*ends)
    top = np.clip(middle - length / 2, 0, extent_mm(neck)[0] - length)
    low, high = in_plane(neck, labels, rng)
    return box_view(np.r_[top, low], np.r_[top + length, high])


def closer_view(neck, labels, rng):
    """What `segment` looks at the second time: a box around what it found, inaccurate."""
    kind = rng.choice([*PARENTS], p=[*PARENTS.values()])
    parent = KINDS[kind](neck, labels, rng)
    low, high = parent.centre + np.outer([-1, 1], parent.axes.sum(1))
    ends = vertebrae_ends(neck, labels).clip(low, high)
    first, last = ends + rng.normal(0, (7, 5, 5), (2, 3))
    missed = rng.random(2) < 0.12  # C1 or C7 not found
    first[0] += 15 * missed[0]
    last[0] -= 15 * missed[1]
    reach = (last - first) * CLOSER_REACH
    return box_view(np.maximum(first - reach, low), np.minimum(last + reach, high))


KINDS = dict(neck=neck_view, whole=whole_view, partial=partial_view, closer=closer_view)


def draw_view(neck, labels, rng, kind):
    """A view of one of KINDS, mostly turned a little, mirrored in half of the cases."""
    view = KINDS[kind](neck, labels, rng)
    axes = view.axes
    if rng.random() < 0.7:
        axes = random_turn(rng) @ axes
    if rng.random() < 0.5:
        axes = axes * (1, 1, -1)
    return View(view.centre, axes)


def sample(array, spacing, view, shape, window=((-1, -1, -1), (1, 1, 1)), nearest=False):
    """float32 tensor `shape`: an array (Z, Y, X) in a view, or in a window of it; 0 outside.

    The array may be a tensor on a GPU; there the sample is made, too.
    """
    low, high = np.array(window)
    axes = view.axes * (high - low) / 2
    centre = view.centre + view.axes @ (high + low) / 2

    reach = abs(axes).sum(1)
    last = np.array(array.shape) - 1
    start = (centre - reach) // spacing - 1
    start = start.clip(0, last).astype(int)
    stop = (centre + reach) // spacing + 3
    stop = stop.clip(start + 1, last + 1).astype(int)
    part = torch.as_tensor(array[tuple(map(slice, start, stop))])
    part = part[None, None].float()

    half = np.array(part.shape[2:]) * spacing / 2  # mm
    middle = (start - 0.5) * spacing + half
    matrix = np.c_[axes, centre - middle] / half[:, None]
    matrix = matrix[::-1, [2, 1, 0, 3]].copy()  # grid_sample's axes are x, y, z
    theta = torch.from_numpy(np.float32(matrix))[None].to(part.device)
    grid = F.affine_grid(theta, (1, 1, *shape), align_corners=False)
    mode = "nearest" if nearest else "bilinear"
    return F.grid_sample(part, grid, mode, align_corners=False)[0, 0]


def view_hu(neck, view, shape, **others):
    """float32 tensor of the HU of a view; air where there is no CT."""
    above_air = neck.hu + -AIR_HU
    return sample(above_air, neck.spacing, view, shape, **others) + AIR_HU


def view_labels(neck, labels, view, shape, **others):
    """uint8 tensor of the labels of a view."""
    return sample(labels, neck.spacing, view, shape, nearest=True, **others).byte()


# ==== Studies ====

def cells(count):
    """Centres of `count` cells of equal size, from 0 to 1."""
    return (np.arange(count) + 0.5) / count


def harder_kernel(hu, share):
    """Edges sharpened by a share of what a mean over 3 x 3 x 3 voxels takes away."""
    soft = F.avg_pool3d(hu[None, None], 3, 1, 1)[0, 0]
    return hu + share * (hu - soft)


def add_couch(hu, extent, rng):
    """A bent board behind the body, in place; hu float32 (Z, Y, X), extent in mm."""
    depth, height, width = hu.shape
    body = (hu > -100).float().mean((0, 2)).cpu()  # of every row
    rows = np.flatnonzero(body > 0.03)
    if not len(rows) or rows[-1] > height - 4:
        return
    y = cells(height)[:, None]
    x = cells(width) - 0.5
    middle = y[rows[-1]] + rng.uniform(2, 12) / extent[1]
    thick = rng.uniform(2, 7) / extent[1]
    bend = rng.uniform(0, 0.3) * x**2
    board = torch.from_numpy(abs(y + bend - middle) < thick / 2).to(hu.device)
    hu[:, board] = hu[:, board].clamp(min=rng.uniform(-450, 300))


def cut_circle(hu, share):
    """Air outside the scanner's circle, a share of the width across; in place."""
    depth, height, width = hu.shape
    y = cells(height)[:, None] - 0.5
    x = cells(width) - 0.5
    outside = torch.from_numpy(np.hypot(y, x) > share / 2).to(hu.device)
    hu[:, outside] = AIR_HU


def dress(hu, extent, rng):
    """A view, a tensor, as another scanner shows it: kernel, couch, circle."""
    if rng.random() < 0.5:
        hu = harder_kernel(hu, rng.uniform(0, 1.2))
    if rng.random() < 0.5:
        add_couch(hu, extent, rng)
    if rng.random() < 0.35:
        cut_circle(hu, rng.uniform(0.97, 1.05))
    return hu


def make_study(neck, labels, rng, kind, columns=256):
    """A study of one view: what phantoms.write_phantom writes; labels with T1 as 8."""
    from writers import Phantom  # of the repository's tools

    view = draw_view(neck, labels, rng, kind)
    edges = 2 * np.linalg.norm(view.axes, axis=0)
    pixel = edges[1:].max() / columns  # square
    thick = rng.uniform(0.5, 3.0 if rng.random() < 0.3 else 1.25)
    spacing = np.array([thick, pixel, pixel])
    shape = tuple(np.rint(edges / spacing).astype(int).tolist())
    view = View(view.centre, view.axes * shape * spacing / edges)
    edges = shape * spacing

    hu = dress(view_hu(neck, view, shape), edges, rng).numpy()
    hu += rng.uniform(5, 60) * rng.standard_normal(shape, np.float32)
    lps_from_voxel = np.eye(4)
    lps_from_voxel[:3, :3] = np.diag(spacing * (-1, 1, 1))[::-1]
    lps_from_voxel[:3, 3] = 0, 0, edges[0]
    return Phantom(
        hu=np.rint(hu.clip(AIR_HU, 3071)).astype(np.int16),
        label=view_labels(neck, labels, view, shape).numpy(),
        spacing=tuple(spacing.tolist()),
        affine=lps_from_voxel,
        fractured=np.zeros(7, np.uint8),  # none is known
        boxes=np.zeros((0, 5), int))


def write_studies(folder, out, views, seed, part="train", landmarks=LANDMARKS):
    """A data set under `out`: `views` studies of every patient of a part."""
    import phantoms

    rows = []
    for coarse in read_necks(folder, part, landmarks):
        neck = finer(coarse)
        labels = make_mask(neck)
        for k in range(views):
            rng = np.random.default_rng([seed, k, *neck.name.encode()])
            kind = list(KINDS)[k % len(KINDS)]
            study = make_study(neck, labels, rng, kind)
            uid = f"1.2.826.0.1.3680043.9998.{seed}.{len(rows)}"
            folders = out / "train_images", out / "segmentations"
            phantoms.write_phantom(study, uid, *folders, [seed, len(rows)])
            rows.append((uid, 0, *study.fractured.tolist()))
            print(uid, neck.name, kind, study.hu.shape, flush=True)
    phantoms.write_tables(out, rows, [])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("necks", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--views", type=int, default=2, help="studies a patient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="train", choices=PARTS)
    o = parser.parse_args()
    write_studies(o.necks, o.out, o.views, o.seed, o.part)


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tools")]
    main()
