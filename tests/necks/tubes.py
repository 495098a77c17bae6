"""Synthetic neck CTs whose bones are swept tubes and carved silhouettes: `tubes.py OUT`.

Bones are rectangles swept along curves, and visual hulls of three silhouettes, as signed
distances in mm; joints are carved midway between bones, fractures move what a rough surface
cuts off; soft tissue is painted. Tables: tubes_bodies.csv, tubes_silhouettes.csv,
tubes_bones.csv (frames: C1, C2, skull, C4 to C6, T1 to T3), tubes_breaks.csv,
tubes_ovals.csv (level 1 = C1 to 8 = T1; a value up to 1 is a share of contrast). mm; x to
the patient's left, y to the back, z up.
"""

import functools
import sys
from collections import namedtuple
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tools"))

from writers import Grid, main  # noqa: E402

UID_ROOT = "1.2.3.8"
MATRIX = 256  # pixels, edge of a slice
FAR = 6.0  # mm, the distance where nothing is drawn
PAD = 4.0  # mm, reach of a tube's field
BLEND = 1.6  # mm over which tubes melt together
CELL = 0.25  # mm, pixel of a silhouette
EDGE = 224  # pixels of a silhouette
LEVELS = 9  # C1 to T2 turn; T3 follows
NEVER = -99  # mm, inside everything
TILE = 96  # voxels, beyond which noise repeats: fresh noise is slow
THIN_MM = 0.85  # a slice is the mean of slices that are thinner than this
CRUSHED = -3  # mm down: this shift stands for bone that is crushed, not moved

# Of C1 to T3: how much each wears, and of C1 to C7 how often each breaks. By eye.
WEAR = [0.3, 0.3, 0.5, 0.7, 1.2, 1.3, 0.9, 0.4, 0.3, 0.3]
FRACTURE_ODDS = np.array([7, 14, 5, 7, 8, 14, 19.0])
SLICES_MM = [0.6, 0.75, 0.9, 1, 1.25, 1.5, 2, 3]
SLICES_ODDS = [0.07, 0.12, 0.15, 0.36, 0.15, 0.07, 0.05, 0.03]
TOOTH = (1500, 2600, 0.8)  # HU inside, HU and mm of the shell
FILLING = (6000, 6000, 1)
CARTILAGE_HU = (90, 280)

# knots (N, 3); half widths aside and up; corner radius / half width; plane of section; cuts
Tube = namedtuple("Tube", "knots widths heights up edge plane cuts")
Pose = namedtuple(
    "Pose", "turn at size", defaults=(np.eye(3), np.zeros(3), 1.0)
)
# signed distance to the bone, and to the surface that has a cortex; look: see TOOTH
Bone = namedtuple("Bone", "box axes distance cortex label look")
Body = namedtuple("Body", "half_width half_depth height uncus sagittal swell")
Row = namedtuple("Row", "knots widths heights marks")  # of a table of tubes
Break = namedtuple("Break", "point normal centre shift reach")
Course = namedtuple("Course", "x y turn level")  # of the spine, a value a slice
Oval = namedtuple("Oval", "value centre half degrees")  # a row a slice
World = namedtuple("World", "z y x")  # mm of the voxels

# ---- Noise ----

def blur(volume, in_plane, across):
    """Gaussian blur of a (z, y, x) volume; both deviations in voxels."""
    planes = [cv2.GaussianBlur(plane, (0, 0), in_plane) for plane in volume]
    flat = np.stack(planes).reshape(len(volume), -1)
    blurred = cv2.GaussianBlur(flat, (1, 0), 1, sigmaY=across)
    return blurred.reshape(volume.shape)

def noise(rng, shape, in_plane, across):
    """Correlated noise of unit variance; its grain in voxels, as that of `blur`."""
    white = rng.standard_normal(np.minimum(shape, TILE), np.float32)
    out = blur(white, in_plane, across)
    repeats = np.ceil(np.divide(shape, out.shape)).astype(int)
    out = np.tile(out / out.std(), repeats)
    return out[tuple(map(slice, shape))]

# ---- Tables ----

@functools.cache
def read_table(name):
    """The csv file tubes_<name>.csv."""
    return pd.read_csv(HERE / f"tubes_{name}.csv", keep_default_na=False)

def numbers(cell):
    """The numbers of a cell "1 2 3"."""
    return [float(word) for word in str(cell).split()]

def make_row(knots, widths, heights, marks=""):
    """A row of a table of tubes; a single half width holds for all knots."""
    knots = np.array(knots, float)
    widths = np.broadcast_to(widths, len(knots))
    return Row(knots, widths, np.broadcast_to(heights, len(knots)), marks.split())

