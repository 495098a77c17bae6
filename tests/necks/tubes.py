"""Draw synthetic neck CTs, a sixth hand's: swept tubes and carved silhouettes, cut, cracked and scanned.

Bones are rectangles swept along curves and visual hulls of three silhouettes, as signed distances in mm; joints are carved midway between
bones, fractures move what a rough surface cuts off; soft tissue is painted. x to the patient's left, y to the back, z up.
"""

from collections import namedtuple
from functools import partial
from itertools import combinations

import cv2
import numpy as np
from lofts import Grid, main, noise

MATRIX, FAR, PAD = 256, 6.0, 4.0  # pixels a side; mm: distance where nothing is drawn, reach of a tube's field
# C2..T3: half width, half depth, height, x of pillar, x of transverse tip, canal, y and z of spinous tip, spread of its tips, slope, uncus
BODIES = np.reshape([float(v) for v in """8.8 7.6 20 19 26 17 44 -10 5 .8 1.5 7.8 7.3 13.5 19.5 25 14.2 40 -6 3.5 .85 3.5 8.2 7.5 13 20 26
    14 40 -7 3.5 .85 3.7 8.8 7.7 12.5 20.5 27.5 14 43 -8 3.2 .85 3.7 9.6 8 12.7 21 29 14.2 49 -10 2 .95 3.4 10.6 8.2 14.3 20.5 34 14.5 60
    -14 0 1.2 2.4 11.4 8.4 16 18.5 38 14.8 60 -20 0 1.7 1.2 11.4 8.8 17 17 36 15 58 -26 0 2.2 0 11.2 9.2 17.5 16 33 15 57 -31 0 2.5
    0""".split()], (9, 11))
AXIAL = [(0, -1), (.45, -.95), (.86, -.62), (1.04, -.1), (1.02, .45), (.85, .82), (.45, .92), (0, .85)]
CORONAL = [(0, -2), (1.1, -2), (1.1, -.9), (.95, -.4), (.93, 0), (.95, .3), (1.06, 1), (1.0, 2), (0, 2)]
SAGITTAL = [(-.98, .92), (-.5, .86), (0, .88), (.6, 1), (1, 1.05), (.96, .5), (.95, .1), (1.02, -1.05), (.5, -.94), (0, -.9), (-.55,
            -1.02), (-1.1, -1.2), (-1.05, -.8), (-.95, -.4), (-.92, 0), (-.98, .6)]
# painted: HU (up to 1: share of contrast), 1 if mirrored: (level, x, y, half width, half depth, degrees)...; level 1 = C1 .. 7 = C7, 8 = T1
SOFT = """52 1: -.3 22 34 12 8 0 2.6 16 30 9 7 0; 55 1: 1.8 12 30 9 7 20 5 12 31 9 7 20 11 14 32 12 9 20; 55 1: -.5 16 52 13 8 10 3 14 42 11
    8 15 8 17 45 11 7 15; 53 1: -.3 38 44 18 6 -35 3 27 46 19 5 -28 7 18 53 15 4 -15 10 15 52 12 3 -15; 55 1: .5 18 60 12 3 -10 4 28 55 26 4
    -28 6.5 42 52 38 6 -22 8 65 48 62 9 -10 11 60 62 70 9 0; 56 1: 1 34 18 6 8 0 4 37 22 8 9 20 7.5 55 34 10 9 30; 56 1: 2.5 26 4 5 6 0 5 29
    3 8 9 10 8.7 40 -8 12 11 20; 58 1: .7 7 -12 6 3 0 3.5 8 -11 7 4 0 10 7 -12 6 3.5 0; 57 1: -.2 54 16 8 11 0 3 49 -6 9 17 -22 6 34 -33 14
    8 35 8.6 15 -52 10 5 15; 54 1: 7.2 90 22 40 12 0 9 105 32 50 16 -10 12 100 45 45 18 0; 54 1: 8.6 60 -50 40 8 -10 12 75 -62 55 12 -15; 58
    1: -.6 55 -45 6 14 0 2.7 50 -42 7 16 -10; 58 0: .6 0 -62 22 24 0 2.6 0 -58 20 25 0 3.8 0 -50 14 17 0; 50 0: -.6 0 -22 20 12 0 3 0 -24 20
    12 0 4 0 -28 21 14 0 6.3 0 -30 17 17 0; 56 1: 3.8 8 -52 9 3 20 6 9 -50 10 3 25 9.4 8 -54 9 3 15; 52 0: 5.9 1 -15 10 4.5 0 7 5 -15 8 5.5
    0 12 6 -16 8 6 0; 50 0: 6.1 0 -32 11 11 0 12 0 -38 11.5 11 0; 45 1: -1 27 -14 7 7 0 4 29 -16 9 7 -30 8.5 26 -24 10 8 -30; 95 0: 1.6 0 0
    8 7 0 7.4 0 0 10.5 8 0 13 0 0 12 10 0; 850 0: -15 0 -10 70 84 0 -4 0 8 70 72 0 -1.5 0 30 62 54 0 -.6 0 34 52 44 0 -.1 0 38 34 26 0; 36
    0: -15 0 -10 64 78 0 -4 0 8 64 66 0 -1.5 0 30 56 48 0 -.7 0 34 47 39 0 -.25 0 38 32 24 0; 36 0: -1 0 14 13 9 0 .5 0 14 9 8 0; 1 1: -1 24
    -15 2.4 2.4 0 3.6 27 -16 3.6 3.4 0 8.5 22 -24 3.4 3.4 0 12 15 -34 4 4 0; .6 1: -1 29 -9 4 3.5 0 4 34 -13 5.5 4 -20 8.6 32 -26 7 5.5 0; 1
    1: 1.5 15 1 1.7 1.7 0 6.5 15 1 1.7 1.7 0 8 20 -10 2 2 0; 1 1: 8.4 34 -24 18 4 -25 9 30 -28 12 4 -15; -10 0: -1 0 15 13 10 0 1.5 0 15 12
    9 0 3 0 15 11 7.5 0 13 0 15 10 7.5 0; 12 0: -1 0 14 9 8 0 2 0 14.5 9 7.5 0 3 0 14.5 8.5 6.3 0 13 0 15 8 6.3 0; 40 0: -1 0 13 6 5 0 13 0
    15 6.5 4 0; -940 0: -.8 0 -26 14 6 0 1 0 -24 12 5 0 1.4 0 -25 9 4 0 3.2 0 -28 10 6 0 4.2 0 -30 11 6 0 5 0 -34 4 8 0 5.6 0 -34 3 9 0 6.2
    0 -33 7 8 0 12 0 -38 8.5 8 0; -1020 1: 3.3 11 -27 5 4 0 4.7 13 -25 4 3 0; -860 1: 8.7 36 -2 12 14 0 10 46 -8 27 34 0 13 62 -12 46 55 0;
    -1020 0: 6.6 4 -15 1.5 1 0 7.8 5 -15 1.2 .8 0; -1020 1: -2.6 7 -66 3 22 0 .3 7 -66 4 24 0; -1020 1: -2.8 28 -62 10 14 0 -.1 26 -60 8 12
    0"""
