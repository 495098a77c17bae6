"""Synthetic neck CTs whose bones are sums of blobs (metaballs): `metaballs.py OUT`.

Each vertebra is a sum of anisotropic Gaussian blobs, positive and negative, cut off at one
half, in coordinates that a smooth displacement bends; soft tissue is noise-warped columns,
fractures are noisy sheets. The tables are metaballs_*.csv; mm and degrees, levels 1 = C1 to
8 = T1.
"""

import functools
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from writers import Grid, main

HERE = Path(__file__).parent
UID_ROOT = "1.2.3.7"
SIDE = 256  # pixels, edge of a slice
CENTRE = 127.5  # pixels
FAR = -9.0  # mm under the surface: outside of all
LOWEST = 9  # level of T2
HALF = np.float32(-0.693)  # log of one half
REACH = 1.45  # half axes, beyond which a blob counts for nothing

# Millimetres between C1 and T2, and of C1 to C7 how often each breaks. By eye; facts'
# rates.
PITCH_MM = np.array([20.5, 22, 18.6, 18.6, 18.8, 19.4, 21.5, 23])
FREQUENCY = np.array(
    [0.0723, 0.1412, 0.0362, 0.0535, 0.0802, 0.1372, 0.1947]
)

Blob = namedtuple(
    "Blob", "centre axes shape weight"
)  # axes: rows over half axes
Sheet = namedtuple(
    "Sheet", "point normal gap ball radius shift"
)  # of a fracture
Compression = namedtuple("Compression", "share even")
Airway = namedtuple("Airway", "y half_width half_depth")


# ---- Tables ----


@functools.cache
def read_table(name):
    """The csv file metaballs_<name>.csv."""
    return pd.read_csv(HERE / f"metaballs_{name}.csv")


def table_rows(name):
    """The rows of a table of numbers."""
    return read_table(name).to_numpy(float)


def numbers(cell):
    """The numbers of a cell "1 2 3"."""
    return np.array([float(word) for word in cell.split()])


def group_rows(name, level):
    """The rows of a table that hold for a level."""
    group = ["C1", "C2", "C3 to C7", "T1 to T2"][
        min(level, 3) - 1 + (level > 7)
    ]
    table = read_table(name)
    return table[table.group == group].drop(columns="group")


# ---- Vertebrae ----


def turned(degrees_x, degrees_z):
    """Rotation matrix: about x, then about z."""
    tilt = np.radians([degrees_x, 0.0, 0])
    yaw = np.radians([0.0, 0, degrees_z])
    return cv2.Rodrigues(yaw)[0] @ cv2.Rodrigues(tilt)[0]


def blob(centre, half, shape="round", tilt=0.0, yaw=0.0, weight=1.0):
    """A metaball: at weight 1 an ellipsoid, box or drum; tilt about x, then yaw about z."""
    centre = np.asarray(centre, float)
    half = np.asarray(half, float)
    axes = turned(tilt, yaw).T / half[:, None]
    return Blob(centre, axes, shape, weight)


def shaped(row, low, reach, twin):
    """Centre and half axes of a blob as they are at a level; `low` 0: C3, 1: C7."""
    wider = low * np.array([0.15, 0, 0, 0.15, 0.08, 0.12])
    inward = -1.7 * twin
    longer = reach * np.array([inward, 12, -5, 0, 4, 1])
    return row * (1 + wider) + longer


def build(rng, level, worn):
    """The blobs of one level, each side its own, with what wear and chance add."""
    low = (max(level - 3, 0) / 4) ** 1.3 * (level < 8)
    parts = []
    for shape, sides, *cells in group_rows("vertebrae", level).to_numpy():
        row = np.array(cells, float)
        twin = sides == 2
        reach = low * max(row[1] - 25, 0) / 8
        middle = shaped(row[:6], low, reach, twin)
        tilt, yaw, weight = row[6:]
        outward = yaw * (1 - reach)
        for side in (1, -1)[:sides]:
            a, b = rng.normal(0, 2.5, 2)
            half = middle[3:] * rng.normal(1, 0.04, 3)
            at = middle[:3] * (side, 1, 1) + rng.normal(0, 0.35, 3)
            way = side * outward + b * twin
            parts.append(blob(at, half, shape, tilt + a, way, weight))
    for z in (6, -6) if level > 2 else ():
        parts += end_plate(rng, level, worn, z * 1.1)
    return parts


