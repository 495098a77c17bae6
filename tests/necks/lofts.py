"""A third generator of synthetic neck CTs, drawn without sight of the other two.

    python tests/necks/lofts.py OUT --studies 24 --seed 0 [--train]

writes OUT/test_images/<uid>/<k>.dcm (k = 1 on top), OUT/segmentations/<uid>.nii (same voxel order;
1..7 = C1..C7, 8 = T1, 9 = T2), OUT/test.csv, OUT/test_labels.csv and an empty train.csv; with
--train, OUT/train_images and OUT/train.csv. Bones are lofted from axial outlines, where
tests/tools/phantoms.py joins rods. mm; x left, y back, z up.
"""

import argparse
import struct
import sys
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

LOCAL_MM, MARGIN_MM, MATRIX = 0.4, 4.0, 256  # voxel and border of a bone's own grid; CT pixels
TYPES = ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "patient_overall"]
# Of each level, C1 to T2: forward tilt, distance to the next, in-plane size, spinous length.
TILT_DEG = np.array([-8, -6, -2, 3, 8, 14, 20, 26, 30.0])
PITCH_MM = np.array([17.5, 20.5, 18, 18, 17.5, 17.5, 18.5, 20])
SIZE, SPINOUS = [1, 1, 0.94, 0.97, 1, 1.04, 1.1, 1, 1], [1, 0.95, 0.75, 0.8, 0.9, 1.15, 1, 1, 0.9]
FRACTURE_ODDS = [0.07, 0.22, 0.05, 0.08, 0.18, 0.18, 0.22]  # C1..C7
FACET_Y_MM, FACET_DROP_MM, FACET_GAP_MM = (7.5, 18.5), 9, 1.6  # facets slope down from y to y
HU = dict(air=-1000, lung=-850, fat=-100, skin=30, muscle=58, wall=46, csf=12, cord=42, hole=34,
          thyroid=95, cartilage=200, disc=90, fluid=50, bone=950, tooth=2000)