SKIN = """0 0: -14 0 -10 62 72 0 -10 0 -10 76 96 0 0 0 -13 77 94 0 2 0 -18 73 88 0 3.3 0 -18 67 84 0 3.9 0 -6 65 70 0 4.7 0 1 63 63 0 6 0 4
    66 64 0 6.9 0 6 80 68 0 7.7 0 7 122 72 0 8.6 0 7 190 78 0 13 0 4 230 94 0"""
# tubes: knots x y z.. / half widths / half heights / marks (see read); frames: C1, C2, skull, C4..C6, T1..T3, T1 upright
ATLAS = """-15 -6.5 0 -8 -9.3 0 0 -10.2 0 8 -9.3 0 15 -6.5 0/3 2.5 2.9 2.5 3/4.5 4.4 5.2 4.4 4.5; 0 -11 -.5 0 -13 -1.5/2/2.6; 16.8 -1 -4.5
    17.8 0 4.5/6.4 5.8/8 8.5/myb; 21 -3 0 29 -4 -.5 35.5 0 -1/1.7/3 2.6 3/m; 18 6 0 20.5 13 1 17 20 0 9.5 26 -.5 0 28.5 -.5/3 2.4 2.5 2.8
    3/3 2.5 3.7 4.3 5/m; 20 5.5 0 30 7 0 37 3 -1.5/2.5 2.2 3/3.2 3 3.6/m; 27.5 1.6 -9 27.5 1.6 9/3//myc"""
AXIS = """0 .3 3 0 -.3 9 0 -.5 13 0 0 19 0 1 23.5/6.8 5.6 4.7 5.1 3.2/6 5.3 4.8 5.2 3/y; 0 25.6 -4 0 39 -8/3 3.4/6.5 5; 10 -.3 9 20 .3
    5/7.6/3.6/m; 7 1 2 16 4 2/5.5//m; 16 5 2 19 11.6 -4/4.6//m; 19 17.3 -9.6 19 10.9 -4.4/5.3/6.2/mp; 1 37 -8 5 44 -10/2.8 3/3.2/m; 14 2 -4
    22 2 -6 26 6 -7/2.5 2 2.2//m; 17 15.6 -5 12 23.6 -4 0 28.1 -5/2.8 2.5 3.2/6 6.2 6/ml; 15.5 3 -14 17 3 -2 24 1 3/2.6//myc"""