def end_plate(rng, level, worn, z):
    """An osteophyte, a node, a vein and a loose apophysis, each by its chance."""
    spur_at = (rng.normal(0, 4), -rng.uniform(8, 12), z)
    spur_half = rng.uniform(1.5, 3.5, 3)
    node_at = (*rng.normal(0, 3, 2), z)
    vein_weight = -rng.uniform(0.4, 1)
    tip_y = 31 + 8 * (level > 6)
    extras = (
        (worn, blob(spur_at, spur_half)),
        (0.12, blob(node_at, (2.5, 2.5, 3), weight=-0.9)),
        (0.3, blob((0, 6, 0), (1.1, 4.5, 1.2), weight=vein_weight)),
        (0.03, blob((0, tip_y, -9), (6, 1, 6), "box", weight=-1.3)),
    )
    return [part for chance, part in extras if rng.random() < chance]


def choose_cuts(rng, level):
    """The names of the cuts of a pattern that breaks a level."""
    patterns = group_rows("patterns", level).to_numpy()
    cuts = [names.split() for _, names in patterns]
    odds = []
    for (share, _), names in zip(patterns, cuts):
        shoveler = (
            level == 7 and names[0] == "spinous"
        )  # C7's long process
        odds.append(float(share) * (1 + 2 * shoveler))
    odds = np.array(odds)
    return cuts[rng.choice(len(odds), p=odds / odds.sum())]


def fracture(rng, level):
    """Sheets of one level, and its compression or None."""
    names = choose_cuts(rng, level)
    cuts = read_table("cuts").set_index("name")
    side = rng.choice([-1, 1])
    sheets = []
    for name in names:
        side = -side
        cut = cuts.loc[name]
        lower = (0, 7 * (level == 7 and name == "spinous"), 0)
        point, normal, ball, shift = (
            numbers(cut[column]) * (side, 1, 1)
            for column in ("point_mm", "normal", "ball_mm", "shift")
        )
        normal += rng.normal(0, 0.8 if name == "burst" else 0.2, 3)
        shift *= (
            rng.uniform(0.8, 4)
            * (rng.random() < 0.55)
            * (side if name == "dens" else 1)
        )
        point = point + rng.normal(0, 0.8, 3) + lower
        normal = normal / np.linalg.norm(normal)
        gap = rng.uniform(0.8, 2.4)
        sheets.append(
            Sheet(point, normal, gap, ball, cut.radius_mm, shift)
        )
    if names[0] not in ("wedge", "burst"):
        return sheets, None
    return sheets, Compression(
        rng.uniform(0.15, 0.42), names[0] == "burst"
    )


# ---- Fields ----


def hats(count, every, nodes):
    """(count, nodes): the share of every node at every voxel, linear between neighbours."""
    last = nodes - 1
    at = np.minimum(np.arange(count) / every, last)
    away = np.abs(at[:, None] - np.arange(nodes))
    share = np.maximum(0, 1 - away)
    return np.float32(share)


def enlarge(coarse, shape, every):
    """Trilinear interpolation of nodes that lie `every` (z, in-plane) voxels apart."""
    axes = zip(shape, (*every, every[1]), coarse.shape)
    along, down, right = (hats(*axis) for axis in axes)
    planes = down @ np.float32(coarse) @ right.T
    return np.tensordot(along, planes, 1)


