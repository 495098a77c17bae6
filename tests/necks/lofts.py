"""Synthetic neck CTs whose bones are lofted from axial outlines: `python
tests/necks/lofts.py OUT`.

Drawn without sight of tests/tools/phantoms.py, which joins rods. The outlines stand in
lofts.csv (origin in the vertebral body or the dens; mm; x left, y back, z up), the ways to
break a vertebra in lofts_breaks.csv. An outline from midline to midline is mirrored; one
beside it is drawn on both sides; an ellipse is a centre and two radii. writers.py says what
is written.
"""

import functools
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from texture import blur, noise
from writers import Grid, main

HERE = Path(__file__).parent
UID_ROOT = "1.2.3.5"
LOCAL_MM = 0.4  # voxel of a bone's own grid
MARGIN_MM = 4.0  # around a bone in its own grid
MATRIX = 256  # pixels, edge of a slice

# Of C1 to T2. Millimetres and degrees are an adult's, by eye.
LEVELS = 9
TILT_DEG = np.array([-8, -6, -2, 3, 8, 14, 20, 26, 30.0])  # forward
PITCH_MM = np.array([17.5, 20.5, 18, 18, 17.5, 17.5, 18.5, 20])  # to the next
SIZE = [1, 1, 0.94, 0.97, 1, 1.04, 1.1, 1, 1]  # in the plane
SPINOUS = [1, 0.95, 0.75, 0.8, 0.9, 1.15, 1, 1, 0.9]  # length of the process
FRACTURE_ODDS = [0.07, 0.22, 0.05, 0.08, 0.18, 0.18, 0.22]  # C1 to C7

ELLIPSE_POINTS = 12
FACET_Y_MM = (7.5, 18.5)  # facets slope down from the one to the other
FACET_DROP_MM = 9
FACET_GAP_MM = 1.6
FAT_PLANE = 1.12  # size of the fat around a muscle
BED_MM = 84  # behind C7

HU = dict(
    air=-1000,
    lung=-850,
    fat=-100,
    skin=30,
    muscle=58,
    wall=46,
    csf=12,
    cord=42,
    hole=34,
    thyroid=95,
    cartilage=200,
    disc=90,
    fluid=50,
    bone=950,
    tooth=2000,
)

Part = namedtuple(
    "Part", "fills heights points"
)  # mm: (N,), (N, points, 2; an ellipse: 4)
Loft = namedtuple("Loft", "fills heights outlines")  # the same, drawn
Solid = namedtuple(
    "Solid", "origin occupied hu"
)  # corner (x, y, z) mm; both (z, y, x)
Pose = namedtuple(
    "Pose", "centre rotation scale phase"
)  # mm; axes in columns; phase: of the bend
Break = namedtuple("Break", "vertebra name point normal box_low box_high move")
Scan = namedtuple("Scan", "ct labels grid")  # both (z, y, x)


def numbers(text):
    """The numbers of a cell "1 2; 3 4", a row each."""
    return [[float(word) for word in row.split()] for row in text.split(";")]


def make_part(fills, sections):
    """A part of sections (height, points), in order of height."""
    sections = sorted(sections)
    heights = np.array([height for height, _ in sections])
    return Part(
        fills, heights, np.array([points for _, points in sections], float)
    )


@functools.cache
def read_parts():
    """{bone: its parts} of lofts.csv."""
    table = pd.read_csv(HERE / "lofts.csv")
    bones = {}
    for (bone, _), rows in table.groupby(["bone", "part"], sort=False):
        sections = []
        for row in rows.itertuples():
            for height in dict.fromkeys((row.low_mm, row.high_mm)):
                sections.append((height, numbers(row.points_mm)))
        bones.setdefault(bone, []).append(
            make_part(rows.fills.iloc[0], sections)
        )
    return bones


@functools.cache
def read_breaks():
    """The ways of lofts_breaks.csv."""
    table = pd.read_csv(HERE / "lofts_breaks.csv")
    return [
        Break(*row[:2], *(numbers(cell)[0] for cell in row[2:]))
        for row in table.to_numpy()
    ]


