"""Large flat surfaces: floors, walls, table tops and open ground. Each maps plane coordinates to linear colours."""

from collections.abc import Callable

import numpy as np

from data_tools.synth.colour import Colour, from_hsv, linear, vary
from data_tools.synth.noise import fractal_noise, soft_step, value_noise
from data_tools.synth.patterns import mix

# (u, v) in units of about an object's radius, each (h, w), and a pixel's size in units, scalar or (h, w) -> (3, h, w)
Surface = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _cells(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A random number in [-1, 1] per unit square."""
    return value_noise(np.floor(u) * 7 + 3, np.floor(v) * 13 + 5)


def _gap(part: np.ndarray, half_width: float, pixel: np.ndarray) -> np.ndarray:
    """1 within `half_width` of a whole number, else 0; a gap narrower than a pixel fades."""
    distance = np.abs(part - np.round(part))
    strength = np.clip(2 * half_width / np.maximum(pixel, 1e-6), 0, 1)
    return soft_step(half_width - distance, np.maximum(pixel, 0.3 * half_width)) * strength


def _planks(rng: np.random.Generator) -> Surface:
    tone = vary(
        rng, linear(*[(0.62, 0.44, 0.28), (0.45, 0.3, 0.18), (0.75, 0.62, 0.45), (0.55, 0.5, 0.45)][rng.integers(4)]), 0.25
    )
    width, length = np.float32(rng.uniform(0.45, 0.9)), np.float32(rng.uniform(3, 6))

    def surface(u: np.ndarray, v: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        lane = u / width
        along = v / length + 0.37 * value_noise(np.floor(lane) * 5 + 1, np.zeros_like(u))
        shade = _cells(lane, along)
        rings = fractal_noise(lane * 2.2 + 31 * shade, v * 0.35 + 17 * shade, octaves=2, pixel=pixel)
        rings = rings * 3 - np.floor(rings * 3)
        grain = fractal_noise(u * 22, v * 1.3, octaves=2, pixel=22 * pixel)
        dark = np.maximum(_gap(lane, 0.025, pixel / width), _gap(along, 0.006, pixel / length))
        light = (1 + 0.2 * shade) * (0.82 + 0.3 * rings * rings + 0.13 * grain) * (1 - 0.7 * dark)
        return tone[:, None, None] * light

    return surface


def _tiles(rng: np.random.Generator) -> Surface:
    size = np.float32(rng.uniform(0.7, 1.3))
    first = from_hsv(rng.uniform(), rng.uniform(0, 0.35), rng.uniform(0.6, 0.92))
    second = (
        vary(rng, first, 0.08) if rng.uniform() < 0.35 else from_hsv(rng.uniform(), rng.uniform(0, 0.5), rng.uniform(0.15, 0.55))
    )
    grout = linear(*(np.full(3, rng.uniform(0.35, 0.8))))

    def surface(u: np.ndarray, v: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        u, v, fine = u / size, v / size, pixel / size
        odd = (np.floor(u) + np.floor(v)) % 2
        fade = np.clip(1.5 - fine, 0, 1)  # tiles smaller than a pixel become their mean
        colour = mix(first, second, 0.5 + (odd - 0.5) * fade)
        colour *= 1 + 0.05 * _cells(u, v) + 0.06 * fractal_noise(u * 4, v * 4, octaves=3, pixel=4 * fine)
        return colour + np.maximum(_gap(u, 0.022, fine), _gap(v, 0.022, fine)) * (grout[:, None, None] - colour)

    return surface


def _bricks(rng: np.random.Generator) -> Surface:
    clay = vary(rng, linear(*[(0.62, 0.3, 0.22), (0.7, 0.52, 0.38), (0.5, 0.32, 0.28), (0.78, 0.76, 0.72)][rng.integers(4)]), 0.2)
    mortar = linear(*(np.full(3, rng.uniform(0.5, 0.8)) * [1, 0.97, 0.92]))
    height = np.float32(rng.uniform(0.2, 0.34))
    width = height * np.float32(rng.uniform(2.2, 3.0))

    def surface(u: np.ndarray, v: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        row = v / height
        column = u / width + 0.5 * (np.floor(row) % 2)
        shade = _cells(column, row)
        rough = fractal_noise(u * 7, v * 7, octaves=3, pixel=7 * pixel)
        colour = mix(clay, clay * np.float32([0.75, 0.6, 0.6]), np.clip(0.5 + 0.7 * shade, 0, 1)) * (1 + 0.22 * rough)
        joint = np.maximum(_gap(row, 0.065, pixel / height), _gap(column, 0.03, pixel / width))
        return colour + joint * (mortar[:, None, None] * (1 + 0.15 * rough) - colour)

    return surface


def _plaster(rng: np.random.Generator) -> Surface:
    tone = from_hsv(rng.uniform(), rng.uniform(0.02, 0.4), rng.uniform(0.55, 0.92))

    def surface(u: np.ndarray, v: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        stain = fractal_noise(u * 0.5, v * 0.5, octaves=3, pixel=0.5 * pixel)
        rough = fractal_noise(u * 9, v * 9, octaves=2, pixel=9 * pixel)
        return tone[:, None, None] * (1 + 0.1 * stain + 0.05 * rough)

    return surface


def _wallpaper(rng: np.random.Generator) -> Surface:
    base = from_hsv(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.5, 0.9))
    other = vary(rng, base * np.float32(rng.choice([0.55, 1.4])), 0.3)
    repeat, dotted = np.float32(rng.uniform(0.5, 1.0)), rng.uniform() < 0.5

    def surface(u: np.ndarray, v: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        u, v, fine = u / repeat, v / repeat, pixel / repeat
        if dotted:
            row = np.floor(v)
            across, down = u + 0.5 * (row % 2), v - row - 0.5
            across = across - np.round(across)
            figure = soft_step(0.26 - np.sqrt(across * across + 1.4 * down * down), fine)
        else:
            figure = soft_step(np.abs(u - np.round(u)) - 0.27, fine)
        return mix(base, other, figure) * (1 + 0.06 * fractal_noise(u * 3, v * 3, octaves=2, pixel=3 * fine))

    return surface


def _cloth(rng: np.random.Generator) -> Surface:
    base = from_hsv(rng.uniform(), rng.uniform(0.4, 0.85), rng.uniform(0.4, 0.8))
    light = linear(0.93, 0.91, 0.86)
    repeat = np.float32(rng.uniform(0.35, 0.8))

    def surface(u: np.ndarray, v: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        sway = 0.15 * fractal_noise(u * 0.6, v * 0.6, octaves=2)
        first, second = (u + sway) / repeat, (v - sway) / repeat
        fine = pixel / repeat
        warp, weft = (soft_step(np.abs(part - np.round(part)) - 0.25, 1.2 * fine) for part in (first, second))
        thread = fractal_noise(u * 24, v * 24, octaves=1, pixel=24 * pixel)
        return mix(light, base, 0.5 * (warp + weft)) * (1 + 0.07 * thread + 0.5 * sway)

    return surface


def _stone(rng: np.random.Generator) -> Surface:
    tone = from_hsv(rng.uniform(0.02, 0.15), rng.uniform(0, 0.25), rng.uniform(0.4, 0.85))
    vein = vary(rng, tone * np.float32(rng.choice([0.35, 1.6])), 0.2)

    def surface(u: np.ndarray, v: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        bend = fractal_noise(u * 0.7, v * 0.7, octaves=4, pixel=0.7 * pixel)
        streak = 1 - np.abs(fractal_noise(u * 0.4 + bend, v * 0.4 - bend, octaves=2, pixel=0.4 * pixel)) * 5
        return mix(tone, vein, 0.6 * np.clip(streak, 0, 1)) * (1 + 0.14 * bend)

    return surface


def _paving(rng: np.random.Generator) -> Surface:
    tone = linear(*(np.float32(rng.uniform(0.42, 0.68)) * np.float32([1.0, 0.97, 0.92])))
    width, height = rng.uniform(0.5, 1.0, 2).astype(np.float32)

    def surface(u: np.ndarray, v: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        row = v / height
        column = u / width + 0.5 * (np.floor(row) % 2)
        rough = fractal_noise(u * 5, v * 5, octaves=3, pixel=5 * pixel)
        joint = np.maximum(_gap(row, 0.03, pixel / height), _gap(column, 0.03, pixel / width))
        return tone[:, None, None] * (1 + 0.2 * _cells(column, row) + 0.2 * rough) * (1 - 0.6 * joint)

    return surface


def _grass(rng: np.random.Generator) -> Surface:
    fresh = vary(rng, linear(0.4, 0.55, 0.2), 0.3)
    deep = fresh * np.float32([0.3, 0.42, 0.35])

    def surface(u: np.ndarray, v: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        patches = fractal_noise(u * 0.6, v * 0.6, octaves=2, pixel=0.6 * pixel)
        blades = fractal_noise(u * 14, v * 5, octaves=3, pixel=8 * pixel, gain=0.8)
        return mix(deep, fresh, np.clip(0.55 + 0.25 * patches + 0.5 * blades, 0, 1.3))

    return surface


def _sand(rng: np.random.Generator) -> Surface:
    tone = vary(rng, linear(0.82, 0.7, 0.5), 0.2)
    repeat = np.float32(rng.uniform(1.5, 3))

    def surface(u: np.ndarray, v: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        bend = fractal_noise(u * 0.6, v * 0.6, octaves=2, pixel=0.6 * pixel)
        ripple = np.sin((v + 0.3 * u + 0.8 * bend) * repeat * 6.3) * np.clip(1.4 - 3 * repeat * pixel, 0, 1)
        grain = fractal_noise(u * 18, v * 18, octaves=2, pixel=18 * pixel)
        return tone[:, None, None] * (1 + 0.09 * ripple + 0.1 * bend + 0.1 * grain)

    return surface


SURFACES = {
    "bricks": _bricks,
    "cloth": _cloth,
    "grass": _grass,
    "paving": _paving,
    "planks": _planks,
    "plaster": _plaster,
    "sand": _sand,
    "stone": _stone,
    "tiles": _tiles,
    "wallpaper": _wallpaper,
}


def sample_surface(rng: np.random.Generator, names: tuple[str, ...]) -> tuple[str, Surface]:
    """A random surface among `names`, with random colours and sizes, at a random place of the endless plane."""
    name = str(rng.choice(names))
    plain = SURFACES[name](rng)
    shift = rng.uniform(0, 240, 2).astype(np.float32)
    return name, lambda u, v, pixel: plain(u + shift[0], v + shift[1], pixel)


def skirting_colour(rng: np.random.Generator) -> Colour:
    """Paint or wood of a skirting board."""
    return vary(rng, linear(*[(0.9, 0.89, 0.86), (0.4, 0.27, 0.17), (0.25, 0.22, 0.2)][rng.integers(3)]), 0.1)
