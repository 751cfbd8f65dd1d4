"""Where the objects are: open ground under a sky, rooms and yards with a wall, or a table seen from above."""

import math
from typing import NamedTuple

import numpy as np

from data_tools.synth.colour import Colour, linear, vary
from data_tools.synth.noise import screen_noise, smooth_step, soft_step
from data_tools.synth.surfaces import sample_surface, skirting_colour

SKY, HILL, GROUND, WALL, FLOOR, TABLE = range(6)
STUFF = ("sky", "hill", "ground", "wall", "floor", "table")  # names, in the order of the numbers above


class Light(NamedTuple):
    """The sun, or a lamp, and what comes from everywhere else. `towards` (3,) is a unit vector in axes of the view."""

    towards: np.ndarray
    direct: Colour
    ambient: Colour
    softness: float  # of shadows: the radius of their blur, as a share of the object's


class Camera(NamedTuple):
    """Perspective of a level floor. Rows count downwards from the top of the picture."""

    horizon: float  # row, may lie outside the picture
    focal: float  # pixels
    unit_at_bottom: float  # pixels per unit at the bottom row
    height: int

    def unit(self, row: float | np.ndarray) -> float | np.ndarray:
        """Pixels per unit on the floor at `row`."""
        return self.unit_at_bottom * (row - self.horizon) / (self.height - self.horizon)

    def elevation(self, row: float) -> float:
        """Angle, in radians, at which the floor is seen at `row`."""
        return math.atan2(row - self.horizon, self.focal)


class Place(NamedTuple):
    """A picture without objects: `colour` (3, h, w) linear light, `stuff` (h, w) numbers into STUFF."""

    name: str
    colour: np.ndarray
    stuff: np.ndarray
    light: Light
    camera: Camera | None  # None: seen from straight above, at a scale that is the same everywhere
    floor_top: int  # first row on which an object can stand


def _unit_vector(x: float, y: float, z: float) -> np.ndarray:
    vector = np.float32([x, y, z])
    return vector / np.sqrt((vector * vector).sum())


def _sample_light(rng: np.random.Generator, *, indoors: bool) -> Light:
    warmth = rng.uniform(-0.12, 0.25)
    direct = np.float32([1 + warmth, 1.0, 1 - 1.1 * warmth]) * np.float32(rng.uniform(0.75, 1.25))
    ambient = np.float32([0.9, 0.97, 1.1] if not indoors else [1.02, 1.0, 0.96]) * np.float32(rng.uniform(0.2, 0.42))
    side = float(rng.choice([-1, 1]) * rng.uniform(0.4, 1.1))
    towards = _unit_vector(
        side, rng.uniform(0.65, 1.1), rng.choice([rng.uniform(0.3, 0.8), rng.uniform(-0.25, 0.2)], p=[0.7, 0.3])
    )
    return Light(towards, direct, ambient, softness=float(rng.uniform(0.03, 0.16)))


def _sample_camera(rng: np.random.Generator, height: int, width: int) -> Camera:
    horizon = height * rng.uniform(0.12, 0.42)
    return Camera(
        float(horizon),
        focal=float(1.15 * max(width, height)),
        unit_at_bottom=float(height * rng.uniform(0.36, 0.5)),
        height=height,
    )


def _grid(height: int, width: int, first_row: int = 0) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.mgrid[first_row:height, 0:width].astype(np.float32)
    return row, column


def _floor(rng: np.random.Generator, camera: Camera, width: int, first_row: int, names: tuple[str, ...]) -> np.ndarray:
    """(3, height - first_row, width) albedo of a level floor, turned by a random angle."""
    _, surface = sample_surface(rng, names)
    row, column = _grid(camera.height, width, first_row)
    row = np.maximum(row, camera.horizon + 1.5)
    unit = camera.unit(row)
    right = (column - width / 2) / unit
    away = camera.focal / unit
    pixel = away / (row - camera.horizon)  # the longer, receding side of a pixel's footprint
    turn = rng.uniform(-0.9, 0.9)
    u = math.cos(turn) * right - math.sin(turn) * away
    v = math.sin(turn) * right + math.cos(turn) * away
    return surface(u, v, 0.5 * (pixel + 1 / unit))


def _lit(albedo: np.ndarray, light: Light, facing: float) -> np.ndarray:
    return albedo * (light.ambient + light.direct * np.float32(facing))[:, None, None]