def round_off(outlines):
    """Twice as many points, each corner cut (Chaikin)."""
    ahead = np.roll(outlines, -1, 1)
    cut = np.stack([3 * outlines + ahead, outlines + 3 * ahead], 2)
    return cut.reshape(len(outlines), -1, 2) / 4


def closed(points):
    """Closed outlines (N, points, 2) of a part's."""
    if points.shape[2] == 4:
        turn = np.exp(2j * np.pi * np.arange(ELLIPSE_POINTS) / ELLIPSE_POINTS)
        circle = np.stack([turn.real, turn.imag], 1)
        return (
            points[..., :2] + 1.05 * points[..., 2:] * circle
        )  # 1.05: rounding off shrinks it
    if points[0, 0, 0] == 0:
        mirrored = points[:, -2:0:-1] * (-1, 1)
        return np.concatenate([points, mirrored], 1)
    return points.copy()


def make_lofts(parts, rng, jitter_mm, size=1.0, stretch=1.0):
    """Lofts of slightly displaced, smoothed outlines; `stretch` lengthens what is far
    back."""
    lofts = []
    for part in parts:
        outlines = closed(part.points)
        far_back = np.maximum(outlines[..., 1] - 25, 0)
        outlines[..., 1] += far_back * (stretch - 1)
        beside = outlines[..., 0].mean() > 0.1
        for side in (1, -1) if beside else (1,):
            moved = size * outlines + rng.normal(
                0, jitter_mm, (1, *outlines.shape[1:])
            )
            smooth = round_off(round_off(moved))
            lofts.append(Loft(part.fills, part.heights, smooth * (side, 1)))
    return lofts


def outline_at(loft, z):
    """The outline of a loft at a height, or None beyond its ends."""
    heights = loft.heights
    if not heights[0] <= z <= heights[-1]:
        return None
    above = min(np.searchsorted(heights, z, "right"), len(heights) - 1)
    share = (z - heights[above - 1]) / (heights[above] - heights[above - 1])
    return (1 - share) * loft.outlines[above - 1] + share * loft.outlines[above]


def fill(image, pixels, value):
    """Fill a polygon whose points are (x, y) pixels, to a sixteenth."""
    points = np.round(pixels * 16).astype(np.int32)
    cv2.fillPoly(image, [points], float(value), shift=4)


def fill_lofts(lofts):
    """Lower corner (x, y, z) mm and occupancy (z, y, x) of lofts, in a grid of LOCAL_MM."""
    low = [
        (*loft.outlines.reshape(-1, 2).min(0), loft.heights[0])
        for loft in lofts
    ]
    high = [
        (*loft.outlines.reshape(-1, 2).max(0), loft.heights[-1])
        for loft in lofts
    ]
    low = np.min(low, 0) - MARGIN_MM
    high = np.max(high, 0) + MARGIN_MM
    shape = np.ceil((high - low) / LOCAL_MM).astype(int)[::-1]
    mask = np.zeros(shape, np.uint8)

    for z, image in zip(low[2] + LOCAL_MM * np.arange(len(mask)), mask):
        for loft in lofts:
            outline = outline_at(loft, z)
            if outline is not None:
                fill(
                    image, (outline - low[:2]) / LOCAL_MM, loft.fills != "hole"
                )
    return low, mask


def plane_distances(planes):
    """Distance to the background in each plane, in voxels."""
    return np.stack(
        [cv2.distanceTransform(plane, cv2.DIST_L2, 3) for plane in planes]
    )


