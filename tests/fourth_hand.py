"""A fourth generator of synthetic neck CTs, drawn without sight of the others.

Each kind of vertebra is a closed quad mesh, the skin of a block model bent to millimetres and smoothed; it is
displaced by waves, posed, voxelised by signed ray crossings. Soft tissue: swept contours; other bones: tubes.
"""
from functools import lru_cache

import cv2
import numpy as np
from third_hand import Grid, main

SIDE = 256
# Lattice lines in mm (z, y, x in front, x behind); half plans from midline: a text a layer, a word a row.
ATLAS = ([-8, -4.5, 0, 4.5, 8.5], [-18.5, -13, -8, -3, 2, 7, 12, 16.5, 22], [0, 4, 9, 14, 21, 27.5, 35],
         [0, 4, 9, 14, 19.5, 27, 34], [". ..cd ..cd ..cd ..cd . . .",
          "abc ..cd ..cdef ..cd.f ..cdef ...d ..cd abc", "abc ..cd ..cdef ..cd.f ..cde ...d ..cd abc",
          ". ...d ...d ...d ...d . . ."])
AXIS = ([-2.5, 0, 5, 10, 15, 18.5, 28, 36.5], [-15, -11, -6, -0.5, 4, 8, 12, 16, 22, 30],
        [0, 5.3, 9, 13, 20, 24.5], [0, 3.2, 12, 15, 20, 24],
        [". . . . ..cde ..cde ab a ab", "ab abc abc . ..cde ..cde abc a ab",
         "ab abcde abc.e ..cde ..cde ..cde abc a ab", "ab abcd abcd ..cd ..cd ..c abc a .",
         "a abcd abcd ..cd . . . . .", ". a a . . . . . .", ". a a . . . . . ."])
LOW = ([-2.5, 0, 3.5, 8, 12, 14.3], [-16, -11, -6, -0.5, 4, 8, 12, 16, 22, 28],
       [0, 2.8, 7.5, 10.5, 17, 21.5], [0, 3, 12, 15, 20, 24.5], [". . . . ..cde ..cde ab a ab",
        "ab abc abc . ..cde ..cde abc a ab", "ab abcde abc.e ..cde ..cde ..cde abc a ab",
        "ab abc abc ..cd ..cde ..cde abc . .", ". ..c ..c ..cde ..cde . . . ."])
SEVEN = ([-2.5, 0, 4, 9, 13.5, 15.5], [-16.5, -11, -6, -0.5, 4, 8, 12, 17, 28, 40],
         [0, 2.8, 8.5, 11.5, 17, 28], [0, 5, 11.5, 14.5, 20, 27], LOW[4])
CHEST = ([-2.5, 0, 4, 10, 15, 17], SEVEN[1], [0, 3, 10, 13, 17, 26], [0, 5, 10.5, 14, 19, 36], LOW[4])
PLANS, ODDS = [ATLAS, AXIS, *[LOW] * 4, SEVEN, CHEST, CHEST], np.array([.07, .15, .05, .07, .11, .20, .28])
HEIGHT, SIZE = [0, 15.5, 12, 12, 12, 12, 13.5, 15, 15], [1, 1, .95, .97, 1, 1.05, 1.03, 1, 1]
# Breaks: point (sides mirrored at random), normal, reach in mm, weight; a reach of 0 is a crush of the body.
FRONT, BACK = (7, -14, 0, 1, .2, 0, 8, 2), (11, 15, 0, .8, -.6, 0, 9, 2)
SITES = [[FRONT, BACK, (15, -4, 0, .8, .6, .1, 12, 1), (26, -4, 0, 1, 0, .2, 9, .7)],
         [(0, -6, 20, 0, .25, 1, 11, 3), (0, -6, 14, 0, .5, 1, 15, 1), (14, 4, 10, .1, 1, .35, 11, 3),
          (0, -13, 2, 0, -.8, -.6, 12, 1), (8, 12, 6, .9, .4, 0, 10, .8), (13, -5, 14, .8, .2, .5, 12, 1)],
         [(7, 12, 1, .9, .4, 0, 10, 1), (18, 7, 4, .1, .6, .8, 11, 1), (18, 5, 11, .2, .8, .5, 8, 1),
          (0, 20, -3, 0, 1, .2, 12, 2), (14, -6, 5, 1, .3, 0, 9, 1), (11, 1, 7, .5, .9, 0, 8, .7),
          (2, -8, 6, 1, .2, .15, 14, 1), (0, -13, 2, 0, -.75, -.66, 11, 1), (0, 0, 0, 0, 0, 1, 0, 2)]]
