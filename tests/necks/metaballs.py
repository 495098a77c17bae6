"""A fifth generator of synthetic neck CTs, drawn without sight of the others.

Each vertebra is a sum of anisotropic Gaussian blobs (metaballs), positive and negative, thresholded in
coordinates that a smooth displacement bends; soft tissue is noise-warped columns, fractures noisy sheets.
"""
import cv2
import numpy as np
from lofts import Grid, main

SIDE, FAR, KNOTS = 256, -9., (-2, 0, 1.5, 3, 4.5, 6, 7.5, 9.5)
FREQUENCY = np.array([.0723, .1412, .0362, .0535, .0802, .1372, .1947])
# Blobs (mm): shape (round, box, drum; small letter: both sides), centre, half axes, tilt, yaw, weight. BONES:
# level, half axes, count, density, points. MUSCLES: x, y, radii at C1, T1. COLUMNS: HU, contrast, x, y,
# radii, levels. PROFILE at KNOTS: skin's half width, front, back, airway's y, radii. CUTS: point, normal,
# ball's centre and radius, displacement. PATTERNS: chances and sheets of fractures.
PROFILE = """72 74 72 62 60 60 85 155, -106 -106 -105 -90 -56 -53 -60 -78,
 82 74 68 64 63 66 73 84, -28 -28 -25 -24 -27 -33 -36 -39, 12 12 13 14 8 8.5 9 9, 7 7 7 7 9 9 8 8"""
SPINE = """b 17 1 0 7 9 8.5 0 -18, r 9 -8.3 0 5.5 3 5 0 -24, r 29 -1.5 0 8.5 2.6 3.4 0 12,
 r 36 3 -.5 3.8 5.5 4.5, r 29 6.5 0 8.5 2.6 3.6 0 -18, R 0 -10 0 6 3.2 5.5, R 0 -12.5 -1 3 2.2 3.5,
 R 0 31 0 4 3 4.5, r 20.5 12 1 3 5 3.6, r 19.5 17 1 2.9 4 3.6 0 10, r 17 21.5 0 2.8 4 3.6 0 35,
 r 13 25.5 0 2.8 4 3.6 0 50, r 8.5 28.3 0 4 2.8 3.7 0 -30, r 3.5 30 0 4 2.8 3.7 0 -12,
 r 27 2.5 0 2.8 3 30 0 0 -1.6, r 17 1 10.5 5 9 4 0 -18 -.7, D 0 2 0 9 9.5 40 0 0 -1.5; D 0 0 -2 9 7.5 8.5,
 R 0 -1 8 6 6 6, R 0 -4 -8 7 4.5 3.5, D 0 -1.2 17 4.9 5.2 11 -3, R 0 -1 11 5.1 5.2 6, R 0 30 -5 3.8 8 6,
 R 0 26 -3 5 4 6, b 13.5 0 5.5 8 8.5 5 0 -12, r 13 7 1 5.5 6 5, b 18 13 -6 6 7 6.2 -45, r 15.5 10 -2 5 5 5.5,
 r 21 5 -2 6 3 3.5 0 -10, r 14 -1 -3 6 2.3 3 0 10, b 10.5 21.5 -4 9.5 2.8 6.5 -12 -38,
 r 4.2 36.5 -9 3 5 3.6 0 -25, r 16.5 3.2 -3 2.7 2.8 12 0 0 -1.5, D 0 15.5 0 10.5 7 40 0 0 -1.5;
 D 0 0 0 8.2 7.6 6.8, B 0 4 0 8.2 3.6 6.2, r 8 1.8 7.1 2 5 3 0 6, r 11.5 8 1.5 5.2 2.9 3.5 0 38,
 b 19.5 12 .3 6 7 6.9 -48, b 11 20.2 -2 9.4 2.1 5.8 -14 -36, r 14 -3.5 -1.5 6.5 2 2.4 0 4,
 r 21 -.5 -1.5 2.6 4.6 2.8, r 23.5 5 -1 5 3 2.8 0 -14, r 14.8 1.7 0 2.7 2.7 15 0 0 -1.6, R 0 25 -2 5 3 5,
 R 0 28 -3.5 2.6 6 4.6, r 2.5 33 -5.5 2.3 4.5 3 0 -28, R 0 -1 7.4 5.3 4.6 1.3 0 0 -.45,
 R 0 -1 -7.4 5.3 4.6 1.3 0 0 -.45, D 0 15.4 0 10.8 6.8 40 0 0 -1.5; D 0 0 0 12.3 8.6 8.2,
 r 11 9 3 5 4.5 4 0 50, b 16 15 0 5.5 5 9.5 -15, b 9.5 21.5 -3 9.5 2.5 7 0 -34, r 26 15 2 10 3.8 4.2 0 8,
 r 33 16 2 4 4 5, R 0 27 -5 4 5 6, R 0 35 -11 2.8 9 5 -30, R 0 44 -16 3.4 6 5 -25,
 D 0 15.6 0 9 7 40 0 0 -1.5"""