def make_solid(lofts, rng, shell_mm, trabecular_hu, cortex_hu):
    """Fill lofts; roughen the surface; add a cortical shell and trabecular texture."""
    low, mask = fill_lofts(lofts)
    coarse = noise(rng, mask.shape, 3, 3)
    occupied = blur(mask, 1.7, 1.7) + 0.06 * coarse > 0.5

    axial = plane_distances(occupied.astype(np.uint8))
    sagittal = plane_distances(np.moveaxis(occupied, 2, 0).astype(np.uint8))
    nearer = np.minimum(axial, np.moveaxis(sagittal, 0, 2))
    depth_mm = LOCAL_MM * nearer * (1 - 0.25 * coarse)

    y_mm = low[1] + LOCAL_MM * np.arange(occupied.shape[1])
    behind = np.clip(y_mm - 7, 0, 10)[:, None]  # the arch is denser
    grain = 0.2 * noise(rng, occupied.shape, 1.2, 1.5)
    inner = (trabecular_hu + 14 * behind) * (1 + grain + 0.1 * coarse)
    shell = np.clip(1.7 - depth_mm / shell_mm, 0, 1)
    hu = inner + shell * (cortex_hu - inner)
    if lofts[0].fills == "disc":
        hu = np.full_like(hu, HU["disc"])
    return Solid(low, occupied, hu)


def choose_break(level, rng):
    """A way to break this level, sized to it."""
    group = ("C1", "C2", "C3 to C7")[min(level, 2)]
    ways = [way for way in read_breaks() if way.vertebra == group]
    way = ways[rng.integers(len(ways))]
    spec = (
        np.array(way[2:])
        * np.array([SIZE[level], 1, SIZE[level], SIZE[level], 1])[:, None]
    )
    return Break(group, way.name, *spec)


def break_bone(solid, level, rng, slice_mm):
    """Cut a fluid-filled gap through a level; sometimes displace the fragment beyond it."""
    way = choose_break(level, rng)
    side = rng.choice([-1, 1])
    shape = solid.occupied.shape
    index = np.ogrid[tuple(map(slice, shape))][::-1]
    axes = zip((side, 1, 1), solid.origin, index)
    xyz = [sign * (start + LOCAL_MM * k) for sign, start, k in axes]

    normal = way.normal / np.linalg.norm(way.normal) + rng.normal(0, 0.08, 3)
    rough = 0.6 * noise(rng, shape, 5, 5)
    terms = (n * (mm - p) for n, mm, p in zip(normal, xyz, way.point))
    beyond_mm = sum(terms, rough)
    limits = zip(xyz, way.box_low, way.box_high)
    x, y, z = ((mm > low) & (mm < high) for mm, low, high in limits)
    half_mm = rng.uniform(0.7 if slice_mm < 2 else 1.2, 2.5) / 2
    gap = x & y & z & (abs(beyond_mm) < half_mm)
    fragment = solid.occupied & x & y & z & (beyond_mm >= half_mm)

    moved_mm = (
        way.move * (side, 1, 1) * rng.uniform(0.5, 3) * (rng.random() < 0.75)
    )
    steps = np.round(moved_mm[::-1] / LOCAL_MM).astype(int)
    moved = np.roll(fragment, steps, (0, 1, 2))
    shifted = np.roll(solid.hu, steps, (0, 1, 2))
    hu = np.where(moved, shifted, np.where(gap, HU["fluid"], solid.hu))
    return Solid(solid.origin, (solid.occupied & ~fragment) | moved, hu)


def rotation(*degrees):
    """Rotation matrix of a rotation vector (x: forward tilt, y: to the side, z: turn)."""
    return cv2.Rodrigues(np.radians(degrees))[0]