# Swept contours: HU, x (not 0: a pair), y, radii, turn, first and last height (0 foot of C7, 1 head of C1).
SOFT = np.array("""40 0 -54 50 44 0 .5 3  58 105 15 75 40 8 -3 .1  58 8 23 9 9 25 -1 1
60 12 37 12 8 10 -1 1.05  56 24 39 15 6 -32 -1 1  54 22 49 22 3.5 -18 -1 .85  57 32 22 7 12 -25 -.3 .95
58 29 4 7 11 20 -.4 .8  58 24 -9 5 6 0 -.4 .6  57 7.5 -20 6 3.5 -12 -.4 1  60 38 -17 7 15 35 -.1 1.1
50 0 -25 7 3.6 0 -.6 .3  95 15 -36 7 11 15 -.15 .22  56 7 -52 6 2.5 10 -.1 .6  45 0 -31 17 8 0 .3 1.1
15 46 -12 12 17 20 .72 1.15  58 49 -48 8 18 -15 .75 1.3  52 0 -58 21 22 0 .55 1  38 25 -45 9 12 30 .5 .75
58 30 -38 8 12 -20 .8 1.25  -990 0 -40 8 9 0 -.9 .36  -990 0 -33 12 4.5 0 .36 1.15  18 0 6.5 11.5 6.5 0 -1 1.3
42 0 6.2 6 3.7 0 -1 1.3  1 23 -22 3.3 3.3 0 -.4 1.2  1 30 -18 5.5 4 30 -.3 1.2  1 14.5 -4 2 2 0 -.1 1
-860 40 -4 25 34 0 -3 -.15  900 50 -4 11 15 15 .9 1.6""".split(), float).reshape(-1, 8)


@lru_cache(None)


def skin(level):
    """Smoothed vertices and outward quads of a level's block model, halves joined, a block cut in eight."""
    zs, ys, front, back, plans = PLANS[level]
    half = np.array([[[m > "." for m in row.ljust(len(front) - 1)] for row in p.split()] for p in plans])
    solid = np.pad(np.kron(np.concatenate([half[:, :, ::-1], half], 2), np.ones((2, 2, 2), int)), 1)
    quads, unit, full = [], np.eye(3, dtype=int), np.array(solid.shape) + 1
    for axis in range(3):
        step, b, c = np.diff(solid, axis=axis), unit[(axis + 1) % 3], unit[(axis + 2) % 3]
        at = np.argwhere(step) + unit[axis]
        ring = np.stack([at, at + b, at + b + c, at + c], 1)
        quads.append(np.where(step[step != 0][:, None, None] < 0, ring[:, ::-1], ring))
    ids, quads = np.unique(np.ravel_multi_index(np.vstack(quads).reshape(-1, 3).T, full), return_inverse=True)
    quads, place = quads.reshape(-1, 4), (np.array(np.unravel_index(ids, full)) - 1) / 2
    z, y = (np.interp(p, range(len(lines)), lines) for p, lines in zip(place, (zs, ys)))
    ahead, behind = (np.interp(np.abs(place[2] - len(g) + 1), range(len(g)), g) for g in (front, back))
    x = (ahead + (behind - ahead) * np.clip((y + 3) / 6, 0, 1)) * np.sign(place[2] - len(front) + 1)
    verts, who, mate = bend(level, x, y, z), np.repeat(quads, 2, 1), quads[:, [1, 3, 0, 2, 1, 3, 0, 2]]
    for turn in range(26):
        mean = [np.bincount(who.ravel(), v[mate].ravel()) / np.bincount(who.ravel()) for v in verts.T]
        verts = verts + (.5, -.52)[turn % 2] * (np.stack(mean, 1) - verts)
    return verts, quads