def noise(rng, shape, every):
    """Smooth noise of about unit deviation, its grain `every` (z, in-plane) voxels."""
    steps = (*every, every[1])
    nodes = [n // step + 2 for n, step in zip(shape, steps)]
    white = rng.standard_normal(nodes, np.float32)
    return enlarge(white * 1.4, shape, every)


def sums(values):
    """Running sum that is 0 at index 140, where the curve of the spine has its origin."""
    total = np.cumsum(values)
    return total - total[140]


def draw_curve(rng, s, size):
    """Lean, place (x, y, z), roll and turn of the spine at mm `s` along it."""
    knots = np.array([-60, 0, 60, 115]) * size
    bow = rng.normal([22, 16, 4, -6], [5, 7, 5, 6])
    degrees = bow + rng.normal(0, 4)
    lean = np.interp(s, knots, np.radians(degrees))
    y = sums(-np.sin(lean))
    z = sums(np.cos(lean))
    aside = rng.normal(0, 2.5, 4)
    x = np.interp(s, knots, aside)
    ends = rng.normal(0, 0.05, 2)
    roll = np.interp(s, [-20, 115], ends)
    twist = np.array([0, 0.05, 0.15]) * rng.normal()
    twist = twist + rng.normal(0, 0.04)
    turn = np.interp(s, [-20, 30, 115], twist)
    return lean, (x, y, z), roll, turn


def coarse_coordinates(grid, shape):
    """z, y, x (mm) of nodes that lie 4 slices and 8 pixels apart."""
    axes = []
    for axis, n, every in zip((2, 1, 0), shape, (4, 8, 8)):
        nodes = np.arange(n // every + 2) * every
        mm = nodes * grid.step[axis]
        axes.append(grid.origin[axis] + mm)
    return np.meshgrid(*axes, indexing="ij")


def bend(rng, grid, shape, size):
    """Anatomical coordinates (x, y, along the spine) of every voxel: a smooth
    displacement."""
    s = np.arange(-140, 300.0)
    lean, (x0, y0, z0), roll, turn = draw_curve(rng, s, size)
    z, y, x = coarse_coordinates(grid, shape)
    along = z
    for _ in range(4):  # where the spine passes nearest
        angle = np.interp(along, s, lean)
        sine, cosine = np.sin(angle), np.cos(angle)
        dy = y - np.interp(along, s, y0)
        dz = z - np.interp(along, s, z0)
        along = along - sine * dy + cosine * dz

    t = np.interp(along, s, turn)
    off = x - np.interp(along, s, x0)
    deep = cosine * dy + sine * dz - 5
    across = np.cos(t) * off - np.sin(t) * deep
    back = np.sin(t) * off + np.cos(t) * deep + 5
    up = along + off * np.interp(along, s, roll)
    fields = []
    for field in (across, back, up):
        wavy = field + 0.5 * noise(rng, field.shape, (5, 5))
        fields.append(enlarge(wavy, shape, (4, 8)))
    return fields


def box_of(coords, low, high):
    """Index slices of the voxels with coordinates between low and high; None where none
    are."""
    inside = True
    for c, a, b in zip(coords, low, high):
        few = c[::3, ::5, ::5]
        inside = inside & (few > a) & (few < b)
    hit = np.argwhere(inside)
    if not len(hit):
        return None
    every = (3, 5, 5)
    first = np.maximum((hit.min(0) - 1) * every, 0)
    last = (hit.max(0) + 1) * every
    return tuple(map(slice, first.tolist(), (last + 1).tolist()))


def fall_off(coords, part):
    """What a blob adds where it reaches: 1 in its centre, one half on its surface."""
    here = [c - np.float32(m) for c, m in zip(coords, part.centre)]
    u, v, w = (
        sum(np.float32(f) * c for f, c in zip(axis, here)) ** 2
        for axis in part.axes
    )
    if part.shape == "round":
        power = (u + v + w) ** 2
    elif part.shape == "box":
        power = u * u + v * v + w * w
    else:
        power = (u + v) ** 2 + w * w
    return np.float32(part.weight) * np.exp(HALF * power)


def depth_of(coords, parts, step):
    """Depth (mm, to first order) under the level set at one half of the blobs' sum."""
    total = np.zeros(coords[0].shape, np.float32)
    for part in parts:
        half = np.linalg.inv(part.axes)
        reach = REACH * np.abs(half).sum(1)
        at = box_of(coords, part.centre - reach, part.centre + reach)
        if at:
            here = [c[at] for c in coords]
            total[at] += fall_off(here, part)
    spacing = map(np.float32, step[::-1])
    square = sum(g * g for g in np.gradient(total, *spacing))
    slope = np.maximum(square**0.5, 0.02)
    depth = np.where(total > 0.02, (total - 0.5) / slope, FAR)
    return depth.astype(np.float32)


def squeezed(x, y, z, compression):
    """Height z before a compression, and the density of what is impacted."""
    gentle = 4 if compression.even else 12
    forward = np.clip((6 - y) / gentle, 0, 1)
    inward = np.clip((13 - np.abs(x)) / 3, 0, 1)
    ramp = forward * inward
    lost = compression.share * ramp
    higher = (z + 7) / (1 - lost) - 7
    z = np.where(z > -7, higher, z)
    layer = np.exp(-(((z - 4) / 2.5) ** 2))
    return z, 500 * compression.share * ramp * layer


def broken_up(local, breaks, wave, step, opening):
    """Coordinates after compression and displacement, depth in the cracks, impaction's
    HU."""
    sheets, compression = breaks
    x, y, z = local
    band = 0
    if compression:
        z, band = squeezed(x, y, z, compression)
    xyz = [x, y, z]
    crack = np.full(wave.shape, FAR, np.float32)
    for sheet in sheets:
        depth, gone = sheet_depth(xyz, sheet, wave, step, opening)
        crack = np.maximum(crack, depth)
        xyz = [c - gone * np.float32(d) for c, d in zip(xyz, sheet.shift)]
    return xyz, crack, band


def sheet_depth(xyz, sheet, wave, step, opening):
    """Depth inside the crack of a sheet, and which voxels it breaks off."""
    across = float(np.abs(sheet.normal) @ step)  # of a voxel
    half = max(sheet.gap * opening, 1.15 * across) / 2
    pull = float(sheet.normal @ sheet.shift)
    along, square = 0, 0
    for c, n, p, b in zip(xyz, sheet.normal, sheet.point, sheet.ball):
        along = along + np.float32(n) * (c - np.float32(p))
        square = square + (c - np.float32(b)) ** 2
    side = wave / 2 + along
    inside = sheet.radius - np.sqrt(square)
    gone = (side > 0) & (inside > 0)
    depth = np.where(gone, half + pull - side, half + side)
    return np.minimum(depth, inside), gone


def mix(image, hu, depth, width=1.0):
    """Fill `image` with `hu` where depth > 0, the edge as wide as width."""
    image += (hu - image) * np.clip(depth / width + 0.5, 0, 1)


def oval(x, y, middle_x, middle_y, half_width, half_depth):
    """Depth (mm, about) inside an elliptic column."""
    square = ((x - middle_x) / half_width) ** 2 + (
        (y - middle_y) / half_depth
    ) ** 2
    return (1 - np.sqrt(square)) * np.minimum(half_width, half_depth)


# ---- A study ----


class Study:
    """The volume being painted: CT, labels, depth in bone, coordinates, heights, bone's
    look."""

    def __init__(self, rng):
        self.size = rng.uniform(0.87, 1.1)
        self.age, thick, cut, thin = rng.random(4)
        self.heights = self.draw_heights(rng)
        self.merge = 1 + (thick < 0.12)  # slices that become one
        self.grid, shape = self.draw_grid(rng, thick, cut)
        self.step = self.grid.step
        shares = rng.random(6)
        self.coords = bend(rng, self.grid, shape, self.size)
        if rng.random() < 0.15:
            self.move(rng, 0.2 + 0.7 * shares[0])

        self.labels = np.zeros(shape, np.uint8)
        self.depth = np.full(shape, FAR, np.float32)
        grain = [max(1, round(4 / mm)) for mm in self.step[[2, 0]]]
        self.wave = noise(rng, shape, grain)
        denser = shares[:2] * (220, 500)
        thinner = 1 - 0.45 * (thin < 0.15)  # osteoporosis
        self.marrow, self.compact = np.add((180, 650), denser) * thinner
        looks = (0.6, 0.1, 0.6, 40) + shares[2:] * (0.6, 0.3, 0.7, 70)
        self.shell, self.rough, self.joint, self.texture = looks

    def move(self, rng, share):
        """The patient moves aside, when this share of the slices is made."""
        start = int(len(self.coords[0]) * share)
        for c in self.coords[:2]:
            c[start:] += rng.normal(0, 1)

    def draw_heights(self, rng):
        """{level: mm along the spine}, C7 at 0; worn discs are narrow."""
        worn = rng.random(8) < self.age * 0.6
        lost = np.where(worn, rng.uniform(0.5, 2.5, 8), 0)
        narrow = lost * (np.arange(8) > 1)
        steps = narrow - self.size * PITCH_MM
        tops = np.cumsum([0, *steps])
        levels = range(1, LOWEST + 1)
        return dict(zip(levels, tops - tops[6]))

    def draw_grid(self, rng, thick, cut):
        """The grid and its shape; few studies lack a C7 or a C1."""
        low = rng.uniform(-8, 8) if cut < 0.025 else -rng.uniform(30, 55)
        above = rng.uniform(16, 45) if cut < 0.975 else -8
        high = above + self.heights[1]
        usual = (0.35, 0.75) if rng.random() < 0.4 else (0.5, 0.65)
        pixel = rng.uniform(*usual)
        coarse = thick < 0.12 or rng.random() < 0.35
        limits = (1, 1.5) if coarse else (0.6, 1)
        slice_mm = rng.uniform(*limits)

        step = np.array([pixel, pixel, slice_mm])
        behind = 30 - pixel * 40
        away = rng.normal(0, (4, 4, 0))
        middle = (0, behind, low) + away
        half = step * (SIDE / 2, SIDE / 2, 0)
        slices = int((high - low) / slice_mm) // 2 * 2
        return Grid(middle - half, step), (slices, SIDE, SIDE)

    def place(self, parts, level):
        """Index slices of the part of the volume that the blobs lie in."""
        low, high = [], []
        for part in parts:
            if part.weight > 0:
                half = (np.linalg.inv(part.axes) ** 2).sum(1) ** 0.5
                low.append(part.centre - (half + 1))
                high.append(part.centre + (half + 1))
        shift = (0, 0, self.heights[level])
        low = np.min(low, 0) * self.size + shift
        high = np.max(high, 0) * self.size + shift
        return box_of(self.coords, low, high)

    def local(self, rng, level, at, loose):
        """Coordinates around a level, a little turned if it is a vertebra."""
        size = np.float32(self.size)
        x, y, z = (c[at] / size for c in self.coords)
        z -= np.float32(self.heights[level] / self.size)
        angles = rng.normal(0, 0.03, 3) * loose
        a, b, c = np.float32(angles)
        across = x + c * y - b * z
        back = y - c * x + a * z
        up = z + b * x - a * y
        return [across, back, up]

    def paint(self, rng, parts, level, label=0, breaks=None, density=1):
        """Paint one bone: pose, fracture, blobs, joint gap, shell, marrow, label."""
        at = self.place(parts, level) or (slice(0, 2),) * 3
        local = pieces = self.local(rng, level, at, label > 0)
        wave = self.wave[at]
        crack, band = np.float32(FAR), 0
        for opening in (
            (1, 1.7, 3) if breaks else (1,)
        ):  # wider until it can be seen
            if breaks:
                mm = self.step / self.size
                pieces, crack, band = broken_up(
                    local, breaks, wave, mm, opening
                )
            depth = depth_of(pieces, parts, self.step) + self.rough * wave
            if ((crack > 0) & (depth > 0.4)).sum() > 60:
                break

        depth = np.minimum(depth, -self.depth[at] - self.joint)
        white = rng.standard_normal(depth.shape, np.float32)
        bone = self.marrow + self.texture * white + band
        deep = depth.clip(0) / self.shell * (1 + 0.3 * wave)
        mix(bone, self.compact * density, np.exp(-(deep**2)) - 0.5)
        edge = self.step[0] + 0.15
        mix(bone, 65, crack, edge)
        mix(self.ct[at], bone, depth, edge)
        self.labels[at][depth > 0] = label
        self.depth[at] = np.maximum(self.depth[at], depth)

    def other_bones(self, rng):
        """Condyles, jaw, teeth, clavicles, hyoid and ribs: blobs strung along curves."""
        for row in read_table("strings").itertuples():
            points = np.array(
                [numbers(point) for point in row.points_mm.split(";")]
            )
            knots = np.arange(len(points))
            t = np.linspace(0, len(points) - 1, row.count_)
            line = np.stack([np.interp(t, knots, c) for c in points.T], 1)
            half = (row.half_x, row.half_y, row.half_z)
            for side in (1, -1):
                parts = [
                    blob(point * (side, 1, 1), half) for point in line
                ]
                self.paint(
                    rng, parts, row.level, density=np.float64(row.density)
                )

    def soft_tissue(self, rng):
        """CT of all but bone on a coarse grid; depth under the skin; level."""
        few = [np.ascontiguousarray(c[::3, ::2, ::2]) for c in self.coords]
        x, y, s = (c / np.float32(self.size) for c in few)
        level = 7 - s / 19
        out = np.full(x.shape, -1000, np.float32)
        stout = rng.uniform(0.9, 1.2)
        warp = [noise(rng, x.shape, (4, 7)) for _ in range(3)]
        fine = noise(rng, x.shape, (1, 2))

        profile = table_rows("profile").T
        courses = [
            np.float32(np.interp(level, profile[0], row))
            for row in profile[1:]
        ]
        wide, front, back, *airway = courses
        skin = (
            oval(
                x / stout,
                2 * y / stout,
                0,
                front + back,
                wide,
                back - front,
            )
            + warp[2]
        )
        collar = np.minimum(1.5 - np.abs(skin + 13), 3 - np.abs(level - 5))
        mix(
            out,
            rng.uniform(-200, 100) if rng.random() < 0.25 else -1000,
            collar,
        )
        mix(out, 30, skin, 1.5)
        mix(out, rng.uniform(-115, -85) + 12 * fine, skin - 2, 1.5)
        muscles(
            rng, out, x + 2 * warp[0], y + 2 * warp[1], level, fine, skin
        )
        viscera(
            rng,
            out,
            x + warp[0],
            y + warp[1],
            level,
            Airway(*airway),
            fine,
            self.age,
        )
        self.discs(rng, out, x, y, s, fine)
        skull(out, x, y, s - self.heights[1] / self.size, fine, warp[2])
        return out, skin, level

    def discs(self, rng, out, x, y, s, fine):
        """Discs, some of them with gas."""
        for n in range(2, LOWEST):
            upper, lower = self.heights[n], self.heights[n + 1]
            middle = (upper + lower) / 2 / self.size
            shift = 2.2 * (n == 2)  # C2 is long
            off = np.abs(s - middle + shift)
            width = 9 + 0.3 * n
            disc = oval(x, y, 0, 0, width, 8.2)
            inside = np.minimum(disc, 5.5 - off)
            mix(out, rng.uniform(75, 110), inside)
            none = rng.random() > 0.12 * self.age
            gas = np.minimum(inside - 2, 1 - off + fine)
            mix(out, -300, gas - 99 * none)


def muscles(rng, out, x, y, level, fine, skin):
    """Muscles, with planes of fat where two meet."""
    best, second = 0, 0
    down = ((level - 1) / 7).clip(0, 1)
    for row in table_rows("muscles"):
        top, bottom = np.float32(row).reshape(2, 4)
        middle_x, middle_y, wide, deep = (
            a + (b - a) * down for a, b in zip(top, bottom)
        )
        for side in (1, -1):
            square = ((x - side * middle_x) / wide) ** 2 + (
                (y - middle_y) / deep
            ) ** 2
            here = np.exp(-0.7 * square)
            second = np.maximum(second, np.minimum(best, here))
            best = np.maximum(best, here)
    apart = best - second - rng.uniform(0.02, 0.08)
    core = (best - rng.uniform(0.2, 0.4)) * 0.6
    inner = np.minimum(apart, core) * 12
    hu = rng.uniform(45, 70) + 8 * fine
    mix(out, hu, np.minimum(inner, skin - rng.uniform(3, 12)), 1.5)


def viscera(rng, out, x, y, level, airway, fine, age):
    """Columns of the table, airway, cartilages of the larynx."""
    contrast = rng.uniform(180, 350) * (rng.random() < 0.25)
    wide = airway.half_width * rng.uniform(0.8, 1.15)
    deep = airway.half_depth * rng.uniform(0.7, 1.2)
    pipe = oval(x, y, 0, airway.y, wide, deep)
    mix(out, 50 + 8 * fine, pipe + 4, 2)
    for row in table_rows("columns"):
        hu, share, mid_x, mid_y, half_x, half_y, first, last = row
        beyond = np.minimum(level - first, last - level)
        ends = 20 * np.minimum(0, beyond)
        for side in (1, -1)[: 1 + (mid_x > 9)]:
            width = half_x * rng.uniform(0.85, 1.15)
            column = oval(x, y, side * mid_x, mid_y, width, half_y)
            mix(out, hu + share * contrast, column + ends)
    mix(out, -1000, pipe, 1.2)

    behind = y > airway.y + 4
    open_back = 30 * behind * (level < 5.8)
    span = (0.8 - abs(level - 5.3)) * 19
    wall = np.minimum(1.6 - abs(pipe + 3), span - open_back)
    calcified = 280 * age * (fine > 0.2)
    mix(out, 110 + calcified, wall)


def skull(out, x, y, up, fine, warp):
    """Skull base with the foramen magnum, brain, mastoid cells; `up` mm above C1."""
    across = (x / 72) ** 2
    along = ((y + 15) / 91) ** 2
    height = ((up - 74) / 60) ** 2
    depth = (1 - np.sqrt(across + along + height)) * 60 + 0.7 * warp
    foramen = oval(x, y, 0, 13, 15, 17)
    hole = np.minimum(foramen, 40 - up)
    inside = np.minimum(hole, up - 9)
    mix(out, 35, np.maximum(depth, inside))
    diploe = np.exp(-(((depth - 3) / 1.2) ** 2))
    shell = 3.2 - np.abs(depth - 3 + warp)
    mix(out, 950 - 350 * diploe, np.minimum(shell, -hole))

    aside = (np.abs(x) - 54) ** 2
    behind = (y * 0.8 - 6) ** 2
    above = ((up - 13) / 1.6) ** 2
    mastoid = 13 - np.sqrt(aside + behind + above) + 2 * warp
    cells = 1.5 * fine - 0.2
    mix(out, 600, mastoid)
    mix(out, -750, np.minimum(mastoid - 2, cells))


# ---- The scanner ----


def star_of(rng, here):
    """Streaks around 0 of complex pixels."""
    counts = rng.integers(2, 24, 6)
    heights, phases = rng.uniform(0, 6, (2, 6))
    angle = np.angle(here)
    rays = 0
    for n, a, b in zip(counts, heights, phases):
        rays = rays + 25 * a * np.cos(n * angle + b)
    return rays * np.exp(-np.abs(here) / 45)


def add_metal(rng, ct, skin, away):
    """Metal with its streaks, in bone or on the skin."""
    bone = ct[::3, ::2, ::2] > 1100
    on_skin = np.abs(skin + 3) < 2
    chosen = (bone, on_skin)[rng.integers(2)]
    spots = np.argwhere(chosen) * (3, 2, 2)
    most = rng.integers(1, 5)
    count = most * (rng.random() < 0.4 and len(spots) > 0)
    for k, j, i in rng.choice(spots, count):
        here = away - (i + 1j * j - CENTRE - CENTRE * 1j)
        star = star_of(rng, here)
        for plane in ct[max(0, k - 2) : k + 2]:
            plane += star * (plane > -900)
            plane[np.abs(here) < 2.5] = 3000


def add_couch(rng, ct, skin, away, step):
    """A thin curved couch in the air."""
    lower = rng.uniform(0.3, 0.6) * SIDE
    height_mm = (away.imag - lower) * step[0]
    aside_mm = away.real * step[0]
    bed = height_mm + aside_mm**2 / 1500
    outside = np.float32((skin < -3).mean(0))  # share of the slices
    air = cv2.resize(outside, (SIDE, SIDE)) > 0.9
    couch = air & (np.abs(bed) < 1.5)
    ct[:, couch] = rng.uniform(-400, 0)


def scan(rng, ct, level, skin, step):
    """Image formation: metal, couch, blur, edges, noise and streaks of shoulders,
    circle."""
    rows = np.arange(SIDE)[:, None] - CENTRE
    away = 1j * rows + np.arange(SIDE) - CENTRE
    add_metal(rng, ct, skin, away)
    add_couch(rng, ct, skin, away, step)
    lower = np.clip(level[:, 64, 64] - 6.2, 0, 2.2)
    load = lower * rng.uniform(0.3, 1.6)
    sharp = rng.uniform(0, 1.1)
    sigma = rng.uniform(0.45, 0.9)
    grit = rng.uniform(13, 60)
    for k, plane in enumerate(ct):
        shoulder = load[k // 3]
        white = rng.standard_normal(plane.shape, np.float32)
        speck = cv2.GaussianBlur(white, (0, 0), 0.5 + 0.5 * sigma)
        plane = cv2.GaussianBlur(plane, (0, 0), sigma)
        plane = plane + grit * (1 + shoulder) * speck
        soft = cv2.GaussianBlur(plane, (0, 0), 1.2)
        plane += sharp * (plane - soft)
        lines = rng.standard_normal((SIDE, 6), np.float32)
        streak = cv2.resize(lines, (SIDE, SIDE))
        dark = 22 * (plane > -300)
        ct[k] = plane + shoulder * (16 * streak - dark)
    radius = SIDE * rng.choice([0.5, 1], p=[0.4, 0.6])
    ct[:, np.abs(away) > radius] = -1024


def whole_levels(study, drawn):
    """The levels 1..7 that lie in the volume with both ends."""
    whole = []
    for n in range(1, 8):
        at = study.place(drawn[n], n)
        if at and at[0].start > 0 and at[0].stop < len(study.ct):
            whole.append(n)
    return whole


def choose_broken(rng, whole):
    """The levels that break, in order."""
    levels = np.array(whole, int)
    chance = FREQUENCY[levels - 1]
    many = rng.choice(4, p=[0.5, 0.3, 0.14, 0.06])
    count = min(many, len(whole))
    odds = chance / chance.sum()
    return sorted(rng.choice(whole, count, replace=False, p=odds))


def make_study(rng):
    """One study: CT (z ascending, HU, float32), labels, Grid, indices of the broken."""
    study = Study(rng)
    soft, skin, level = study.soft_tissue(rng)
    study.ct = enlarge(soft, study.labels.shape, (3, 2))
    worn = 0.6 * study.age
    drawn = {n: build(rng, n, worn) for n in range(LOWEST, 0, -1)}
    broken = choose_broken(rng, whole_levels(study, drawn))
    for n, parts in drawn.items():
        breaks = fracture(rng, n) if n in broken else None
        study.paint(rng, parts, n, n, breaks)
    study.other_bones(rng)
    scan(rng, study.ct, level, skin, study.step)

    merged = study.ct.reshape(-1, study.merge, SIDE, SIDE)
    ct = np.rint(merged.mean(1).clip(-1024, 3071))
    step = study.step * (1, 1, study.merge)
    origin = study.grid.origin + (step - study.step) / 2
    labels = study.labels[:: study.merge].copy()
    return ct, labels, Grid(origin, step), [int(n) - 1 for n in broken]


if __name__ == "__main__":
    main(make_study, UID_ROOT, __doc__)
