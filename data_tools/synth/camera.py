"""From light to a developed picture: focus, exposure, tone curve, sensor noise."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_tools.synth.colour import GAMMA

_BRIGHTEST = 6.0  # light beyond this is white whatever the tone curve
_FILM_STEPS = 4096
_NOISE_SIDE, _NOISE_SEED = 769, 20221


class Lens(NamedTuple):
    """How the picture is taken. Blurs are standard deviations in pixels."""

    background_blur: float
    blur: float
    exposure: float  # mean brightness that the camera aims at, linear
    vignette: float  # share of light lost in the corners
    noise: float  # standard deviation of the sensor, in screen values (0 to 1)


def sample_lens(rng: np.random.Generator) -> Lens:
    """A random camera; about half of them blur the background a little, as a wide aperture does."""
    background = float(max(0.0, rng.uniform(-1.0, 1.4)))
    return Lens(
        background,
        float(rng.uniform(0.3, 0.6)),
        float(rng.uniform(0.2, 0.34)),
        float(rng.uniform(0, 0.3)),
        float(rng.uniform(0.003, 0.011)),
    )


def blur(colour: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (c, h, w) by `sigma` pixels; borders repeat. Returns a new array."""
    reach = max(1, round(2.2 * sigma))
    if sigma < 0.2:  # nothing to see
        return colour.copy()
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        size = colour.shape[axis]
        pad = [(0, 0), (0, 0), (0, 0)]
        pad[axis] = (reach, reach)
        padded = np.pad(colour, pad, mode="edge")
        colour = np.zeros_like(colour)
        for offset, weight in enumerate(weights):
            colour += weight * (padded[:, offset : offset + size] if axis == 1 else padded[:, :, offset : offset + size])
    return colour


def develop(rng: np.random.Generator, colour: np.ndarray, lens: Lens) -> np.ndarray:
    """Linear light (3, h, w) to an (h, w, 3) uint8 picture."""
    _, height, width = colour.shape
    row = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    column = np.linspace(-1, 1, width, dtype=np.float32)[None]
    gain = lens.exposure / max(1e-3, float(colour.mean()))
    light = np.clip(colour, 0, _BRIGHTEST / gain) * (gain * (1 - 0.5 * lens.vignette * (row * row + column * column)))
    place = np.sqrt(light) * np.float32((_FILM_STEPS - 1) / _BRIGHTEST**0.5)
    screen = _film().take(place.astype(np.int32)) + (255 * lens.noise) * _grain(rng, height, width)
    return np.ascontiguousarray(np.clip(screen + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _grain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(3, h, w) sensor noise: fine in brightness, coarser and weaker in colour, as processing leaves it."""
    fine, *coarse = (_cut_noise(rng, height, width) for _ in range(4))
    half = np.stack(coarse)[:, : (height + 1) // 2, : (width + 1) // 2]
    return fine + 0.4 * half.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]


def _cut_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(h, w) normal noise, cut at a random place from a tile that repeats: drawing it anew would take a tenth of all time."""
    top, left = rng.integers(0, _NOISE_SIDE, 2)
    return _noise_tile()[(np.arange(height) + top)[:, None] % _NOISE_SIDE, (np.arange(width) + left) % _NOISE_SIDE]


@lru_cache(maxsize=1)
def _noise_tile() -> np.ndarray:
    return np.random.default_rng(_NOISE_SEED).standard_normal((_NOISE_SIDE, _NOISE_SIDE), dtype=np.float32)


@lru_cache(maxsize=1)
def _film() -> np.ndarray:
    """Screen values (0 to 255) of light spaced evenly in its root: a rational tone curve that rolls off, then gamma."""
    light = np.linspace(0, _BRIGHTEST**0.5, _FILM_STEPS) ** 2
    tone = light * (1.1 + 0.35 * light) / (0.9 + 0.45 * light) * (light + 0.02) / (light + 0.03)
    return (255 * np.clip(tone, 0, 1) ** (1 / GAMMA)).astype(np.float32)