def bend(level, x, y, z):
    """Bows the arches, slopes facets and laminae, rounds the body, narrows tip, dens and ribs' processes."""
    near = np.minimum(x * x, 289)
    if level == 0:
        return np.stack([x, y + .03 * near * (y < -12) - .028 * near * np.clip((y - 7) / 8, 0, 1), z], 1)
    z = np.where((level > 5) & (np.abs(x) > 22), 7 + (z - 7) * .55, z)
    slope = (.55 if level == 1 else .75) * (np.clip(y, 3, 12) - 5) * np.clip((y - 1) / 2, 0, 1)
    x = x * np.where(y > 18, .75, 1) * (1 - .25 * (level == 1) * np.clip((z - 30) / 5, 0, 1))
    y = y + .055 * near.clip(0, 81) * (y < -10) - .025 * near.clip(0, 169) * np.clip((y - 8) / 4, 0, 1)
    return np.stack([x, y, z - slope - .3 * np.clip(y - 12, 0, 40)], 1)


def tube(path, wide, tall):
    """Closed quad mesh swept along a path smoothed through a few points."""
    at, own = np.linspace(0, len(path) - 1, 20), range(len(path))
    path = np.stack([np.interp(at, own, p) for p in np.transpose(path)], 1)
    for _ in range(4):
        path[1:-1] = (path[:-2] + 2 * path[1:-1] + path[2:]) / 4
    run = np.gradient(path, axis=0)
    u = np.cross([0, 0, 1.] if np.ptp(path[:, 2]) < np.ptp(path[:, :2]) else [0, 1., 0], run)
    u, w = (v / np.linalg.norm(v, axis=1)[:, None] for v in (u, np.cross(run, u)))
    turn = np.arange(14)[:, None] * np.pi / 7
    rings = path[:, None] + wide * np.cos(turn) * u[:, None] + tall * np.sin(turn) * w[:, None]
    rings = np.concatenate([rings[:1] * 0 + path[0], rings, rings[:1] * 0 + path[-1]])
    i, j = np.meshgrid(np.arange(21) * 14, np.arange(14), indexing="ij")
    k = (j + 1) % 14
    return rings.reshape(-1, 3), np.stack([i + j, i + k, i + 14 + k, i + 14 + j], -1).reshape(-1, 4)


def voxelise(verts, quads, grid, shape):
    """Box (slices) and the share of each of its voxels inside the mesh: signed crossings of rays along x."""
    v = (verts - grid.origin) / grid.step
    low = np.clip(v.min(0).astype(int) - 4, 0, np.array(shape[::-1]) - 1)
    size = np.clip(v.max(0).astype(int) + 6, 1, shape[::-1]) - low
    t = ((v - low) * (1, 2, 2) + .5)[np.concatenate([quads[:, :3], quads[:, [0, 2, 3]]])]
    first = np.clip(np.ceil(t[:, :, 1:].min(1)).astype(int), 0, None)
    last = np.minimum(np.floor(t[:, :, 1:].max(1)), 2 * size[1:] - 1).astype(int)
    span = np.clip(last - first + 1, 0, None)
    who = np.repeat(np.arange(len(t)), span.prod(1))
    off = np.arange(len(who)) - (np.cumsum(span.prod(1)) - span.prod(1))[who]
    y, z = first[who, 0] + off % span[who, 0], first[who, 1] + off // span[who, 0]
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = (t[who, i].T for i in range(3))
    area = (by - ay) * (cz - az) - (bz - az) * (cy - ay) + 1e-30
    p = ((by - y) * (cz - z) - (bz - z) * (cy - y)) / area
    q = ((cy - y) * (az - z) - (cz - z) * (ay - y)) / area
    hit = (p >= 0) & (q >= 0) & (p + q <= 1)
    x = np.clip((p * ax + q * bx + (1 - p - q) * cx)[hit], 0, size[0] - 1e-6)
    sign, part, wide = -np.sign(area[hit]), x % 1, size[0] + 1
    flat, total = (z[hit] * 2 * size[1] + y[hit]) * wide + x.astype(int), 4 * size[2] * size[1] * wide
    step = np.bincount(flat, sign * (1 - part), total) + np.bincount(flat + 1, sign * part, total)
    fill = np.cumsum(step.reshape(size[2], 2, size[1], 2, wide).astype(np.float32), 4)[..., :-1].clip(0, 1)
    return tuple(map(slice, low[::-1], (low + size)[::-1])), fill.mean((1, 3))