BONES = """1 6 11 7.5 2 1 19 1 14.5 19 -1 15.5, 2 3.4 3.6 8 6 1.9 29 -58 -8 21 -78 -9 0 -88 -9,
 2 4 4 8 6 1.6 29 -58 5 21 -78 4 0 -88 4, 2 4.5 5 9 17 1.2 48 -22 24 47 -25 0 43 -36 -14 32 -65 -21 9 -90 -24,
 4 2.3 2.3 3 9 .7 19 -26 2 15 -40 0 0 -48 -1, 8 6 5 5 12 1 20 -52 -12 45 -58 -10 75 -35 -2 105 -15 2,
 8 3.6 3.6 3.2 20 1 15 5 4 35 9 1 46 -5 -6 50 -25 -15 42 -45 -24,
 9 3.6 3.6 3.2 20 1 15 5 4 35 9 1 46 -5 -6 50 -25 -15 42 -45 -24"""
MUSCLES = """9 -12 7 4 8 -12 7 4, 28 -3 9 9 32 -2 11 11, 42 14 8 10 44 18 9 11, 52 2 8 11 20 -50 13 5,
 9 32 8 9 11 33 9 9, 15 44 13 8 17 46 12 7, 30 38 11 8 30 42 13 7, 22 55 20 5 38 57 34 7,
 16 -48 12 8 9 -47 9 4, 42 -34 9 14 44 -30 14 3, 60 -30 9 14 70 10 20 16"""
COLUMNS = """55 0 0 -62 34 32 -9 3.4, 110 .3 17 -31 8 12 6.1 7.9, 50 .6 31 -14 6.5 4.5 -9 11,
 45 1 24 -16 3.3 3.3 -9 11, 45 1 17 2 2 2 1 6.3, 40 0 3 -19 9 4 6 11, -830 0 40 2 28 34 10.2 99,
 12 0 0 15.4 11.5 7.5 -.6 99, 42 0 0 15 6.6 4.2 -.6 99"""
CUTS = """jefferson 5 -9 0 1 -.15 0 0 0 0 99 1 0 0, tip 31 3 0 1 .2 0 36 3 0 14 1 0 0,
 dens 0 -1 10 0 0 1 0 -1 17 13 0 1 0, third 0 0 2 0 0 1 0 0 4 16 0 -1 0, hangman 0 9 0 0 1 0 0 14 0 32 0 1 0,
 spinous 0 29 -4 0 1 -.2 0 37 -8 17 0 .4 -1, lamina 9 21 -2 -.8 .6 0 9 21 -2 10 0 0 0,
 pedicle 11.5 8 1 .8 .5 0 11.5 8 1 8 0 0 0, pillar 20 12 0 .5 .6 .5 20 12 0 12 .6 .6 .4,
 split 0 0 0 1 0 0 0 -1 0 12 0 0 0, transverse 22 2 -1 1 0 0 25 2 -1 10 1 0 -.3,
 back 0 3 1 0 1 .2 0 6 2 8 0 1 0, teardrop 0 -5.5 -4.5 0 -.75 -.66 0 -9 -8 11 0 -1 -.4,
 wedge 0 -4 2 0 -.5 1 0 -7 4 7 0 0 0, burst 0 0 0 .5 .5 .5 0 -1 0 12 .3 0 0"""