def _falloff(rng: np.random.Generator, height: int, width: int, strength: float) -> np.ndarray:
    """(h, w) uneven light: brighter towards a random side, as near a window or lamp."""
    row, column = _grid(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (column / width - 0.5) * math.cos(angle) + (row / height - 0.5) * math.sin(angle)
    return (1 + strength * slope).astype(np.float32)


def _sky(rng: np.random.Generator, height: int, width: int, rows: int) -> tuple[np.ndarray, Colour]:
    """(3, rows, width) light of a sky with clouds, and the colour of its haze at the horizon."""
    mood = rng.choice(3, p=[0.6, 0.2, 0.2])
    zenith, haze, cloud = (
        (linear(0.2, 0.42, 0.78), linear(0.75, 0.86, 0.95), linear(1, 1, 1)),
        (linear(0.3, 0.35, 0.58), linear(0.99, 0.74, 0.5), linear(1.0, 0.8, 0.68)),
        (linear(0.62, 0.67, 0.73), linear(0.85, 0.87, 0.89), linear(0.93, 0.94, 0.95)),
    )[mood]
    zenith = vary(rng, zenith, 0.25)
    climb = (np.arange(rows, dtype=np.float32)[::-1] / max(1, 0.6 * height))[:, None] ** 0.7
    colour = haze[:, None, None] + np.clip(climb, 0, 1) * np.ones((1, width), np.float32) * (zenith - haze)[:, None, None]
    cells = height * rng.uniform(0.16, 0.3)
    veil = sum(screen_noise(rng, rows, width, cells / 2**octave) * 0.55**octave for octave in range(4))
    cover = smooth_step(0.0, 1.6, veil + rng.uniform(-0.9, 0.5)) * np.float32(rng.uniform(0.5, 0.95))
    shade = 1 - 0.25 * np.clip(np.roll(veil, 3, axis=0), 0, 1)
    return (colour + cover * (cloud[:, None, None] * shade - colour)) * np.float32(1.35), haze


def _hills(rng: np.random.Generator, colour: np.ndarray, stuff: np.ndarray, haze: Colour, foot: int) -> None:
    """Draw one or two ranges of hills or trees above row `foot`, the farther the hazier."""
    height, width = stuff.shape
    base = vary(rng, linear(0.3, 0.4, 0.26), 0.4)
    for distance in (0.75, 0.4)[2 - int(rng.integers(1, 3)) :]:
        tall = height * rng.uniform(0.03, 0.14)
        ridge = screen_noise(rng, 2, width, width * rng.uniform(0.2, 0.5))[0] + 0.12 * screen_noise(rng, 2, width, 5)[0]
        top = foot - tall * np.clip(1 + 0.6 * ridge, 0.1, 2.2)
        share = soft_step(np.arange(foot, dtype=np.float32)[:, None] - top[None], 1.0)
        leaves = 1 + 0.22 * screen_noise(rng, foot, width, 3) + 0.15 * screen_noise(rng, foot, width, 12)
        paint = base[:, None, None] * leaves * (1 - distance) + haze[:, None, None] * distance
        colour[:, :foot] += share * (paint * 1.2 - colour[:, :foot])
        stuff[:foot][share > 0.5] = HILL


def _outdoors(rng: np.random.Generator, height: int, width: int) -> Place:
    camera, light = _sample_camera(rng, height, width), _sample_light(rng, indoors=False)
    foot = max(4, int(np.ceil(camera.horizon)) + 1)
    colour, stuff = np.empty((3, height, width), np.float32), np.full((height, width), GROUND, np.uint8)
    colour[:, :foot], haze = _sky(rng, height, width, foot)
    stuff[:foot] = SKY
    if rng.uniform() < 0.75:
        _hills(rng, colour, stuff, haze, foot)
    ground = _lit(_floor(rng, camera, width, foot, ("grass", "grass", "sand", "paving", "planks")), light, light.towards[1])
    distance = np.exp(-(np.arange(height - foot, dtype=np.float32) + 1) / (0.06 * height))[:, None]
    colour[:, foot:] = ground + 0.65 * distance * (haze[:, None, None] - ground)
    return Place("outdoors", colour, stuff, light, camera, floor_top=foot + int(0.12 * height))


def _against_wall(rng: np.random.Generator, height: int, width: int) -> Place:
    camera, indoors = _sample_camera(rng, height, width), rng.uniform() < 0.65
    light = _sample_light(rng, indoors=indoors)
    foot = int(np.clip(camera.horizon + height * rng.uniform(0.12, 0.3), 0.3 * height, 0.66 * height))
    walls, floors = (
        (("plaster", "wallpaper", "tiles", "planks"), ("planks", "tiles", "cloth", "stone"))
        if indoors
        else (("bricks", "bricks", "stone", "planks"), ("paving", "grass", "sand", "planks"))
    )
    unit = camera.unit(foot)
    _, wall = sample_surface(rng, walls)
    row, column = _grid(foot, width)
    paint = wall(column / unit, (foot - row) / unit, np.full_like(row, 1 / unit))
    colour, stuff = np.empty((3, height, width), np.float32), np.full((height, width), FLOOR, np.uint8)
    colour[:, :foot] = _lit(paint, light, max(0.3, light.towards[2]))
    stuff[:foot] = WALL
    colour[:, foot:] = _lit(_floor(rng, camera, width, foot, floors), light, light.towards[1])
    if indoors and rng.uniform() < 0.7:
        _skirting(rng, colour, foot, max(3, int(0.22 * unit)), light)
    _corner_shade(colour, foot)
    if rng.uniform() < 0.4:
        _window_light(rng, colour, light)
    colour *= _falloff(rng, height, width, rng.uniform(0.1, 0.7))
    return Place("indoors" if indoors else "yard", colour, stuff, light, camera, floor_top=foot + int(0.1 * height))


def _skirting(rng: np.random.Generator, colour: np.ndarray, foot: int, tall: int, light: Light) -> None:
    profile = np.ones((tall, 1), np.float32)
    profile[0] = 1.25  # its upper edge catches the light
    profile[1:2] = 0.8
    colour[:, foot - tall : foot] = _lit(skirting_colour(rng)[:, None, None] * profile, light, max(0.3, light.towards[2]))


def _corner_shade(colour: np.ndarray, foot: int) -> None:
    """Less light reaches the corner between wall and floor."""
    height = colour.shape[1]
    distance = np.abs(np.arange(height, dtype=np.float32) - foot) / (0.05 * height)
    colour *= (1 - 0.35 * np.exp(-distance))[:, None]


def _window_light(rng: np.random.Generator, colour: np.ndarray, light: Light) -> None:
    """A slanted patch of sunlight with the shadows of window bars."""
    _, height, width = colour.shape
    row, column = _grid(height, width)
    slant = rng.uniform(0.3, 0.8) * (-1 if light.towards[0] > 0 else 1)
    across = (column - width * rng.uniform(0.2, 0.8) - slant * row) / (width * rng.uniform(0.3, 0.5))
    down = (row - height * rng.uniform(0.2, 0.6)) / (height * rng.uniform(0.35, 0.6))
    soft = 0.05
    patch = soft_step(0.5 - np.abs(across), soft) * soft_step(0.5 - np.abs(down), soft)
    bars = soft_step(np.abs(across) - 0.03, soft) * soft_step(np.abs(down) - 0.03, soft)
    colour *= 1 + np.float32(rng.uniform(0.4, 0.9)) * patch * bars


def _table_top(rng: np.random.Generator, height: int, width: int) -> Place:
    light = _sample_light(rng, indoors=True)
    light = light._replace(towards=_unit_vector(light.towards[0], rng.uniform(-0.2, 0.9), rng.uniform(0.7, 1.2)))
    _, surface = sample_surface(rng, ("planks", "planks", "cloth", "stone", "tiles", "grass", "sand", "paving"))
    unit, turn = height * rng.uniform(0.3, 0.42), rng.uniform(0, 2 * np.pi)
    row, column = _grid(height, width)
    u = (math.cos(turn) * column - math.sin(turn) * row) / np.float32(unit)
    v = (math.sin(turn) * column + math.cos(turn) * row) / np.float32(unit)
    colour = _lit(surface(u, v, np.full_like(u, 1 / unit)), light, light.towards[2])
    colour = colour * _falloff(rng, height, width, rng.uniform(0.2, 0.9))
    return Place("table", colour, np.full((height, width), TABLE, np.uint8), light, None, floor_top=0)


def sample_place(rng: np.random.Generator, height: int, width: int) -> Place:
    """A random place of height x width pixels."""
    make = (_outdoors, _against_wall, _table_top)[rng.choice(3, p=[0.36, 0.38, 0.26])]
    return make(rng, height, width)