# Parts: what (in bones 1 adds, 0 removes), then sections: height (or low:high) and outline points.
# A point of four numbers is an ellipse (centre, radii). An outline from midline to midline is
# mirrored; one beside the midline is drawn on both sides. Origin: in the vertebral body or dens.
BODY = """1 | -7 0,-9.2 6,-8.4 8.6,-4 8.6,2.5 7,7.2 0,7 | 0 0,-7.2 5,-7 8.2,-3.5 8.4,2.5 6.5,7 0,6.6
| 6.7 0,-8 6,-7.6 9.4,-4 9.6,2.5 7,7.4 0,7.2; 0 | -7.6 0,-.5,6.5,6 | -5.6 0,-.5,2.5,2.5;
1 | -2.3:5 5,2.5 10,2 17,8 15,15 11,13 5,7.5; 1 | 5 6.2,-2 9.6,-3 10.6,3 8.5,7 6.5,5
| 9.8 8.6,0 10,-1 10.6,2.5 9.6,5.5 8.6,4; 1 | -5.5 13,-4 19,-5.5 24,-5.5 27,1 26,7 20,9.5 15,7
| 3.3 7,-4.6 13,-5.4 18,-5.4 22,0 21,7 16,10 9,5; 0 | -8:6 13.9,1.8,3.3,3.2;"""
LAMINA = """1 | 4.5 0,22 6,20 11.5,15.7 15.5,14 17,17 8,22.3 0,25
| -8.5 0,23 6,21.5 12,17 16,16 17,19.5 9,25.4 0,28;"""
BIFID = """1 | 0 0,22 2.8,24 2.8,26 2.6,28 0,29 | -5 0,23 3.3,26 3,31 4,40 0,38.5
| -9.5 0,27 2.8,30 3.4,36 6.4,44.5 0,38 | -13 0,36 2.4,36 4,39 6.4,44 0,38;"""
LONG = """1 | 2 0,22 3,24 2.8,27 2.4,30 0,30.5 | -6 0,23 3.3,26 3,32 2.8,39 0,41
| -13 0,29 2.8,31 3,36 4,46 0,50 | -21 0,41 2.4,42 3,45 3.8,49 0,51;"""
AXIS = """1 | -9.4 0,-8.8 5.5,-8.2 8.8,-3.5 8.8,2 6.8,7 0,7 | 0 0,-7 4.6,-6.8 8.4,-3 9,2 6.4,7 0,7
| 7 0,-6.4 4,-6.2 8,-3.5 8.6,2.5 5,6.4 0,6.4; 1 | 4 0,-6.4 4.4,-6 6.4,-1.5 5,4 2.8,6 0,6
| 12 0,-5.8 3.2,-5.4 5,-1 4.3,3.2 2.6,4.8 0,5 | 18 0,-6.6 4,-6.2 6,-1 4.8,3.3 2.6,5 0,5.2
| 24.5 0,-4.4 2,-4 3.2,-1 2.6,1.6 1.6,2.8 0,3; 1 | -1 7,-3 12,-4 17,-1 18,4 14,9 7,6
| 5.5 6,-4.6 12,-6 19,-3 19.5,5 14,9 6,6 | 10.5 5.5,-4 9,-4.4 12,-1.5 12,3 9,6 5.5,5;
1 | -5:5.5 7,3 14,2.5 18.5,9 18.5,17 12,15 8.5,8; 1 | -6 14,0 19,-1 23,2 25,6 21,10 15,9
| -.5 9,-1 15,-2.8 21,0 23,5 20,10 12,9; 0 | -10:2.5 14.8,2.6,3,3;"""
ATLAS = """1 | -6:6 0,-14.6 7,-12.4 14,-8 11,-3.4 6.5,-7.2 0,-7.9; 1 | -12.5 15.5,-4 19,-5 21.5,-2
21.5,5 18,9 15.5,6 | -7.5:4 9,-4 16,-7.4 22,-3 22,6 17,12 10,8 | 9.5 16,-6 19,-6.4 23,-2 22,6
17.5,11.5 16,8; 1 | -5.2:4.2 0,27 7,25.6 13,20 14,9 21,8 19.5,18 13,27.5 6,32.4 0,34; 1 | -4.5:4.5
18,-2 25,-3.6 32,0 38.5,4 37,10 28,11 18,9; 0 | -8:8 25.8,3.4,3.5,3.4;"""
THORACIC = """1 | -8.2:8.2 0,-9.4 8,-9 14,-3.5 15,3.5 10,8 0,7;
1 | -1:6.5 8,4 13,5 16,11 15,16 11,14 8,8; 1 | -5:6 12,11 22,12 30,14 38,18 38,24 30,25 12,20;"""
RIBS = """1 | 4 16,3 25,7 36,11 46,9 54,0 57,-16 65,-16 65,4 57,17 42,18 30,15 16,10
| -5 17,4 25,8 36,13 48,10 56,-2 59,-22 67,-22 66,3 57,17 42,19 30,16 17,10;"""
CONDYLES = "1 | 11 10,-5 13,-7 16,-4 16,3 13,8 11,5 | 16 9,-8 14,-10 22,-5 21,5 16,11 10,6;"
DISC = "disc | -6.4:6.4 0,-.6,8.6,7.4;"
CANALS = "0 | -.8:.8 .2,8.5 1.5,8.5 4,1 3,0;"  # of the nutrient veins
# Around the spine, height 0 at C1, in painting order; bone, holes in it and teeth cover the rest.
SCENE = """skin | -190:-142 0,-62 70,-62 165,-40 185,20 140,62 60,76 0,72 | -90 0,-60 30,-56 58,-32
66,10 56,52 30,68 0,65 | -52 0,-70 30,-62 56,-32 63,6 54,50 30,65 0,62 | -40 0,-88 34,-80 58,-40
66,6 56,52 30,66 0,63 | -5 0,-104 44,-94 68,-44 74,8 66,58 36,76 0,74 | 80 0,-104 52,-92 82,-44 88,8
82,68 46,100 0,106; muscle | -150 70,40,60,14 | -60 26,50,24,6 | 0 18,56,18,5; muscle | -150
48,30,20,18 | -90 38,24,15,18 | 12 42,30,12,13; muscle | -150 17,45,17,9 | -90 18,40,17,9 | -20
19,44,18,10 | 16 18,50,17,7; muscle | -150 14,29,14,12 | 12 13,38,13,9; muscle | -150 8,-12,6,3.4 |
-10 7,-11,5.6,3; muscle | -140 42,-2,14,11 | -90 32,0,11,9 | -35 27,4,8,8; muscle | -140 18,-46,9,6
| -95 34,-30,14,7 | -40 48,-8,8,15 | 12 56,14,7,12; wall | -48 0,-45,18,13 | -36 0,-52,32,28 | -4
0,-55,30,26 ; wall | -190 0,-15,7,5 | -100 0,-30,16,14 | -60 0,-28,20,20 | -30 0,-20,19,12; thyroid
| -120 14,-28,5,7 | -105 15,-28,8,11 | -84 18,-26,4,6; artery | -150 18,-22,4,4 | 12 26,-12,3,3;
vein | -150 27,-24,7,6 | 12 29,-7,4,4; lung | -190 58,-4,44,42 | -140 46,-2,28,24 | -120 38,0,7,7;
csf | -190:20 0,15,10,9; air | 24 0,-26,11,6 | 10 0,-20,11,5 | -30 0,-21,9,4.5 | -44 0,-24,13,6 |
-58 0,-27,8,5 | -74 0,-34,2.4,7 | -84 0,-32,7,8 | -190 0,-31,8.5,8; cord | -190 0,15,5.5,4 | 20
0,14,6.5,5; cartilage | -80 0,-50 16,-38 18,-24 16,-24 0,-47 | -58 0,-58 19,-38 22,-22 20,-22 0,-54;
bone | 17 0,-8 10,-10 22,2 19,28 0,40 | 24 0,-14 24,-14 50,10 42,52 0,64 | 40 0,-30 44,-28 70,12
56,72 0,86 | 80 0,-78 56,-58 79,10 60,85 0,95; hole | 16 0,1 10,5 14,15 10,28 0,32 | 21 0,1 10,5
15,15 11,29 0,34 | 27 0,-2 24,2 42,22 32,48 0,56 | 42 0,-16 40,-14 62,16 50,66 0,79 | 80 0,-70
50,-52 72,10 54,78 0,88; bone | 0 51,12,5,6 | 12 51,11,9,13 | 30 54,10,13,18; bone | -42 0,-90
12,-89 18,-85 16,-80 8,-80 0,-80 | -30 0,-92 24,-86 47,-48 39,-48 18,-74 0,-80 | -10 0,-90 24,-84
48,-40 39,-38 18,-72 0,-80; bone | -32 42,-48 46,-48 48,-32 44,-32 | 20 45,-34 49,-34 54,-12 47,-12;
bone | -51:-45 0,-49 9,-46 19,-31 21,-20 18,-20 15,-31 7,-42 0,-43; tooth | -16:9 3,-88,2.7,3; tooth
| -16:9 11,-85,3,3; tooth | -16:9 20,-77,3.6,3.6; tooth | -16:9 28,-65,4,4; tooth | -16:9
33,-52,4.6,4;"""
# Breaks: C1, C2 or C3-C7, name, point, normal into the fragment, box that holds both, way to move.
BREAKS = """1 burst 4,5,0 1,.25,0 -99,-99,-99 99,99,99 1,0,0; 1 posterior 10,24,0 .8,-.6,.1 2,14,-9
18,34,9 0,0,0; 1 anterior 6,-9,0 1,.35,.1 1,-18,-9 11,-3,9 0,0,0; 2 dens 0,0,8.5 .05,-.2,1 -7,-9,4
7,8,40 .3,1,.1; 2 hangman 0,9,0 .1,-1,.15 -99,-99,-99 99,99,99 0,-1,-.1; 2 body 3,0,-1 .9,.3,.4
-11,-13,-9 11,7.6,11 0,0,0; 3 sagittal 1.5,0,0 1,.25,.1 -11,-13,-9 11,7.6,11 0,0,0; 3 oblique 0,-1,0
.6,-.7,.3 -11,-13,-9 11,7.6,11 .5,-.9,0; 3 teardrop 0,-4,-2.5 .1,-.8,-.5 -11,-13,-9 11,7.6,11
0,-1,-.3; 3 lamina 7.5,22,-3 .8,-.5,.15 1,15,-11 15,28,6 0,0,0; 3 pillar 16,12.5,0 .3,-1,.2
9.5,7.6,-14 24,20,14 0,0,0; 3 transverse 16,2,0 1,.2,0 9.6,-9,-8 30,8.5,5 1,-.2,-.4; 3 spinous
0,32,-7 .15,1,-.3 -99,-99,-99 99,99,99 0,.6,-.8"""
Loft = namedtuple("Loft", "what heights outlines")
Solid = namedtuple("Solid", "origin occ hu")  # corner (x, y, z); (z, y, x) occupancy and HU
Pose = namedtuple("Pose", "centre rot scale phase")  # LPS; local axes in columns; zoom; bend
Grid = namedtuple("Grid", "origin step")  # (x, y, z); z ascending