PATTERNS = """4 jefferson, 4 jefferson jefferson, 2 tip; 42 dens, 16 third, 24 hangman, 9 lamina, 9 pillar;
 10 spinous, 9 lamina, 5 lamina lamina, 12 pillar, 8 pillar transverse, 8 pedicle lamina, 9 transverse,
 7 teardrop, 4 teardrop split, 15 wedge, 7 burst back split, 5 burst back"""


def blob(centre, half, shape="r", tilt=0., yaw=0., weight=1.):
    """A metaball: at weight 1 an ellipsoid, box or drum; tilt about x, then yaw about z (degrees)."""
    turn = cv2.Rodrigues(np.radians([0., 0, yaw]))[0] @ cv2.Rodrigues(np.radians([tilt, 0., 0]))[0]
    return np.asarray(centre, float), turn.T / np.asarray(half, float)[:, None], shape, weight


def rows(text, skip=0):
    """The numbers of a table's rows, after `skip` words."""
    return [np.array(row.split()[skip:], float) for row in text.split(",")]


def build(rng, level, worn):
    """The blobs of one level, each side its own; osteophytes, nodes, ossicles, veins, loose apophyses."""
    text, parts = SPINE.split(";")[min(level, 3) - 1 + (level > 7)], []
    low = (max(level - 3, 0) / 4) ** 1.3 * (level < 8)
    for row, name in zip(rows(text, 1), text.split(",")):
        shape, twin, reach = name.split()[0].lower(), name.split()[0].islower(), low * max(row[1] - 25, 0) / 8
        row[:6] *= 1 + low * np.array([.15, 0, 0, .15, .08, .12])
        row[:6] += reach * np.array([-1.7 * twin, 12, -5, 0, 4, 1])
        tilt, yaw, weight = np.concatenate([row[6:], [0, 0, 1][len(row) - 6:]])
        for side in (1, -1)[:1 + twin]:
            a, b, half = *rng.normal(0, 2.5, 2), row[3:6] * rng.normal(1, .04, 3)
            at = row[:3] * (side, 1, 1) + rng.normal(0, .35, 3)
            parts.append(blob(at, half, shape, tilt + a, side * yaw * (1 - reach) + b * twin, weight))
    for z in (6, -6) if level > 2 else ():
        extras = [(worn, blob((rng.normal(0, 4), -rng.uniform(8, 12), z * 1.1), rng.uniform(1.5, 3.5, 3))),
                  (.12, blob((*rng.normal(0, 3, 2), z * 1.1), (2.5, 2.5, 3), weight=-.9)),
                  (.3, blob((0, 6, 0), (1.1, 4.5, 1.2), weight=-rng.uniform(.4, 1))),
                  (.03, blob((0, 31 + 8 * (level > 6), -9), (6, 1, 6), "b", weight=-1.3))]
        parts += [part for chance, part in extras if rng.random() < chance]
    return parts