def soften(vol, sigma, step):
    """Gaussian blur of a volume, sigma in mm."""
    high, wide = np.maximum(sigma / step[[2, 0]], .2)
    flat = cv2.GaussianBlur(vol.reshape(len(vol), -1), (1, int(3 * high) * 2 + 1), .01, sigmaY=high)
    return np.stack([cv2.GaussianBlur(s, (0, 0), wide) for s in flat.reshape(vol.shape)])


def stack(rng, scale):
    """Rotation and origin (foot of the back wall) of C1..T2, and the heights of the discs."""
    sag = np.interp(range(9), [1, 2, 6, 8], [-3, -6, 13, 24] + rng.normal(0, [6, 7, 7, 5])) / 57
    lat = rng.normal(0, .05) + rng.normal(0, .05) * np.linspace(1, -1, 9)
    turns = np.stack([sag, lat, rng.normal(0, .08) * np.linspace(1, 0, 9)], 1) + rng.normal(0, .02, (9, 3))
    rots = [cv2.Rodrigues(turn)[0] for turn in turns]
    discs = np.where(rng.random(9) < .15, rng.uniform(1.8, 3, 9), rng.uniform(3.8, 5.6, 9)) * scale
    at = [np.zeros(3)] * 9
    for i in range(8, 1, -1):
        at[i - 1] = at[i] + rots[i][:, 2] * HEIGHT[i] * scale + (rots[i] + rots[i - 1])[:, 2] * discs[i] / 2
    rots[0] = rots[1] @ cv2.Rodrigues(rng.normal(0, [.06, .03, .14]))[0]
    at[0] = at[1] + rots[1] @ [0, -6 * scale, 28 * scale] - rots[0] @ [0, -6 * scale, 0]
    return rots, at, discs


def personal(rng, verts, wear, level):
    """A patient's own shape: low-frequency waves, forked tip, lips (osteophytes) and dents at end plates."""
    for _ in range(5):
        wave = np.sin(verts @ rng.normal(0, .14, 3) + rng.uniform(0, 6.3))
        verts = verts + wave[:, None] * rng.normal(0, .4, 3)
    x, y, z = verts.T
    x = x * (1 - rng.uniform(.55 * (level > 5), .6) * np.clip((y - 21 - 10 * (level > 5)) / 3, 0, 1))
    y = y - rng.uniform(0, 5) * np.exp(-(x / 2.5) ** 2) * np.clip((y - 22) / 4, 0, 1) * (level < 6)
    if level and rng.random() < wear:
        rim = np.exp(-np.minimum(np.abs(z), np.abs(z - HEIGHT[level])) ** 2 / 5) * (y < -1) * (x * x < 196)
        lobe = np.sin(np.arctan2(x, -y - 5) * rng.uniform(.7, 2.5) + rng.uniform(0, 6.3)) + .5
        rim *= rng.uniform(.5, 4) * np.clip(lobe, 0, 1) / np.hypot(x, y + 8).clip(1)
        x, y = x + rim * x, y + rim * (y + 8)
    if level > 1 and rng.random() < wear / 2:
        z = z - rng.uniform(1.5, 4) * np.exp(-((x - rng.normal(0, 3)) ** 2 + (y + 7) ** 2) / 8) * (z > 8)
    return np.stack([x, y, z], 1)


