"""A second generator of synthetic neck CTs, drawn without sight of tests/phantoms.py.

Weights that are trained on two hands lean less on the habits of either. Here a vertebra is a smooth
union of solids, each given by its distance function; a fracture is a wavy plane through it.

    python tests/other_hand.py OUT --studies 50 --test-studies 10 --seed 0 [--wide] [--workers 2]

writes the layout of the competition: train_images, train.csv, test_images, test.csv,
test_labels.csv, sample_submission.csv and the masks of all studies in segmentations.

The patient's frame is x left, y back, z up in mm, upright, C4 at 0. Each vertebra and the head
have a frame of their own. Volumes are (Z, Y, X), foot first, in a grid along DICOM's LPS.
Levels count 1 to 7 for C1 to C7, 8 to 11 for T1 to T4. Sizes of solids are half axes.
"""

import argparse
import struct
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pydicom

from phantoms import write_tables

SIDES = (-1, 1)  # right, left
LEVELS = range(1, 12)  # C1 to T4
FAR_MM = 9  # distances are not computed beyond
MATRIX, LARGE_MATRIX, PIXEL_MM, MAX_SLICES = 256, 352, (0.3, 0.72), 260
FRACTURE_SHARES = (0.14, 0.24, 0.05, 0.07, 0.15, 0.17, 0.18)  # of C1 to C7 in fractured patients
HEIGHTS = {3: 13.9, 4: 13.6, 5: 13.4, 6: 13.7, 7: 14.9, 8: 16.8, 9: 17.8, 10: 18.4, 11: 19}  # mm
TILTS = {11: 6, 10: 5, 9: 3, 8: 0, 7: -4, 6: -10, 5: -16, 4: -21, 3: -25, 2: -28, 1: -28}  # degrees
CERVICAL = dict(  # of C3 to C7, mm; spine: how far back and down the spinous process ends
    width=(8.7, 8.9, 9.3, 10.0, 11.2), depth=(8.0, 8.0, 8.1, 8.3, 8.5),
    uncus=(4.0, 4.0, 4.2, 4.0, 3.0), pillar_x=(18.3, 18.8, 19.2, 19.6, 20),
    pillar_y=(13, 13, 13.2, 13.4, 13.8), lamina=(23.8, 24, 24.2, 24.6, 25),
    spine=(36, 36, 38, 44, 57), drop=(-7, -8, -9, -11, -17))
THORACIC = dict(  # of T1 to T4, mm
    width=(14, 13.6, 13.4, 13.4), depth=(8.2, 8.6, 9, 9.4), spine=(54, 52, 52, 52),
    drop=(-20, -24, -27, -28), span=(36, 33, 31, 30))
DISCS = {  # half width and depth of the disc below a level, mm
    2: (8.6, 7.4), 3: (8.4, 7.8), 4: (8.6, 7.8), 5: (9.1, 7.8), 6: (9.9, 7.8), 7: (11.0, 7.8),
    8: (13.5, 8.4), 9: (13.5, 8.4), 10: (13.5, 8.4)}
RIBS = {8: (1.0, 46, 30), 9: (1.28, 62, 42), 10: (1.45, 75, 50), 11: (1.55, 80, 55)}
TEETH = np.array(  # x, y of one half of the upper arch, from the molars to the middle
    [(27, -42), (26.5, -51), (25, -60), (22, -69), (17, -78), (11, -84), (4, -87)], float)
JAW = np.array(
    [(46, -24, -24), (43, -38, -33), (37, -54, -36), (29, -70, -38), (19, -83, -39), (8, -91, -39)],
    float)
SKIN = dict(  # mm at levels; -5 is the crown of the head, 15 the chest
    side=((-5, 60), (0, 62), (2, 60), (4, 55), (6, 57), (7, 66), (8, 90), (9, 150), (10, 175),
          (15, 190)),
    front=((-5, -50), (1, -50), (3, -52), (4.5, -48), (6, -46), (8, -56), (10, -72), (15, -110)),
    back=((-5, 60), (0, 64), (2, 60), (4, 58), (6, 66), (8, 82), (10, 92), (15, 98)))
FACE = (([0, -7, 90], [78, 98, 73]), ([0, 26, 45], [68, 62, 48]), ([0, -48, 5], [62, 62, 62]),
        ([0, -60, -25], [47, 48, 32]), ([0, -104, 12], [12, 12, 16]))  # skin in the head's frame
# Level: x, y, half width, half depth; y counts from the vertebral body or from the canal.
MUSCLES = (
    ("body", {-1: (6, -12, 6, 4), 2: (8, -11, 7, 4), 5: (9, -12, 8, 4.5), 8: (8, -13, 6, 4),
              12: (8, -13, 3, 3)}),  # longus colli
    ("body", {-0.5: (50, 15, 9, 15), 2: (49, 6, 9, 18), 4: (45, -10, 9, 18), 6: (33, -32, 10, 13),
              8: (20, -46, 10, 6), 10: (16, -52, 7, 4)}),  # sternocleidomastoid
    ("body", {3: (24, -4, 5, 5), 5: (28, -2, 7, 8), 7: (36, -6, 8, 9), 9: (46, -12, 9, 7)}),
    ("body", {2: (30, 6, 5, 6), 5: (33, 8, 8, 9), 8: (42, 6, 10, 11), 9: (50, 4, 9, 8)}),
    ("body", {1: (38, 12, 7, 8), 3: (40, 18, 8, 9), 5: (42, 24, 9, 11), 8: (52, 42, 12, 10),
              10: (62, 48, 11, 8)}),  # levator scapulae, after two scalenes
    ("canal", {-0.5: (40, 22, 16, 7), 2: (33, 20, 15, 8), 5: (24, 28, 17, 6), 8: (15, 38, 14, 5),
               11: (12, 42, 10, 4)}),  # splenius
    ("canal", {-0.5: (17, 38, 15, 9), 2: (15, 29, 13, 9), 5: (14, 21, 12, 6), 8: (18, 22, 8, 7),
               11: (18, 22, 6, 6)}),  # semispinalis
    ("canal", {1.5: (13, 18, 12, 7), 3: (14, 17, 12, 7), 5: (12, 14, 11, 7), 8: (12, 18, 11, 9),
               11: (11, 18, 11, 9)}),  # multifidus
    ("canal", {-0.3: (16, 22, 13, 8), 0.7: (24, 10, 13, 9), 1.4: (22, 10, 13, 8),
               1.9: (18, 14, 7, 5)}),  # below the occiput
    ("canal", {3: (30, 8, 6, 7), 5: (30, 11, 8, 8), 8: (33, 18, 11, 10), 11: (34, 22, 13, 10)}),
    ("canal", {0: (14, 47, 12, 3), 2: (16, 40, 16, 4), 4: (24, 38, 24, 4.5), 6: (36, 38, 34, 6),
               8: (58, 40, 48, 8), 11: (60, 48, 60, 7)}),  # trapezius
    ("canal", {6.5: (12, 40, 10, 3), 8: (24, 36, 24, 5), 11: (36, 38, 34, 5)}),  # rhomboids
    ("body", {3.4: (9, -42, 9, 3.5), 5: (13, -45, 10, 4), 8: (13, -44, 10, 4),
              10: (16, -50, 10, 4)}),  # below the hyoid
    ("body", {8: (80, 20, 26, 22), 10: (95, 20, 34, 28), 15: (100, 20, 30, 30)}))  # shoulder
CHEWING = (([55, -28, -6], [6.5, 17, 34]), ([36, -27, 2], [7.5, 14, 28]))  # head's frame

F32 = np.float32
Primitive = namedtuple("Primitive", "low high distance")  # corners (3,) mm; function of x, y, z
Bone = namedtuple("Bone", "cortex spongy shell")  # HU, HU, mm
Broken = namedtuple("Broken", "parts wedge")  # fractures; the share of height lost in front
Surface = namedtuple("Surface", "box distance")  # slices (Z, Y, X); mm of its voxels
Vertebra = namedtuple("Vertebra", "box distance gap depth frame")


# ============================ Geometry: frames and boxes of voxels ============================