def fracture(rng, level):
    """Sheets (point, normal, gap, ball, radius, shift) and compression (share, whether even) of one level."""
    table = dict(zip([row.split()[0] for row in CUTS.split(",")], rows(CUTS, 1)))
    choices = [row.split() for row in PATTERNS.split(";")[min(level, 3) - 1].split(",")]
    chance = np.array([float(c[0]) * (1 + 2 * (level == 7 and c[1] == "spinous")) for c in choices])
    names = choices[rng.choice(len(chance), p=chance / chance.sum())][1:]
    side, sheets = rng.choice([-1, 1]), []
    for name in names:
        side, row, long = -side, table[name], level == 7 and name == "spinous"
        point, normal, ball, shift = row[[[0, 1, 2], [3, 4, 5], [6, 7, 8], [10, 11, 12]]] * (side, 1, 1)
        normal += rng.normal(0, .2 if name != "burst" else .8, 3)
        shift *= rng.uniform(.8, 4) * (rng.random() < .55) * (side if name == "dens" else 1)
        sheets.append((point + rng.normal(0, .8, 3) + (0, 7 * long, 0), normal / np.linalg.norm(normal),
                       rng.uniform(.8, 2.4), ball, row[9], shift))
    return sheets, (rng.uniform(.15, .42), names[0] == "burst") if names[0] in ("wedge", "burst") else None


def enlarge(coarse, shape, every):
    """Trilinear interpolation of nodes that lie `every` (z, in-plane) voxels apart."""
    at = [np.minimum(np.arange(n) / e, m - 1)[:, None] - np.arange(m)
          for n, e, m in zip(shape, (*every, every[1]), coarse.shape)]
    along, down, right = [np.float32(np.maximum(0, 1 - np.abs(a))) for a in at]
    return np.tensordot(along, down @ np.float32(coarse) @ right.T, 1)