def crush(rng, verts, level):
    """Wedge or burst: front (and back wall) of the body pressed in, with its dense band and torn front."""
    (x, y, z), high, drop, burst = verts.T, HEIGHT[level], rng.uniform(.18, .5), rng.random() < .4
    front = np.clip(6 * burst - y, 0, 14) / 14 * (y < 1) * (np.abs(x) < 13) * np.clip(z / 3, 0, 1)
    bulge, low = np.sin(np.pi * np.clip(z / high, 0, 1)) * front, high * (1 - .7 * drop) * .72
    back = rng.uniform(2, 5) * np.exp(-((z - .75 * high) / 4) ** 2 - (x / 6) ** 2) * (np.abs(y + 1) < 4)
    marks = [((0, -9, low), (0, drop * .8, 1), rng.uniform(1.5, 3), 11, "dense"),
             ((rng.normal(0, 4), -14, low), (0, .2, 1), rng.uniform(.5, 1.2), rng.uniform(6, 10), "fresh"),
             ((rng.normal(0, 2), -7, 6), (1, rng.normal(0, .3), 0), rng.uniform(.6, 1.5), 13, "fresh")]
    verts = np.stack([x * (1 + .1 * bulge), y - 1.8 * bulge + back * burst, z - drop * z * front], 1)
    return verts, marks[:2 + burst]


def fracture(rng, verts, level):
    """Breaks a vertebra: vertices with displaced fragments, and cuts (point, normal, width, reach, look)."""
    sites, cuts, side = SITES[min(level, 2)], [], rng.choice([-1, 1])
    odds, shift = np.array([s[7] for s in sites]), rng.uniform(1, 4.5) * (rng.random() < .4)
    picks = [sites[rng.choice(len(sites), p=odds / odds.sum())]]
    if picks[0] in (FRONT, BACK):
        picks = [[FRONT, BACK], [FRONT, BACK, BACK], [BACK, BACK]][rng.integers(3)]
    elif picks[0][0] > 5 and rng.random() < .4:
        picks = picks * 2
    for site in picks if picks[0][6] else ():
        point, normal = np.multiply(site[:3], (side, 1, 1)), np.multiply(site[3:6], (side, 1, 1))
        normal = normal / np.linalg.norm(normal) + rng.normal(0, .12, 3)
        near = np.linalg.norm(verts - point - rng.normal(0, 1, 3), axis=1)
        p, side = verts[near < max(5, near.min() + 2)].mean(0), -side
        reach, width, slide = site[6] * rng.uniform(.75, 1.2), rng.uniform(.6, 1.9), rng.normal(0, .5, 3)
        loose = np.clip(3 - 2 * np.linalg.norm(verts - p, axis=1) / (reach + 3), 0, 1) * shift
        loose *= np.clip((verts - p) @ normal / 1.5 + .5, 0, 1)
        verts = verts + loose[:, None] * (slide + normal * (.5 - slide @ normal))
        cuts.append((p + normal * shift * .25, normal, width + .5 * shift, reach + shift, "fresh"))
        for _ in range(rng.integers(2, 5) if rng.random() < .22 else 0):
            cuts.append((p + rng.normal(0, 2.5, 3), rng.normal(0, 1, 3), width * .8, reach * .7, "fresh"))
    return (verts, cuts) if cuts else crush(rng, verts, level)