BASE = """0 -10 17 0 -24 45/12/4.5/y; 0 34 18 0 60 21 0 86 42/8/3.5; 12.5 -9 13.5 19 8 13/5.5//m; 19 8 16 17 22 17 0 31 18/4/3.5/m; 18 0 18
    42 8 21/7/4/m"""
EAR = "64 8 27 40 -2 32 15 -18 36/9/7/m; 55 14 26 53 14 12 50 10 1/10 9 4/13 10 5/my"
FACE = """0 -45 4 0 -84 3/20/1.5; 24 -45 -1 22 -68 -1 10 -82 -1 0 -85 -1/4/5/m; 17 -38 0 15 -36 22/2/5/my; 41 -13 24 55 -13 24/4//m; 30 -66
    14 52 -55 17 66 -30 20 68 -5 26/6 5 2 2.5/9 7 3 3/m; 47 -15 22 46 -26 2 44 -30 -17/3 3.5 4/5 13 13/my; 43 -34 -24 33 -60 -31 17 -79 -34
    0 -85 -35/5.5/11 12 12.5 13/m"""
TEETH = [(25, -49, 4), (24.5, -57, 4.1), (22.5, -65, 3.3), (20, -71, 3.1), (16, -76.5, 3), (10, -81, 2.7), (3.5, -84, 2.8)]  # x, y, radius
TRUNK = """0 -52 6 10 -49 6 17 -40 8 20 -28 11/4 3 2 2/4 3 2 1.8/m | 2 -56 0 12 -46 0 19 -34 0/1.3/8 10 10/m | 0 -44 0 10 -41 0 12 -33 2 7
    -26 5 0 -24 6/1.8/3 4 6 9 9/m | 13 5 4 30 16 5 46 14 3 56 -8 2 48 -38 0 26 -58 -2/3.2/4.5 3.6 4.5 5 6 6/m | 13 6 5 32 20 4 56 20 0 76 -5
    -8 70 -45 -14/3.2/4.5 4 4.5 5 6/m | 13 6 5 32 22 3 62 28 -4 88 0 -16 84 -45 -25/3.2/4.5 4 4.5 5 6/m | 14 -62 -22 40 -68 -12 75 -55 0 115
    -25 8 150 -10 10/8 6 5 5 7//m; 0 -60 -25 0 -66 -55/22/6/y; 85 52 -70 95 50 -25 108 40 0/25 22 9/2.2/my; 80 62 -18 120 46 5 150 15
    15/5/8/m""".split(" | ")
# breaks of C1, C2, C3..C7: a point of the surface, its normal, a centre, shift of what is cut off (z -3: crushed), reach round the centre
BREAKS = """2 0 0 1 .1 0 0 0 0 2 0 0 99; 0 11 0 .3 1 0 0 20 0 0 1.2 -.5 99; 9 25 0 1 -.6 0 12 22 0 0 0 0 9; 17 0 0 1 .4 0 20 0 0 1 0 0 12 |
    0 0 9 0 .2 1 0 0 18.5 0 2 0 11; 0 0 10 0 -.3 1 0 0 18.5 0 -2 0 11; 0 0 3.5 0 .15 1 0 0 24 0 1.5 0 27; 0 -3.4 -5.6 .1 -.8 -.6 0 -7.6 -10
    0 -1 -.8 10; 0 34 -7 .2 1 -.3 0 50 -9 0 .5 -2 30; 0 9.6 0 .15 1 .1 0 24 -8 0 1.5 -.5 28 | 0 32 -4 .2 1 -.3 0 52 -8 0 .5 -2 30; 0 -3.5
    -3.6 .1 -.8 -.6 0 -7.7 -6.4 0 -1 -.8 10; 1.5 0 0 1 .2 0 0 0 0 .5 0 0 13; 20.3 14 0 .3 .6 .8 20.3 15 4 0 1 .5 9.5; 13.2 19 -1 .8 -.6 0
    16.4 16 0 .4 0 0 9; 20 1 -2 1 .2 0 27 2 -2 1 0 -.5 10; 0 0 1.5 0 -.3 1 0 -3 6.4 0 0 -3 13""".split("|")
Tube = namedtuple("Tube", "at a b up edge plane cut")  # knots; half widths aside, up; corner radius / half width; plane of section; cuts
Pose = namedtuple("Pose", "turn at size", defaults=(np.eye(3), np.zeros(3), 1.0))
Bone = namedtuple("Bone", "box axes d e label look")  # signed distance, that to the surface with cortex; (HU inside, HU, mm of cortex)


def local(axes, pose):
    """Coordinates x, y, z of the voxels of some axes in a pose's frame."""
    (z, y, x), c = np.ix_(*((a - o).astype(np.float32) for a, o in zip(axes, pose.at[::-1]))), np.float32(pose.turn / pose.size)
    return [c[0, i] * x + c[1, i] * y + c[2, i] * z for i in range(3)]