def make_lofts(text, rng, jitter, size=1.0, stretch=1.0):
    """Parse parts into lofts with slightly displaced, then smoothed (Chaikin) outlines."""
    lofts = []
    for part in text.strip(";").split(";"):
        (what,), *sections = (s.split() for s in part.split("|"))
        pairs = sorted((float(z), p) for heights, *p in sections for z in heights.split(":"))
        pts = np.array([[xy.split(",") for xy in points] for _, points in pairs], float)
        if pts.shape[2] == 4:
            turn = np.exp(2j * np.pi * np.arange(12) / 12)
            pts = pts[..., :2] + 1.05 * pts[..., 2:] * np.stack([turn.real, turn.imag], 1)
        elif pts[0, 0, 0] == 0:
            pts = np.concatenate([pts, pts[:, -2:0:-1] * (-1, 1)], 1)
        pts[..., 1] += np.maximum(pts[..., 1] - 25, 0) * (stretch - 1)
        for side in (1, -1) if pts[..., 0].mean() > 0.1 else (1,):
            out = size * pts + rng.normal(0, jitter, (1, *pts.shape[1:]))
            for _ in range(2):
                ahead = np.roll(out, -1, 1)
                out = np.stack([3 * out + ahead, out + 3 * ahead], 2).reshape(len(out), -1, 2) / 4
            lofts.append(Loft(what, np.array([z for z, _ in pairs]), out * (side, 1)))
    return lofts