def paint(rng, ct, lab, grid, mesh, level, look, cuts=()):
    """Puts a bone into CT and labels: shell, textured marrow, cuts; look is (shell, marrow, edge)."""
    box, fill = voxelise(*mesh, grid, ct.shape)
    fill *= (1 - 4 * soften(np.float32((lab[box] > 0) & (lab[box] != level)), .45, grid.step)).clip(0, 1)
    hard = np.clip((look[2] - soften(fill, .75, grid.step)) / .16, 0, 1)
    grain = soften(rng.standard_normal(fill.shape, dtype=np.float32), .45, grid.step)
    grain *= .3 / max(grain.std(), 1e-3)
    hu, lost = look[1] * (1 + grain) + (look[0] - look[1]) * hard * (1 + .2 * grain), np.zeros_like(fill)
    z, y, x = np.ogrid[box]
    for p, n, width, reach, kind in cuts:
        n = n / np.linalg.norm(n)
        a, b, c = (np.float32(v * grid.step[i] + grid.origin[i] - p[i]) for i, v in enumerate((x, y, z)))
        d = np.abs(a * n[0] + b * n[1] + c * n[2] + .5 * np.sin((a + b + c) / 3 + reach) * (kind == "fresh"))
        near, blur = (reach - np.sqrt(a * a + b * b + c * c)).clip(0, 1), np.abs(n * grid.step).sum()
        for width in width * 1.3 ** np.arange(5):
            gap = np.clip((width / 2 - d) / blur + .5, 0, 1) * near
            if kind != "fresh" or (gap * fill).sum() * grid.step.prod() > 14 + 20 * blur:
                break
        hu += 330 * gap * (kind == "dense")
        hu += (look[0] - hu) * np.clip(1 - (d - width / 2) / 1.3, 0, 1) * near * (kind == "old")
        lost = np.maximum(lost, gap * (kind != "dense"))
    ct[box] += fill * (hu * (1 - lost) + 50 * lost - ct[box])
    lab[box][(fill > .5) & (lost < .7)] = level


def tissue(rng, ct, grid, place, foot, head):
    """Swept contours, slice by slice: skin, fat, muscles, vessels, airway, shoulders, lungs, skull."""
    bulk, lean, blood = *rng.uniform((.85, 3), (1.15, 14)), rng.choice([45, 45, rng.uniform(200, 350)])
    rows = [[blood if r[0] == 1 else r[0] + rng.normal(0, 4), s * r[1], *r[2:5], s * r[5], *r[6:]]
            for r in SOFT for s in ((-1, 1) if r[1] else (1,))]
    rows += [[-700, s * rng.normal(50, 4.5), rng.normal(-4, 6), *rng.uniform(2, 5, 2), 0, u, u + .05]
             for s in (-1, 1) for u in rng.uniform(.92, 1.25, 70)]
    a, wobble = np.arange(40) * np.pi / 20, rng.uniform(0, 6, (len(rows), 2, 1))
    rims = 1 + .06 * np.sin(2 * a + wobble[:, 0]) + .04 * np.sin(3 * a + wobble[:, 1])
    rims = rims[..., None] * np.stack([np.cos(a), np.sin(a)], 1)
    shape = [[215, 150, 68, 60, 70, 84], [95, 80, 63, 59, 80, 98], [-10, -8, -2, -2, -14, -20]]
    for k, image in enumerate(ct):
        z = grid.origin[2] + k * grid.step[2]
        t, h = (z - foot) / (head - foot), z - head
        middle = place([[0, 0, t]])[0, :2] - grid.origin[:2]

        def fill(hu, x, y, a, b, turn=0, outline=rims[0]):
            c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
            points = (outline * (a, b) @ np.array([[c, s], [-s, c]]) + middle + (x, y)) / grid.step[:2]
            cv2.fillPoly(image, [(points * 16).astype(np.int32)], hu, shift=4)
        rx, ry, mid = (np.interp(t, [-.7, -.1, .15, .6, .9, 1.2], v) for v in shape)
        for less, hu in ((0, 25), (1.8, -100), (1.8 + lean, 30)):
            fill(hu, 0, mid, rx * bulk - less, ry * bulk - less)
        for (hu, x, y, a, b, turn, u, v), outline in zip(rows, rims):
            size = np.clip(min(t - u, v - t) / .1, 0, 1) ** .5
            for extra, value in ((.9, -70), (0, hu))[not 45 < hu < 61:] if size > .1 else ():
                fill(value, x * bulk, y, a * size * bulk + extra, b * size * bulk + extra, turn, outline)
        size = np.sqrt(np.clip(1 - ((h - 66) / 64) ** 2, 0, 1))
        if h > 4:
            for less, hu in ((0, 1000), (1.5, 550), (4, 1000), (6, 36)):
                fill(hu, 0, -14, max(72 * size - less, 1), max(86 * size - less, 1))
            fill(600, 0, -19 - h / 4, 12, 6)
            fill(25, 0, 8, 15 if h < 16 else 1, 17 if h < 16 else 1)