def bone_rows(bone):
    """The tubes of a bone in tubes_bones.csv."""
    table = read_table("bones")
    rows = []
    for _, knots, widths, heights, marks in table[table.bone == bone].to_numpy():
        points = [numbers(point) for point in knots.split(";")]
        rows.append(make_row(points, numbers(widths), numbers(heights), marks))
    return rows

def silhouette(view):
    """The outline (N, 2) of one view, in half axes of the body."""
    table = read_table("silhouettes")
    return table[table.view == view][["first", "second"]].to_numpy()

def breaks_of(level):
    """The ways in which the vertebra 0..6 breaks."""
    table = read_table("breaks")
    group = ("C1", "C2", "C3 to C7")[min(level, 2)]
    rows = table[table.vertebra == group].to_numpy()
    return [Break(*map(numbers, row[1:5]), float(row[5])) for row in rows]

# ---- Tubes ----

def make_tubes(rows, rng=None):
    """Tubes of a table's rows, varied as bones are; what cuts is never varied."""
    tubes = []
    for knots, widths, heights, marks in rows:
        up = (
            (0, 1, 0)
            if "upright" in marks
            else (0, -0.32 * ("leaning" in marks), 1)
        )
        edge = 0.4 if "square" in marks else 0.62 if "boxy" in marks else 0.9
        plane = (0, 1, 0) if "square" in marks else None
        cuts = "cutting" in marks
        for side in (1, -1)[: 1 + ("mirrored" in marks)]:
            shift, grow = 0, 1
            if rng and not cuts:
                shift = rng.normal(0, 0.35, knots.shape)
                grow = np.exp(rng.normal(0, 0.07))
            moved = knots * (side, 1, 1) + shift
            tubes.append(Tube(moved, widths * grow, heights, up, edge, plane, cuts))
    return tubes

def placed(tubes, pose):
    """Tubes in the world."""
    out = []
    for tube in tubes:
        plane = tube.plane and tuple(pose.turn @ tube.plane)
        out.append(
            tube._replace(
                knots=pose.at + tube.knots @ pose.turn.T * pose.size,
                widths=tube.widths * pose.size,
                heights=tube.heights * pose.size,
                up=pose.turn @ tube.up,
                plane=plane,
            )
        )
    return out

def local(axes, pose):
    """Coordinates x, y, z of the voxels of some axes (z, y, x) in a pose's frame."""
    centred = []
    for axis, origin in zip(axes, pose.at[::-1]):
        centred.append((axis - origin).astype(np.float32))
    z, y, x = np.ix_(*centred)
    out = []
    for across, back, up in np.float32(pose.turn / pose.size).T:
        out.append(across * x + back * y + up * z)
    return out

def window(axes, points, span):
    """The voxels of some axes (z, y, x) within a span (mm) of points (x, y, z)."""
    box = []
    for k in range(3):
        along = points[:, 2 - k]
        ends = (along.min() - span, along.max() + span)
        box.append(slice(*np.searchsorted(axes[k], ends)))
    return tuple(box)

def part_of(axes, box):
    """The axes of a box of voxels."""
    return [axis[inside] for axis, inside in zip(axes, box)]

def smooth_curve(rows):
    """Rows of a tube with a row between each two, on a smooth curve through them."""
    first, second = rows[:2]
    before_last, last = rows[-2:]
    ends = np.vstack([2 * first - second, rows, 2 * last - before_last])
    near = 9 * (ends[1:-2] + ends[2:-1])
    middles = (near - ends[:-3] - ends[3:]) / 16
    places = np.arange(1, len(rows))
    return np.insert(rows, places, middles, 0)

def sweep(field, axes, tube):
    """Join the distance to a swept tube to a field, or cut the tube out of it."""
    rows = np.column_stack([tube.knots, tube.widths, tube.heights])
    for _ in range(2 if len(rows) > 2 else 0):
        rows = smooth_curve(rows)
    own = np.full(field.shape, FAR, np.float32)
    for start, end in zip(rows, rows[1:]):
        reach = max(*start[3:], *end[3:]) * 1.4 + PAD
        near = window(axes, np.array([start, end]), reach)
        if own[near].size:
            distance = link(part_of(axes, near), start, end, tube)
            own[near] = np.minimum(own[near], distance)

    whole = window(axes, rows, rows[:, 3:].max() * 1.5 + PAD)
    field, own = field[whole], own[whole]
    if tube.cuts:
        field[:] = np.maximum(field, -own)
    else:
        overlap = np.maximum(BLEND - np.abs(field - own), 0) ** 2
        field[:] = np.minimum(field, own) - overlap / (4 * BLEND)