def rotation(axis, degrees):
    """The matrix (3, 3) that turns about x, y or z (axis 0, 1, 2)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[[1, 0, 0], [0, c, -s], [0, s, c]], [[c, 0, s], [0, 1, 0], [-s, 0, c]],
                     [[c, -s, 0], [s, c, 0], [0, 0, 1]]][axis])


def smooth_min(a, b, blend):
    """The smaller of two distances (mm), rounded where they differ by less than `blend` mm."""
    if blend <= 0:
        return np.minimum(a, b)
    near = np.maximum(blend - np.abs(a - b), 0) / blend
    return np.minimum(a, b) - near * near * (blend * 0.25)


def smooth_max(a, b, blend):
    """The larger of two distances (mm), rounded likewise."""
    return -smooth_min(-a, -b, blend)


def smooth_step(x, start, stop):
    """0 before start, 1 after stop."""
    t = np.clip((x - start) / (stop - start), 0, 1)
    return t * t * (3 - 2 * t)


def cover(distance, width):
    """How much of each voxel lies inside, 0 to 1, of an edge `width` mm wide."""
    return np.clip(0.5 - distance / width, 0, 1)


class Frame:
    """A local frame in mm: matrix (3, 3) @ (i, j, k) + origin (3,) for the index of a voxel."""

    def __init__(self, matrix, origin):
        self.matrix, self.origin = np.asarray(matrix, float), np.asarray(origin, float)
        self.inverse = np.linalg.inv(self.matrix)

    def below(self, turn, position):
        """The frame turned by `turn` (3, 3) with its origin at `position` (mm) of this one."""
        return Frame(turn.T @ self.matrix, turn.T @ (self.origin - position))

    def moved(self, shift):
        """The frame with its origin at `shift` (mm) of this one."""
        return Frame(self.matrix, self.origin - np.array(shift, float))

    def coarser(self, factor):
        """The same frame for a grid of half the rows and columns and every `factor`-th slice."""
        return Frame(self.matrix @ np.diag([2, 2, factor]),
                     self.origin + self.matrix @ [0.5, 0.5, 0])

    def box(self, low, high, inside):
        """Slices (Z, Y, X) that cover a local box (mm) within other slices; None if empty."""
        corners = np.array(list(product(*zip(low, high))))
        index = (corners - self.origin) @ self.inverse.T
        start = np.maximum(np.floor(index.min(0)).astype(int)[::-1], [s.start for s in inside])
        stop = np.minimum(np.ceil(index.max(0)).astype(int)[::-1] + 1, [s.stop for s in inside])
        return None if (stop <= start).any() else tuple(map(slice, start, stop))

    def coordinates(self, box):
        """Local x, y, z (mm, float32), each (Z, Y, X), of the voxels of a box."""
        k, j, i = np.ogrid[box]
        return [(row[0] * i + start).astype(F32) + (row[1] * j).astype(F32)
                + (row[2] * k).astype(F32) for row, start in zip(self.matrix, self.origin)]


def whole(shape):
    """The box of all voxels."""
    return tuple(slice(0, n) for n in shape)


def overlap(a, b):
    """The box common to two boxes, seen from the corner of each; None if there is none."""
    start = [max(s.start, t.start) for s, t in zip(a, b)]
    stop = [min(s.stop, t.stop) for s, t in zip(a, b)]
    if any(low >= high for low, high in zip(start, stop)):
        return None
    return [tuple(slice(low - s.start, high - s.start) for low, high, s in zip(start, stop, box))
            for box in (a, b)]


# ============================ Solids: distances (mm, negative inside) ============================


def sum_of_squares(values):
    x, y, z = values
    return x ** 2 + y ** 2 + z ** 2


def relative(points, centre, turn=None):
    """x, y, z from a centre along the columns of a rotation (3, 3), float32."""
    x, y, z = (p - F32(c) for p, c in zip(points, centre))
    if turn is None:
        return x, y, z
    return [(c[0] * x + c[1] * y + c[2] * z).astype(F32) for c in turn.T]


def capsule(start, end, radius, end_radius=None, stretch=1.0):
    """A rod with round ends between two points, `stretch` times as high as wide."""
    start, end = np.array(start, float), np.array(end, float)
    end_radius = radius if end_radius is None else end_radius
    squeeze, along = 1 / stretch, (end - start) * [1, 1, 1 / stretch]
    per_square = 1 / (float(along @ along) + 1e-9)
    step = F32(along)

    def distance(x, y, z):
        x, y, z = relative((x, y, z), start)
        z = z * squeeze
        t = np.clip((x * step[0] + y * step[1] + z * step[2]) * per_square, 0, 1)
        to_axis = sum_of_squares([p - t * s for p, s in zip((x, y, z), step)])
        return np.sqrt(to_axis) - (radius + t * (end_radius - radius))

    extent = max(radius, end_radius) * np.array([1, 1, max(1, stretch)])
    return Primitive(np.minimum(start, end) - extent, np.maximum(start, end) + extent, distance)


def polyline(points, radii, stretch=1.0):
    """A chain of rods through points; one radius for all or one a point."""
    radii = radii if np.ndim(radii) else [radii] * len(points)
    rods = [capsule(*ends, *sizes, stretch)
            for ends, sizes in zip(pairwise(points), pairwise(radii))]

    def distance(x, y, z):
        return reduce(np.minimum, (rod.distance(x, y, z) for rod in rods))

    return Primitive(np.min([rod.low for rod in rods], 0), np.max([rod.high for rod in rods], 0),
                     distance)


def ellipsoid(centre, radii, turn=None):
    """An ellipsoid, turned by a rotation (3, 3)."""
    centre, radii = np.array(centre, float), np.array(radii, float)
    extent = radii if turn is None else np.sqrt(turn ** 2 @ radii ** 2)

    def distance(x, y, z):
        scaled = [p / r for p, r in zip(relative((x, y, z), centre, turn), F32(radii))]
        one = np.sqrt(sum_of_squares(scaled))
        two = np.sqrt(sum_of_squares([p / r for p, r in zip(scaled, F32(radii))]))
        return one * (one - 1) / (two + 1e-6)

    return Primitive(centre - extent, centre + extent, distance)


def rounded_box(centre, half, radius, turn=None):
    """A box of half edges `half`, rounded by a radius, turned by a rotation (3, 3)."""
    centre, half = np.array(centre, float), np.array(half, float)
    extent = half if turn is None else np.abs(turn) @ half
    core = F32(np.maximum(half - radius, 0.01))

    def distance(x, y, z):
        x, y, z = (np.abs(p) - c for p, c in zip(relative((x, y, z), centre, turn), core))
        outside = np.sqrt(sum_of_squares([np.maximum(p, 0) for p in (x, y, z)]))
        return outside + np.minimum(np.maximum(np.maximum(x, y), z), 0) - radius

    return Primitive(centre - extent, centre + extent, distance)


def slab(start, end, thickness, height, radius, tilt=0):
    """A rounded plate from start to end, upright but for `tilt` degrees."""
    start, end = np.array(start, float), np.array(end, float)
    length = np.linalg.norm(end - start)
    along = (end - start) / length
    across = np.cross(along, [0, 0, 1.0])
    across /= np.linalg.norm(across)
    up = np.cross(across, along)
    if tilt:
        c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
        across, up = c * across + s * up, c * up - s * across
    return rounded_box((start + end) / 2, [length / 2 + radius, thickness / 2, height / 2], radius,
                       np.stack([along, across, up], 1))


def vertebral_body(width, depth, height, power, uncus=0.0, lip=1.2, wedge=0.0, waist=0.08,
                   cave=0.5, lift=0.0):
    """A drum with hollow ends, flat at the back: width and depth are half axes, height is whole.

    uncus: the hooks at the sides of the upper end; lip: how far the lower end hangs in front;
    wedge: the share of the height lost in front; cave: depth of the hollows; lift: shift upwards.
    """
    def distance(x, y, z):
        z = z - lift
        side, back = np.abs(x) * (1 / width), y * (1 / depth)
        radius = (side ** power + np.abs(back) ** power) ** (1 / power)
        waisted = 1 - waist * np.clip(1 - (z * (2 / height)) ** 2, 0, 1)
        wall = (radius / waisted - 1) * (depth * 0.95)
        wall = smooth_max(wall, y - depth * 0.86, 1.5)
        hollow = cave * np.clip(1 - radius * radius, 0, 1)
        top, bottom = height / 2 - hollow, -height / 2 + hollow
        if uncus:
            top = top + uncus * smooth_step(side, 0.55, 0.97) * smooth_step(back, -0.7, 0.1)
            top = top + 0.05 * y
            bottom = bottom + 0.55 * uncus * smooth_step(side, 0.6, 1.0)
        if wedge:
            top = top - wedge * height * smooth_step(-back, -0.7, 0.9)
        bottom = bottom - lip * smooth_step(-back, 0.2, 1.0)
        return smooth_max(smooth_max(wall, z - top, 2.0), bottom - z, 2.0)

    extent = np.array([width, depth, height / 2 + uncus + lip + 1 + abs(lift)])
    return Primitive(-extent, extent, distance)


def articular_pillar(centre, half_x, half_y, half_height, slope):
    """A parallelogram seen from the side, whose facets fall backwards at `slope` degrees."""
    centre = np.array(centre, float)
    s, c = F32(np.sin(np.radians(slope))), F32(np.cos(np.radians(slope)))

    def distance(x, y, z):
        x, y, z = relative((x, y, z), centre)
        wall = smooth_max(np.abs(x) - half_x, np.abs(y + 0.08 * z) - half_y, 3)
        return smooth_max(wall, np.abs(s * y + c * z) - F32(half_height), 1.8)

    extent = np.array([half_x, half_y + 2, (half_height + half_y * s) / c])
    return Primitive(centre - extent, centre + extent, distance)


class Solid:
    """A smooth union of primitives from which others are cut, in the order of the calls."""

    def __init__(self):
        self.parts = []

    def add(self, primitive, blend=2.0):
        self.parts.append((primitive, blend, False))

    def cut(self, primitive, blend=1.0):
        self.parts.append((primitive, blend, True))

    def corners(self):
        """The corners (mm) of a box around the solid."""
        kept = [primitive for primitive, _, is_cut in self.parts if not is_cut]
        return np.min([p.low for p in kept], 0) - 3, np.max([p.high for p in kept], 0) + 3

    def distance(self, frame, box):
        """Distance (Z, Y, X) in mm, float32, of the voxels of a box; at most FAR_MM."""
        out = np.full([s.stop - s.start for s in box], FAR_MM, F32)
        for primitive, blend, is_cut in self.parts:
            margin = max(blend, 2.5) + 0.8
            near = frame.box(primitive.low - margin, primitive.high + margin, box)
            if near is None:
                continue
            at = overlap(box, near)[0]
            new = primitive.distance(*frame.coordinates(near)).astype(F32)
            join, new = (smooth_max, -new) if is_cut else (smooth_min, new)
            out[at] = join(out[at], new, blend)
        return out


# ============================ Fractures ============================


class Fracture:
    """A wavy plane through `point` (mm) of a vertebra's frame, `width` mm wide.

    It reaches `reach` mm around `centre`; what lies beyond the plane there is displaced by `move`.
    Its normal is varied by `spread`.
    """

    def __init__(self, rng, width, point, normal, reach, centre=None, move=None, waves=0.8,
                 spread=0.2):
        normal = varied_vector(rng, normal, spread) if spread else normal
        self.normal = normal / np.linalg.norm(normal)
        self.point = np.array(point, float)
        self.centre = self.point if centre is None else np.array(centre, float)
        self.width, self.reach, self.move, self.waves = width, reach, move, waves
        self.wave_vectors = F32(rng.normal(0, 0.45, (3, 3)))
        self.phases = F32(rng.uniform(0, 6.28, 3))

    def distances(self, x, y, z):
        """Distance beyond the plane, and inward from the end of the fracture's reach, mm."""
        from_centre = sum_of_squares(relative((x, y, z), self.centre))
        x, y, z = relative((x, y, z), self.point)
        normal = F32(self.normal)
        beyond = x * normal[0] + y * normal[1] + z * normal[2]
        for m, size in enumerate((0.8, 0.5, 0.35)):
            wave = self.wave_vectors[m]
            along = x * wave[0] + y * wave[1] + z * wave[2]
            beyond = beyond + self.waves * size * np.sin((1 + m) * along + self.phases[m])
        return beyond, self.reach - np.sqrt(from_centre)

    def opening(self):
        """How far the displacement widens the gap, mm."""
        if self.move is None:
            return 0.0
        return 0.8 * max(0.0, float(np.dot(self.move, self.normal)))


def varied_vector(rng, vector, spread):
    return np.array(vector, float) + rng.normal(0, spread, 3)


def draw_kind(rng, shares):
    weights = np.array(list(shares.values()))
    return rng.choice(list(shares), p=weights / weights.sum())


def break_vertebra(rng, level, height):
    """The fractures of a vertebra of a height (mm), of one random kind: Broken."""
    side = rng.choice(SIDES)
    crack = partial(Fracture, rng, rng.uniform(1.1, 2.7))
    shift = rng.uniform(1.0, 4.0) if rng.random() < 0.5 else 0.0
    if level == 1:
        return Broken(break_atlas(rng, crack, side, shift), 0)
    if level == 2:
        return Broken(break_axis(rng, crack, side, shift), 0)
    shares = dict(burst=0.12, sagittal=0.1, teardrop=0.13, wedge=0.16, lamina=0.14, pillar=0.13,
                  transverse=0.1, spinous=0.1 if level < 6 else 0.22, pedicle=0.06)
    kind = draw_kind(rng, shares)
    if kind in ("burst", "sagittal", "teardrop", "wedge"):
        return break_body(rng, crack, kind, side, shift, height)
    return Broken(break_arch(rng, crack, kind, side, shift, level), 0)


def break_atlas(rng, crack, side, shift):
    """Fractures of C1: of an arch, of a lateral mass, or Jefferson's, in which a side moves out."""
    kind = draw_kind(rng, dict(front=0.2, back=0.3, jefferson=0.35, mass=0.15))
    front = side * rng.uniform(3, 9)
    if kind == "front":
        return [crack([front, -10, 0], [1, 0.25 * side, 0], 9)]
    if kind == "mass":
        return [crack([side * 17, 2, 0], [0.5 * side, 1, 0], 16)]
    parts = []
    if kind == "back":
        for one in [side] if rng.random() < 0.5 else SIDES:
            x = one * rng.uniform(12, 18)
            parts.append(crack([x, 25 - 0.3 * (abs(x) - 14), 0], [0.8, -0.6 * one, 0.2], 9))
        return parts
    parts.append(crack([front, -9.5, 0], [side, 0.2 * side, 0], 26, [side * 22, 2, 0],
                       [side * max(shift, 1), -0.2, 0], spread=0.1))
    x = side * rng.uniform(13, 18)
    parts.append(crack([x, 24.5, 0], [0.8, -0.6 * side, 0.1], 9, spread=0.1))
    if rng.random() < 0.6:
        x = -side * rng.uniform(12, 18)
        parts.append(crack([x, 24.5, 0], [0.8, 0.6 * side, 0.1], 9, spread=0.1))
    return parts


def break_axis(rng, crack, side, shift):
    """Fractures of C2: of the dens (types II and III), hangman's, teardrop, lamina, transverse."""
    kind = draw_kind(rng, dict(dens2=0.36, dens3=0.22, hangman=0.18, teardrop=0.1, lamina=0.08,
                               transverse=0.06))
    if kind == "dens2":
        move = [rng.normal(0, 0.5), rng.choice(SIDES) * shift, 0.3] if shift else None
        return [crack([0, -1, rng.uniform(8, 10.5)], [0, rng.normal(0, 0.25), 1], 11.5,
                      [0, -1, 17], move, spread=0.1)]
    if kind == "dens3":
        move = [0, -shift * 0.7, -0.3] if shift else None
        return [crack([0, -1, rng.uniform(1, 4)], [0, rng.normal(0, 0.3), 1], 17, [0, -2, 10],
                      move, 1.2, 0.1)]
    if kind == "hangman":
        parts = [crack([one * 16.5, 9, -3], [0, 1, rng.normal(-0.3, 0.3)], 12, [one * 17, 9, -3],
                       spread=0.15) for one in SIDES]
        if shift:
            parts = [crack([0, 9.5, -3], [0, -1, 0.3], 34, [0, 0, 3], [0, -min(shift, 3), -0.3],
                           spread=0.1)]
        return parts
    if kind == "teardrop":
        return [crack([0, -4.5, -6], [0, -1, -0.8], 10, [0, -7, -9],
                      [0, -max(shift, 0.8), -0.5], spread=0.15)]
    if kind == "lamina":
        return [crack([side * 10, 22, -5], [0.8 * side, -0.5, 0.2], 11)]
    return [crack([side * 19, 4, -4], [1, 0, 0.3], 10)]