def draw(img, loft, z, value, to_pixels):
    """Fill the outline of a loft at height z, if it reaches there."""
    if loft.heights[0] <= z <= loft.heights[-1]:
        k = min(np.searchsorted(loft.heights, z, "right"), len(loft.heights) - 1)
        t = (z - loft.heights[k - 1]) / (loft.heights[k] - loft.heights[k - 1])
        pts = to_pixels((1 - t) * loft.outlines[k - 1] + t * loft.outlines[k])
        cv2.fillPoly(img, [np.round(pts * 16).astype(np.int32)], float(value), shift=4)


def blur(vol, in_plane, across):
    """Gaussian blur of a (z, y, x) volume; sigmas in voxels."""
    out = np.stack([cv2.GaussianBlur(img, (0, 0), in_plane) for img in vol.astype(np.float32)])
    return cv2.GaussianBlur(out.reshape(len(out), -1), (1, 0), 1, sigmaY=across).reshape(out.shape)


def noise(rng, shape, in_plane, across, tile=96):
    """Correlated noise of unit variance, repeated beyond a tile (fresh noise is slow)."""
    out = blur(rng.standard_normal(np.minimum(shape, tile), np.float32), in_plane, across)
    out = np.tile(out / out.std(), np.ceil(np.divide(shape, out.shape)).astype(int))
    return out[tuple(map(slice, shape))]