def frame_of(line, tube):
    """Axes aside, up and along (3, 3) of a tube's link."""
    along = tube.plane or line
    along = np.array(along) / (np.linalg.norm(along) + 1e-9)
    up = tube.up - along * (tube.up @ along)
    up /= np.linalg.norm(up) + 1e-9
    return np.column_stack([np.cross(up, along), up, along])

def link(axes, start, end, tube):
    """Distance to a straight link of a tube, between rows x, y, z and two half widths."""
    line = end - start
    turn = frame_of(line[:3], tube)
    along = (line[:3] @ turn + 1e-6).astype(np.float32)
    round_mm = np.float32(tube.edge * min(*start[3:], *end[3:]))
    u, v, s = local(axes, Pose(turn, start[:3]))
    share = np.clip(s / along[2], 0, 1)

    outside = []
    for k, c in enumerate((u, v)):
        half = share * np.float32(line[3 + k])
        offset = np.abs(c - share * along[k])
        outside.append(offset - half - np.float32(start[3 + k] - round_mm))
    aside, above = outside
    beyond = np.abs(s - share * along[2])
    deep = np.minimum(np.maximum(aside, above), 0) * (beyond == 0)
    square = np.maximum(aside, 0) ** 2 + np.maximum(above, 0) ** 2 + beyond**2
    return np.sqrt(square) + deep - round_mm

# ---- Vertebral bodies ----

def mirrored(outline):
    """A whole outline of its half, which begins and ends on the midline."""
    return np.vstack([outline, outline[-2:0:-1] * (-1, 1)])

def outline_distance(outline, scale):
    """Image of the signed distance (mm) to an outline, CELL a pixel."""
    points = outline * scale / CELL + EDGE // 2
    blank = np.zeros((EDGE, EDGE), np.uint8)
    sixteenths = [np.int32(points * 16)]
    image = cv2.fillPoly(blank, sixteenths, 255, cv2.LINE_8, 4)
    outside = cv2.distanceTransform(255 - image, cv2.DIST_L2, 5)
    inside = cv2.distanceTransform(image, cv2.DIST_L2, 5)
    return (outside - inside) * np.float32(CELL)