def break_body(rng, crack, kind, side, shift, height, depth=8):
    """Fractures of the body of C3 to C7, whose half depth is about `depth` mm: Broken."""
    if kind == "burst":
        parts = [crack([0, 0, rng.uniform(-2, 3)], [0, rng.normal(0, 0.5), 1], 15, [0, 0, 0], None,
                       1.3),
                 crack([side * rng.uniform(0, 3), 0, -height / 4], [1, 0, 0], 10,
                       [0, 0, -height / 3])]
        parts[1].width *= 0.8
        if shift:
            parts.append(crack([0, depth * 0.35, 0], [0, 1, 0], 8.5, [0, depth, 1],
                               [0, min(shift, 3), 0], spread=0.1))
            parts[2].width *= 0.7
        return Broken(parts, rng.uniform(0, 0.15))
    if kind == "sagittal":
        return Broken([crack([side * rng.uniform(0, 4.5), 0, 0], [1, 0, 0], 14, [0, 0, 0],
                             waves=1.0)], 0)
    if kind == "teardrop":
        up = 1 if rng.random() < 0.2 else -1
        return Broken([crack([0, -depth * 0.5, up * height * 0.22], [0, -1, up * 0.8], 11,
                             [0, -depth, up * height / 2],
                             [0, -max(shift, 0.8) * 0.8, up * 0.6], spread=0.15)], 0)
    parts = []
    if rng.random() < 0.7:
        parts.append(crack([0, -depth * 0.4, rng.uniform(-1, 2)], [0, 0.5, 1], 10,
                           [0, -depth * 0.6, 0], None, 1.2, 0.15))
    return Broken(parts, rng.uniform(0.2, 0.42))


def break_arch(rng, crack, kind, side, shift, level):
    """Fractures behind the body of C3 to C7 or of its transverse process."""
    if kind == "lamina":
        return [crack([side * 17 * 0.55, 21, 0], [0.8 * side, -0.5, 0.15], 11)]
    if kind == "pillar":
        normal = [0, 0.2, 1] if rng.random() < 0.5 else [0, 1, 0.3]
        normal = varied_vector(rng, normal, 0.25)
        centre = np.array([19, 13.3, 0]) * [side, 1, 1]
        move = normal * min(shift, 2) if shift else None
        return [crack(varied_vector(rng, centre, 0.6), normal, 11, centre, move, spread=0)]
    if kind == "transverse":
        return [crack([side * 15.5, 6.5, -1], [side, 0.4, 0.2], 6),
                crack([side * 15.5, -2.5, -2], [side, -0.2, 0.2], 6)]
    if kind == "spinous":
        root = np.array([0, 24.5, -2])
        tip = np.array([0, CERVICAL["spine"][level - 3], CERVICAL["drop"][level - 3]])
        share = rng.uniform(0.3, 0.65)
        point, along = root * (1 - share) + tip * share, (tip - root) / np.linalg.norm(tip - root)
        move = [rng.normal(0, 0.5), 0.3 * shift, -shift] if shift else None
        return [crack(point, along, 22, point + along * 10, move)]
    return [crack([side * 12, 7.5, 2], [0.7 * side, 0.7, 0], 8)]


# ============================ Vertebrae ============================


def varied(rng, value, spread=0.05):
    return value * (1 + rng.normal(0, spread))


def vertebra_solid(rng, level, study):
    """The solid of a vertebra in its own frame, and half the depth of its body, mm."""
    if level == 1:
        return atlas(rng, study.cleft), 10
    if level == 2:
        return axis(rng)
    return cervical(rng, level, study) if level <= 7 else thoracic(rng, level, study)


def atlas(rng, cleft):
    """C1: a ring with two lateral masses, now and then open at the back."""
    vary, solid = partial(varied, rng), Solid()
    solid.add(polyline([(-15, -2, 0), (-10.5, -7.5, 0), (-5, -10, 0), (0, -10.9, 0), (5, -10, 0),
                        (10.5, -7.5, 0), (15, -2, 0)], vary(2.5, 0.08), 1.75))
    solid.add(ellipsoid([0, -12.7, -0.5], [vary(3.5), 2.6, 4.2]))
    height, wide, rod = rng.normal(-1, 0.8), vary(1), vary(2.5, 0.1)
    arch = [(20, 8), (20.5, 14), (18, 20), (13.5, 25), (8, 29), (0, 31.5)]
    for side in SIDES:
        centre = np.array([17 * side, 1.5, 0]) + rng.normal(0, 0.5, 3) * 0.4
        solid.add(rounded_box(centre, [vary(7.2), vary(9.5), vary(8.2)], 3.6,
                              rotation(2, 18 * side) @ rotation(1, 14 * side)))
        solid.add(polyline([(side * x * wide, y, height if y > 12 else height * 0.3)
                            for x, y in arch], [rod * 1.1, rod * 0.95, rod, rod, rod, rod], 1.5))
        span = vary(37, 0.04)
        solid.add(capsule([side * 22, -2, -1], [side * (span - 2), 4.5, -1], 2.3, 2.6, 1.2))
        solid.add(capsule([side * 22, 8, -1], [side * (span - 1), 6.5, -1.5], 2.5, 3.0, 1.2))
        solid.add(ellipsoid([side * span, 6, -2], [3.6, 4.2, 4.5]))
        solid.cut(capsule([side * 27.5, 2.8, -12], [side * 27.5, 2.8, 12], 3.1), 0.8)
        solid.cut(ellipsoid([side * 16.2, 1, 11.5], [6.5, 10.5, 5.6], rotation(2, 20 * side)))
    solid.add(ellipsoid([0, 33, height], [vary(4, 0.15), vary(3, 0.2), 3.8]))
    if cleft:
        solid.cut(rounded_box([0, 33, 0], [vary(2, 0.3), 8, 14], 1.0), 1.5)
    return solid


def axis(rng):
    """C2 with its dens, and half the depth of its body."""
    vary, solid = partial(varied, rng), Solid()
    width, depth = vary(8.8), vary(7.6)
    solid.add(vertebral_body(width, depth, 16.5, 2.4, 0, 1.8, waist=0.05, cave=0.3, lift=-1.6), 0)
    rod, tip, lean = vary(4.9, 0.06), vary(22, 0.04), rng.normal(0, 0.5)
    solid.add(polyline([(0, 0, 2), (0, -1, 8.5), (lean * 0.5, -1, 15),
                        (lean, -1.3 + rng.normal(0, 0.4), tip - 3)],
                       [rod * 1.35, rod * 0.96, rod * 1.04, rod * 0.8]), 5)
    solid.add(ellipsoid([lean, -1.3, tip - 2], [rod * 0.8, rod * 0.85, 4]))
    back, fork = vary(48, 0.06), vary(5, 0.2)
    for side in SIDES:
        centre = np.array([14.5 * side, 1.8, 1]) + rng.normal(0, 0.5, 3) * 0.4
        solid.add(rounded_box(centre, [vary(7.7), vary(8.2), vary(5.6)], 3, rotation(1, 20 * side)),
                  4)
        solid.add(capsule([side * 14, 5, -2], [side * 18, 13, -7], vary(5), vary(5.2)), 2.5)
        solid.add(articular_pillar([side * 18.5, 13.5, -8.5], 6, 6, 5.2, 42))
        solid.add(slab([side * 18, 16, -6], [side * 1.5, 27, -6], vary(5.5), vary(14), 2.2,
                       12 * side))
        solid.add(capsule([side * 18, 3.5, -4], [side * vary(27.5), 6.5, -7], 3, 2.4, 1.1))
        solid.add(capsule([side * 8.5, -1, -5], [side * 26, 5, -7], 2.2, 2.2))
        solid.cut(capsule([side * 15.8, 3, -14], [side * 18.2, 3, -2], 2.7), 0.8)
        solid.cut(capsule([side * 18.2, 3, -2], [side * 27, 3, 4], 2.7), 0.8)
        solid.add(capsule([0, 35, -8], [side * fork, back, -12.5], 4, vary(3.2, 0.1), 1.15))
    solid.add(capsule([0, 25, -5.5], [0, 37, -8.5], 4.6, 4.8, 1.35), 2.5)
    return solid, depth


def cervical(rng, level, study):
    """C3 to C7 with wear, and half the depth of the body."""
    vary, solid = partial(varied, rng), Solid()
    m = SimpleNamespace(**{name: values[level - 3] for name, values in CERVICAL.items()})
    width, depth = vary(m.width), vary(m.depth, 0.04)
    slope, uncus = study.slope + rng.normal(0, 2), vary(m.uncus, 0.12)
    solid.add(vertebral_body(width, depth, study.height[level], 2.7, uncus, vary(1.3, 0.4),
                             study.wedge.get(level, 0)), 0)
    spine, drop = vary(m.spine, 0.06), vary(m.drop, 0.15)
    for side in SIDES:
        add_pillar(rng, solid, level, side, m, width, slope, study.pitch[level])
        add_transverse_process(rng, solid, level, side, m, width)
    solid.add(capsule([0, m.lamina - 0.5, -1.5], [0, spine - 3.5, drop * 0.85], 2.9,
                      2.5 if level < 7 else 3.2, 1.9))
    if level < 7 and rng.random() < 0.85:
        fork = vary(4 if level < 6 else 2.5, 0.3)
        for side in SIDES:
            solid.add(capsule([0, spine - 7, drop * 0.75], [side * fork, spine, drop], 2.6,
                              vary(2.1, 0.1), 1.3), 1.5)
    else:
        solid.add(capsule([0, spine - 8, drop * 0.75], [0, spine - 1, drop], 2.6,
                          vary(3.6 if level == 7 else 3.0), 1.4))
    for end, back, size in study.spurs[level]:
        x, half = rng.uniform(-5, 5), rng.uniform(3, 7)
        solid.add(ellipsoid([x, back * (depth + 0.6), end * study.height[level] / 2],
                            [half, 1 + size, 1.7 + 0.45 * size]), 3.2)
    if level in study.worn_facets:
        side, z = rng.choice(SIDES), rng.choice([-6, 6])
        solid.add(ellipsoid([side * (m.pillar_x + 3), m.pillar_y + 3, z], [4, 4, 4]))
    return solid, depth


def add_pillar(rng, solid, level, side, m, width, slope, pitch):
    """One side's articular pillar, pedicle and lamina; m: the level's CERVICAL measures."""
    vary, x, y = partial(varied, rng), m.pillar_x, m.pillar_y
    centre = np.array([side * x, y, 0]) + rng.normal(0, 0.5, 3) * 0.5
    slope = slope + rng.normal(0, 2)
    half_height = pitch * np.cos(np.radians(slope)) / 2 - 0.3
    solid.add(articular_pillar(centre, vary(5.8), vary(5.8, 0.04), half_height, slope), 0)
    solid.add(capsule([side * (width - 2.5), 4.5, 1.8], [side * (x - 2), y - 3, 1.5], vary(2.9),
                      vary(3.2), 1.25))
    solid.add(slab([side * (x - 2), y + 4, -0.5], [side * 0.8, m.lamina, -2], vary(3.6, 0.1),
                   vary(12.0 if level < 7 else 14), 1.6, 16 * side))


def add_transverse_process(rng, solid, level, side, m, width):
    """Two bars and a tubercle around the hole of the artery; in C7 one long bar."""
    vary, hole, x, y = partial(varied, rng), width + 5.3, m.pillar_x, m.pillar_y
    tip_y, tip = rng.normal(-2.5, 0.8), hole + vary(8.0, 0.1)
    if level == 7:
        solid.add(capsule([side * (x - 2), y - 5, 0], [side * vary(33), 11, -1], 3.6, 3.2, 1.25))
        solid.add(capsule([side * (width - 1), -1.0, -1.5], [side * (hole + 6), 5, -2], 1.5, 1.5,
                          1.2), 1.4)
        solid.cut(capsule([side * hole, 3, -12], [side * hole, 3, 12], vary(2.1, 0.2)), 0.8)
        return
    solid.add(capsule([side * (width - 1), -2.3, -1.5], [side * tip, tip_y, -3.5], 2.0, 1.9, 1.2),
              1.6)
    tubercle = [2.1, 2.6, vary(5 if level == 6 else 3.4, 0.15)]
    solid.add(ellipsoid([side * tip, tip_y - 0.8, -3], tubercle), 1.5)
    solid.add(capsule([side * (x - 1), y - 6, -0.5], [side * (tip + 1.8), tip_y + 7.5, -4.5], 2.2,
                      2.4, 1.2), 1.6)
    solid.add(capsule([side * (tip - 1.5), tip_y + 0.5, -4], [side * (tip - 0.5), tip_y + 6, -4.5],
                      1.6, 1.6), 1.2)
    solid.cut(capsule([side * hole, 2.3, -14], [side * hole, 2.3, 14], vary(2.9, 0.12)), 0.8)


