"""Patterns that run through a body: each maps points to linear colours, with edges as soft as a pixel is wide."""

from collections.abc import Callable

import numpy as np

from data_tools.synth.colour import Colour, sample_palette
from data_tools.synth.noise import soft_step, solid_noise

# (x, y, z) points of a body about one unit in radius, each (n,), and a pixel's width in units -> (3, n) linear colour
Pattern = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
Palette = tuple[Colour, Colour, Colour]


def mix(first: Colour, second: Colour, share: np.ndarray) -> np.ndarray:
    """(3, ...) colours between `first` (share 0) and `second` (share 1)."""
    shape = (3,) + (1,) * share.ndim
    return first.reshape(shape) + share * (second - first).reshape(shape)


def _paint(colour: np.ndarray, over: Colour, share: np.ndarray) -> np.ndarray:
    return colour + share * (over[:, None] - colour)


def _zigzag_wave(phase: np.ndarray) -> np.ndarray:
    """Triangle wave in [-1, 1] with period 1."""
    return 4 * np.abs(phase - np.floor(phase + 0.5)) - 1


def _direction(rng: np.random.Generator, *, free: bool) -> np.ndarray:
    """A unit vector: along an axis of the body mostly, any one if `free`."""
    if free:
        vector = rng.standard_normal(3)
        return (vector / np.linalg.norm(vector)).astype(np.float32)
    return np.eye(3, dtype=np.float32)[rng.choice(3, p=[0.35, 0.5, 0.15])]


def _stripes(rng: np.random.Generator, palette: Palette) -> Pattern:
    axis, repeats, duty = (
        _direction(rng, free=rng.uniform() < 0.4),
        np.float32(rng.uniform(1.3, 3.2)),
        np.float32(rng.uniform(-0.35, 0.35)),
    )
    shift = np.float32(rng.uniform())
    edge_colour = palette[2] if rng.uniform() < 0.4 else None

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        wave = _zigzag_wave((x * axis[0] + y * axis[1] + z * axis[2]) * repeats + shift)
        colour = mix(palette[0], palette[1], soft_step(wave - duty, 4 * repeats * pixel))
        if edge_colour is not None:
            colour = _paint(colour, edge_colour, soft_step(wave - 0.72, 4 * repeats * pixel))
        return colour

    return pattern


def _panels(rng: np.random.Generator, palette: Palette) -> Pattern:
    count = int(rng.integers(3, 7))
    twist = np.float32(rng.choice([0, 0, 0.7, 1.6]))

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        turns = np.arctan2(z, x) * np.float32(count / (2 * np.pi)) + twist * y
        width = pixel * count / np.maximum(np.sqrt(x * x + z * z), 0.05) * 0.7
        colour = mix(palette[0], palette[1], soft_step(_zigzag_wave(turns), 4 * width))
        return _paint(colour, palette[2], soft_step(np.abs(y) - 0.86, pixel))

    return pattern


def _checks(rng: np.random.Generator, palette: Palette) -> Pattern:
    repeats = np.float32(rng.uniform(1.2, 2.4))
    shift = rng.uniform(0.1, 0.4, 3).astype(np.float32)

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        side = np.float32(1)
        for part, offset in zip((x, y, z), shift, strict=True):
            side = side * (2 * soft_step(_zigzag_wave(part * repeats + offset), 4 * repeats * pixel) - 1)
        return mix(palette[0], palette[1], 0.5 + 0.5 * side)

    return pattern


def _dots(rng: np.random.Generator, palette: Palette) -> Pattern:
    repeats, radius = np.float32(rng.uniform(1.6, 3.0)), np.float32(rng.uniform(0.3, 0.42))
    shift = rng.uniform(0, 1, 3).astype(np.float32)

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        squared = np.float32(0)
        for part, offset in zip((x, y, z), shift, strict=True):
            place = part * repeats + offset
            cell = place - np.round(place)
            squared = squared + cell * cell
        return mix(palette[0], palette[1], soft_step(radius - np.sqrt(squared), repeats * pixel))

    return pattern


def _plaid(rng: np.random.Generator, palette: Palette) -> Pattern:
    repeats = rng.uniform(1.2, 2.2, 2).astype(np.float32)
    duty = rng.uniform(-0.2, 0.5, 2).astype(np.float32)

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        first, second = _zigzag_wave((x + 0.31 * z) * repeats[0] + 0.2), _zigzag_wave((y + 0.13 * z) * repeats[1] + 0.3)
        bands = soft_step(first - duty[0], 5 * pixel * repeats[0]) + soft_step(second - duty[1], 5 * pixel * repeats[1])
        colour = mix(palette[0], palette[1], 0.5 * bands)
        lines = np.maximum(soft_step(first - 0.86, 5 * pixel), soft_step(second - 0.86, 5 * pixel))
        return _paint(colour, palette[2], 0.7 * lines)

    return pattern