def make_spine(rng):
    """Poses of C1 to T2 along a lordotic curve, turned as a whole; mm for the facets below
    each."""
    tilt = TILT_DEG * rng.uniform(0.5, 1.15) + rng.normal(0, 0.8, LEVELS)
    worn = (rng.uniform(1.5, 2.8, 8) * (rng.random(8) < 0.12)) * (
        np.arange(8) > 1
    )
    pitch = PITCH_MM * rng.uniform(0.97, 1.03) - worn
    up = np.stack([rotation(t, 0, 0)[:, 2] for t in tilt])
    steps = pitch[:, None] * (up[1:] + up[:-1]) / 2
    centres = -np.cumsum(np.vstack([np.zeros(3), steps]), 0)
    room = (
        pitch
        - np.mean(FACET_Y_MM) * np.sin(np.radians(np.diff(tilt)))
        - FACET_GAP_MM
    )

    flex, roll, yaw = rng.uniform((-10, -8, -15), (10, 8, 15))
    scale = rng.uniform(0.85, 1.15)
    phase = rng.uniform(0, 6)
    centres = (centres - centres[3]) @ rotation(flex, roll, 0).T * scale
    turns = yaw * np.linspace(1, 0.3, LEVELS)  # mostly the head
    poses = []
    for centre, forward, turn in zip(centres, tilt + flex, turns):
        poses.append(Pose(centre, rotation(forward, roll, turn), scale, phase))
    return poses, room


def facets(level, room):
    """The articular pillars of a level, fitted to the room around it."""
    top = (7 if level == 1 else room[level - 1]) / 2
    low = -room[min(level, 7)] / 2
    front, back = FACET_Y_MM
    rise = FACET_DROP_MM / 2
    sections = []
    for z, a, b in (
        (top + rise, front, front + 3),
        (top - rise, front, back),
        (low + rise, front, back),
        (low - rise, back - 3, back),
    ):
        middle = (a + b) / 2
        outline = [
            [10, middle],
            [11, a],
            [20, a],
            [22.5, middle],
            [21, b],
            [11.5, b],
        ]
        sections.append((z, outline))
    return make_part("bone", sections)


def wedge_part(wedge_mm):
    """What compression takes off the front of a body's top."""
    return make_part(
        "hole", [(6.4 - wedge_mm, [[0, -13, 12, 3]]), (7.2, [[0, -7, 12, 14]])]
    )


def spur_part(z, y):
    """An osteophyte at the front of an end plate."""
    ends = [[0, -7, 4, 1.5]]
    return make_part(
        "bone", [(z - 2.5, ends), (z, [[0, y, 6.5, 2.5]]), (z + 2.5, ends)]
    )


def vertebra_parts(level, room, wedge_mm, rng):
    """Parts of a level: its tables, facets fitted to the room around it, variants of the
    body."""
    z = rng.choice([-6, 6])
    y = -8.5 - rng.uniform(0, 3)
    spur, canals = rng.random(2) < 0.3
    bones = read_parts()
    if level == 0:
        return bones["atlas"]

    own = "axis" if level == 1 else "body" if level < 7 else "thoracic"
    process = "long" if level > 5 else "bifid"
    parts = [
        facets(level, room),
        *bones[own],
        *bones["lamina"],
        *bones[process],
    ]
    if 1 < level < 7:
        parts += [wedge_part(wedge_mm)] * (wedge_mm > 0)
        parts += bones["canals"] * int(canals)
        parts += [spur_part(z, y)] * int(spur)
    return parts


def reach_of(solid, shape, pose, scan):
    """Slices (z, y, x) of the scan that a solid in a pose can touch."""
    corners = (
        np.array(list(np.ndindex(2, 2, 2))) * shape[::-1] * LOCAL_MM
        + solid.origin
    )
    corners = pose.centre + pose.scale * corners @ pose.rotation.T
    voxels = (corners - scan.grid.origin) / scan.grid.step
    ends = scan.ct.shape[::-1]
    low = np.clip(voxels.min(0), 0, ends).astype(int)
    high = np.clip(voxels.max(0) + 2, 0, ends).astype(int)
    return tuple(slice(a, b) for a, b in zip(low[::-1], high[::-1]))


def bent(x, y, z, pose):
    """Scan's mm, bent gently alike for all bones of a study, from the pose's centre.

    No face stays flat, and yet the joints stay congruent.
    """
    out = []
    for a, b, c, centre in zip((x, y, z), (y, z, x), (z, x, y), pose.centre):
        wave = 0.6 * np.sin(b / 4 + pose.phase)
        out.append(a + wave + 0.6 * np.sin(c / 5 + pose.phase) - centre)
    return out