def thoracic(rng, level, study):
    """T1 to T4, and half the depth of the body."""
    vary, solid, below = partial(varied, rng), Solid(), level - 8
    m = SimpleNamespace(**{name: values[below] for name, values in THORACIC.items()})
    width, depth = vary(m.width), vary(m.depth, 0.04)
    solid.add(vertebral_body(width, depth, study.height[level], 2.4, 0 if below else 1.2, 0.6,
                             cave=0.7), 0)
    spine, drop = vary(m.spine), vary(m.drop, 0.1)
    half_height = study.pitch[level] * np.cos(np.radians(58)) / 2 - 0.2
    for side in SIDES:
        x = 15 - below
        solid.add(articular_pillar([side * (x + 1.5), 17, 1], 5.4, 4.5, half_height, 58), 0)
        solid.add(capsule([side * (width - 5), 5, 3.5], [side * x, 15, 3], 3.2, 3.6, 1.5))
        solid.add(slab([side * x, 19, -1], [side * 0.8, 26.5, -3], 4.2, 18, 1.8, 10 * side))
        solid.add(capsule([side * x, 17, 2], [side * vary(m.span, 0.04), 27 + below, 4], 4.4, 4.4,
                          1.2))
    solid.add(capsule([0, 26, -3], [0, spine, drop], 3, 3.3, 1.8))
    return solid, depth


# ============================ Head, throat and chest ============================


def brain_case(rng):
    """The outer surface of the skull around the brain."""
    solid = Solid()
    solid.add(ellipsoid([0, 31, 50], [varied(rng, 60, 0.04), varied(rng, 51, 0.03), 41.5]), 0)
    solid.add(ellipsoid([0, -8, 92], [varied(rng, 71, 0.04), varied(rng, 90, 0.04), 66]), 14)
    return solid


def skull_base(rng):
    """Skull below the brain and the upper face, without the foramen magnum."""
    vary, solid = partial(varied, rng, spread=0.04), Solid()
    solid.add(ellipsoid([0, 79, 36], [8, 6, 8]))  # occipital protuberance
    solid.add(rounded_box([0, -15, 27], [12, 4.5, 20], 3.5, rotation(0, 36)), 5)  # clivus
    solid.add(ellipsoid([0, -40, 44], [19, 17, 8]), 5)  # sphenoid
    for side in SIDES:
        solid.add(ellipsoid([side * 16.4, 1.5, 12.3], [6.3, vary(10.5), 5.4],
                            rotation(2, 20 * side)))  # condyle
        solid.add(rounded_box([side * 19, 6, 17], [8, 13, 4.5], 3), 3)
        solid.add(ellipsoid([side * 51, 13, 17], [vary(11), vary(15), vary(20)]))  # mastoid
        solid.add(capsule([side * 50, 4, 30], [side * 14, -20, 33], 9, 7), 3)  # petrous bone
        styloid = [side * 34, -16, vary(-14, spread=0.3)]
        solid.add(capsule([side * 42, -3, 16], styloid, 1.8, 1.0), 1)
        solid.add(ellipsoid([side * 55, -20, 31], [10, 19, 5]), 5)  # socket of the jaw
        solid.add(rounded_box([side * 14, -38, 20], [1.4, 7, 19], 1), 1)  # pterygoid plates
        solid.add(rounded_box([side * 20, -37, 20], [1.4, 7, 19], 1, rotation(2, -20 * side)), 1)
        solid.add(rounded_box([side * 36, -40, 42], [22, 24, 3], 2, rotation(1, -10 * side)))
    add_face(solid)
    solid.cut(ellipsoid([0, 11, 9], [15, 17.5, 14]), 2.5)  # foramen magnum
    return solid


def add_face(solid):
    """Palate, upper arch, walls of the sinuses and nose, cheekbones."""
    solid.add(rounded_box([0, -66, 1], [19, 22, 1.8], 1.2), 1)
    solid.add(polyline([(x, y, -2) for x, y in TEETH] + [(-x, y, -2) for x, y in TEETH[::-1]], 4.5,
                       1.6))
    for side in SIDES:
        solid.add(rounded_box([side * 31, -62, 18], [1.5, 20, 15], 1), 1)
        solid.add(rounded_box([side * 9, -62, 18], [1.2, 20, 16], 1), 1)
        solid.add(capsule([side * 36, -76, 18], [side * 60, -30, 31], 4, 3))
    solid.add(rounded_box([0, -65, 20], [1.0, 24, 18], 0.8), 1)


def mandible(lift):
    """The lower jaw, `lift` mm above its usual place."""
    solid, line = Solid(), JAW + [0, 0, lift]
    for side in SIDES:
        points = line * [side, 1, 1]
        for start, end in pairwise(points):
            solid.add(slab(start, end, 9, 24, 3.5), 3)
        solid.add(rounded_box([side * 47.5, -25, -5 + lift / 2], [3.4, 14, 26], 2.5,
                              rotation(0, -10)), 3)
        solid.add(capsule([side * 48, -21, 15], [side * 51, -17, 23], 3.4, 4.5), 3)
        solid.add(capsule([side * 47, -33, 15], [side * 46, -36, 24], 3, 1.8), 3)
        solid.cut(capsule(points[1] + [0, 0, -3], points[4] + [0, 0, -4], 1.4), 0.6)
    solid.add(slab(line[-1] * [-1, 1, 1], line[-1], 11, 25, 4), 3)
    return solid


def draw_teeth(rng, lift):
    """(root primitive, crown's place, radius, 1 above or -1 below) of each tooth; places of metal.

    The lower jaw stands `lift` mm above its usual place.
    """
    fillings = 0 if rng.random() < 0.6 else rng.integers(1, 5)
    along = np.r_[0, np.cumsum(np.hypot(*np.diff(TEETH, axis=0).T))]
    teeth = []
    for up, side, number in product((1, -1), SIDES, range(8)):
        if rng.random() < 0.1:
            continue
        place = along[-1] - (number + 0.4) * along[-1] / 8.2
        x, y = (np.interp(place, along, axis) for axis in TEETH.T)
        if up < 0:
            x, y = x * 1.04 + 0.6, y - 1
        z = -14 if up > 0 else -21.5 + lift
        radius = 3.2 if number < 5 else 4.6
        root = capsule([side * x, y, z + up * 9], [side * x, y, z], 2.0, radius * 0.95, 1.1)
        teeth.append((root, np.array([side * x, y, z]), radius, up))
    return teeth, [teeth[k][1] for k in rng.permutation(len(teeth))[:fillings]]


def sinuses():
    """Primitives of the air in the face and the sphenoid."""
    return ([ellipsoid([22 * side, -62, 20], [8.5, 17, 13]) for side in SIDES]
            + [rounded_box([4.5 * side, -60, 14], [3.0, 25, 11], 2) for side in SIDES]
            + [ellipsoid([0, -38, 50], [13, 10, 7])])


def hyoid():
    """The bone at the root of the tongue, a bow open to the back."""
    solid = Solid()
    radii = [1.5, 1.6, 1.6, 1.6, 2.2, 2.2, 2.2, 2.2, 2.2, 1.6, 1.6, 1.6, 1.5]
    solid.add(polyline([(19 * np.cos(t), -30 - 17 * np.sin(t), 5 * (1 - np.sin(t)))
                        for t in np.radians(np.linspace(-12, 192, 13))], radii, 1.5), 0)
    return solid


def thyroid_cartilage():
    """Two plates that meet in front, with horns."""
    solid = Solid()
    for side in SIDES:
        solid.add(slab([side * 0.6, -51, 0], [side * 18, -28, 1], 2.3, 23, 1.0), 1)
        solid.add(capsule([side * 18, -27, 10], [side * 18.5, -24, 22], 1.6), 1)
        solid.add(capsule([side * 17.5, -28, -10], [side * 14, -26, -17], 1.6), 1)
    return solid


def cricoid():
    """The ring below the thyroid cartilage."""
    solid = Solid()
    solid.add(polyline([(10.5 * np.cos(t), -33 + 11 * np.sin(t), 5.5 * (1 + np.sin(t)) / 2)
                        for t in np.radians(np.arange(0, 361, 30))], 1.7, 1.9), 0)
    return solid


def thorax(position, turn, shrug):
    """Ribs, collarbones, shoulder blades and sternum in the patient's frame.

    position and turn: where each level stands; shrug: how far the shoulders are drawn up, mm.
    """
    solid, t2 = Solid(), position[9]
    for (level, (size, depth, fall)), side in product(RIBS.items(), SIDES):
        z = 5 if level == 8 else 8
        points = [position[level] + turn[level] @ local for local in (
            [side * 15.5, 7.5, z], [side * 27, 18, z],
            [side * 38 * (0.6 + 0.4 * size), 24, z - 1])]
        for step in ([side * 16 * size, -12, -5],
                     [side * 3 * size, -depth * 0.45, -fall * 0.35],
                     [-side * 12 * size, -depth * 0.4, -fall * 0.3], [-side * 20, -10, -8]):
            points.append(points[-1] + step)
        solid.add(polyline(points, [4.2, 3.4, 3.8, 3.8, 3.8, 3.8, 3.6],
                           0.95 if level == 8 else 1.35), 0.5)
    for side in SIDES:
        solid.add(polyline([
            t2 + [side * 13, -54, -12], t2 + [side * 40, -57, -3 + shrug * 0.3],
            t2 + [side * 75, -44, 6 + shrug * 0.6], t2 + [side * 110, -22, 10 + shrug],
            t2 + [side * 140, -8, 12 + shrug]], [9, 6.5, 5.5, 5.5, 6.5]), 1)
        solid.add(ellipsoid(t2 + [side * 158, 2, -10 + shrug], [24, 24, 25]), 1)
        solid.add(slab(t2 + [side * 60, 62, -30 + shrug], t2 + [side * 118, 32, -25 + shrug], 5, 75,
                       2), 1)
        solid.add(polyline([
            t2 + [side * 58, 62, shrug], t2 + [side * 110, 50, 10 + shrug],
            t2 + [side * 142, 18, 18 + shrug]], [3.5, 5, 6]))
    solid.add(rounded_box(t2 + [0, -56, -34], [24, 6, 22], 4))
    return solid


# ============================ The study: patient, pose and grid ============================