def make_solid(lofts, rng, shell_mm, trabecular, cortex):
    """Fill lofts; round and roughen the surface; add a cortical shell and trabecular texture."""
    ends = [(*o.reshape(-1, 2).min(0), h[0], *o.reshape(-1, 2).max(0), h[-1]) for _, h, o in lofts]
    lo, hi = np.min(ends, 0)[:3] - MARGIN_MM, np.max(ends, 0)[3:] + MARGIN_MM
    mask = np.zeros(np.ceil((hi - lo) / LOCAL_MM).astype(int)[::-1], np.uint8)
    for z, img in zip(lo[2] + LOCAL_MM * np.arange(len(mask)), mask):
        for loft in lofts:
            draw(img, loft, z, loft.what != "0", lambda p: (p - lo[:2]) / LOCAL_MM)
    coarse = noise(rng, mask.shape, 3, 3)
    occ = blur(mask, 1.7, 1.7) + 0.06 * coarse > 0.5
    axial, sagittal = (np.stack([cv2.distanceTransform(img, cv2.DIST_L2, 3) for img in m]) for m in
                       (occ.astype(np.uint8), np.moveaxis(occ, 2, 0).astype(np.uint8)))
    depth = LOCAL_MM * np.minimum(axial, np.moveaxis(sagittal, 0, 2)) * (1 - 0.25 * coarse)
    back = np.clip(lo[1] + LOCAL_MM * np.arange(occ.shape[1]) - 7, 0, 10)[:, None]  # denser arch
    inner = (trabecular + 14 * back) * (1 + 0.2 * noise(rng, occ.shape, 1.2, 1.5) + 0.1 * coarse)
    hu = inner + np.clip(1.7 - depth / shell_mm, 0, 1) * (cortex - inner)
    return Solid(lo, occ, hu if lofts[0].what != "disc" else np.full_like(hu, HU["disc"]))


def break_bone(solid, k, rng, slice_mm):
    """Cut a fluid-filled gap through level k; sometimes displace the fragment beyond it."""
    rows = [r for r in BREAKS.split(";") if int(r.split()[0]) == min(k + 1, 3)]
    spec = np.array([v.split(",") for v in rows[rng.integers(len(rows))].split()[2:]], float)
    point, normal, lo, hi, way = spec * np.array([SIZE[k], 1, SIZE[k], SIZE[k], 1])[:, None]
    side, index = rng.choice([-1, 1]), np.ogrid[tuple(map(slice, solid.occ.shape))][::-1]
    xyz = [s * (o + LOCAL_MM * g) for s, o, g in zip((side, 1, 1), solid.origin, index)]
    normal = normal / np.linalg.norm(normal) + rng.normal(0, 0.08, 3)
    beyond = 0.6 * noise(rng, solid.occ.shape, 5, 5)
    beyond = sum((n * (g - p) for n, g, p in zip(normal, xyz, point)), beyond)
    x, y, z = ((g > a) & (g < b) for g, a, b in zip(xyz, lo, hi))
    half = rng.uniform(0.7 if slice_mm < 2 else 1.2, 2.5) / 2
    gap, fragment = x & y & z & (abs(beyond) < half), solid.occ & x & y & z & (beyond >= half)
    move = way * (side, 1, 1) * rng.uniform(0.5, 3) * (rng.random() < 0.75)
    steps = np.round(move[::-1] / LOCAL_MM).astype(int)
    moved, hu = (np.roll(v, steps, (0, 1, 2)) for v in (fragment, solid.hu))
    hu = np.where(moved, hu, np.where(gap, HU["fluid"], solid.hu))
    return Solid(solid.origin, (solid.occ & ~fragment) | moved, hu)


def rotation(*degrees):
    """Rotation matrix of a rotation vector (x: forward tilt, y: to the side, z: turn)."""
    return cv2.Rodrigues(np.radians(degrees))[0]


def make_spine(rng):
    """Poses of C1..T2 along a lordotic curve, turned as a whole; the facet room below each."""
    tilt = TILT_DEG * rng.uniform(0.5, 1.15) + rng.normal(0, 0.8, 9)
    narrow = rng.uniform(1.5, 2.8, 8) * (rng.random(8) < 0.12) * (np.arange(8) > 1)
    pitch = PITCH_MM * rng.uniform(0.97, 1.03) - narrow
    up = np.stack([rotation(t, 0, 0)[:, 2] for t in tilt])
    centres = -np.cumsum(np.vstack([np.zeros(3), pitch[:, None] * (up[1:] + up[:-1]) / 2]), 0)
    room = pitch - np.mean(FACET_Y_MM) * np.sin(np.radians(np.diff(tilt))) - FACET_GAP_MM
    flex, roll, yaw = rng.uniform((-10, -8, -15), (10, 8, 15))
    scale, phase = rng.uniform(0.85, 1.15), rng.uniform(0, 6)
    centres = (centres - centres[3]) @ rotation(flex, roll, 0).T * scale
    turns = zip(tilt + flex, np.full(9, roll), yaw * np.linspace(1, 0.3, 9))  # mostly the head
    return [Pose(c, rotation(*t), scale, phase) for c, t in zip(centres, turns)], room