def _marble(rng: np.random.Generator, palette: Palette) -> Pattern:
    axis, repeats, wild = _direction(rng, free=True), np.float32(rng.uniform(1.0, 2.2)), np.float32(rng.uniform(0.6, 1.3))

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        bend = solid_noise(1.6 * x, 1.6 * y, 1.6 * z, octaves=4, pixel=1.6 * pixel)
        wave = _zigzag_wave((x * axis[0] + y * axis[1] + z * axis[2]) * repeats + wild * bend)
        return mix(palette[0], palette[1], (0.5 + 0.5 * wave) ** 2)

    return pattern


def _wood(rng: np.random.Generator, palette: Palette) -> Pattern:
    del palette
    tone = np.float32(rng.uniform(0.6, 1.2)) * np.float32([0.42, 0.2, 0.075])
    dark = tone * np.float32([0.38, 0.32, 0.28])
    repeats, lean = np.float32(rng.uniform(4, 7)), np.float32(rng.uniform(0.1, 0.35))

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        bend = solid_noise(1.2 * x, 0.4 * y, 1.2 * z, octaves=2)
        rings = np.sqrt((x + 0.6 + lean * y) ** 2 + (z - 0.3) ** 2) * repeats + 0.7 * bend
        saw = rings - np.floor(rings)
        grain = solid_noise(20 * x, 1.5 * y, 20 * z, octaves=2, pixel=20 * pixel)
        return mix(tone, dark, np.clip(0.75 * saw * saw + 0.18 * grain, 0, 1))

    return pattern


def _speckle(rng: np.random.Generator, palette: Palette) -> Pattern:
    grains, amount = np.float32(rng.uniform(6, 11)), np.float32(rng.uniform(-0.1, 0.35))

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        fine = solid_noise(grains * x, grains * y, grains * z, octaves=2, pixel=grains * pixel)
        coarse = solid_noise(2 * x + 9, 2 * y, 2 * z, octaves=2, pixel=2 * pixel)
        colour = mix(palette[0], palette[1], soft_step(fine - amount, 0.25 + grains * pixel))
        return colour * (1 + 0.3 * coarse)

    return pattern


def _zigzag(rng: np.random.Generator, palette: Palette) -> Pattern:
    repeats, teeth, height = (
        np.float32(rng.uniform(1.4, 2.4)),
        np.float32(rng.uniform(1.2, 2.2)),
        np.float32(rng.uniform(0.15, 0.3)),
    )

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        side = np.where(np.abs(x) > np.abs(z), z, x)  # the coordinate that runs along the visible face
        wave = _zigzag_wave((y + height * _zigzag_wave(side * teeth)) * repeats)
        return mix(palette[0], palette[1], soft_step(wave, 6 * repeats * pixel))

    return pattern


def _gradient(rng: np.random.Generator, palette: Palette) -> Pattern:
    axis = _direction(rng, free=rng.uniform() < 0.5)

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        del pixel
        share = np.clip(0.5 + 0.6 * (x * axis[0] + y * axis[1] + z * axis[2]), 0, 1)
        return mix(palette[0], palette[1], share * share * (3 - 2 * share))

    return pattern


def _bands(rng: np.random.Generator, palette: Palette) -> Pattern:
    edges = np.sort(rng.uniform(-0.8, 0.8, 5)).astype(np.float32)

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        del x, z
        colour = mix(palette[0], palette[0], y)
        for index, edge in enumerate(edges):
            colour = _paint(colour, palette[(index + 1) % 3], soft_step(y - edge, pixel))
        return colour

    return pattern


PATTERNS = {
    "bands": _bands,
    "checks": _checks,
    "dots": _dots,
    "gradient": _gradient,
    "marble": _marble,
    "panels": _panels,
    "plaid": _plaid,
    "speckle": _speckle,
    "stripes": _stripes,
    "wood": _wood,
    "zigzag": _zigzag,
}


def sample_pattern(rng: np.random.Generator) -> tuple[str, Pattern]:
    """A random pattern with random colours, and its name. Fine dirt keeps any of them from looking printed."""
    name = str(rng.choice(sorted(PATTERNS)))
    clean = PATTERNS[name](rng, sample_palette(rng))
    offset, dirt = rng.uniform(0, 200, 3).astype(np.float32), np.float32(rng.uniform(0.03, 0.12))

    def pattern(x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
        wear = solid_noise(3 * x + offset[0], 3 * y + offset[1], 3 * z + offset[2], octaves=3, pixel=3 * pixel)
        return clean(x, y, z, pixel) * (1 + dirt * wear)

    return name, pattern