def read(text, rng=None):
    """Tubes of a table: m mirrored, y upright, l leaning, p cut square at the back, b boxy, c cutting; varied, as bones are."""
    out = []
    for at, a, b, marks in ((item.strip() + "///").split("/")[:4] for item in text.split(";")):
        at = np.reshape([float(v) for v in at.split()], (-1, 3))
        a, b = (np.broadcast_to([float(v) for v in half.split()], len(at)) for half in (a, b or a))
        up, edge = (0, 1, 0) if "y" in marks else (0, -.32 * ("l" in marks), 1), .4 if "p" in marks else .62 if "b" in marks else .9
        for side in (1, -1)[:1 + ("m" in marks)]:
            shift, grow = (rng.normal(0, .35, at.shape), np.exp(rng.normal(0, .07))) if rng and "c" not in marks else (0, 1)
            out.append(Tube(at * (side, 1, 1) + shift, a * grow, b, up, edge, (0, 1, 0) if "p" in marks else None, "c" in marks))
    return out


def place(tubes, pose):
    """Tubes in the world."""
    return [t._replace(at=pose.at + t.at @ pose.turn.T * pose.size, a=t.a * pose.size, b=t.b * pose.size, up=pose.turn @ t.up,
                       plane=t.plane and tuple(pose.turn @ t.plane)) for t in tubes]


def window(axes, knots, span):
    """The voxels of some axes (z, y, x) within a span of points."""
    return tuple(slice(*np.searchsorted(axes[i], (knots[:, 2 - i].min() - span, knots[:, 2 - i].max() + span))) for i in range(3))


def sweep(field, axes, t, blend=1.6):
    """Join the distance to a swept tube to a field (blending over so many mm), or cut the tube out of it."""
    rows, own = np.column_stack([t.at, t.a, t.b]), np.full(field.shape, FAR, np.float32)
    for _ in range(2 if len(rows) > 2 else 0):  # a smooth curve through the knots
        ends = np.vstack([2 * rows[0] - rows[1], rows, 2 * rows[-1] - rows[-2]])
        middles = (9 * (ends[1:-2] + ends[2:-1]) - ends[:-3] - ends[3:]) / 16
        rows = np.insert(rows, np.arange(1, len(rows)), middles, 0)
    whole = window(axes, rows, rows[:, 3:].max() * 1.5 + PAD)
    for p, q in zip(rows, rows[1:]):
        near = window(axes, np.array([p, q]), max(*p[3:], *q[3:]) * 1.4 + PAD)
        if own[near].size:
            own[near] = np.minimum(own[near], link([a[s] for a, s in zip(axes, near)], p, q, t))
    field, own = field[whole], own[whole]
    smooth = np.maximum(blend - np.abs(field - own), 0)**2 / (4 * blend)
    field[:] = np.maximum(field, -own) if t.cut else np.minimum(field, own) - smooth


def link(axes, p, q, t):
    """Distance to a straight link of a tube, between two rows x, y, z, a, b."""
    line = q - p
    w = np.array(t.plane or line[:3]) / (np.linalg.norm(t.plane or line[:3]) + 1e-9)
    v = t.up - w * (t.up @ w)
    v /= np.linalg.norm(v) + 1e-9
    turn = np.column_stack([np.cross(v, w), v, w])
    along, r = (line[:3] @ turn + 1e-6).astype(np.float32), np.float32(t.edge * min(*p[3:], *q[3:]))
    u, v, s = local(axes, Pose(turn, p[:3]))
    f = np.clip(s / along[2], 0, 1)
    qu, qv = (np.abs(c - f * along[i]) - f * np.float32(line[3 + i]) - np.float32(p[3 + i] - r) for i, c in enumerate((u, v)))
    beyond = np.abs(s - f * along[2])
    deep = np.minimum(np.maximum(qu, qv), 0) * (beyond == 0)
    return np.sqrt(np.maximum(qu, 0)**2 + np.maximum(qv, 0)**2 + beyond**2) + deep - r


def hull(xyz, row, sagittal, swell):
    """Signed distance of a vertebral body: three silhouettes carved, lifted at the sides to uncinate processes."""
    (x, y, z), (wide, deep, high), out = xyz, row[:3] * (swell, swell, .5), np.float32(-99)
    rise = np.clip((np.abs(x) / wide - .5) / .5, 0, 1)
    up = z - row[10] * rise * rise * (3 - 2 * rise) * np.clip(.75 + y / deep / 3, .3, 1)
    half, front = ([*v, *[(-a, b) for a, b in v[-2:0:-1]]] for v in (AXIAL, CORONAL))
    for a, b, outline, scale in ((x, y, half, (wide, deep)), (y, up, sagittal, (deep, high)), (x, z, front, (wide, high))):
        img = cv2.fillPoly(np.zeros((224, 224), np.uint8), [np.int32((np.array(outline) * scale / .25 + 112) * 16)], 255, cv2.LINE_8, 4)
        img = (cv2.distanceTransform(255 - img, cv2.DIST_L2, 5) - cv2.distanceTransform(img, cv2.DIST_L2, 5)) * np.float32(.25)
        flat = [(c / .25 + 112).astype(np.float32).reshape(-1, c.shape[2]) for c in (a, b)]
        d = cv2.remap(cv2.blur(img, (7, 7)), *flat, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).reshape(x.shape)
        out = np.maximum(out, d) + np.maximum(1.2 - np.abs(out - d), 0)**2 / 4.8
    return out - np.float32(.5)