def vertebra_text(k, room, wedge, rng):
    """Parts of level k: its tables, facets fitted to the room around it, variants of the body."""
    top, low = (7 if k == 1 else room[k - 1]) / 2, -room[min(k, 7)] / 2
    (front, back), rise, text = FACET_Y_MM, FACET_DROP_MM / 2, "1"
    for z, a, b in ((top + rise, front, front + 3), (top - rise, front, back),
                    (low + rise, front, back), (low - rise, back - 3, back)):
        text += f"| {z} 10,{(a + b) / 2} 11,{a} 20,{a} 22.5,{(a + b) / 2} 21,{b} 11.5,{b}"
    text += ";" + (AXIS, BODY, THORACIC)[(k > 1) + (k > 6)] + LAMINA + (LONG if k > 5 else BIFID)
    z, y, (spur, canals) = rng.choice([-6, 6]), -8.5 - rng.uniform(0, 3), rng.random(2) < 0.3
    extras = {f"0 | {6.4 - wedge} 0,-13,12,3 | 7.2 0,-7,12,14;": wedge > 0, CANALS: canals,
              f"1 | {z - 2.5} 0,-7,4,1.5 | {z} 0,{y},6.5,2.5 | {z + 2.5} 0,-7,4,1.5;": spur}
    text += "".join(part for part, used in extras.items() if used and 1 < k < 7)
    return text if k else ATLAS


def place(ct, lab, grid, solid, pose, label):
    """Blend a solid into the CT and label it, but leave labelled voxels alone."""
    across = 0.3 * grid.step[2] / LOCAL_MM / pose.scale
    alpha, value = (blur(v, 0.9, across) for v in (solid.occ, solid.occ * solid.hu))
    far = np.array(list(np.ndindex(2, 2, 2))) * alpha.shape[::-1] * LOCAL_MM + solid.origin
    far = (pose.centre + pose.scale * far @ pose.rot.T - grid.origin) / grid.step
    lo, hi = (np.clip(v, 0, ct.shape[::-1]).astype(int) for v in (far.min(0), far.max(0) + 2))
    box = tuple(slice(a, b) for a, b in zip(lo[::-1], hi[::-1]))
    x, y, z = (o + s * g for o, s, g in zip(grid.origin, grid.step, np.ogrid[box][::-1]))
    # one gentle bend for all bones of a study: no flat faces, yet the joints stay congruent
    bent = [a + 0.6 * np.sin(b / 4 + pose.phase) + 0.6 * np.sin(c / 5 + pose.phase) - o
            for a, b, c, o in zip((x, y, z), (y, z, x), (z, x, y), pose.centre)]
    local = [sum(r * a for r, a in zip(axis, bent)) / pose.scale for axis in pose.rot.T]
    index = [np.round((p - o) / LOCAL_MM).astype(int) for p, o in zip(local, solid.origin)][::-1]
    ok = (lab[box] == 0) & np.all([(i >= 0) & (i < n) for i, n in zip(index, alpha.shape)], 0)
    at = tuple(i[ok] for i in index)
    ct[box][ok] = ct[box][ok] * (1 - alpha[at]) + value[at]
    lab[box][ok] = np.where(alpha[at] > 0.5, label, 0)