def hull(xyz, body):
    """Signed distance of a body: three silhouettes, the sides lifted to the uncus."""
    x, y, z = xyz
    wide = body.half_width * body.swell
    deep = body.half_depth * body.swell
    high = body.height * 0.5
    rise = np.clip((np.abs(x) / wide - 0.5) / 0.5, 0, 1)
    backward = np.clip(0.75 + y / deep / 3, 0.3, 1)
    up = z - body.uncus * rise * rise * (3 - 2 * rise) * backward

    out = np.float32(NEVER)
    axial = mirrored(silhouette("axial"))
    coronal = mirrored(silhouette("coronal"))
    for a, b, outline, scale in (
        (x, y, axial, (wide, deep)),
        (y, up, body.sagittal, (deep, high)),
        (x, z, coronal, (wide, high)),
    ):
        image = cv2.blur(outline_distance(outline, scale), (7, 7))
        cells = [(c / CELL + EDGE // 2).astype(np.float32) for c in (a, b)]
        flat = [c.reshape(-1, c.shape[2]) for c in cells]
        edge = cv2.BORDER_REPLICATE
        found = cv2.remap(image, *flat, cv2.INTER_LINEAR, borderMode=edge)
        found = found.reshape(x.shape)
        blend = np.maximum(1.2 - np.abs(out - found), 0) ** 2 / 4.8
        out = np.maximum(out, found) + blend
    return out - np.float32(0.5)

def forks(row):
    """Whether a spinous process has two tips."""
    return row.fork > 1

def typical(row, pitch):
    """Rows of C3 to T3: process, pedicles, pillars, laminae, transverse processes."""
    neck = row.slope < 1.45
    back = row.half_depth + row.canal
    tip_y, tip_z = row.spinous_y, row.spinous_z
    club = 0.13 * (tip_y - 40) * neck
    process = [
        (0, back + 2, -2.5),
        (0, (back + tip_y) / 2, tip_z * 0.5 - 1.5),
        (0, tip_y - 2 - 2 * forks(row), tip_z * 0.9),
    ]
    rows = [make_row(process, [2.6, 2.3, 2.8 + club], [5, 4, 3.6 + club])]
    rows += arch(row, pitch, back, neck)
    if forks(row):
        fork = [(1, tip_y - 6, tip_z * 0.8), (row.fork, tip_y, tip_z)]
        rows.append(make_row(fork, 2.2, 2.4, "mirrored"))
    return rows + (cervical_sides(row) if neck else thoracic_sides(row))

def arch(row, pitch, back, neck):
    """Pedicles, articular pillars and laminae."""
    wide, deep, pillar = row.half_width, row.half_depth, row.pillar_x
    leg = 2.6 if neck else 1.2
    lean = leg * row.slope
    pedicle = [(wide - 3, deep - 4, 1.5), (pillar - 1, deep + 4, 0.8)]
    column = [
        (pillar, deep + 6.2 + leg, -lean),
        (pillar, deep + 6.2 - leg, lean),
    ]
    lamina = [
        (pillar - 2.5, deep + 9, -1),
        (pillar * 0.62, back - 2.2, -1.5),
        (0, back + 3, -2.5),
    ]
    return [
        make_row(pedicle, 2.9, 3.6, "mirrored"),
        make_row(column, 5.3, pitch / 2, "mirrored square"),
        make_row(lamina, [2.4, 1.9, 2.4], [5.8, 5.6, 5], "mirrored leaning"),
    ]

def thoracic_sides(row):
    """Transverse processes without a foramen."""
    deep, pillar, tip = row.half_depth, row.pillar_x, row.transverse_x
    knots = [
        (pillar, deep + 7, 1.5),
        ((pillar + tip) / 2, deep + 11, 2.5),
        (tip - 4, deep + 15, 3),
    ]
    return [make_row(knots, [3.6, 3.4, 4.2], [3.6, 3.4, 4.2], "mirrored")]

def cervical_sides(row):
    """Transverse processes of two roots, and the foramen of the vertebral artery."""
    wide, deep, pillar, tip = (
        row.half_width,
        row.half_depth,
        row.pillar_x,
        row.transverse_x,
    )
    long = tip > 32
    foramen = wide + 5.6
    behind = [
        (pillar - 2, deep + 2, -0.5),
        (tip - 3, 6, -2),
        (tip, 5 + 4 * long, -3),
    ]
    front = [
        (wide - 1, -2.5, -1),
        (tip - 7.5, -4.6, -1),
        (tip - 5.5, -1.5, -2.5),
        (tip, 4.5, -3.5),
    ]
    hole = [(foramen, 1, -12), (foramen, 1.6, 12)]
    radius = 2.7 - long
    return [
        make_row(behind, [2.2, 2, 2.6], [3, 2.6, 2.8], "mirrored"),
        make_row(front, [1.6, 1.9, 1.5, 2], [2.6, 3, 2, 2.4], "mirrored"),
        make_row(hole, radius, radius, "mirrored upright cutting"),
    ]

def vessels(row, rng):
    """The vein that leaves a body at its back; at times a channel like a crack."""
    height = rng.normal(0, 0.7)
    depth = row.half_depth * rng.uniform(0.45, 0.8)
    vein = [(0, row.half_depth + 1, 0), (height, depth, 0.3)]
    rows = [make_row(vein, [1.2, 0.6], [1.2, 0.6], "cutting")]
    channel = [(9, -8, 1), (rng.normal(3, 1), rng.normal(0, 2), 0)]
    if rng.random() < 0.2:
        rows.append(make_row(channel, 0.5, 0.5, "cutting"))
    return rows

def worn_body(row, worn, rng):
    """The body of C2 to T3 with lips of its end plates."""
    spur = worn * rng.gamma(1.5, 0.2, 4)
    sagittal = silhouette("sagittal")
    outline = sagittal + rng.normal(0, 0.015, sagittal.shape)
    outline[[0, 4, 7, 11]] *= np.column_stack([1 + spur, 1 - 0.15 * spur])
    return functools.partial(
        Body, row.half_width, row.half_depth, row.height, row.uncus, outline
    )

# ---- Bones ----

def draw_bone(world, tubes, look, pose, label=0, body=None, box=None):
    """A bone of tubes, and perhaps of a vertebral body, on a box of the world."""
    tubes = placed(tubes, pose)
    if box is None:
        solid = np.vstack([tube.knots for tube in tubes if not tube.cuts])
        widest = max(max(*tube.widths, *tube.heights) for tube in tubes)
        box = window(world, solid, widest + PAD + 3)
    axes = part_of(world, box)
    distance = np.full([len(axis) for axis in axes], FAR, np.float32)

    core = window(axes, pose.at[None], 19 * pose.size)
    if body and distance[core].size:
        inside = hull(local(part_of(axes, core), pose), body)
        distance[core] = np.minimum(FAR, pose.size * inside)
    for tube in tubes:
        sweep(distance, axes, tube)
    return Bone(box, axes, distance, distance.copy(), label, look)

def make_vertebra(rng, world, level, row, pitch, worn, look):
    """A function of a pose that draws a vertebra (level 1 = C1)."""
    rows = (
        typical(row, pitch)
        if level > 2
        else bone_rows(("atlas", "axis")[level - 1])
    )
    if level > 2:
        rows += vessels(row, rng)
    shaped = worn_body(row, worn, rng)
    body = None if level == 1 else shaped(rng.normal(1 + 0.05 * worn, 0.02))
    tubes = make_tubes(rows, rng)
    return functools.partial(draw_bone, world, tubes, look, label=level, body=body)

def surface(xyz, point, normal, waves):
    """Signed distance to a plane that waves."""
    out = 0
    for c, p, n, wave in zip(xyz, point, normal, waves):
        swing = sum(c * k for c, k in zip(xyz, wave))
        out = out + ((c - p) * n + 0.35 * np.sin(swing))
    return out

def sphere(xyz, centre, radius):
    """Signed distance to a sphere."""
    square = sum((c - np.float32(m)) ** 2 for c, m in zip(xyz, centre))
    return np.sqrt(square) - radius

def part(rng, bone, redraw, pose, way, old=False):
    """Break a bone along a rough surface: what it cuts off moves.

    What is crushed grows dense; an old break has a cortex.
    """
    spec = np.array(way[:4]) * (rng.choice([-1, 1]), 1, 1)
    point, normal, centre, shift = spec
    crush = shift[2] == CRUSHED
    point = point + rng.normal(0, 0.8, 3)
    normal = normal + rng.normal(0, 0.15, 3)
    shift = shift * rng.uniform(0.3, 1.2)
    gap = 0 if crush else rng.uniform(0.5, 2.2)
    turn = pose.turn @ cv2.Rodrigues(rng.normal(0, 0.035, 3))[0]
    stays = pose.turn @ (shift + point) - turn @ point
    moved = Pose(turn, pose.at + stays * pose.size, pose.size)
    chip = redraw(moved, box=bone.box)

    waves = rng.normal(0, 0.5, (6, 3)).astype(np.float32)
    normal = np.float32(normal / np.linalg.norm(normal))
    point = np.float32(point)
    for piece, frame in ((bone, pose), (chip, moved)):
        xyz = local(piece.axes, frame)
        beyond = surface(xyz, point, normal, waves)
        ball = sphere(xyz, centre, way.reach)
        if piece is chip:
            away = np.maximum(gap / 2 - beyond, ball - (0 if crush else 1.5))
        else:
            away = np.minimum(beyond + gap / 2, -ball)
        np.maximum(piece.distance, pose.size * away, out=piece.distance)
        np.maximum(piece.cortex, piece.distance if old else NEVER, out=piece.cortex)
    join(bone, chip, crush)

def join(bone, chip, crush):
    """Put the two pieces of a broken bone together, in place of the first."""
    inside = (bone.distance < 0) & (chip.distance < 0)
    dense = crush & inside
    of_chip = chip.distance < bone.distance
    nearer = np.where(of_chip, chip.cortex, bone.cortex)
    thick = np.maximum(bone.cortex, -1.1)
    bone.cortex[:] = np.where(dense, thick, nearer)
    np.minimum(bone.distance, chip.distance, out=bone.distance)

def overlap(one, two):
    """The slices of two bones' own boxes that both hold, or None."""
    near, far = [], []
    for p, q in zip(one.box, two.box):
        start = max(p.start, q.start)
        stop = min(p.stop, q.stop)
        if start >= stop:
            return None
        near.append(slice(start - p.start, stop - p.start))
        far.append(slice(start - q.start, stop - q.start))
    return tuple(near), tuple(far)

def separate(bones, gap):
    """Carve joints with a cortex: no bone passes the middle between it and another."""
    half = np.float32(gap / 2)
    for one, two in combinations(bones, 2):
        shared = overlap(one, two) if one.label + two.label else None
        if shared is None:
            continue
        near, far = shared
        middle = (one.distance[near] - two.distance[far]) / 2
        for field in (one.distance[near], one.cortex[near]):
            np.maximum(field, middle + half, out=field)
        for field in (two.distance[far], two.cortex[far]):
            np.maximum(field, -middle + half, out=field)

def render(rng, ct, labels, bone, pixel):
    """Paint a bone, cortex around a texture, and its label."""
    inside, cortex, shell = bone.look
    if not bone.distance.size:
        return
    texture = 0.22 * noise(rng, bone.distance.shape, 1.1, 0.9)
    hu = inside * (1 + texture)
    depth = np.minimum(bone.cortex, 0)
    hu += (cortex - hu) * np.exp(depth / np.float32(shell))
    edge = bone.distance / np.float32(pixel)
    cover = np.clip(0.5 - edge, 0, 1)
    ct[bone.box] += cover * (hu - ct[bone.box])
    labels[bone.box][bone.distance < 0] = bone.label

# ---- The spine ----

def rotation(radians):
    """Rotation matrix of a rotation vector."""
    return cv2.Rodrigues(radians)[0]

def draw_angles(rng):
    """Rotation vectors (degrees) of C2 to T3: lordosis, scoliosis, a turned neck."""
    levels = np.arange(LEVELS)
    lordosis = rng.normal((-6, 20, 26), (7, 6, 5))
    tilt = np.interp(levels, [0, 6, 8], lordosis)
    tilt = tilt + rng.normal(0, 1.5, LEVELS)
    bend = rng.normal(0, 3)
    wave = np.sin(levels * 0.5 + rng.uniform(0, 6))
    roll = bend * wave + np.linspace(rng.normal(0, 3), 0, LEVELS)
    turned = np.linspace(rng.normal(0, 6), 0, LEVELS)
    return zip(tilt, roll, turned + rng.normal(0, 0.7, LEVELS))

def chain(rng, rows, discs, size):
    """Poses of the skull, and of C1 to T3: a chain from C2 down, the others on top."""
    poses, at, last = [], np.zeros(3), 0
    for k, angles in enumerate(draw_angles(rng)):
        turn = rotation(np.radians(angles))
        up = turn[:, 2]
        half = rows[k].height * size / 2
        if k:
            between = (last + up) / 2 * discs[k - 1]
            at = at - between - up * half
        poses.append(Pose(turn, at, size))
        at = at - up * half
        last = up

    axis = poses[0]
    turned = rng.normal(0, (3, 1.5, 5))
    turn = axis.turn @ rotation(np.radians(turned))
    at = axis.at + axis.turn @ (0, 0, 17) * size
    nod = rotation(rng.normal((0.1, 0, 0), (0.09, 0.03, 0.04)))
    atlas = Pose(turn, at, size)
    return Pose(turn @ nod, at, size), [atlas, *poses]

def make_spine(rng, world, rows, worn, poses, look, whole):
    """The vertebrae, and the indices of the broken ones, out of those whole in the scan."""
    centres = [pose.at for pose in poses]
    between = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    pitch = (
        np.interp(np.arange(10), np.arange(0.5, 9), between) / poses[0].size
    )
    redraws = []
    for k in range(10):
        redraws.append(
            make_vertebra(rng, world, k + 1, rows[k], pitch[k], worn[k], look)
        )
    bones = [redraw(pose) for redraw, pose in zip(redraws, poses)]

    chance = FRACTURE_ODDS[whole]
    count = rng.choice([0, 1, 2], p=[0.5, 0.33, 0.17])
    hurt = rng.choice(
        whole, count, replace=False, p=chance / chance.sum()
    ).tolist()
    old = [k for k in whole if k > 4 and k not in hurt]
    old = old[: int(rng.random() < 0.12)]
    for k in hurt + old:
        ways = breaks_of(k)
        chosen = [0]
        if k in hurt:
            shuffled = rng.permutation(len(ways))
            chosen = shuffled[: rng.choice([1, 2], p=[0.65, 0.35])]
        for way in chosen:
            part(rng, bones[k], redraws[k], poses[k], ways[way], k in old)
    return bones, sorted(hurt)

def filling_of(tooth):
    """The filling of a tooth."""
    ends = tooth.knots[:1] + [(0, 0, 0), (1, 0, 2)]
    return tooth._replace(
        knots=ends, widths=tooth.widths * 0.5, heights=tooth.heights * 0.5
    )

def other_bones(rng, world, skull, poses, look, lost):
    """Skull, jaw, larynx, ribs, girdle, teeth and fillings; where there is metal."""
    hard = look[1:]
    upright = Pose(at=poses[7].at, size=skull.size)
    bones = []
    for bone, pose, looks in (
        ("base", skull, look),
        ("ear", skull, (-150, *hard)),
        ("face", skull, look),
        ("hyoid", poses[3], look),
        ("thyroid", poses[4], (*CARTILAGE_HU, look[2])),
        ("cricoid", poses[5], (*CARTILAGE_HU, look[2])),
        ("first rib", poses[7], look),
        ("second rib", poses[8], look),
        ("third rib", poses[9], look),
        ("girdle", upright, look),
    ):
        bones.append(draw_bone(world, make_tubes(bone_rows(bone), rng), looks, pose))

    teeth = [tooth for tooth in make_tubes(bone_rows("teeth")) if rng.random() > lost]
    metal = [filling_of(tooth) for tooth in teeth if rng.random() < 0.08]
    bones.append(draw_bone(world, teeth, TOOTH, skull))
    bones += [draw_bone(world, [filling], FILLING, skull) for filling in metal]
    return bones, [filling.knots[0] for filling in placed(metal, skull)]

# ---- Soft tissue ----

def ovals(rng, layer, course, size, muscle=1.0):
    """The ovals of a layer of tubes_ovals.csv, an ellipse a slice (half axes 0: absent)."""
    table = read_table("ovals")
    cosine, sine = np.cos(course.turn), np.sin(course.turn)
    out = []
    for _, rows in table[table.layer == layer].groupby("shape"):
        value, twice = float(rows.value.iloc[0]), int(rows.mirrored.iloc[0])
        knots = rows.iloc[:, 4:].to_numpy(float)
        level = course.level
        x, y, wide, deep, tilt = (
            np.interp(level, knots[:, 0], c) for c in knots.T[1:]
        )
        inside = np.minimum(level - knots[0, 0], knots[-1, 0] - level)
        end = np.clip(inside / 0.35, 0, 1)
        fatter = muscle if 50 <= value < 60 else 1
        grow = (
            np.sqrt(end * (2 - end))
            * size
            * np.exp(rng.normal(0, 0.05))
            * fatter
        )
        x = size * (x + rng.normal(0, 0.8) * twice)
        y = size * (y + rng.normal(0, 0.8))
        half = np.column_stack([wide, deep]) * grow[:, None]

        for side in (1, -1)[: 1 + twice]:
            across = course.x + cosine * side * x - sine * y
            back = course.y + sine * side * x + cosine * y
            degrees = side * tilt + np.degrees(course.turn)
            out.append(Oval(value, np.column_stack([across, back]), half, degrees))
    return out

def couch_behind(world, skin):
    """An empty slice with a couch below the skin."""
    deepest = skin.centre[:, 1] + skin.half[:, 1]
    middle = skin.centre[:, 0].mean()
    hollow = (world.x - middle) ** 2 / 900
    below = world.y[:, None] - deepest.max() - 4 - hollow
    offset = np.abs(below / 18 - 0.5)
    shell = np.where(offset > 0.38, -250, -930)
    couch = np.where(offset < 0.5, shell, -1000)
    return couch.astype(np.float32)

def draw_oval(image, oval, k, value, corner, pixel):
    """Draw the ellipse of slice k, if it is there."""
    if oval.half[k].min() > 0:
        at = (
            np.rint((oval.centre[k] - corner) / pixel * 16)
            .astype(int)
            .tolist()
        )
        half = np.rint(oval.half[k] / pixel * 16).astype(int).tolist()
        cv2.ellipse(
            image, at, half, oval.degrees[k], 0, 360, value, -1, cv2.LINE_8, 4
        )

def soft_tissue(rng, world, course, size):
    """Slices of all but bone (the vault of the skull is painted here), with a couch."""
    pixel = world.x[1] - world.x[0]
    corner = (world.x[0], world.y[0])
    contrast = rng.choice([0, 120, 250])
    skin = ovals(rng, "skin", course, size * rng.normal(1.02, 0.06))[0]
    shapes = ovals(rng, "inside", course, size, rng.normal(1.17, 0.05))
    air = couch_behind(world, skin)

    slices = []
    for k in range(len(course.x)):
        image = np.full(air.shape, -100, np.float32)
        mask = np.zeros(air.shape, np.uint8)
        draw_oval(mask, skin, k, 1, corner, pixel)
        for shape in shapes:
            plain = abs(shape.value) > 1
            value = shape.value if plain else 45 + contrast * shape.value
            draw_oval(image, shape, k, value, corner, pixel)
        image[cv2.erode(mask, np.ones((5, 5))) == 0] = 20
        slices.append(np.where(mask, image, air))
    ct = np.array(slices)
    return ct + 14 * noise(rng, ct.shape, 1.5, 1.2) * (ct > -300)

# ---- The scanner ----

def add_streaks(image, spot, k, pixel):
    """Streaks from metal at (x, y, z) voxels over slice k."""
    x, y, z = spot
    rows, columns = np.mgrid[:MATRIX, :MATRIX].astype(np.float32)
    down, right = rows - y, columns - x
    ray = np.arctan2(down, right)
    near = np.exp(-np.hypot(down, right) * pixel / 30)
    level = max(0, 1 - abs(z - k) / 3)
    fade = level * near
    image += 900 * fade * np.sin(7 * ray + x) * np.sin(3 * ray + y)

def scan(rng, ct, level, pixel, metal):
    """Add a scanner's kernel, noise, and streaks of shoulders and metal."""
    sharp = rng.choice([0, 0.7], p=[0.6, 0.4])
    dose = rng.uniform(20, 110)
    for k, image in enumerate(ct):
        for spot in metal:
            add_streaks(image, spot, k, pixel)
        soft = cv2.GaussianBlur(image, (0, 0), 0.45 / pixel)
        white = rng.standard_normal(image.shape, np.float32)
        shoulder = 1 / (1 + np.exp(7.2 - level[k]))
        image[:] = soft + sharp * (
            soft - cv2.GaussianBlur(soft, (0, 0), 0.9 / pixel)
        )
        grain = cv2.GaussianBlur(white, (0, 0), 0.5 if sharp else 0.8)
        image += grain * np.float32(dose * (1 + shoulder))
        lines = cv2.resize(rng.standard_normal((MATRIX, 5), np.float32), image.shape)
        image += lines * np.float32(0.5 * dose * shoulder)

def course_of(skull, poses, heights, size):
    """Place, turn and level of the spine at the heights (mm) of slices."""
    last = poses[-1]
    crown = skull.at + skull.turn[:, 2] * 255 * size
    points = [crown, *(pose.at for pose in poses), last.at + (0, 12, -60)]
    turns = [
        np.arctan2(p.turn[1, 0], p.turn[0, 0]) for p in (skull, *poses, last)
    ]
    x, y, z = np.transpose(points)
    levels = [-14, *range(1, 11), 13]
    return Course(
        *(np.interp(-heights, -z, values) for values in (x, y, turns, levels))
    )

def varied_rows(rng):
    """The measures of C1 (as C2) to T3, varied."""
    table = read_table("bodies").iloc[:, 1:]
    bodies = table.to_numpy(float)
    bodies = np.vstack([bodies[:1], bodies])
    varied = bodies * np.exp(rng.normal(0, 0.035, bodies.shape))
    Measures = namedtuple("Measures", table.columns)
    return [Measures(*row) for row in varied]

def draw_scan(rng, heights, middle):
    """(Grid, World, slices, thinner slices a slice) of a scan around the spine."""
    pixel = rng.uniform(0.45, 0.9)
    step = rng.choice(SLICES_MM, p=SLICES_ODDS)
    lowest = rng.choice([6, 7, 8, 9], p=[0.03, 0.22, 0.4, 0.35])
    low = heights[lowest] - rng.uniform(12, 18)
    high = heights[0] + rng.uniform(14, 50)
    count = int((high - low) / step)
    fold = int(np.ceil(step / THIN_MM))

    away = rng.normal((0, 8, 0), (4, 6, 0))
    left, back, _ = middle + away - pixel * (MATRIX - 1) / 2
    origin = np.array([left, back, low])
    grid = Grid(origin, np.array([pixel, pixel, step]))
    thin = np.arange(count * fold) - (fold - 1) / 2
    pixels = pixel * np.arange(MATRIX)
    return (
        grid,
        World(low + step / fold * thin, back + pixels, left + pixels),
        count,
        fold,
    )

def draw_look(rng, age):
    """HU inside a bone, of its shell, and mm of the shell."""
    inside = rng.uniform(170, 330) * (1.2 - 0.5 * age)
    return inside, rng.uniform(850, 1400), rng.uniform(0.55, 0.95)

def make_study(rng):
    """One study: CT (z ascending, HU), labels (1 = C1), Grid, indices of the broken."""
    size = rng.normal(1, 0.07)
    rows = varied_rows(rng)
    age = rng.beta(1.6, 1.6)
    wear = age * rng.gamma(3, 0.45, 10) * WEAR
    worn = np.clip(wear, 0, 1.4)
    discs = size * np.maximum(1.2, 5.6 - 3 * worn[1:])
    skull, poses = chain(rng, rows[1:], discs, size)
    heights = np.array([pose.at[2] for pose in poses])
    grid, world, count, fold = draw_scan(rng, heights, poses[4].at)
    low, step = grid.origin[2], grid.step[2]

    course = course_of(skull, poses, low + step * np.arange(count), size)
    ct = np.repeat(soft_tissue(rng, world, course, size), fold, 0)
    labels = np.zeros(ct.shape, np.uint8)
    look = draw_look(rng, age)
    high = low + step * count
    whole = [k for k in range(7) if low + 12 < heights[k] < high - 12]
    bones, hurt = make_spine(rng, world, rows, worn, poses, look, whole)
    frame, metal = other_bones(rng, world, skull, poses, look, 0.5 * age)
    bones += frame
    separate(bones, rng.uniform(1, 1.8))
    pixel = grid.step[0]
    for bone in bones:
        render(rng, ct, labels, bone, pixel)

    ct = ct.reshape(count, fold, MATRIX, MATRIX).mean(1)
    spots = [(at - grid.origin) / grid.step for at in metal]
    scan(rng, ct, course.level, pixel, spots)
    labels = labels[fold // 2 :: fold].copy()
    return np.rint(ct.clip(-1024, 3071)), labels, grid, hurt

if __name__ == "__main__":
    main(make_study, UID_ROOT, __doc__)