def typical(row, pitch):
    """Table of C3..C7 and T1..T3: spinous process, pedicles, pillars, laminae, transverse processes (in the neck forked, with foramina)."""
    wide, deep, _, px, tx, canal, sy, sz, fork, slope = row[:10]
    back, neck, leg = deep + canal, slope < 1.45, 2.6 if slope < 1.45 else 1.2
    club, lean, hole, tip = .13 * (sy - 40) * neck, leg * slope, wide + 5.6, 5 + 4 * (tx > 32)
    text = f"""0 {back + 2} -2.5 0 {(back + sy) / 2} {sz * .5 - 1.5} 0 {sy - 2 - 2 * (fork > 1)} {sz * .9}/2.6 2.3 {2.8 + club}/5 4
        {3.6 + club}; {wide - 3} {deep - 4} 1.5 {px - 1} {deep + 4} .8/2.9/3.6/m; {px} {deep + 6.2 + leg} {-lean} {px} {deep + 6.2 - leg}
        {lean}/5.3/{pitch / 2}/mp; {px - 2.5} {deep + 9} -1 {px * .62} {back - 2.2} -1.5 0 {back + 3} -2.5/2.4 1.9 2.4/5.8 5.6 5/ml"""
    text += f"; 1 {sy - 6} {sz * .8} {fork} {sy} {sz}/2.2/2.4/m" * int(fork > 1)
    if not neck:
        return text + f"; {px} {deep + 7} 1.5 {(px + tx) / 2} {deep + 11} 2.5 {tx - 4} {deep + 15} 3/3.6 3.4 4.2//m"
    return text + f"""; {px - 2} {deep + 2} -.5 {tx - 3} 6 -2 {tx} {tip} -3/2.2 2 2.6/3 2.6 2.8/m; {wide - 1} -2.5 -1 {tx - 7.5} -4.6 -1
        {tx - 5.5} -1.5 -2.5 {tx} 4.5 -3.5/1.6 1.9 1.5 2/2.6 3 2 2.4/m; {hole} 1 -12 {hole} 1.6 12/{2.7 - (tx > 32)}//myc"""


def chain(rng, rows, discs, size):
    """Poses of the skull and of C1..T3: a chain from C2 down, C1 and the skull on top: lordosis, scoliosis, turned head."""
    tilt = np.interp(np.arange(9), [0, 6, 8], rng.normal((-6, 20, 26), (7, 6, 5))) + rng.normal(0, 1.5, 9)
    roll = rng.normal(0, 3) * np.sin(np.arange(9) * .5 + rng.uniform(0, 6)) + np.linspace(rng.normal(0, 3), 0, 9)
    out, at, last = [], np.zeros(3), 0
    for k, angles in enumerate(zip(tilt, roll, np.linspace(rng.normal(0, 6), 0, 9) + rng.normal(0, .7, 9))):
        turn, half = cv2.Rodrigues(np.radians(angles))[0], rows[k, 2] * size / 2
        at = at - (last + turn[:, 2]) / 2 * discs[k - 1] - turn[:, 2] * half if k else at
        out.append(Pose(turn, at, size))
        at, last = at - turn[:, 2] * half, turn[:, 2]
    turn, at = out[0].turn @ cv2.Rodrigues(np.radians(rng.normal(0, (3, 1.5, 5))))[0], out[0].at + out[0].turn @ (0, 0, 17) * size
    return Pose(turn @ cv2.Rodrigues(rng.normal((.1, 0, 0), (.09, .03, .04)))[0], at, size), [Pose(turn, at, size), *out]


def draw(world, tubes, pose, look, label=0, body=None, box=None):
    """A bone of tubes and perhaps of a vertebral body (row, outline, swell), in a pose's frame, on a box of the world."""
    tubes = place(tubes, pose)
    box = box or window(world, np.vstack([t.at for t in tubes if not t.cut]), max(max(*t.a, *t.b) for t in tubes) + PAD + 3)
    axes = [a[s] for a, s in zip(world, box)]
    d, core = np.full([len(a) for a in axes], FAR, np.float32), window(axes, pose.at[None], 19 * pose.size)
    if body and d[core].size:
        d[core] = np.minimum(FAR, pose.size * hull(local([a[s] for a, s in zip(axes, core)], pose), *body))
    for t in tubes:
        sweep(d, axes, t)
    return Bone(box, axes, d, d.copy(), label, look)