def others(rng, ct, grid, rots, at, place):
    """Unlabelled bone and gristle (condyles, jaw, hyoid, larynx, clavicles, ribs), teeth, metal streaks."""
    blank, look, dentist = np.zeros(ct.shape, np.uint8), (1100, 330, .75), .25 * (rng.random() < .35)
    for side in ((-1, 1, 1), (1, 1, 1)):
        rib = np.multiply([[12, 6, 8], [38, 14, 8], [60, -12, 0], [52, -48, -14], [22, -66, -26]], side)
        paths = [([[46, -22, .98], [45, -38, .75], [24, -75, .6], [0, -88, .57]], 5, 9, look),
                 ([[22, -38, .56], [16, -52, .52], [0, -58, .5]], 2.4, 3.5, look),
                 ([[17, -33, .36], [10, -50, .33], [0, -58, .3]], 1.5, 10, (300, 180, .7)),
                 ([[12, -52, -.33], [60, -42, -.2], [120, -5, -.08]], 6, 5.5, look)]
        paths = [(place(np.multiply(p, side)), *rest) for p, *rest in paths]
        paths += [(rib @ rots[i].T + at[i], 5, 3.5, look) for i in (7, 8)]
        condyle = np.multiply([[16, -4, 11], [16, -5, 17], [14, -6, 25]], side) @ rots[0].T + at[0]
        for path, wide, tall, kind in paths + [(condyle, 6, 9, look)]:
            paint(rng, ct, blank, grid, tube(path, wide, tall), 0, kind)
    for a in np.linspace(-1.25, 1.25, 14):
        gold, s, c = rng.random() < dentist, np.sin(a), np.cos(a)
        path = place([[30 * s, -50 - 38 * c, .66], [29 * s, -49 - 37 * c, .8]])
        paint(rng, ct, blank, grid, tube(path, 3.2, 3.6), 0, (3000, 3000, .7) if gold else (2100, 1300, .75))
        x, y, z = (path.mean(0) - grid.origin) / grid.step
        rays = cv2.GaussianBlur(rng.normal(0, 140, (361, 1)), (1, 5), 1.2) / (.25 + np.arange(300) / 120)
        rays = cv2.warpPolar(rays, (SIDE, SIDE), (x, y), 300, cv2.WARP_INVERSE_MAP)
        part = ct[max(0, int(z - gold * 4 / grid.step[2])):max(0, int(z + gold * 4 / grid.step[2]))]
        part += np.float32(rays * rng.uniform(.1, 1.2, (len(part), 1, 1)))


def scanned(rng, ct, grid, foot):
    """Blur, kernel, noise (stronger and streaky at the shoulders), field of view."""
    soft, sharp, level = rng.uniform(.5, .85), rng.uniform(0, 1.3) * (rng.random() < .7), rng.uniform(22, 70)
    starved, view = rng.uniform(0, 350), np.hypot(*(np.mgrid[:SIDE, :SIDE] - SIDE / 2)) * rng.uniform(.5, 2)
    for k, image in enumerate(ct):
        dark = 1 / (1 + np.exp((grid.origin[2] + k * grid.step[2] - foot - 5) / 9))
        grit, long = rng.standard_normal((2, SIDE, SIDE), dtype=np.float32)
        image = cv2.GaussianBlur(image, (0, 0), soft) + cv2.blur(long, (61, 1)) * starved * dark
        image += cv2.GaussianBlur(grit, (0, 0), .8) * level * (1 + 2 * dark)
        ct[k] = np.where(view > SIDE, -1024, image + sharp * (image - cv2.GaussianBlur(image, (0, 0), 1.3)))