def paint_scene(ct, grid, poses, rng):
    """Soft tissue, skull, jaw and cartilages, lofted slice by slice around the spine."""
    lofts = make_lofts(SCENE, rng, 0.7)
    lofts.insert(1, lofts[0]._replace(what="fat", outlines=lofts[0].outlines * 0.965))
    for k in [k for k, loft in enumerate(lofts) if loft.what == "muscle"][::-1]:
        core = lofts[k].outlines.mean(1, keepdims=True)  # a fat plane around each muscle
        lofts.insert(k, Loft("fat", lofts[k].heights, 1.12 * lofts[k].outlines - 0.12 * core))
    hu = dict(HU, artery=rng.choice([50, 280]), vein=rng.choice([45, 150]))
    centres, scale = np.stack([p.centre for p in poses])[::-1], poses[0].scale
    turns = [np.degrees(np.arctan2(p.rot[1, 0], p.rot[0, 0])) for p in poses][::-1]
    bed = max(int((84 * scale + centres[6, 1] - grid.origin[1]) / grid.step[1]), 0)
    for img, z in zip(ct, grid.origin[2] + grid.step[2] * np.arange(len(ct))):
        turn, *middle = (np.interp(z, centres[:, 2], v) for v in (turns, *centres.T[:2]))
        axes, middle = rotation(0, 0, turn)[:2, :2].T * scale, middle - grid.origin[:2]
        img[bed:bed + 6], img[bed + 1:bed + 5] = -150, -900
        for loft in lofts:
            draw(img, loft, (z - centres[-1, 2]) / scale, hu[loft.what],
                 lambda p: (p @ axes + middle) / grid.step[:2])
        deep = cv2.distanceTransform(np.uint8(img == hu["bone"]), cv2.DIST_L2, 3) * grid.step[0]
        img[deep > 2] = 420  # spongy inside
    ct += np.where((ct > 40) & (ct < 80), 12, 4) * noise(rng, ct.shape, 1.5, 1)


def add_artefacts(ct, heights, rng):
    """Blur and correlated noise; darkening and horizontal streaks at the shoulders."""
    ct = blur(ct, rng.uniform(0.5, 0.8), 0.3)
    ct += rng.uniform(10, 50) * noise(rng, ct.shape, rng.uniform(0.5, 0.9), 0.3, MATRIX)
    for img, w in zip(ct, np.clip((-92 - heights) / 35, 0, 1) * rng.uniform(0.3, 1)):
        streak = cv2.GaussianBlur(rng.standard_normal(img.shape), (0, 0), 30, sigmaY=0.7)
        img += w * (45 * streak / streak.std() - 40) * (img > -700)
    return np.clip(np.round(ct), -1024, 3071).astype(np.int16)


def make_study(rng):
    """One study: CT (z ascending, HU), labels, grid and the fractured levels."""
    poses, room = make_spine(rng)
    broken = rng.choice(7, rng.integers(1, 3), False, FRACTURE_ODDS) if rng.random() < 0.5 else []
    scale, step, c1 = poses[0].scale, rng.uniform(0.35, 0.7), poses[0].centre[2]
    slice_mm = rng.uniform(2, 2.5) if rng.random() < 1 / 6 else rng.uniform(0.6, 1.5)
    top = c1 + scale * rng.uniform(*((40, 60) if rng.random() < 0.2 else (16, 30)))
    low = poses[rng.choice([7, 8])].centre[2] - scale * rng.uniform(5, 16)
    middle = np.mean([p.centre[:2] for p in poses], 0) + (0, 6) + rng.uniform(-9, 9, 2)
    grid = Grid(np.append(middle - step * MATRIX / 2, low), np.array([step, step, slice_mm]))
    ct = np.full((int((top - low) / slice_mm) + 1, MATRIX, MATRIX), HU["air"], np.float32)
    lab, look = np.zeros(ct.shape, np.uint8), rng.uniform((0.6, 220, 1050), (1, 420, 1600))
    paint_scene(ct, grid, poses, rng)
    for k, pose in enumerate(poses):
        wedge = rng.uniform(2, 5) * (k in broken and rng.random() < 0.3)
        disc = pose._replace(centre=(pose.centre + poses[k - 1].centre) / 2)
        jobs = [(CONDYLES, pose)] * (k == 0) + [(DISC, disc)] * (k > 1) + [(RIBS, pose)] * (k > 6)
        for text, at in jobs + [(vertebra_text(k, room, wedge, rng), pose)]:
            size = 1.4 if text == DISC and k > 6 else SIZE[k]
            label = 0 if text in (CONDYLES, DISC, RIBS) else k + 1
            solid = make_solid(make_lofts(text, rng, 0.3, size, SPINOUS[k]), rng, *look)
            if label and k in broken:
                solid = break_bone(solid, k, rng, slice_mm)
            place(ct, lab, grid, solid, at, label)
    height = (low + slice_mm * np.arange(len(ct)) - c1) / scale
    return add_artefacts(ct, height, rng), lab, grid, broken