def place(scan, solid, pose, label):
    """Blend a solid into the CT and label it, but leave labelled voxels alone."""
    across = 0.3 * scan.grid.step[2] / LOCAL_MM / pose.scale
    alpha = blur(solid.occupied, 0.9, across)
    value = blur(solid.occupied * solid.hu, 0.9, across)
    box = reach_of(solid, alpha.shape, pose, scan)
    ct, labels = scan.ct[box], scan.labels[box]

    axes = zip(scan.grid.origin, scan.grid.step, np.ogrid[box][::-1])
    x, y, z = (start + step * k for start, step, k in axes)
    curved = bent(x, y, z, pose)
    index = []
    for axis, start in zip(pose.rotation.T, solid.origin):
        local_mm = sum(r * mm for r, mm in zip(axis, curved)) / pose.scale
        index.append(np.round((local_mm - start) / LOCAL_MM).astype(int))
    index = index[::-1]

    inside = np.all([(k >= 0) & (k < n) for k, n in zip(index, alpha.shape)], 0)
    free = (labels == 0) & inside
    at = tuple(k[free] for k in index)
    ct[free] = ct[free] * (1 - alpha[at]) + value[at]
    labels[free] = np.where(alpha[at] > 0.5, label, 0)


def scene_lofts(rng):
    """Skin, fat and all that lies around the spine, in painting order."""
    lofts = make_lofts(read_parts()["scene"], rng, 0.7)
    lofts.insert(
        1, lofts[0]._replace(fills="fat", outlines=lofts[0].outlines * 0.965)
    )
    muscles = [k for k, loft in enumerate(lofts) if loft.fills == "muscle"]
    for k in muscles[::-1]:
        muscle = lofts[k]
        core = muscle.outlines.mean(1, keepdims=True)
        grown = (
            FAT_PLANE * muscle.outlines - 0.12 * core
        )  # a fat plane around each muscle
        lofts.insert(k, Loft("fat", muscle.heights, grown))
    return lofts


def paint_scene(scan, poses, rng):
    """Soft tissue, skull, jaw and cartilages, lofted slice by slice around the spine."""
    ct, grid = scan.ct, scan.grid
    lofts = scene_lofts(rng)
    hu = dict(HU, artery=rng.choice([50, 280]), vein=rng.choice([45, 150]))
    centres = np.stack([pose.centre for pose in poses])[::-1]
    turns = [
        np.degrees(np.arctan2(p.rotation[1, 0], p.rotation[0, 0]))
        for p in poses
    ][::-1]
    scale = poses[0].scale
    bed = max(
        int((BED_MM * scale + centres[6, 1] - grid.origin[1]) / grid.step[1]), 0
    )

    for image, z in zip(ct, grid.origin[2] + grid.step[2] * np.arange(len(ct))):
        turn, x, y = (
            np.interp(z, centres[:, 2], v) for v in (turns, *centres.T[:2])
        )
        axes = rotation(0, 0, turn)[:2, :2].T * scale
        middle = (x, y) - grid.origin[:2]
        image[bed : bed + 6] = -150
        image[bed + 1 : bed + 5] = -900
        for loft in lofts:
            outline = outline_at(loft, (z - centres[-1, 2]) / scale)
            if outline is not None:
                fill(
                    image,
                    (outline @ axes + middle) / grid.step[:2],
                    hu[loft.fills],
                )
        bone = np.uint8(image == hu["bone"])
        deep_mm = cv2.distanceTransform(bone, cv2.DIST_L2, 3) * grid.step[0]
        image[deep_mm > 2] = 420  # spongy inside
    muscle = (ct > 40) & (ct < 80)
    ct += np.where(muscle, 12, 4) * noise(rng, ct.shape, 1.5, 1)