def vertebra(rng, world, level, row, pitch, worn, look):
    """A function that draws a vertebra in a pose."""
    text = ATLAS if level == 1 else AXIS if level == 2 else typical(row, pitch)
    if level > 2:  # the vein that leaves the body at its back; now and then a vascular channel that mimics a crack
        text += f"; 0 {row[1] + 1} 0 {rng.normal(0, .7)} {row[1] * rng.uniform(.45, .8)} .3/1.2 .6//c"
        text += f"; 9 -8 1 {rng.normal(3, 1)} {rng.normal(0, 2)} 0/.5//c" * int(rng.random() < .2)
    spur, outline = worn * rng.gamma(1.5, .2, 4), np.array(SAGITTAL) + rng.normal(0, .015, (len(SAGITTAL), 2))
    outline[[0, 4, 7, 11]] *= np.column_stack([1 + spur, 1 - .15 * spur])  # lips of the end plates
    body = None if level == 1 else (row, outline.tolist(), rng.normal(1 + .05 * worn, .02))
    return partial(draw, world, read(text, rng), look=look, label=level, body=body)


def part(rng, bone, redraw, pose, table, old=False):
    """Break a bone along a rough surface: what it cuts off moves; what is crushed grows dense; an old break has a cortex."""
    *numbers, reach = map(float, table.split())
    at, normal, centre, shift = np.reshape(numbers, (4, 3)) * (rng.choice([-1, 1]), 1, 1)
    at, normal, crush, shift = at + rng.normal(0, .8, 3), normal + rng.normal(0, .15, 3), shift[2] == -3, shift * rng.uniform(.3, 1.2)
    gap, turn = 0 if crush else rng.uniform(.5, 2.2), pose.turn @ cv2.Rodrigues(rng.normal(0, .035, 3))[0]
    moved = Pose(turn, pose.at + (pose.turn @ (shift + at) - turn @ at) * pose.size, pose.size)
    chip, waves = redraw(moved, box=bone.box), rng.normal(0, .5, (6, 3)).astype(np.float32)
    normal, at = (np.float32(v) for v in (normal / np.linalg.norm(normal), at))
    for piece, frame, side in ((bone, pose, -1), (chip, moved, 1)):
        xyz = local(piece.axes, frame)
        s = sum((c - a) * n + .35 * np.sin(sum(c * k for c, k in zip(xyz, w))) for c, a, n, w in zip(xyz, at, normal, waves))
        ball = np.sqrt(sum((c - np.float32(a))**2 for c, a in zip(xyz, centre))) - reach
        away = np.maximum(gap / 2 - s, ball - (0 if crush else 1.5)) if side > 0 else np.minimum(s + gap / 2, -ball)
        np.maximum(piece.d, pose.size * away, out=piece.d)
        np.maximum(piece.e, piece.d if old else -99, out=piece.e)
    dense = crush & (bone.d < 0) & (chip.d < 0)
    bone.e[:] = np.where(dense, np.maximum(bone.e, -1.1), np.where(chip.d < bone.d, chip.e, bone.e))
    np.minimum(bone.d, chip.d, out=bone.d)


def separate(bones, gap):
    """Carve joints with a cortex: no bone passes the middle between itself and a neighbour."""
    for one, two in combinations(bones, 2):
        shared = [(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(one.box, two.box)]
        if one.label + two.label and all(a < b for a, b in shared):
            near, far = (tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(shared, bone.box)) for bone in (one, two))
            middle = (one.d[near] - two.d[far]) / 2
            for field, away in ((one.d[near], middle), (one.e[near], middle), (two.d[far], -middle), (two.e[far], -middle)):
                np.maximum(field, away + np.float32(gap / 2), out=field)


def render(rng, ct, lab, bone, pixel):
    """Paint a bone, cortex around a texture, and its label."""
    inside, cortex, shell = bone.look
    if bone.d.size:
        hu = inside * (1 + .22 * noise(rng, bone.d.shape, 1.1, .9))
        hu += (cortex - hu) * np.exp(np.minimum(bone.e, 0) / np.float32(shell))
        ct[bone.box] += np.clip(.5 - bone.d / np.float32(pixel), 0, 1) * (hu - ct[bone.box])
        lab[bone.box][bone.d < 0] = bone.label


