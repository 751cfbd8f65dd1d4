"""Smooth random fields: the same lattice of numbers for every picture, looked up at coordinates of the picture's own.

All functions are pure; a picture becomes its own by the offset that its random generator adds to the coordinates.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

Field = np.ndarray  # float32, any shape; coordinates of one call share the shape

_SIDE = 256  # points of the lattice per axis; the noise repeats after as many units
_LATTICE_SEED = 20220


@lru_cache(maxsize=1)
def _lattice() -> np.ndarray:
    """Per point of the lattice the four coefficients of its cell, a + bu + cv + duv, packed so that one look-up fetches all."""
    value = np.random.default_rng(_LATTICE_SEED).uniform(-1, 1, (_SIDE, _SIDE)).astype(np.float32)
    right, below = np.roll(value, -1, 1) - value, np.roll(value, -1, 0) - value
    both = np.roll(right, -1, 0) - right
    return np.ascontiguousarray(np.stack([value, right, below, both], axis=-1)).reshape(-1, 4).view(np.complex128).reshape(-1)


def value_noise(u: Field, v: Field) -> Field:
    """Noise in [-1, 1] with features one unit wide, at coordinates (u, v)."""
    floor_u, floor_v = np.floor(u), np.floor(v)
    fade_u, fade_v = u - floor_u, v - floor_v
    fade_u *= fade_u * (3 - 2 * fade_u)
    fade_v *= fade_v * (3 - 2 * fade_v)
    place = floor_v.astype(np.int32)
    place &= _SIDE - 1
    place *= _SIDE
    place += floor_u.astype(np.int32) & (_SIDE - 1)
    cell = _lattice().take(place).view(np.float32).reshape(*place.shape, 4)
    slope = cell[..., 2] + fade_u * cell[..., 3]
    slope *= fade_v
    slope += cell[..., 0]
    slope += fade_u * cell[..., 1]
    return slope


def fractal_noise(u: Field, v: Field, *, octaves: int, pixel: Field | float = 0.0, gain: float = 0.5) -> Field:
    """Sum of `octaves` noises, each twice as fine and `gain` times as strong as the one before; roughly in [-1, 1].

    `pixel` is the size of a pixel in units of (u, v): octaves finer than it fade out instead of flickering.
    """
    total = np.zeros(np.broadcast_shapes(np.shape(u), np.shape(v)), np.float32)  # all octaves may be too fine
    strength, frequency, norm = 1.0, 1.0, 0.0
    for octave in range(octaves):
        shift = 37.7 * octave  # octaves must not line up at the origin
        keep = np.clip(1.6 - 2 * frequency * np.asarray(pixel, np.float32), 0, 1)
        if np.any(keep):
            total = total + strength * keep * value_noise(u * frequency + shift, v * frequency - shift)
        norm += strength**2
        strength, frequency = strength * gain, frequency * 2.03
    return total / np.float32(norm**0.5)


def solid_noise(x: Field, y: Field, z: Field, *, octaves: int, pixel: float = 0.0) -> Field:
    """Noise through a body, from three plane noises; roughly in [-1, 1]."""
    along_x = fractal_noise(y + 11.3, z - 5.1, octaves=octaves, pixel=pixel)
    along_z = fractal_noise(x - 7.9, y + 3.7, octaves=octaves, pixel=pixel)
    return (along_x + along_z) * np.float32(0.7)


def screen_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Field:
    """(height, width) noise of unit variance whose blobs are about `cell` pixels wide: cheap, for what has no perspective."""
    rows, columns = max(2, round(height / cell) + 1), max(2, round(width / cell) + 1)
    grid = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def soft_step(signed: Field, width: Field | float) -> Field:
    """0 below -width / 2, 1 above width / 2, linear between: an edge at 0 that is `width` wide, both in units of `signed`."""
    return np.clip(signed / np.maximum(width, 1e-6, dtype=np.float32) + 0.5, 0, 1)


def smooth_step(low: float, high: float, value: Field) -> Field:
    """0 below `low`, 1 above `high`, an S-shaped ramp between."""
    ramp = np.clip((value - low) / (high - low), 0, 1)
    return ramp * ramp * (3 - 2 * ramp)