def noise(rng, shape, every):
    """Smooth noise of about unit deviation, its grain `every` (z, in-plane) voxels."""
    nodes = [n // e + 2 for n, e in zip(shape, (*every, every[1]))]
    return enlarge(rng.standard_normal(nodes, np.float32) * 1.4, shape, every)


def bend(rng, grid, shape, size):
    """Anatomical coordinates (x, y, along the spine) of every voxel: the volume's smooth displacement."""
    s, knots = np.arange(-140, 300.), np.array([-60, 0, 60, 115]) * size
    lean = np.interp(s, knots, np.radians(rng.normal([22, 16, 4, -6], [5, 7, 5, 6]) + rng.normal(0, 4)))
    y0, z0 = [np.cumsum(f) - np.cumsum(f)[140] for f in (-np.sin(lean), np.cos(lean))]
    x0, roll = np.interp(s, knots, rng.normal(0, 2.5, 4)), np.interp(s, [-20, 115], rng.normal(0, .05, 2))
    turn = np.interp(s, [-20, 30, 115], np.array([0, .05, .15]) * rng.normal() + rng.normal(0, .04))
    z, y, x = np.meshgrid(*[grid.origin[a] + np.arange(n // e + 2) * e * grid.step[a]
                            for a, n, e in zip((2, 1, 0), shape, (4, 8, 8))], indexing="ij")
    along = z
    for _ in range(4):
        a, dy, dz = np.interp(along, s, lean), y - np.interp(along, s, y0), z - np.interp(along, s, z0)
        along = along - np.sin(a) * dy + np.cos(a) * dz
    t, off, deep = np.interp(along, s, turn), x - np.interp(along, s, x0), np.cos(a) * dy + np.sin(a) * dz - 5
    return [enlarge(f + .5 * noise(rng, f.shape, (5, 5)), shape, (4, 8)) for f in (
        np.cos(t) * off - np.sin(t) * deep, np.sin(t) * off + np.cos(t) * deep + 5,
        along + off * np.interp(along, s, roll))]


def box_of(coords, low, high):
    """Index slices of the voxels whose coordinates lie between low and high; None where there are none."""
    few = [c[::3, ::5, ::5] for c in coords]
    hit = np.argwhere(np.all([(c > a) & (c < b) for c, a, b in zip(few, low, high)], axis=0))
    return len(hit) and tuple(slice(max(0, (a - 1) * e), (b + 1) * e + 1)
                              for a, b, e in zip(hit.min(0), hit.max(0), (3, 5, 5)))


def depth_of(coords, parts, step):
    """Depth (mm, to first order) under the level set at one half of the blobs' sum."""
    total = np.zeros(coords[0].shape, np.float32)
    for centre, axes, shape, weight in parts:
        reach = 1.45 * np.abs(np.linalg.inv(axes)).sum(1)
        at = box_of(coords, centre - reach, centre + reach)
        if at:
            here = [c[at] - np.float32(m) for c, m in zip(coords, centre)]
            u, v, w = [sum(np.float32(f) * c for f, c in zip(a, here)) ** 2 for a in axes]
            q = dict(r=(u + v + w) ** 2, b=u * u + v * v + w * w, d=(u + v) ** 2 + w * w)[shape]
            total[at] += np.float32(weight) * np.exp(np.float32(-.693) * q)
    slope = sum(g * g for g in np.gradient(total, *map(np.float32, step[::-1]))) ** .5
    return np.where(total > .02, (total - .5) / np.maximum(slope, .02), FAR).astype(np.float32)


def broken_up(local, breaks, wave, step, opening):
    """Coordinates after compression and displacement, depth inside the cracks (mm), density of impaction."""
    (x, y, z), crack, band = local, np.full(wave.shape, FAR, np.float32), 0
    if breaks[1]:
        share, even = breaks[1]
        ramp = np.clip((6 - y) / (4 if even else 12), 0, 1) * np.clip((13 - np.abs(x)) / 3, 0, 1)
        z = np.where(z > -7, (z + 7) / (1 - share * ramp) - 7, z)
        band = 500 * share * ramp * np.exp(-((z - 4) / 2.5) ** 2)
    for at, normal, gap, ball, radius, shift in breaks[0]:
        wide, pull = max(gap * opening, 1.15 * float(np.abs(normal) @ step)), float(normal @ shift)
        side = wave / 2 + sum(np.float32(n) * (c - np.float32(p)) for n, c, p in zip(normal, [x, y, z], at))
        inside = radius - np.sqrt(sum((c - np.float32(b)) ** 2 for c, b in zip([x, y, z], ball)))
        gone = (side > 0) & (inside > 0)
        crack = np.maximum(crack, np.minimum(np.where(gone, wide / 2 + pull - side, wide / 2 + side), inside))
        x, y, z = [c - gone * np.float32(d) for c, d in zip((x, y, z), shift)]
    return [x, y, z], crack, band


def mix(image, hu, depth, width=1.):
    """Fill `image` with `hu` where depth > 0, the edge as wide as width."""
    image += (hu - image) * np.clip(depth / width + .5, 0, 1)


def oval(x, y, cx, cy, rx, ry):
    """Depth (mm, about) inside an elliptic column."""
    return (1 - np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)) * np.minimum(rx, ry)


class Study:
    """The volume being painted: CT, labels, depth in bone, coordinates, heights of levels, bone's look."""

    def __init__(self, rng):
        self.size, self.age, merge, cut, thin = rng.uniform(.87, 1.1), *rng.random(4)
        narrow = np.where(rng.random(8) < self.age * .6, rng.uniform(.5, 2.5, 8), 0) * (np.arange(8) > 1)
        tops = np.cumsum([0, *narrow - self.size * np.array([20.5, 22, 18.6, 18.6, 18.8, 19.4, 21.5, 23])])
        self.heights, self.merge = dict(zip(range(1, 10), tops - tops[6])), 1 + (merge < .12)
        low = rng.uniform(-8, 8) if cut < .025 else -rng.uniform(30, 55)
        high = (rng.uniform(16, 45) if cut < .975 else -8) - tops[6]
        step = np.array([1, 1, 0]) * rng.uniform(*((.35, .75) if rng.random() < .4 else (.5, .65)))
        step[2] = rng.uniform(1, 1.5) if merge < .12 or rng.random() < .35 else rng.uniform(.6, 1)
        corner = (0, 30 - step[0] * 40, low) + rng.normal(0, (4, 4, 0)) - step * (SIDE / 2, SIDE / 2, 0)
        shape = int((high - low) / step[2]) // 2 * 2, SIDE, SIDE
        self.grid, self.step, shares = Grid(corner, step), step, rng.random(6)
        self.coords = bend(rng, self.grid, shape, self.size)
        for c in self.coords[:2] if rng.random() < .15 else ():
            c[int(shape[0] * (.2 + .7 * shares[0])):] += rng.normal(0, 1)
        self.lab, self.depth = np.zeros(shape, np.uint8), np.full(shape, FAR, np.float32)
        self.wave = noise(rng, shape, [max(1, round(4 / s)) for s in self.step[[2, 0]]])
        self.marrow, self.compact = np.add((180, 650), shares[:2] * (220, 500)) * (1 - .45 * (thin < .15))
        self.shell, self.rough, self.joint, self.texture = (.6, .1, .6, 40) + shares[2:] * (.6, .3, .7, 70)

    def place(self, parts, level):
        """Index slices of the part of the volume that the blobs lie in."""
        solid = [(p[0], (np.linalg.inv(p[1]) ** 2).sum(1) ** .5 + 1) for p in parts if p[3] > 0]
        span = np.min([c - r for c, r in solid], 0), np.max([c + r for c, r in solid], 0)
        return box_of(self.coords, *[b * self.size + (0, 0, self.heights[level]) for b in span])

    def paint(self, rng, parts, level, label=0, breaks=None, density=1):
        """Paint one bone: pose, fracture, blobs, joint gap to its neighbours, shell, marrow, label."""
        at = self.place(parts, level) or (slice(0, 2),) * 3
        x, y, z = [c[at] / np.float32(self.size) for c in self.coords]
        z -= np.float32(self.heights[level] / self.size)
        a, b, c = np.float32(rng.normal(0, .03, 3) * (label > 0))
        local = pieces = [x + c * y - b * z, y - c * x + a * z, z + b * x - a * y]
        wave, crack, band = self.wave[at], np.float32(FAR), 0
        for opening in (1, 1.7, 3) if breaks else (1,):
            if breaks:
                pieces, crack, band = broken_up(local, breaks, wave, self.step / self.size, opening)
            depth = depth_of(pieces, parts, self.step) + self.rough * wave
            if ((crack > 0) & (depth > .4)).sum() > 60:
                break
        depth = np.minimum(depth, -self.depth[at] - self.joint)
        bone = self.marrow + self.texture * rng.standard_normal(depth.shape, np.float32) + band
        mix(bone, self.compact * density, np.exp(-(depth.clip(0) / self.shell * (1 + .3 * wave)) ** 2) - .5)
        mix(bone, 65, crack, self.step[0] + .15)
        mix(self.ct[at], bone, depth, self.step[0] + .15)
        self.lab[at][depth > 0] = label
        self.depth[at] = np.maximum(self.depth[at], depth)

    def other_bones(self, rng):
        """Condyles, jaw, teeth, clavicles, hyoid and ribs: blobs strung along curves."""
        for row in rows(BONES):
            points, t = row[6:].reshape(-1, 3), np.linspace(0, len(row) / 3 - 3, int(row[4]))
            line = np.stack([np.interp(t, np.arange(len(points)), p) for p in points.T], 1)
            for side in (1, -1):
                self.paint(rng, [blob(p * (side, 1, 1), row[1:4]) for p in line], int(row[0]), density=row[5])

    def soft_tissue(self, rng):
        """Skin, fat, muscles with fat planes, discs, viscera, skull on a coarse grid; skin depth; level."""
        x, y, s = [np.ascontiguousarray(c[::3, ::2, ::2]) / np.float32(self.size) for c in self.coords]
        level, out, stout = 7 - s / 19, np.full(x.shape, -1000, np.float32), rng.uniform(.9, 1.2)
        warp, fine = [noise(rng, x.shape, (4, 7)) for _ in range(3)], noise(rng, x.shape, (1, 2))
        wide, front, back, *pipe = [np.float32(np.interp(level, KNOTS, row)) for row in rows(PROFILE)]
        skin = oval(x / stout, 2 * y / stout, 0, front + back, wide, back - front) + warp[2]
        collar = np.minimum(1.5 - np.abs(skin + 13), 3 - np.abs(level - 5))
        mix(out, rng.uniform(-200, 100) if rng.random() < .25 else -1000, collar)
        mix(out, 30, skin, 1.5)
        mix(out, rng.uniform(-115, -85) + 12 * fine, skin - 2, 1.5)
        best, second, down, u, v = 0, 0, ((level - 1) / 7).clip(0, 1), x + 2 * warp[0], y + 2 * warp[1]
        for row in rows(MUSCLES):
            cx, cy, rx, ry = [a + (b - a) * down for a, b in np.float32(row).reshape(2, 4).T]
            for side in (1, -1):
                f = np.exp(-.7 * (((u - side * cx) / rx) ** 2 + ((v - cy) / ry) ** 2))
                best, second = np.maximum(best, f), np.maximum(second, np.minimum(best, f))
        inner = np.minimum(best - second - rng.uniform(.02, .08), (best - rng.uniform(.2, .4)) * .6) * 12
        mix(out, rng.uniform(45, 70) + 8 * fine, np.minimum(inner, skin - rng.uniform(3, 12)), 1.5)
        viscera(rng, out, x + warp[0], y + warp[1], level, pipe, fine, self.age)
        for n in range(2, 9):
            off = np.abs(s - (self.heights[n] + self.heights[n + 1]) / 2 / self.size + 2.2 * (n == 2))
            inside = np.minimum(oval(x, y, 0, 0, 9 + .3 * n, 8.2), 5.5 - off)
            mix(out, rng.uniform(75, 110), inside)
            mix(out, -300, np.minimum(inside - 2, 1 - off + fine) - 99 * (rng.random() > .12 * self.age))
        skull(out, x, y, s - self.heights[1] / self.size, fine, warp[2])
        return out, skin, level


def viscera(rng, out, x, y, level, profile, fine, age):
    """Columns of the table, airway, larynx cartilages."""
    contrast, (ay, rx, ry) = rng.uniform(180, 350) * (rng.random() < .25), profile
    pipe = oval(x, y, 0, ay, rx * rng.uniform(.8, 1.15), ry * rng.uniform(.7, 1.2))
    mix(out, 50 + 8 * fine, pipe + 4, 2)
    for hu, share, cx, cy, a, b, first, last in rows(COLUMNS):
        for side in (1, -1)[:1 + (cx > 9)]:
            ends = 20 * np.minimum(0, np.minimum(level - first, last - level))
            mix(out, hu + share * contrast, oval(x, y, side * cx, cy, a * rng.uniform(.85, 1.15), b) + ends)
    mix(out, -1000, pipe, 1.2)
    wall = np.minimum(1.6 - abs(pipe + 3), (.8 - abs(level - 5.3)) * 19 - 30 * (y > ay + 4) * (level < 5.8))
    mix(out, 110 + 280 * age * (fine > .2), wall)


def skull(out, x, y, up, fine, warp):
    """Skull base with the foramen magnum, brain, mastoid cells."""
    depth = (1 - np.sqrt((x / 72) ** 2 + ((y + 15) / 91) ** 2 + ((up - 74) / 60) ** 2)) * 60 + .7 * warp
    hole = np.minimum(oval(x, y, 0, 13, 15, 17), 40 - up)
    mix(out, 35, np.maximum(depth, np.minimum(hole, up - 9)))
    mix(out, 950 - 350 * np.exp(-((depth - 3) / 1.2) ** 2), np.minimum(3.2 - np.abs(depth - 3 + warp), -hole))
    mastoid = 13 - np.sqrt((np.abs(x) - 54) ** 2 + (y * .8 - 6) ** 2 + ((up - 13) / 1.6) ** 2) + 2 * warp
    mix(out, 600, mastoid)
    mix(out, -750, np.minimum(mastoid - 2, 1.5 * fine - .2))


def scan(rng, ct, level, skin, step):
    """Image formation: metal, couch, blur, edge overshoot, shoulder noise and streaks, field of view."""
    away = 1j * (np.arange(SIDE)[:, None] - 127.5) + np.arange(SIDE) - 127.5
    spots = np.argwhere(((ct[::3, ::2, ::2] > 1100), np.abs(skin + 3) < 2)[rng.integers(2)]) * (3, 2, 2)
    for k, j, i in rng.choice(spots, rng.integers(1, 5) * (rng.random() < .4 and len(spots) > 0)):
        here = away - (i + 1j * j - 127.5 - 127.5j)
        waves = zip(rng.integers(2, 24, 6), *rng.uniform(0, 6, (2, 6)))
        star = sum(25 * a * np.cos(n * np.angle(here) + b) for n, a, b in waves) * np.exp(-np.abs(here) / 45)
        for plane in ct[max(0, k - 2):k + 2]:
            plane += star * (plane > -900)
            plane[np.abs(here) < 2.5] = 3000
    bed = (away.imag - rng.uniform(.3, .6) * SIDE) * step[0] + (away.real * step[0]) ** 2 / 1500
    air = cv2.resize(np.float32((skin < -3).mean(0)), (SIDE, SIDE)) > .9
    ct[:, air & (np.abs(bed) < 1.5)] = rng.uniform(-400, 0)
    load = np.clip(level[:, 64, 64] - 6.2, 0, 2.2) * rng.uniform(.3, 1.6)
    sharp, sigma, grit = rng.uniform(0, 1.1), rng.uniform(.45, .9), rng.uniform(13, 60)
    for k, plane in enumerate(ct):
        speck = cv2.GaussianBlur(rng.standard_normal(plane.shape, np.float32), (0, 0), .5 + .5 * sigma)
        plane = cv2.GaussianBlur(plane, (0, 0), sigma) + grit * (1 + load[k // 3]) * speck
        plane += sharp * (plane - cv2.GaussianBlur(plane, (0, 0), 1.2))
        streak = cv2.resize(rng.standard_normal((SIDE, 6), np.float32), (SIDE, SIDE))
        ct[k] = plane + load[k // 3] * (16 * streak - 22 * (plane > -300))
    ct[:, np.abs(away) > SIDE * rng.choice([.5, 1], p=[.4, .6])] = -1024


def make_study(rng):
    """One study: CT (z ascending = foot to head, HU, float32), labels uint8, Grid, fractured levels."""
    study = Study(rng)
    soft, skin, level = study.soft_tissue(rng)
    ct = study.ct = enlarge(soft, study.lab.shape, (3, 2))
    drawn = {n: build(rng, n, .6 * study.age) for n in range(9, 0, -1)}
    whole = [n for n in range(1, 8) for at in [study.place(drawn[n], n)]
             if at and at[0].start > 0 and at[0].stop < len(ct)]
    chance, many = FREQUENCY[np.array(whole, int) - 1], rng.choice(4, p=[.5, .3, .14, .06])
    broken = sorted(rng.choice(whole, min(many, len(whole)), replace=False, p=chance / chance.sum()))
    for n, parts in drawn.items():
        study.paint(rng, parts, n, n, fracture(rng, n) if n in broken else None)
    study.other_bones(rng)
    scan(rng, ct, level, skin, study.step)
    ct, grid = ct.reshape(-1, study.merge, SIDE, SIDE).mean(1), study.grid
    step = grid.step * (1, 1, study.merge)
    return (np.rint(ct.clip(-1024, 3071)), study.lab[::study.merge].copy(),
            Grid(grid.origin + (step - grid.step) / 2, step), [int(n) - 1 for n in broken])


if __name__ == "__main__":
    main(make_study, "1.2.3.7")