def ovals(rng, text, course, size, muscle=1.0):
    """Painted shapes along the slices: value, centre in mm, half axes (0 where absent), degrees."""
    (x0, y0, turn, level), out = course, []
    for head, numbers in (item.split(":") for item in text.split(";")):
        knots, (value, mirrored) = np.reshape([float(v) for v in numbers.split()], (-1, 6)), map(float, head.split())
        x, y, a, b, tilt = (np.interp(level, knots[:, 0], c) for c in knots.T[1:])
        end = np.clip(np.minimum(level - knots[0, 0], knots[-1, 0] - level) / .35, 0, 1)
        grow = np.sqrt(end * (2 - end)) * size * np.exp(rng.normal(0, .05)) * (muscle if 50 <= value < 60 else 1)
        x, y, c, s = size * (x + rng.normal(0, .8) * mirrored), size * (y + rng.normal(0, .8)), np.cos(turn), np.sin(turn)
        out += [(value, np.column_stack([x0 + c * m * x - s * y, y0 + s * m * x + c * y]), np.column_stack([a, b]) * grow[:, None],
                 m * tilt + np.degrees(turn)) for m in (1, -1)[:1 + int(mirrored)]]
    return out


def soft_tissue(rng, world, course, size):
    """Slices of skin, fat, muscles, discs, vessels, cord, airways, brain and couch; no bone but the vault of the skull."""
    pixel, corner, contrast, ct = world[2][1] - world[2][0], (world[2][0], world[1][0]), rng.choice([0, 120, 250]), []
    skin, shapes = ovals(rng, SKIN, course, size * rng.normal(1.02, .06))[0], ovals(rng, SOFT, course, size, rng.normal(1.17, .05))
    couch = (world[1][:, None] - (skin[1][:, 1] + skin[2][:, 1]).max() - 4 - (world[2] - skin[1][:, 0].mean())**2 / 900) / 18
    air = np.where(np.abs(couch - .5) < .5, np.where(np.abs(couch - .5) > .38, -250, -930), -1000).astype(np.float32)
    for k in range(len(course[0])):
        img, mask = np.full(air.shape, -100, np.float32), np.zeros(air.shape, np.uint8)
        for canvas, (value, at, wide, tilt) in [(mask, (1, *skin[1:])), *((img, shape) for shape in shapes)]:
            if wide[k].min() > 0:
                value = value if abs(value) > 1 or canvas is mask else 45 + contrast * value
                at, wide = (np.rint(v / pixel * 16).astype(int).tolist() for v in (at[k] - corner, wide[k]))
                cv2.ellipse(canvas, at, wide, tilt[k], 0, 360, value, -1, cv2.LINE_8, 4)
        img[cv2.erode(mask, np.ones((5, 5))) == 0] = 20
        ct.append(np.where(mask, img, air))
    ct = np.array(ct)
    return ct + 14 * noise(rng, ct.shape, 1.5, 1.2) * (ct > -300)


def scan(rng, ct, level, pixel, metal):
    """What the scanner adds: its kernel, quantum noise, streaks through the shoulders and from metal (x, y, z in voxels)."""
    sharp, dose, (yy, xx) = rng.choice([0, .7], p=[.6, .4]), rng.uniform(20, 110), np.mgrid[:MATRIX, :MATRIX].astype(np.float32)
    for k, img in enumerate(ct):
        for x, y, z in metal:
            ray, fade = np.arctan2(yy - y, xx - x), max(0, 1 - abs(z - k) / 3) * np.exp(-np.hypot(xx - x, yy - y) * pixel / 30)
            img += 900 * fade * np.sin(7 * ray + x) * np.sin(3 * ray + y)
        soft = cv2.GaussianBlur(img, (0, 0), .45 / pixel)
        grain, shoulder = rng.standard_normal(img.shape, np.float32), 1 / (1 + np.exp(7.2 - level[k]))
        img[:] = soft + sharp * (soft - cv2.GaussianBlur(soft, (0, 0), .9 / pixel))
        img += cv2.GaussianBlur(grain, (0, 0), .5 if sharp else .8) * np.float32(dose * (1 + shoulder))
        img += cv2.resize(rng.standard_normal((MATRIX, 5), np.float32), img.shape) * np.float32(.5 * dose * shoulder)


def spine(rng, world, rows, worn, poses, look, whole):
    """The vertebrae, and the numbers 0..6 of the broken ones, out of those that are whole in the scan."""
    pitch = np.interp(np.arange(10), np.arange(.5, 9), np.linalg.norm(np.diff([p.at for p in poses], axis=0), axis=1)) / poses[0].size
    makers = [vertebra(rng, world, k + 1, rows[k], pitch[k], worn[k], look) for k in range(10)]
    bones, chance = [make(pose) for make, pose in zip(makers, poses)], np.array([7, 14, 5, 7, 8, 14, 19.])[whole]
    hurt = rng.choice(whole, rng.choice([0, 1, 2], p=[.5, .33, .17]), replace=False, p=chance / chance.sum()).tolist()
    old = [k for k in whole if k > 4 and k not in hurt][:int(rng.random() < .12)]
    for k in hurt + old:
        ways = BREAKS[min(k, 2)].split(";")
        for way in rng.permutation(len(ways))[:rng.choice([1, 2], p=[.65, .35])] if k in hurt else [0]:
            part(rng, bones[k], makers[k], poses[k], ways[way], k in old)
    return bones, sorted(hurt)


