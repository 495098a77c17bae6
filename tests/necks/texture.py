"""Noise with a grain, for volumes (z, y, x)."""

import cv2
import numpy as np

TILE_VOXELS = 96  # beyond it the noise repeats: fresh noise is slow


def blur(volume, in_plane, across):
    """Gaussian blur of a (z, y, x) volume; both deviations in voxels."""
    planes = [
        cv2.GaussianBlur(plane, (0, 0), in_plane)
        for plane in volume.astype(np.float32)
    ]
    flat = np.stack(planes).reshape(len(volume), -1)
    blurred = cv2.GaussianBlur(flat, (1, 0), 1, sigmaY=across)
    return blurred.reshape(volume.shape)


def noise(rng, shape, in_plane, across, tile=TILE_VOXELS):
    """Correlated noise of unit variance; its grain in voxels, as that of `blur`."""
    white = rng.standard_normal(np.minimum(shape, tile), np.float32)
    out = blur(white, in_plane, across)
    repeats = np.ceil(np.divide(shape, out.shape)).astype(int)
    out = np.tile(out / out.std(), repeats)
    return out[tuple(map(slice, shape))]