def make_study(rng):
    """One study: CT (z ascending = foot to head, HU, float32), labels uint8, Grid, fractured levels."""
    scale, old, wear = rng.normal(1, .06), rng.random() < .2, rng.choice([.05, .3, .8])
    rots, at, discs = stack(rng, scale)
    head, foot, margin = at[0][2] + 9 * scale, at[6][2] - 10, rng.uniform([20, 8], [46, 30])
    margin[rng.integers(2)] -= 50 * (rng.random() < .05)
    many, low, high = rng.choice([1, 2, 3], p=[.85, .08, .07]), foot - margin[0], head + margin[1]
    dz = rng.uniform(2, 3) / many if many > 1 else rng.choice([.6, .625, .75, .8, 1, 1.25, 1.5])
    dz = max(dz, (high - low) / 300)
    step = np.array([1, 1, 0]) * rng.choice([.36, .4, .43, .49, .55, .62, .72]) + [0, 0, dz]
    centre = np.mean(at[:7], 0) + [rng.normal(0, 4), rng.uniform(-14, 2) - 12 * (step[0] > .5), 0]
    grid = Grid(np.array([*(centre - step * (SIDE - 1) / 2)[:2], low]), step)
    shape, knots = (int((high - low) / dz) // many * many, SIDE, SIDE), np.array(at[::-1])
    ct, lab = np.full(shape, -1000, np.float32), np.zeros(shape, np.uint8)

    def place(points):
        x, y, t = np.transpose(points)
        z = foot + t * (head - foot)
        return np.stack([np.interp(z, knots[:, 2], knots[:, i]) + v for i, v in enumerate((x, y))] + [z], 1)
    tissue(rng, ct, grid, place, foot, head)
    others(rng, ct, grid, rots, at, place)
    look = rng.uniform(*(((650, 110, .66), (900, 160, .7)) if old else ((900, 200, .7), (1400, 360, .78))))
    inside = [i for i in range(7) if low + 14 + 3 * i < at[i][2] < high - (14, 41, 20)[min(i, 2)]]
    number, odds = rng.choice(4, p=[.5, .35, .1, .05]), ODDS[inside] / ODDS[inside].sum()
    broken = sorted(int(i) for i in rng.choice(inside, number, replace=False, p=odds))
    for i in range(8, -1, -1):
        (verts, quads), size = skin(i), scale * SIZE[i]
        verts = personal(rng, verts, wear, i)
        verts, cuts = fracture(rng, verts, i) if i in broken else (verts, [])
        if i and rng.random() < .5:
            cuts.append(((rng.normal(0, .7), -3, 6), (0, 0, 1), *rng.uniform((.8, 2.5), (1.8, 4.5)), "old"))
        cuts += [((0, 24 - 5 * (not i), -6 * (i > 0)), (not i, i > 0, .1), 1, 9, "old")] * (rng.random() < .1)
        if i > 1:
            disc = [[0, -8 * scale, HEIGHT[i] * scale + h] for h in (-2, discs[i] + 2)] @ rots[i].T + at[i]
            paint(rng, ct, lab * 0, grid, tube(disc, 8.5 * size, 7.5 * size), 0, (80, 95, .6))
        cuts = [(rots[i] @ p * size + at[i], rots[i] @ n, w, r * size, m) for p, n, w, r, m in cuts]
        paint(rng, ct, lab, grid, (verts * size @ rots[i].T + at[i], quads), i + 1, look, cuts)
    if many > 1:
        ct, lab = ct.reshape(-1, many, SIDE, SIDE).mean(1), np.ascontiguousarray(lab[many // 2::many])
        grid = Grid(grid.origin + [0, 0, dz * (many - 1) / 2], step * [1, 1, many])
    scanned(rng, ct, grid, foot)
    return np.clip(np.round(ct), -1024, 3071).astype(np.float32), lab, grid, broken


if __name__ == "__main__":
    main(make_study, "1.2.3.6")