def write_dicom(folder, uid, ct, grid):
    """Write slices 1.dcm (top) .. n.dcm (bottom)."""
    folder.mkdir(parents=True, exist_ok=True)
    tags = dict(
        SOPClassUID=CTImageStorage, StudyInstanceUID=uid, SeriesInstanceUID=f"{uid}.1",
        Modality="CT", PatientID=uid, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2",
        Rows=ct.shape[1], Columns=ct.shape[2], BitsAllocated=16, BitsStored=16, HighBit=15, RescaleSlope=1,
        PixelRepresentation=0, RescaleIntercept=-1024, ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[round(grid.step[0], 6)] * 2, SliceThickness=round(grid.step[2], 6))
    for k, img in enumerate(ct[::-1], 1):
        at = grid.origin + grid.step * (0, 0, len(ct) - k)
        tags |= dict(SOPInstanceUID=f"{uid}.1.{k}", PixelData=(img + 1024).astype("<u2").tobytes(),
                     InstanceNumber=k, ImagePositionPatient=at.round(4).tolist())
        ds, ds.file_meta = Dataset(), FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        for name, value in tags.items():
            setattr(ds, name, value)
        ds.save_as(folder / f"{k}.dcm", enforce_file_format=True)


def write_nifti(path, lab, grid):
    """Write labels as uint8 NIfTI-1 in DICOM voxel order, with a RAS sform affine."""
    (x, y, z), (sx, sy, sz) = grid
    affine = -sx, 0, 0, -x, 0, -sy, 0, -y, 0, 0, -sz, z + (len(lab) - 1) * sz
    head = struct.pack("<i36x8h14x2h2x8f3f3xB128x2h24x12f16x4s4x", 348, 3, *lab.shape[::-1], 1, 1,
                       1, 1, 2, 8, 1, sx, sy, sz, 1, 1, 1, 1, 352, 1, 0, 2, 0, 1, *affine, b"n+1")
    path.write_bytes(head + lab[::-1].tobytes())


def write_tables(out, truth, train):
    """The csv files of studies {uid: fractured levels}."""
    columns = ["StudyInstanceUID", "patient_overall", *TYPES[:7]]
    rows = [(uid, int(len(broken) > 0), *(int(k in broken) for k in range(7)))
            for uid, broken in truth.items()]
    labels = pd.DataFrame(rows, columns=columns)
    asked = [(f"{uid}_{kind}", uid, kind) for uid in truth for kind in TYPES]
    test = pd.DataFrame(asked, columns=["row_id", "StudyInstanceUID", "prediction_type"])
    labels[:len(labels) * train].to_csv(out / "train.csv", index=False)
    if not train:
        labels.to_csv(out / "test_labels.csv", index=False)
        test.to_csv(out / "test.csv", index=False)


def main(make=make_study, root="1.2.3.5"):
    """Generate the studies of `make` (another hand may bring its own) and their tables."""
    doc = sys.modules[make.__module__].__doc__
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--studies", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", action="store_true", help="studies to train on")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    (args.out / "segmentations").mkdir(parents=True, exist_ok=True)
    images, truth = args.out / ("train_images" if args.train else "test_images"), {}
    for i in range(args.studies):
        uid = f"{root}.{args.seed}.{i}"
        ct, lab, grid, truth[uid] = make(np.random.default_rng([args.seed, i]))
        write_dicom(images / uid, uid, ct, grid)
        write_nifti(args.out / "segmentations" / f"{uid}.nii", lab, grid)
    write_tables(args.out, truth, args.train)


if __name__ == "__main__":
    main()