def others(rng, world, skull, poses, look, lost):
    """Skull, jaw, hyoid, larynx, ribs and shoulder girdle; teeth and fillings; where there is metal."""
    frames = [skull] * 3 + poses[3:6] + poses[7:] + [Pose(at=poses[7].at, size=skull.size)]
    looks = [look, (-150, *look[1:]), look, look, *[(90, 280, look[2])] * 2, *[look] * 4]
    bones = [draw(world, read(text, rng), *how) for text, *how in zip([BASE, EAR, FACE, *TRUNK], frames, looks)]
    text = "; ".join(f"{x} {y} -9 {x} {y} -1/{r}//my; {x} {y + 1} -15 {x} {y + 1} -25/{.9 * r}//my" for x, y, r in TEETH)
    teeth = [t for t in read(text) if rng.random() > lost]
    metal = [t._replace(at=t.at[:1] + [(0, 0, 0), (1, 0, 2)], a=t.a * .5, b=t.b * .5) for t in teeth if rng.random() < .08]
    bones += [draw(world, teeth, skull, (1500, 2600, .8)), *(draw(world, [t], skull, (6000, 6000, 1)) for t in metal)]
    return bones, [t.at[0] for t in place(metal, skull)]


def make_study(rng):
    """One study: CT (z ascending, HU), labels (1..7 = C1..C7, then T1..T3), Grid, numbers 0..6 of the fractured vertebrae."""
    size, rows, age = rng.normal(1, .07), np.vstack([BODIES[:1], BODIES]) * np.exp(rng.normal(0, .035, (10, 11))), rng.beta(1.6, 1.6)
    worn = np.clip(age * rng.gamma(3, .45, 10) * [.3, .3, .5, .7, 1.2, 1.3, .9, .4, .3, .3], 0, 1.4)
    skull, poses = chain(rng, rows[1:], size * np.maximum(1.2, 5.6 - 3 * worn[1:]), size)
    heights, pixel = np.array([p.at[2] for p in poses]), rng.uniform(.45, .9)
    step = rng.choice([.6, .75, .9, 1, 1.25, 1.5, 2, 3], p=[.07, .12, .15, .36, .15, .07, .05, .03])
    low, high = heights[rng.choice([6, 7, 8, 9], p=[.03, .22, .4, .35])] - rng.uniform(12, 18), heights[0] + rng.uniform(14, 50)
    count, fold = int((high - low) / step), int(np.ceil(step / .85))  # slices are means of thinner ones
    corner = poses[4].at + rng.normal((0, 8, 0), (4, 6, 0)) - pixel * (MATRIX - 1) / 2
    grid = Grid(np.array([*corner[:2], low]), np.array([pixel, pixel, step]))
    world = [low + step / fold * (np.arange(count * fold) - (fold - 1) / 2), *(corner[i] + pixel * np.arange(MATRIX) for i in (1, 0))]
    ends = [skull.at + skull.turn[:, 2] * 255 * size, *(p.at for p in poses), poses[-1].at + (0, 12, -60)]
    tracks = np.column_stack([ends, [np.arctan2(p.turn[1, 0], p.turn[0, 0]) for p in (skull, *poses, poses[-1])], [-14, *range(1, 11), 13]])
    course = [np.interp(-low - step * np.arange(count), -tracks[:, 2], tracks[:, i]) for i in (0, 1, 3, 4)]  # x, y, turn, level of slices
    ct = np.repeat(soft_tissue(rng, world, course, size), fold, 0)
    lab, look = np.zeros(ct.shape, np.uint8), (rng.uniform(170, 330) * (1.2 - .5 * age), rng.uniform(850, 1400), rng.uniform(.55, .95))
    bones, hurt = spine(rng, world, rows, worn, poses, look, [k for k in range(7) if low + 12 < heights[k] < high - 12])
    frame, metal = others(rng, world, skull, poses, look, .5 * age)
    separate(bones + frame, rng.uniform(1, 1.8))
    for bone in bones + frame:
        render(rng, ct, lab, bone, pixel)
    ct = ct.reshape(count, fold, MATRIX, MATRIX).mean(1)
    scan(rng, ct, course[3], pixel, [(at - grid.origin) / grid.step for at in metal])
    return np.rint(ct.clip(-1024, 3071)), lab[fold // 2::fold].copy(), grid, hurt


if __name__ == "__main__":
    main(make_study, "1.2.3.8")