def add_artefacts(ct, heights_mm, rng):
    """Blur and correlated noise; darkening and horizontal streaks at the shoulders."""
    ct = blur(ct, rng.uniform(0.5, 0.8), 0.3)
    sigma_hu = rng.uniform(10, 50)
    grain = rng.uniform(0.5, 0.9)
    ct += sigma_hu * noise(rng, ct.shape, grain, 0.3, MATRIX)
    lower = np.clip((-92 - heights_mm) / 35, 0, 1)
    shoulders = lower * rng.uniform(0.3, 1)
    for image, weight in zip(ct, shoulders):
        white = rng.standard_normal(image.shape)
        streak = cv2.GaussianBlur(white, (0, 0), 30, sigmaY=0.7)
        darker = 45 * streak / streak.std() - 40
        image += weight * darker * (image > -700)
    ct = np.clip(np.round(ct), -1024, 3071)
    return ct.astype(np.int16)


def draw_scan(poses, rng):
    """An empty scan around the spine, and its millimetres between slices."""
    scale = poses[0].scale
    step = rng.uniform(0.35, 0.7)
    c1 = poses[0].centre[2]
    thick = rng.random() < 1 / 6
    slice_mm = rng.uniform(2, 2.5) if thick else rng.uniform(0.6, 1.5)
    high = rng.random() < 0.2
    top = c1 + scale * rng.uniform(*((40, 60) if high else (16, 30)))
    low = poses[rng.choice([7, 8])].centre[2] - scale * rng.uniform(5, 16)
    level_middle = np.mean([pose.centre[:2] for pose in poses], 0)
    middle = level_middle + (0, 6) + rng.uniform(-9, 9, 2)

    grid = Grid(
        np.append(middle - step * MATRIX / 2, low),
        np.array([step, step, slice_mm]),
    )
    shape = (int((top - low) / slice_mm) + 1, MATRIX, MATRIX)
    ct = np.full(shape, HU["air"], np.float32)
    return Scan(ct, np.zeros(shape, np.uint8), grid)


def make_study(rng):
    """One study: CT (z ascending, HU), labels, grid and the indices of the broken
    vertebrae."""
    poses, room = make_spine(rng)
    broken = []
    if rng.random() < 0.5:
        broken = rng.choice(7, rng.integers(1, 3), False, FRACTURE_ODDS)
    scan = draw_scan(poses, rng)
    look = rng.uniform(
        (0.6, 220, 1050), (1, 420, 1600)
    )  # mm of shell; HU inside, of the shell
    paint_scene(scan, poses, rng)

    bones = read_parts()
    for level, pose in enumerate(poses):
        compressed = level in broken
        wedge_mm = rng.uniform(2, 5) * (compressed and rng.random() < 0.3)
        between = pose._replace(
            centre=(pose.centre + poses[level - 1].centre) / 2
        )
        size = SIZE[level]
        jobs = []
        if level == 0:
            jobs.append((bones["condyles"], pose, 0, size))
        if level > 1:
            jobs.append((bones["disc"], between, 0, 1.4 if level > 6 else size))
        if level > 6:
            jobs.append((bones["ribs"], pose, 0, size))
        jobs.append(
            (vertebra_parts(level, room, wedge_mm, rng), pose, level + 1, size)
        )
        for parts, at, label, size in jobs:
            solid = make_solid(
                make_lofts(parts, rng, 0.3, size, SPINOUS[level]), rng, *look
            )
            if label and compressed:
                solid = break_bone(solid, level, rng, scan.grid.step[2])
            place(scan, solid, at, label)

    z = scan.grid.origin[2] + scan.grid.step[2] * np.arange(len(scan.ct))
    heights_mm = (z - poses[0].centre[2]) / poses[0].scale
    return (
        add_artefacts(scan.ct, heights_mm, rng),
        scan.labels,
        scan.grid,
        broken,
    )


if __name__ == "__main__":
    main(make_study, UID_ROOT, __doc__)