class Study:
    """One study drawn from (seed, index): the patient, the pose and the grid of the scan.

    `fractured` is {level: [Fracture]}; of the studies 2n and 2n + 1 one has fractures. `wide`: a
    field of view beyond the neck. Lengths are those of the patient before `scale`.
    """

    def __init__(self, seed, index, wide=False):
        self.rng, self.wide = np.random.default_rng([seed, index, 7717]), wide
        self.slope, self.cleft = self.rng.uniform(40, 50), self.rng.random() < 0.05
        self.wear = self.rng.beta(1.2, 2.5)
        self.draw_sizes()
        self.draw_levels(seed, index)
        self.draw_wear()
        self.wedge = {}
        for level in self.fractured:
            self.fractured[level], wedge = break_vertebra(self.rng, level, self.height[level])
            if wedge:
                self.wedge[level] = wedge
        self.draw_turns()
        self.draw_positions()
        self.draw_pose()
        self.draw_grid()

    def draw_sizes(self):
        """height of each level and disc below it, mm."""
        rng, size = self.rng, self.rng.normal(1, 0.05)
        self.height = {level: mm * size * (1 + rng.normal(0, 0.025))
                       for level, mm in HEIGHTS.items()} | {1: 15, 2: 18}
        self.disc = {}
        for level in range(2, 11):
            self.disc[level] = 4.9 + rng.normal(0, 0.4) if level < 8 else 4.0
            if 4 <= level <= 7 and rng.random() < self.wear:
                self.disc[level] *= rng.uniform(0.35, 0.8)

    def draw_levels(self, seed, index):
        """Which levels are fractured: the first of each study evenly spread over a run."""
        self.fractured = {}
        pair = index // 2
        if (index + int(np.random.default_rng([seed, pair, 31]).integers(2))) % 2:
            return
        weights = np.array(FRACTURE_SHARES)
        more = 0 if self.rng.random() < 0.65 else 1
        golden = 0.6180339887  # multiples of it fill 0 to 1 evenly
        place = (np.random.default_rng([seed, 5]).random() + pair * golden) % 1
        first = min(6, int(np.searchsorted(np.cumsum(weights / weights.sum()), place)))
        weights[first] = 0
        others = self.rng.choice(np.arange(1, 8), more, replace=False, p=weights / weights.sum())
        self.fractured = dict.fromkeys([first + 1, *others.tolist()])
        self.cleft = self.cleft and 1 not in self.fractured

    def draw_wear(self):
        """spurs of C3 to C7: [(upper or lower end, front or back, size)]; worn facet joints."""
        rng, self.spurs, self.worn_facets = self.rng, {}, set()
        for level in range(3, 8):
            count = rng.integers(1, 4) if rng.random() < self.wear * 1.1 else 0
            self.spurs[level] = [
                (rng.choice([-0.9, 0.9]), -1 if rng.random() < 0.75 else 0.8, rng.uniform(0.5, 3))
                for _ in range(count)]
            if rng.random() < self.wear * 0.5:
                self.worn_facets.add(level)

    def draw_tilts(self):
        """Forward tilt of each level in degrees: lordotic, straight or kyphotic."""
        rng, bend, base = self.rng, self.rng.normal(0.75, 0.45), self.rng.normal(20, 5)
        tilt = {level: base + degrees * (bend if level < 8 else 1) + rng.normal(0, 1)
                for level, degrees in TILTS.items()}
        tilt[1] += rng.normal(0, 4)
        above = 0
        for level in range(7, 0, -1):
            tilt[level] += above
            if level in self.wedge:
                drop = self.wedge[level] * self.height[level]
                above += np.degrees(np.arctan2(drop, 16)) * 0.6
        return tilt

    def draw_turns(self):
        """turn (3, 3) of each level."""
        rng, tilt, self.turn = self.rng, self.draw_tilts(), {}
        lean, twist, head = rng.normal(0, 3), rng.normal(0, 4), rng.normal(0, 9)
        for level in LEVELS:
            up = (8 - level) / 7
            about_z = twist * up + rng.normal(0, 0.7) + (head if level == 1 else 0)
            about_y = lean * np.sin(2.5 * up) + rng.normal(0, 0.7)
            self.turn[level] = (rotation(2, about_z) @ rotation(1, about_y)
                                @ rotation(0, tilt[level]))

    def draw_positions(self):
        """position (3,) of each level; pitch: its mean distance (mm) from its neighbours."""
        rng, height, at = self.rng, self.height, {8: np.zeros(3)}
        for k in range(7, 1, -1):
            disc = self.disc[k] / 2
            own = height[k] / 2 + disc + (0.5 if k == 2 else 0)
            at[k] = (at[k + 1] + self.turn[k + 1] @ [0, 0, height[k + 1] / 2 + disc]
                     + self.turn[k] @ [0, rng.normal(0, 0.3), own])
        at[1] = at[2] + self.turn[2] @ [0, -1.0, 16]
        for k in range(9, 12):
            disc = self.disc[k - 1] / 2
            at[k] = (at[k - 1] - self.turn[k - 1] @ [0, 0, height[k - 1] / 2 + disc]
                     - self.turn[k] @ [0, 0, height[k] / 2 + disc])
        self.position = {level: place - at[4] for level, place in at.items()}
        self.pitch = {}
        for k in range(2, 12):
            below = np.linalg.norm(self.position[k] - self.position[k + 1]) if k < 11 else 22
            above = np.linalg.norm(self.position[k] - self.position[k - 1]) if k > 3 else below
            self.pitch[k] = (below + above) / 2

    def draw_pose(self):
        """head_turn (3, 3); scale, pose (3, 3) and shift (mm) of the patient in the scanner."""
        rng = self.rng
        nod, shake = rng.normal(0, 3), rng.normal(0, 2)
        self.head_turn = self.turn[1] @ rotation(0, nod) @ rotation(2, shake)
        self.scale = float(np.clip(rng.normal(0.99, 0.07), 0.85, 1.15))
        x, y, z = np.clip(rng.normal([0, 0, 0], [6, 5, 5]), -15, 15)
        self.pose = rotation(2, z) @ rotation(1, y) @ rotation(0, x)
        self.shift = rng.normal(0, 12, 3) + [0, 0, rng.uniform(-600, 200)]

    def in_scanner(self, level, local=(0, 0, 0)):
        """Where a point (mm) of a level's frame lies in the grid's frame, mm."""
        point = self.position[level] + self.turn[level] @ local
        return self.pose @ (self.scale * point) + self.shift

    def draw_pixels(self, low, high):
        """matrix and pixel (mm), so that the corners low and high (2,) are in view; slice_mm."""
        rng, self.matrix = self.rng, MATRIX
        if self.wide:
            self.pixel = rng.uniform(0.82, 1.1)
        else:
            view = max(rng.uniform(110, 180), float(max(high - low)) + 6)
            if rng.random() < 0.12:
                self.matrix = LARGE_MATRIX
            self.pixel = min(max(view / self.matrix, PIXEL_MM[0]), PIXEL_MM[1])
        thin = rng.random() < 0.85
        self.slice_mm = rng.uniform(0.6, 1.5) if thin else rng.uniform(2, 3)
        if self.matrix > MATRIX:
            self.slice_mm = max(self.slice_mm, 1.0)

    def draw_grid(self):
        """origin (mm) and number of slices; shape and frame of the grid that is painted.

        A thick slice is the mean of `fine` painted ones.
        """
        rng = self.rng
        ends = np.array([self.in_scanner(level, point) for level in range(1, 9)
                         for point in ([0, 0, 0], [0, 42, -6])])
        low, high = ends.min(0)[:2] - [30, 16], ends.max(0)[:2] + [30, 10]
        self.draw_pixels(low, high)
        lowest = int(rng.choice([8, 9, 10], p=[0.3, 0.4, 0.3]))
        bottom = self.in_scanner(lowest)[2] - rng.uniform(6, 14) * self.scale
        top = self.in_scanner(1)[2] + rng.uniform(14, 45) * self.scale
        if rng.random() < 0.12 or (self.wide and rng.random() < 0.6):
            top += rng.uniform(30, 90)
        if self.wide and rng.random() < 0.5:
            bottom -= rng.uniform(10, 50)
        self.slices = int(np.ceil((top - bottom) / self.slice_mm))
        if self.slices > MAX_SLICES:
            self.slices, self.slice_mm = MAX_SLICES, (top - bottom) / MAX_SLICES
        centre = (low + high) / 2 + rng.normal(0, 4, 2)
        if self.wide:
            centre += rng.normal(0, 10, 2)
        corner = np.round(centre, 2) - self.matrix * self.pixel / 2 + self.pixel / 2
        self.origin = np.array([*corner, bottom])
        self.fine = 3 if self.slice_mm > 1.8 else 1
        self.shape = (self.slices * self.fine, self.matrix, self.matrix)
        step = self.slice_mm / self.fine
        first = self.origin - [0, 0, step * (self.fine - 1) / 2]
        unposed = self.pose.T / self.scale
        self.frame = Frame(unposed @ np.diag([self.pixel, self.pixel, step]),
                           unposed @ (first - self.shift))
        self.mm, self.mm_z = self.pixel / self.scale, step / self.scale  # in the patient's frame
        self.edge = max(self.mm, 0.55)  # width of a surface, mm

    def vertebra_frame(self, level):
        """The frame of a level, its origin in the middle of the body."""
        return self.frame.below(self.turn[level], self.position[level])

    def head_frame(self):
        """The head's frame, its origin in the middle of C1."""
        return self.frame.below(self.head_turn, self.position[1])

    def render(self):
        """hu (int16) and labels (uint8; 1 to 11 for C1 to T4), both (Z, Y, X), foot first."""
        soft = SoftTissue(self)
        canvas = Canvas(self, soft.paint())
        labels, metal = paint_bones(self, canvas, soft)
        split = (self.slices, self.fine, self.matrix, self.matrix)
        hu = canvas.hu.reshape(split).mean(1)
        labels = np.ascontiguousarray(labels.reshape(split)[:, self.fine // 2])
        levels = soft.level_of_slices().reshape(self.slices, self.fine).mean(1)
        return Scan(self, levels, metal).acquire(hu), labels


# ============================ Soft tissue, air and what lies around ============================


class SoftTissue:
    """All but bones, painted on a grid of half the rows and columns and slices of about 1.3 mm.

    Most shapes are ellipses across the neck whose measures are tables over the level; `level` is
    the level (fractional; below 1 the head) of each voxel.
    """

    def __init__(self, study):
        self.study, self.rng = study, study.rng
        slices, half = study.shape[0], study.matrix // 2
        self.factor = max(1, int(round(1.3 / study.mm_z)))
        self.shape = (-(-slices // self.factor) + 1, half, half)
        box = whole(self.shape)
        self.at = study.frame.coarser(self.factor).coordinates(box)
        self.at_head = study.head_frame().coarser(self.factor).coordinates(box)
        self.edge = F32(2 * study.mm)
        self.hu = np.full(self.shape, -1000, F32)
        self.build_axes()

    def build_axes(self):
        """level, and x, y (mm) from the line through the bodies and through the spinal canal."""
        study, levels = self.study, list(LEVELS)[::-1]
        bodies = np.array([study.position[k] for k in levels])
        canals = np.array([study.position[k] + study.turn[k] @ [0, 15 if k > 1 else 13, 0]
                           for k in levels])
        up, down = study.head_turn @ [0, 0, 1.0], bodies[0] - bodies[1]
        bodies, canals = (np.vstack([line[0] + down * 4, line, line[-1] + up * 40,
                                     line[-1] + up * 120]) for line in (bodies, canals))
        x, y, z = self.at
        self.level = along_z(z, bodies[:, 2], np.array([15, *levels, -1, -5], float))
        self.body = [p - along_z(z, bodies[:, 2], bodies[:, axis]) for axis, p in ((0, x), (1, y))]
        self.canal = [p - along_z(z, canals[:, 2], canals[:, axis]) for axis, p in ((0, x), (1, y))]
        self.table_index = np.clip((self.level + 5) * 20, 0, 400).astype(np.int16)

    def by_level(self, *table):
        """A measure given as (level, mm), at each voxel."""
        levels, values = np.array(table, float).T
        return np.interp(np.linspace(-5, 15, 401), levels, values).astype(F32)[self.table_index]

    def columns(self, table):
        """The measures of a table {level: (measure, ...)}, each at each voxel."""
        levels = sorted(table)
        return [self.by_level(*zip(levels, column)) for column in zip(*map(table.get, levels))]

    def head_ellipsoid(self, centre, radii):
        """Distance from an ellipsoid in the head's frame."""
        return ellipsoid(centre, radii).distance(*self.at_head)

    def lay(self, distance, hu, edge=None):
        """Fill the inside of a surface with HU, a number or one a voxel."""
        share = cover(distance, self.edge if edge is None else edge)
        self.hu += share * (hu - self.hu)

    def lay_below_skin(self, distance, hu, edge=None):
        self.lay(np.maximum(distance, self.deep), hu, edge)

    def paint(self):
        """HU (Z, Y, X), float32, of the study's fine grid."""
        self.paint_skin_and_fat()
        self.paint_muscles()
        self.paint_mouth_and_glands()
        self.paint_ligaments()
        self.paint_vessels()
        self.paint_airway()
        self.paint_canal()
        self.paint_lungs()
        self.paint_couch_and_collar()
        return self.enlarge()

    def skin_distance(self, obesity):
        """Distance from the skin of head, neck and trunk; keeps that from the shoulders' muscle."""
        x, y = self.body
        side = self.by_level(*SKIN["side"]) * obesity
        front = self.by_level(*SKIN["front"]) * (0.5 + 0.5 * obesity)
        back = self.by_level(*SKIN["back"]) * (0.4 + 0.6 * obesity)
        middle, depth = (front + back) / 2, (back - front) / 2
        radius = (np.abs(x) / side) ** 2.3 + (np.abs(y - middle) / depth) ** 2.3
        skin = (radius ** (1 / 2.3) - 1) * np.minimum(side, depth) * 0.9
        for centre, radii in FACE:
            skin = smooth_min(skin, self.head_ellipsoid(centre, radii), 14)
        self.shrug = shrug = self.rng.uniform(0, 14)
        t2, self.shoulders = self.study.position[9], None
        for one in SIDES:
            joint = t2 + [one * 162, 4, -26 + shrug]
            across = capsule(t2 + [one * 45, -8, -22 + shrug * 0.3], joint, 44, 43)
            arm = capsule(joint, t2 + [one * 185, 8, -160 + shrug], 43, 48)
            limb = np.minimum(across.distance(*self.at), arm.distance(*self.at))
            skin = smooth_min(skin, limb, 22)
            muscle = limb + 9
            self.shoulders = (muscle if self.shoulders is None
                              else np.minimum(self.shoulders, muscle))
        return skin

    def paint_skin_and_fat(self):
        """Skin, the fat below it, and the deep tissue, in which the rest lies."""
        rng, obesity = self.rng, self.rng.uniform(0.92, 1.22)
        self.skin = self.skin_distance(obesity)
        self.grain = rng.normal(0, 1, self.shape).astype(F32)
        for k, plane in enumerate(self.grain):
            self.grain[k] = cv2.GaussianBlur(plane, (0, 0), 1.5) * 5
        self.lay(self.skin, 25)
        self.lay(self.skin + 2, rng.uniform(-115, -90) + 8 * self.grain)
        fat = rng.uniform(2.5, 5) * obesity
        self.deep = self.skin + (
            fat + self.by_level((-5, 1), (1, 2), (4, 2), (6, 4), (9, 9)) * obesity)
        self.lay(self.deep, rng.uniform(-70, -20) + 10 * self.grain)

    def muscle_distance(self, reference, table, side, bulk):
        """Distance from one muscle of MUSCLES, which tapers at the ends of its table."""
        levels = sorted(table)
        x, y, half_x, half_y = self.columns(table)
        taper = F32(0.6)
        inside = np.minimum(self.level - F32(levels[0]) + taper,
                            F32(levels[-1]) + taper - self.level)
        size = np.clip(inside / taper, 0.05, 1)
        bulk = bulk * (1 + self.rng.normal(0, 0.03))
        half_x, half_y = half_x * bulk * size, half_y * bulk * size
        at_x, at_y = self.canal if reference == "canal" else self.body
        radius = ellipse(at_x * side - x, at_y - y, half_x, half_y)
        return (radius - 1) * np.minimum(half_x, half_y)

    def muscle_distances(self, bulk):
        """The distance from each muscle."""
        for (reference, table), side in product(MUSCLES, SIDES):
            yield self.muscle_distance(reference, table, side, bulk)
        for ((x, y, z), radii), side in product(CHEWING, SIDES):
            yield self.head_ellipsoid([side * x, y, z], radii)

    def paint_muscles(self):
        """Muscles, parted by fat where two are equally near."""
        rng, bulk = self.rng, self.rng.uniform(0.88, 1.12)
        nearest, second = np.full((2, *self.shape), FAR_MM, F32)
        for distance in self.muscle_distances(bulk):
            second = np.minimum(second, np.maximum(nearest, distance))
            nearest = np.minimum(nearest, distance)
        nearest = np.minimum(nearest, np.maximum(self.shoulders, 70 - np.abs(self.body[0])))
        self.inside = cover(self.deep + 0.8, self.edge)
        fascia = rng.uniform(0.6, 2.0)
        share = (cover(nearest - 0.6, self.edge)
                 * np.clip((second - nearest) / fascia + 0.15, 0, 1) * self.inside)
        self.muscle_hu = F32(rng.uniform(50, 68))
        self.hu += share * (self.muscle_hu + 6 * self.grain - self.hu)

    def paint_mouth_and_glands(self):
        """Tongue, larynx, parotid and submandibular glands."""
        tongue = self.head_ellipsoid([0, -62, -20], [29, 36, 27])
        self.lay(np.maximum(tongue, self.deep + 2), 55 + 8 * self.grain)
        x, y = self.body
        larynx = (ellipse(x, y + 33, 22, 15) - 1) * 15
        larynx = smooth_max(larynx, np.abs(self.level - 4.7) * 15 - 30, 6)
        self.lay(np.maximum(larynx, self.deep + 1), 45 + 12 * self.grain, 3 * self.edge)
        for side in SIDES:
            self.lay_below_skin(self.head_ellipsoid([side * 54, -8, -3], [11, 13, 22]),
                                self.rng.uniform(-30, 30) + 10 * self.grain)
            self.lay_below_skin(self.head_ellipsoid([side * 31, -40, -42], [10, 15, 12]),
                                50 + 8 * self.grain)

    def paint_ligaments(self):
        """Tissue around the vertebrae, and the nuchal ligament."""
        x, y = self.body
        around = (ellipse(x, y - 8, 25, 21) - 1) * 20
        share = cover(around, 4) * (self.level > 0.5) * 0.6
        self.hu += share * (self.muscle_hu - 10 - self.hu)
        x, y = self.canal
        nuchal = np.maximum(np.abs(x) - 0.9, np.abs(y - 30) - 18)
        share = cover(nuchal, self.edge) * (self.level > 1) * (self.level < 8) * self.inside
        self.hu += share * (70 - self.hu)

    def lay_tube(self, table, hu):
        """A tube across the levels of a table {level: (x, y, radius)}, from the bodies' line."""
        x, y, radius = self.columns(table)
        wall = np.sqrt((self.body[0] - x) ** 2 + (self.body[1] - y) ** 2) - radius
        ends = np.maximum(min(table) - self.level, self.level - max(table)) * 15
        self.lay_below_skin(np.maximum(wall, ends), hu)

    def paint_vessels(self):
        """Carotids, jugulars, thyroid and oesophagus, with contrast agent or without."""
        rng, contrast = self.rng, self.rng.random() < 0.45
        self.artery_hu = rng.uniform(220, 360) if contrast else rng.uniform(38, 50)
        if contrast:
            vein_hu = rng.uniform(110, 260) if rng.random() < 0.6 else 60
        else:
            vein_hu = rng.uniform(38, 50)
        for side in SIDES:
            self.paint_vessels_of(side, vein_hu)
            self.paint_thyroid(side, contrast)
        isthmus = ellipsoid([0, 0, 0], [14, 4, 6]).distance(
            self.body[0], self.body[1] + 42, (self.level - 6.6) * 16)
        self.lay_below_skin(isthmus, 110)
        self.lay_tube({5.8: (1, -16.5, 4.5), 8: (3, -17, 5.5), 15: (2, -18, 7)},
                      45 + 10 * self.grain)

    def paint_vessels_of(self, side, vein_hu):
        """Carotid, internal and external jugular vein of a side."""
        high, low, vein, wide = self.rng.normal(0, 1.5, 4)
        self.lay_tube({-1: (side * 28, -10, 3), 1: (side * 28, -12, 2.8),
                       3.3: (side * 27 + high, -16, 3.2), 3.8: (side * 27 + high, -19, 4.6),
                       6: (side * 25 + low, -22, 3.6), 8: (side * 22, -24, 3.8),
                       12: (side * 16, -28, 5)}, self.artery_hu)
        self.lay_tube({-0.5: (side * 31, -3, 4.5), 3: (side * 34 + vein, -12, 5 + wide * 0.6),
                       6: (side * 34, -22, 5.5 + wide * 0.8), 8: (side * 29, -27, 6),
                       11: (side * 22, -36, 7)}, vein_hu)
        if self.rng.random() < 0.7:
            self.lay_tube({2: (side * 52, 0, 1.6), 5: (side * 54, -8, 1.8),
                           7: (side * 48, -16, 2)}, vein_hu)

    def paint_thyroid(self, side, contrast):
        """One lobe of the gland."""
        size, (x, y) = self.rng.uniform(0.7, 1.4), self.body
        across = (x * side - self.by_level((4.8, 15), (6, 14), (8, 15))) / (7 * size)
        back = (y - self.by_level((4.8, -32), (6.2, -31), (8, -31))) / (8.5 * size)
        down = (self.level - 6.3) / (1.35 * size)
        lobe = (np.sqrt(sum_of_squares((across, back, down))) - 1) * 7
        hu = self.rng.uniform(95, 150) + (60 if contrast else 0)
        self.lay_below_skin(lobe, hu + 8 * self.grain)

    def paint_airway(self):
        """Air from the nose to the trachea, its cartilage, the epiglottis, a tube, the mouth."""
        rng, level, (x, y) = self.rng, self.level, self.body
        middle = self.by_level(
            (-2, -33), (-0.5, -24), (1.5, -20), (2.5, -19), (3.5, -23), (4.3, -28), (5, -33),
            (5.8, -32), (6.6, -31), (8, -31), (10, -33), (15, -36))
        f = rng.uniform(0.75, 1.25)
        half_x = self.by_level(
            (-2, 13), (-0.5, 12), (1.5, 12 * f), (2.5, 10 * f), (3.3, 13 * f), (4.2, 9), (4.7, 6),
            (5, 2.6), (5.25, 5), (5.8, 7.2), (6.5, 8), (8, 8.6), (15, 9))
        half_y = self.by_level(
            (-2, 14), (-0.5, 8), (1.5, 5.5 * f), (2.5, 5 * f), (3.3, 7 * f), (4.2, 7), (5, 9.5),
            (5.8, 8.5), (8, 8.3), (15, 8.5))
        air = (ellipse(x, y - middle, half_x, half_y) - 1) * np.minimum(half_x, half_y)
        air = np.maximum(air, (-0.9 - level) * 15)
        if rng.random() < 0.6:
            rings = np.maximum(np.abs(air - 1.2) - 1.0, (6 - level) * 9)
            self.lay(rings, rng.uniform(60, 170) + 30 * self.grain)
        epiglottis = np.abs(y - middle + 1.2 + (level - 3.4) * 3) - 1.1
        epiglottis = np.maximum(epiglottis, np.abs(x) - 8)
        epiglottis = np.maximum(epiglottis, np.abs(level - 3.3) * 16 - 9)
        self.lay(np.maximum(air, -epiglottis), -1000)
        if rng.random() < 0.12:
            wall = np.abs(np.sqrt(x ** 2 + (y - middle) ** 2) - 5) - 1
            self.lay(np.maximum(np.maximum(wall, (level - 8) * 15), 5 - half_x), 180)
        if rng.random() < 0.5:
            self.lay(self.head_ellipsoid([0, -58, -4], [22, 26, rng.uniform(1.5, 5)]), -1000)

    def paint_canal(self):
        """The spinal canal: fat, fluid and cord."""
        rng, (x, y) = self.rng, self.canal
        above = np.maximum(0.7 - self.level, 0) * 15
        self.lay(np.maximum((ellipse(x, y, 12.5, 8.2) - 1) * 8, above), -30 + 10 * self.grain)
        self.lay((ellipse(x, y, 10.5, 7.2) - 1) * 7, rng.uniform(5, 20))
        half_x = self.by_level((-3, 7.5), (1, 6), (5, 6.8), (7, 6.2), (9, 5), (15, 4.5))
        self.lay((ellipse(x, y, half_x, 4.2) - 1) * 4.2, rng.uniform(34, 46))

    def paint_lungs(self):
        """The tops of the lungs."""
        x, y, z = self.study.position[8]
        for side in SIDES:
            lung = ellipsoid([side * 44 + x, y - 6 - 12, z - self.rng.uniform(72, 84)],
                             [37, 50, 72]).distance(*self.at)
            lung = smooth_max(lung, 18 - side * (self.at[0] - F32(x)), 8)
            self.lay(lung, self.rng.uniform(-880, -820) + 25 * self.grain)

    def paint_couch_and_collar(self):
        """Couch and head rest, in the scanner's directions, and a collar around the neck."""
        rng, study, outside = self.rng, self.study, self.skin > 0
        index = (np.arange(self.shape[1]) * 2 + 0.5).astype(F32)
        x, y = (F32(study.origin[axis]) + index * study.pixel - F32(study.shift[axis])
                for axis in (0, 1))
        y = y[:, None]
        top = 100 * study.scale + rng.uniform(0, 15)
        couch = np.abs(y - top + x ** 2 * (1 / 900)) - 9
        if rng.random() < 0.8:
            self.hu[outside & (couch < 0)] = -920
            self.hu[outside & (couch < 0) & (np.abs(couch + 1) < 1.2)] = 60
        if rng.random() < 0.4:
            rest = np.abs(np.sqrt(x ** 2 + (y - 5) ** 2) - 96 * study.scale) - 3.5
            self.hu[outside & (rest < 0) & (y > 10) & (self.level < 3.5)] = rng.uniform(-700, -300)
        if rng.random() < 0.3:
            offset = rng.uniform(4, 9)
            foam = np.abs(self.skin - offset) < 2.5
            foam &= outside & (self.level > 1.8) & (self.level < 7.6)
            self.hu[foam] = rng.uniform(-900, -250)
            plate = np.abs(self.skin - (offset + 3.2)) < 1.0
            plate &= outside & (self.level > 2.2) & (self.level < 7.2) & (self.body[1] < -5)
            self.hu[plate] = rng.uniform(0, 130)

    def enlarge(self):
        """The painted HU on the study's fine grid, by linear interpolation."""
        slices, *size = self.study.shape
        planes = [cv2.resize(plane, size) for plane in self.hu]
        return interpolate(planes, np.arange(slices) / self.factor)

    def level_of_slices(self):
        """The level (Z,) in the middle of each slice of the fine grid."""
        coarse, rows, columns = self.shape
        return np.interp(np.arange(self.study.shape[0]), np.arange(coarse) * self.factor,
                         self.level[:, rows // 2, columns // 2])


def ellipse(x, y, half_x, half_y):
    """Distance from the middle of an ellipse, 1 on its edge."""
    return np.sqrt((x / half_x) ** 2 + (y / half_y) ** 2)


def interpolate(planes, places):
    """Planes (Z, Y, X), float32, between those given, at fractional places (Z,) among them."""
    out = np.empty((len(places), *planes[0].shape), F32)
    for k, place in enumerate(places):
        below = int(place)
        share = F32(place - below)
        out[k] = planes[below] * (1 - share) + planes[below + 1] * share
    return out


def along_z(z, heights, values):
    """Values at the heights (mm) of a line of points, at each z (Z, Y, X); corners rounded."""
    order = np.argsort(heights)
    steps = np.linspace(z.min() - 1, z.max() + 1, 600)
    table = cv2.blur(np.interp(steps, heights[order], values[order])[:, None], (1, 9)).ravel()
    place = (z - F32(steps[0])) * F32(1 / (steps[1] - steps[0]))
    return np.interp(place, np.arange(600), table).astype(F32)


# ============================ Bones ============================


class Canvas:
    """hu (Z, Y, X), float32, on the fine grid, and the texture of bone: grain, fine; lumps, coarse.

    A surface covers a voxel by its share within `edge` mm.
    """

    def __init__(self, study, hu):
        self.study, self.hu, self.box, self.edge = study, hu, whole(study.shape), study.edge
        self.draw_grain()
        self.draw_lumps()

    def draw_grain(self):
        """Noise of unit size, correlated over about 0.6 mm within and 0.9 mm across slices."""
        study, rng = self.study, self.study.rng
        self.grain, sigma = np.empty(study.shape, F32), 0.55 / study.mm
        kept = np.exp(-study.mm_z / 0.9)
        for k in range(study.shape[0]):
            noise = rng.standard_normal(study.shape[1:], dtype=F32)
            noise = cv2.GaussianBlur(noise, (0, 0), sigma) * F32(2 * np.sqrt(np.pi) * sigma)
            if k:
                noise = F32(kept) * self.grain[k - 1] + F32(np.sqrt(1 - kept * kept)) * noise
            self.grain[k] = noise

    def draw_lumps(self):
        """Noise of unit size whose lumps span about 9 mm."""
        study = self.study
        slices, *size = study.shape
        coarse = [max(3, int(n * mm / 9))
                  for n, mm in zip(study.shape, (study.mm_z, study.mm, study.mm))]
        planes = [cv2.resize(plane, size, interpolation=cv2.INTER_CUBIC)
                  for plane in study.rng.standard_normal(coarse).astype(F32)]
        self.lumps = interpolate(planes, np.linspace(0, coarse[0] - 1.001, slices))
        np.clip(self.lumps, -2, 2, out=self.lumps)

    def blend(self, box, touched, distance, hu, opacity=None):
        """Blend hu, one a touched voxel or one for all, into the inside of a surface."""
        share = cover(distance[touched], self.edge)
        if opacity is not None:
            share = share * opacity[touched]
        part = self.hu[box]
        part[touched] += share * (hu - part[touched])

    def touched(self, distance):
        """Which voxels a surface reaches."""
        return distance < self.edge * 0.5

    def fill_primitive(self, frame, primitive, hu):
        """Fill a primitive with one value."""
        box = frame.box(primitive.low - 1, primitive.high + 1, self.box)
        if box is not None:
            distance = primitive.distance(*frame.coordinates(box)).astype(F32)
            self.blend(box, self.touched(distance), distance, F32(hu))

    def fill_cartilage(self, frame, solid, calcium, gain, most):
        """Fill a solid with cartilage that is calcified in patches, at most `most` HU."""
        found = surface(solid, frame, self.box)
        if found:
            touched = self.touched(found.distance)
            patches = self.lumps[found.box][touched] + (calcium - 0.3)
            hu = np.clip(110 + gain * calcium * patches, 70, most)
            self.blend(found.box, touched, found.distance, hu)

    def fill_bone(self, box, distance, bone, opacity=None, extra=None, thicker=None):
        """Fill a surface with bone; extra: HU of the spongy part, thicker: shell, mm, (Z, Y, X)."""
        touched = self.touched(distance)
        lumps = self.lumps[box][touched]
        shell = bone.shell * (1 + 0.25 * lumps)
        if thicker is not None:
            shell = shell + thicker[touched]
        compact = np.clip(1 - (-distance[touched] - shell) / 0.6, 0, 1)
        grain = 0.2 * self.grain[box][touched]
        spongy = bone.spongy * (1 + grain + 0.14 * lumps)
        if extra is not None:
            spongy = spongy + extra[touched]
        hu = spongy + compact * (bone.cortex * (1 + 0.08 * lumps) - spongy)
        self.blend(box, touched, distance, hu, opacity)

    def fill_solid(self, frame, solid, bone):
        """Fill a solid with bone."""
        found = surface(solid, frame, self.box)
        if found:
            self.fill_bone(*found, bone)


def surface(solid, frame, box):
    """The part of a solid within a box: Surface, or None."""
    box = frame.box(*solid.corners(), box)
    return box and Surface(box, solid.distance(frame, box))


def paint_bones(study, canvas, soft):
    """Bones, discs and arteries on the canvas; labels (Z, Y, X) and voxels (i, j, k) of metal."""
    rng = study.rng
    bone = Bone(rng.uniform(850, 1350), rng.uniform(210, 420), rng.uniform(0.65, 1.15))
    skull, metal = paint_head(study, canvas, bone)
    paint_throat(study, canvas, bone)
    paint_discs(study, canvas)
    paint_vertebral_arteries(study, canvas, soft.artery_hu)
    vertebrae = draw_vertebrae(study, canvas.box)
    ribs = surface(thorax(study.position, study.turn, soft.shrug), study.frame, canvas.box)
    for level in range(1, 11):
        if level in vertebrae and level + 1 in vertebrae:
            space = rng.uniform(1.1, 2.0) * (1 - 0.35 * study.wear)
            clear_joint(vertebrae[level], vertebrae[level + 1], space)
    clear_joint(skull, vertebrae.get(1), 1.6)
    for level in range(7, 12):
        clear_joint(ribs, vertebrae.get(level), 1.3)
    if ribs:
        canvas.fill_bone(*ribs, bone._replace(spongy=bone.spongy * 0.9, shell=1.2))
    if skull:
        paint_skull(study, canvas, skull, bone)
    labels = np.zeros(study.shape, np.uint8)
    for level, vertebra in vertebrae.items():
        paint_vertebra(study, canvas, level, vertebra, bone)
        inside = vertebra.distance < 0
        if vertebra.gap is not None:
            inside &= vertebra.gap < 0.8
        labels[vertebra.box][inside] = level
    return labels, metal


def clear_joint(a, b, space):
    """Keep the surfaces of two bones `space` mm apart, in place; either may be None."""
    common = a and b and overlap(a.box, b.box)
    if not common:
        return
    one, other = a.distance[common[0]], b.distance[common[1]]
    near = np.maximum(one, other) < 3
    half = (one[near] - other[near]) * 0.5
    one[near], other[near] = (np.maximum(one[near], half + space / 2),
                              np.maximum(other[near], -half + space / 2))


def paint_head(study, canvas, bone):
    """Brain case, jaw and teeth; the surface of the skull's base, and voxels (i, j, k) of metal."""
    rng, head = study.rng, study.head_frame()
    case, base, lift = brain_case(rng), skull_base(rng), rng.uniform(-5, 1)
    teeth, fillings = draw_teeth(rng, lift)
    vault = paint_brain_case(canvas, head, case, bone)
    skull = surface(base, head, canvas.box)
    common = vault and skull and overlap(skull.box, vault.box)
    if common:
        joined = skull.distance[common[0]]
        joined[:] = smooth_min(joined, vault.distance[common[1]], 4)
    canvas.fill_solid(head, mandible(lift), Bone(bone.cortex * 1.15, bone.spongy * 0.9, 1.7))
    for root, place, radius, up in teeth:
        canvas.fill_primitive(head, root, 1700)
        crown = ellipsoid(place - [0, 0, up * 2.2], [radius, radius, 3.6])
        canvas.fill_primitive(head, crown, 2500)
    for place in fillings:
        filling = ellipsoid(place - [0, 0, 1], [3, 3, 2.4])
        canvas.fill_primitive(head, filling, rng.uniform(4500, 9000))
    return skull, [head.inverse @ (place - head.origin) for place in fillings]


def paint_brain_case(canvas, head, case, bone):
    """Brain and the shell around it, 6 mm thick, open below: Surface, or None out of view."""
    low, high = case.corners()
    box = head.box(low, np.minimum(high, [90, 110, 170]), canvas.box)
    if box is None:
        return None
    outer = case.distance(head, box)
    inner = outer + (6 + 1.2 * canvas.lumps[box])
    brain = 36 + 4 * canvas.grain[box]
    canvas.hu[box] += cover(inner, 2) * (brain - canvas.hu[box])
    opening = ellipsoid([0, 11, 10], [15, 17.5, 20]).distance(*head.coordinates(box))
    shell = smooth_max(np.maximum(outer, -inner), -opening, 2)
    canvas.fill_bone(box, shell, Bone(bone.cortex * 1.1, bone.spongy * 1.4, 1.3))
    return Surface(box, shell)


def paint_skull(study, canvas, skull, bone):
    """The skull's base with the air cells behind the ears, and the sinuses."""
    head = study.head_frame()
    canvas.fill_bone(*skull, bone._replace(spongy=bone.spongy * 1.3, shell=1.5))
    x, y, z = head.coordinates(skull.box)
    cells = air_cells(study, canvas.grain[skull.box]) > study.rng.uniform(-0.2, 0.5)
    cells &= (np.abs(np.abs(x) - 50) < 13) & (y > -6) & (z > -4) & (z < 45)
    canvas.hu[skull.box][cells & (skull.distance < -1.6)] = -750
    for primitive in sinuses():
        canvas.fill_primitive(head, primitive, -1000)


def air_cells(study, grain):
    """The grain (Z, Y, X) of a box, blurred to lumps of about 2 mm."""
    out = np.stack([cv2.GaussianBlur(plane, (0, 0), 1.2 / study.mm) * 3 for plane in grain])
    count = max(1, int(round(2.2 / study.mm_z)))
    sums = np.cumsum(np.concatenate([np.zeros_like(out[:1]), out]), 0)
    k = np.arange(len(out))
    start, stop = np.maximum(k - count // 2, 0), np.minimum(k + count // 2 + 1, len(out))
    return (sums[stop] - sums[start]) / (stop - start).astype(F32)[:, None, None] * 1.4


def paint_throat(study, canvas, bone):
    """Hyoid, thyroid and cricoid cartilage."""
    rng, frame, at = study.rng, study.frame, study.position
    tilted = frame.below(rotation(0, rng.normal(5, 5)), at[4] * 0.5 + at[3] * 0.5)
    canvas.fill_solid(tilted, hyoid(), bone._replace(cortex=bone.cortex * 0.8, shell=0.6))
    tilted = frame.below(rotation(0, rng.normal(4, 4)), at[5] + [0, 0, 2])
    calcium = rng.uniform(0.2, 1)
    canvas.fill_cartilage(tilted, thyroid_cartilage(), calcium, 260, 650)
    tilted = frame.below(rotation(0, 5), at[6] + [0, 0, 6])
    canvas.fill_cartilage(tilted, cricoid(), calcium, 280, 700)


def paint_discs(study, canvas):
    """Discs below C2 to T3; in a narrow one now and then gas."""
    rng = study.rng
    for level, (width, depth) in DISCS.items():
        height = study.disc[level]
        frame = study.vertebra_frame(level + 1).moved(
            [0, 0, study.height[level + 1] / 2 + height / 2])
        disc = vertebral_body(width * 0.97, depth * 0.97, height + 5, 2.4, lip=0, waist=-0.03,
                              cave=0)
        canvas.fill_primitive(frame, disc, rng.uniform(75, 110))
        if height < 3.2 and rng.random() < 0.4:
            gas = ellipsoid([rng.normal(0, 2), 1, 0], [4, 3, 0.9])
            canvas.fill_primitive(frame, gas, -350)


def paint_vertebral_arteries(study, canvas, hu):
    for side in SIDES:
        places = [(7, [side * 17, -6, -6])]
        places += [(level, [side * 14.3, 2.3, 0]) for level in range(6, 2, -1)]
        places += [(2, [side * 17, 3, -7]), (2, [side * 25, 3, 4]), (1, [side * 27.5, 3, 0]),
                   (1, [side * 26, 10, 7]), (1, [side * 14, 18, 7])]
        points = [study.position[level] + study.turn[level] @ local for level, local in places]
        points.append(study.position[1] + study.head_turn @ [side * 7, 8, 16])
        artery = polyline(points, max(1.2, study.rng.normal(1.8, 0.3)))
        canvas.fill_primitive(study.frame, artery, hu)


def draw_vertebrae(study, inside):
    """{level: Vertebra} of those within a box; broken, but not yet clear of each other."""
    vertebrae = {}
    for level in LEVELS:
        solid, depth = vertebra_solid(study.rng, level, study)
        frame = study.vertebra_frame(level)
        low, high = solid.corners()
        box = frame.box(low - 3, high + 3, inside)
        if box is None:
            continue
        distance, gap = solid.distance(frame, box), None
        for part in study.fractured.get(level, []):
            beyond, within = part.distances(*frame.coordinates(box))
            if part.move is not None:
                moved = solid.distance(frame.moved(part.move), box)
                distance = np.where((beyond > 0) & (within > 0), moved, distance)
            far = part.width / 2 + part.opening() - beyond
            new = np.minimum(np.minimum(far, beyond + part.width / 2), within * 0.4)
            gap = new if gap is None else np.maximum(gap, new)
        vertebrae[level] = Vertebra(box, distance, gap, depth, frame)
    return vertebrae


def paint_vertebra(study, canvas, level, vertebra, bone):
    """A vertebra, its fractures open and filled with blood."""
    rng, box, distance, gap = study.rng, vertebra.box, vertebra.distance, vertebra.gap
    x, y, z = vertebra.frame.coordinates(box)
    opacity = None
    if gap is not None:
        opacity = 1 - cover(-gap, study.edge) * rng.uniform(0.88, 1)
        canvas.hu[box][(distance < 1) & (gap > -2)] = 55
    thicker = 0.45 * smooth_step(y, 6, 11)
    if level == 1:
        thicker = np.full(distance.shape, 0.5, F32)
    elif level == 2:
        thicker = np.maximum(thicker, 0.35 * smooth_step(z, 7, 11))
    extra = spongy_pattern(study, level, vertebra.depth, x, y, z, bone.spongy)
    bone = bone._replace(cortex=bone.cortex * rng.uniform(0.95, 1.05),
                         spongy=bone.spongy * rng.uniform(0.92, 1.08))
    canvas.fill_bone(box, distance, bone, opacity, extra, thicker)


def spongy_pattern(study, level, depth, x, y, z, spongy):
    """HU added inside a vertebra: an impacted band, the cleft of its veins, a worn end plate."""
    extra = np.zeros_like(x)
    if level in study.wedge:
        band = (z - 0.1 * study.height[level]) / 2
        extra += 260 * np.exp(-band ** 2) * (y < 5)
    if level > 1:
        cleft = np.exp(-(z / 1.3) ** 2 - (x / 3.5) ** 2)
        cleft = cleft * smooth_step(y, 1, depth * 0.8) * (y < depth)
        extra -= spongy * 0.8 * cleft
        extra[(np.abs(x) < 3) & (np.abs(y) < 4)] -= 60
    if level > 2 and study.wear > 0.4 and study.disc.get(level, 5) < 3.5:
        plate = (z + (study.height[level] / 2 - 1.5)) / 1.5
        extra += 200 * np.exp(-plate ** 2)
    return extra


# ============================ The scanner ============================


class Scan:
    """What the scanner makes of a volume: blur, noise, streaks; sharp or soft kernel."""

    def __init__(self, study, levels, metal):
        """levels (Z,): the level of each slice; metal: voxels (i, j, k) of the painted grid."""
        self.study, self.levels, rng = study, levels, study.rng
        self.sharp = rng.random() < 0.55
        blur, noise = ((0.28, 0.45), (20, 60)) if self.sharp else ((0.45, 0.75), (10, 28))
        self.blur, self.noise = rng.uniform(*blur) / study.pixel, F32(rng.uniform(*noise))
        self.spill = F32(rng.uniform(0.1, 0.25) if study.slice_mm < 1.2 else 0)
        self.hardening = rng.uniform(15, 60)
        size = study.matrix
        self.y, self.x = np.mgrid[0:size, 0:size].astype(F32)
        self.shade = np.exp(-((self.x - size / 2) * study.pixel / 95) ** 2
                            - ((self.y - size * 0.55) * study.pixel / 80) ** 2)
        self.metal = [(i, j, (k - (study.fine - 1) / 2) / study.fine,
                       rng.standard_normal(180).astype(F32), rng.uniform(120, 450))
                      for i, j, k in metal]
        self.kept = rng.uniform(0.15, 0.5) if study.slice_mm < 1.5 else 0.1

    def acquire(self, hu):
        """HU as scanned, int16, from those painted, both (Z, Y, X)."""
        out, grit, last = np.empty(hu.shape, np.int16), None, len(hu) - 1
        for k in range(len(hu)):
            plane = hu[k] * (1 - 2 * self.spill)
            plane += self.spill * hu[max(k - 1, 0)]
            plane += self.spill * hu[min(k + 1, last)]
            plane = cv2.GaussianBlur(plane, (0, 0), self.blur)
            if self.sharp:
                soft = cv2.GaussianBlur(plane, (0, 0), 0.8 / self.study.pixel)
                plane = plane + 0.35 * (plane - soft)
            shoulders = float(np.clip((self.levels[k] - 6.2) / 2.2, 0, 1))
            if shoulders > 0:
                plane = plane - self.hardening * shoulders * self.shade
            grit = self.next_grit(grit)
            plane = plane + self.noise * (1 + 1.1 * shoulders) * grit
            if shoulders > 0.2:
                plane = plane + self.shoulder_streaks(shoulders)
            for metal in self.metal:
                plane = self.add_metal_streaks(plane, k, *metal)
            out[k] = np.clip(np.rint(plane), -1024, 3071)
        return out

    def random_plane(self):
        return self.study.rng.standard_normal((self.study.matrix,) * 2, dtype=F32)

    def next_grit(self, before):
        """Noise of unit size (Y, X) that resembles that of the slice before."""
        pixel, white = self.study.pixel, self.random_plane()
        fine = max(0.35, (0.55 if self.sharp else 1.0) * 0.6 / pixel * 0.6)
        grit = cv2.GaussianBlur(white, (0, 0), fine)
        if self.sharp:
            grit = grit - 0.7 * cv2.GaussianBlur(white, (0, 0), 1.6 * 0.6 / pixel)
        grit /= grit.std() + 1e-6
        if before is None:
            return grit
        return self.kept * before + F32(np.sqrt(1 - self.kept ** 2)) * grit

    def shoulder_streaks(self, shoulders):
        """Streaks (Y, X) from side to side, as of too few photons."""
        pixel = self.study.pixel
        lines = cv2.GaussianBlur(self.random_plane(), (0, 0), sigmaX=9 / pixel, sigmaY=0.5 / pixel)
        size = self.noise * 1.1 * shoulders / (lines.std() + 1e-6)
        return lines * size * (0.3 + self.shade)

    def add_metal_streaks(self, plane, slice_index, i, j, k, rays, size):
        """A star around voxel (i, j, k) on the slices near it; rays (180,): HU by angle."""
        above = (slice_index - k) * self.study.slice_mm
        if abs(above) >= 7:
            return plane
        x, y = self.x - F32(i), self.y - F32(j)
        radius = np.sqrt(x * x + y * y) * self.study.pixel + 2
        angle = np.arctan2(y, x) * F32(180 / np.pi) + 180 + above * 3
        star = np.interp(angle % 360, np.arange(180) * 2, rays, period=360).astype(F32)
        return plane + star * F32(size * np.exp(-(above / 3.5) ** 2)) * np.exp(-radius / 38)


# ============================ Data sets ============================


def write_series(folder, uid, hu, study):
    """A CT series, one file <n>.dcm a slice, from the feet or from the head."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y, z = study.origin
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    for name, value in dict(
            SOPClassUID=pydicom.uid.CTImageStorage, StudyInstanceUID=uid,
            SeriesInstanceUID=uid + ".1", PatientID=uid, Modality="CT", PatientPosition="HFS",
            SliceThickness=f"{study.slice_mm:0.5f}", PixelSpacing=[f"{study.pixel:0.6f}"] * 2,
            ImageOrientationPatient=["1", "0", "0", "0", "1", "0"], Rows=hu.shape[1],
            Columns=hu.shape[2], SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2",
            BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=0,
            RescaleIntercept="-1024", RescaleSlope="1").items():
        setattr(data, name, value)
    order = range(len(hu))
    for number, k in enumerate(order[::-1] if study.rng.random() < 0.5 else order, 1):
        data.SOPInstanceUID, data.InstanceNumber = f"{uid}.1.{number}", number
        data.ImagePositionPatient = [f"{x:0.5f}", f"{y:0.5f}", f"{z + k * study.slice_mm:0.5f}"]
        data.PixelData = (hu[k].astype(np.int32) + 1024).astype("<u2").tobytes()
        data.save_as(folder / f"{number}.dcm", enforce_file_format=True)


def write_mask(path, labels, study):
    """NIfTI-1 of labels (Z, Y, X); RAS+ mm in the sform."""
    z, y, x = labels.shape
    pixel, step, at = study.pixel, study.slice_mm, study.origin
    header = bytearray(352)
    for offset, kind, *values in (
            (0, "i", 348), (40, "8h", 3, x, y, z, 1, 1, 1, 1), (70, "2h", 2, 8),
            (76, "8f", 1, pixel, pixel, step, 1, 1, 1, 1), (108, "2f", 352, 1), (123, "B", 2),
            (254, "h", 1), (280, "4f", -pixel, 0, 0, -at[0]), (296, "4f", 0, -pixel, 0, -at[1]),
            (312, "4f", 0, 0, step, at[2]), (344, "4s", b"n+1")):
        struct.pack_into("<" + kind, header, offset, *values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + labels.tobytes())


def make_study(out, seed, wide, studies, index):
    """One study on disk; its row of labels."""
    uid = f"1.2.3.4.{seed}.{index}"
    study = Study(seed, index, wide)
    hu, labels = study.render()
    images = out / ("train_images" if index < studies else "test_images")
    write_series(images / uid, uid, hu, study)
    write_mask(out / "segmentations" / f"{uid}.nii", labels, study)
    return uid, int(bool(study.fractured)), *(int(k in study.fractured) for k in range(1, 8))


def make_dataset(out, studies, test_studies, seed, wide=False, workers=1):
    """A data set in the layout of the competition, with masks and the truth of the test studies.

    Studies 0 to `studies` - 1 are for training, the next `test_studies` for testing.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    make = partial(make_study, out, seed, wide, studies)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        rows = list(pool.map(make, range(studies + test_studies)))
    write_tables(out, rows[:studies], rows[studies:])


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--studies", type=int, default=20, help="training studies")
    parser.add_argument("--test-studies", type=int, default=0, help="test studies")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("--wide", action="store_true", help="fields of view beyond the neck")
    parser.add_argument("--workers", type=int, default=1, help="studies made at once")
    o = parser.parse_args()
    cv2.setNumThreads(1)  # the studies are what runs in parallel
    make_dataset(o.out, o.studies, o.test_studies, o.seed, o.wide, o.workers)
    print(f"{o.out}: {o.studies} training and {o.test_studies} test studies")


if __name__ == "__main__":
    main()
