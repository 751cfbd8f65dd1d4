"""A picture: a place with one to four objects that stand in it, cast shadows and hide each other."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from data_tools.synth.camera import Lens, blur, develop, sample_lens
from data_tools.synth.patterns import Pattern, sample_pattern
from data_tools.synth.places import GROUND, STUFF, Light, Place, sample_place
from data_tools.synth.solids import REACH, SOLIDS, Trace, rotate, trace, turn

KINDS = tuple(sorted(SOLIDS))  # the classes, in the order of their numbers
CATEGORIES = (*KINDS, *STUFF)  # of the semantic map: 1 is the first, 0 is not used
_FLAT = ("cushion", "ring", "star")  # kinds that face the camera, more or less

_LEAST_VISIBLE = 0.5  # share of an object that others may not hide; the main object keeps more
_LEAST_VISIBLE_MAIN = 0.7
_TRIES = 8


class Instance(NamedTuple):
    """One object as it is seen: its kind, its pattern's name, and the (h, w) bool mask of its visible pixels."""

    kind: str
    pattern: str
    mask: np.ndarray


class Picture(NamedTuple):
    """image (h, w, 3) uint8; semantic (h, w) uint8, numbers of CATEGORIES from 1; instances, far to near."""

    image: np.ndarray
    semantic: np.ndarray
    instances: tuple[Instance, ...]
    place: str


class _Body(NamedTuple):
    """An object, posed and traced, with the picture's pixel (left, top) of its patch's corner."""

    kind: str
    pattern_name: str
    pattern: Pattern
    gloss: float
    trace: Trace
    side: int
    scale: float  # pixels per unit
    left: int
    top: int
    base: int  # picture row of its lowest pixel


def draw_picture(seed: int, index: int, kind: str, height: int, width: int) -> Picture:
    """The picture `index` of the data set `seed`: height x width pixels, its main object of the given kind. Pure."""
    rng = np.random.default_rng([seed, index])
    place = sample_place(rng, height, width)
    lens = sample_lens(rng)
    bodies = _sample_bodies(rng, place, kind, height, width)
    canvas = blur(place.colour, lens.background_blur)
    semantic = place.stuff + np.uint8(1 + len(KINDS))
    owner = np.full((height, width), -1, np.int16)
    for number, body in enumerate(bodies):
        _darken(canvas, _shadow(body, place, height, width), place)
        _draw(canvas, owner, body, place, number)
    instances = tuple(Instance(body.kind, body.pattern_name, owner == number) for number, body in enumerate(bodies))
    for instance in instances:
        semantic[instance.mask] = KINDS.index(instance.kind) + 1
    return Picture(_photograph(rng, canvas, lens), semantic, instances, place.name)


def _photograph(rng: np.random.Generator, canvas: np.ndarray, lens: Lens) -> np.ndarray:
    return develop(rng, blur(canvas, lens.blur), lens)


def _sample_bodies(rng: np.random.Generator, place: Place, kind: str, height: int, width: int) -> list[_Body]:
    """The main object and up to three smaller ones, far to near; one that would hide too much is left out."""
    short = min(height, width)
    main = _place_body(rng, place, kind, float(short * rng.uniform(0.27, 0.4)), height, width, main=True)
    bodies = [main]
    for _ in range(int(rng.choice(4, p=[0.2, 0.35, 0.3, 0.15]))):
        for _ in range(_TRIES):
            radius = float(main.scale * rng.uniform(0.4, 0.8))
            frame = _sample_position(rng, place, radius, height, width, main=False)
            if _far_enough(frame, bodies):
                bodies.append(_pose_body(rng, place, str(rng.choice(KINDS)), frame))
                break
    bodies.sort(key=lambda body: body.base)
    return _without_hiders(bodies, main, height, width)


class _Frame(NamedTuple):
    x: float  # column of the centre
    y: float  # row of the base, or of the centre when seen from above
    radius: float  # pixels


def _sample_position(rng: np.random.Generator, place: Place, radius: float, height: int, width: int, *, main: bool) -> _Frame:
    margin = 0.3 if main else 0.08
    x = rng.uniform(margin, 1 - margin) * width
    if place.camera is None:
        return _Frame(x, rng.uniform(max(margin, 0.1), 1 - max(margin, 0.1)) * height, radius)
    if main:
        low = max(place.floor_top + 0.1 * height, 0.72 * height)
        return _Frame(x, rng.uniform(low, 0.96 * height), radius)
    base = rng.uniform(place.floor_top, 0.99 * height)
    return _Frame(x, base, radius * float(np.sqrt(place.camera.unit(base) / place.camera.unit(0.85 * height))))


def _far_enough(frame: _Frame, bodies: list[_Body]) -> bool:
    """Whether the object's foot is clear of those of the others, so that bodies touch but do not run into each other."""
    for body in bodies:
        centre = body.left + body.side / 2
        across = (frame.x - centre) / (frame.radius + body.scale)
        along = (frame.y - body.base) / (0.5 * (frame.radius + body.scale))
        if across**2 + along**2 < 0.5:
            return False
    return True


def _sample_pose(rng: np.random.Generator, kind: str, elevation: float | None) -> np.ndarray:
    """Axes of the body in the view: standing on the floor seen at `elevation`, or (None) lying under the camera."""
    flat = kind in _FLAT
    if elevation is None:
        lean = rng.uniform(-0.45, 0.45, 2)
        spin = turn(1, rng.uniform(0, 2 * math.pi)) if SOLIDS[kind].upright else turn(1, float(lean[1]))
        return turn(2, rng.uniform(0, 2 * math.pi)) @ turn(0, float(lean[0])) @ spin
    tilt = turn(0, elevation)
    if SOLIDS[kind].upright:
        return tilt @ turn(1, rng.uniform(0, 2 * math.pi))
    if flat:
        quarter = math.pi / 2  # a cushion rests on an edge, not on a corner
        roll = float(rng.integers(4)) * quarter + rng.uniform(-0.12, 0.12) if kind == "cushion" else rng.uniform(0, 4 * quarter)
        return tilt @ turn(1, rng.uniform(-0.8, 0.8)) @ turn(0, -rng.uniform(0, 0.4)) @ turn(2, roll)
    if kind == "gem":  # rests on a facet of its lower side
        return (
            tilt @ turn(1, rng.uniform(0, 2 * math.pi)) @ turn(2, rng.uniform(0.85, 1.25)) @ turn(1, rng.uniform(0, 2 * math.pi))
        )
    free = math.pi
    return tilt @ turn(2, rng.uniform(-free, free)) @ turn(0, rng.uniform(-free, free)) @ turn(1, rng.uniform(0, 2 * math.pi))


def _place_body(
    rng: np.random.Generator, place: Place, kind: str, radius: float, height: int, width: int, *, main: bool
) -> _Body:
    return _pose_body(rng, place, kind, _sample_position(rng, place, radius, height, width, main=main))


def _pose_body(rng: np.random.Generator, place: Place, kind: str, frame: _Frame) -> _Body:
    elevation = None if place.camera is None else place.camera.elevation(frame.y)
    pattern_name, pattern = sample_pattern(rng)
    distance = SOLIDS[kind].sample(rng)
    side = int(np.ceil(2 * REACH * frame.radius))
    hits = trace(distance, _sample_pose(rng, kind, elevation), side, frame.radius)
    if place.camera is None:
        top = round(frame.y - side / 2)
    else:
        top = round(frame.y - int(hits.pixel.max()) // side)  # the lowest pixel touches the floor
    base = top + int(hits.pixel.max()) // side
    gloss = float(rng.choice([0.0, 0.08, 0.25, 0.6]))
    return _Body(kind, pattern_name, pattern, gloss, hits, side, frame.radius, round(frame.x - side / 2), top, base)


def _coverage(body: _Body, height: int, width: int) -> np.ndarray:
    """(h, w) share of each pixel that the body covers."""
    patch = np.zeros(body.side * body.side, np.float32)
    patch[body.trace.pixel] = body.trace.coverage
    full = np.zeros((height, width), np.float32)
    rows, columns, inner_rows, inner_columns = _window(body, height, width)
    full[rows, columns] = patch.reshape(body.side, body.side)[inner_rows, inner_columns]
    return full


def _window(body: _Body, height: int, width: int) -> tuple[slice, slice, slice, slice]:
    """Rows and columns of the picture under the body's patch, and those of the patch that are inside the picture."""
    top, left = max(0, body.top), max(0, body.left)
    bottom, right = max(top, min(height, body.top + body.side)), max(left, min(width, body.left + body.side))
    return (
        slice(top, bottom),
        slice(left, right),
        slice(top - body.top, bottom - body.top),
        slice(left - body.left, right - body.left),
    )


def _without_hiders(bodies: list[_Body], main: _Body, height: int, width: int) -> list[_Body]:
    """Leave out objects, nearest first, that hide too much of one behind them, are mostly hidden or barely in the picture."""
    masks = [_coverage(body, height, width) > 0.5 for body in bodies]
    kept: list[int] = []
    for number in sorted(range(len(bodies)), key=lambda index: (bodies[index] is not main, index)):
        trial = sorted([*kept, number])
        if all(_visible_enough(trial, masks, bodies, index, main) for index in trial):
            kept.append(number)
    return [bodies[number] for number in sorted(kept)]


def _visible_enough(numbers: list[int], masks: list[np.ndarray], bodies: list[_Body], number: int, main: _Body) -> bool:
    seen = masks[number].copy()
    for other in numbers:
        if other > number:
            seen &= ~masks[other]
    if bodies[number] is main:
        return bool(seen.sum() >= _LEAST_VISIBLE_MAIN * masks[number].sum())
    whole = max(1, int((bodies[number].trace.coverage > 0.5).sum()))
    return bool(seen.sum() >= max(60, _LEAST_VISIBLE * whole))


# ---------------------------------------------------------------------------------------------------------------- light


def _shadow_depth(place: Place) -> np.ndarray:
    """(3,) share of the light on the floor that a shadow takes away: what is direct, and some of the rest."""
    facing = place.light.direct * max(0.3, float(place.light.towards[2 if place.camera is None else 1]))
    return 0.15 + 0.85 * facing / (facing + place.light.ambient)


def _darken(canvas: np.ndarray, shadow: np.ndarray, place: Place) -> None:
    """Take the shadow (h, w), between 0 and 1, off the canvas (3, h, w)."""
    rows, columns = np.flatnonzero(shadow.max(1) > 0.004), np.flatnonzero(shadow.max(0) > 0.004)
    if len(rows):
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        canvas[:, *window] *= 1 - shadow[window] * _shadow_depth(place)[:, None, None]


def _shadow(body: _Body, place: Place, height: int, width: int) -> np.ndarray:
    """(h, w) shadow of the body on what it stands or lies on, between 0 and 1, soft edges included."""
    mask = Image.fromarray((_coverage(body, height, width) * 255).astype(np.uint8))
    silhouette = _drop_shadow(mask, body, place.light) if place.camera is None else _cast_shadow(mask, body, place)
    shadow = _soften(silhouette, max(1.0, place.light.softness * body.scale))
    if place.camera is None:
        return shadow
    _add_contact_shadow(shadow, body, place)
    shadow[: max(0, place.floor_top - height // 8)] *= 0.35  # a wall behind catches less of it, the sky nothing
    shadow[place.stuff < GROUND] = 0
    return shadow


def _soften(mask: Image.Image, radius: float) -> np.ndarray:
    """(h, w) mask between 0 and 1, blurred by `radius` pixels, at half its size since a blur keeps nothing finer."""
    half = mask.reduce(2).filter(ImageFilter.GaussianBlur(radius / 2))
    return np.asarray(half.resize(mask.size, Image.Resampling.BILINEAR), np.float32) / 255


def _drop_shadow(mask: Image.Image, body: _Body, light: Light) -> Image.Image:
    """Seen from above, a body of about its own radius in height shades a strip beside it."""
    reach = body.scale * 0.6 / max(0.4, float(light.towards[2]))
    dark = mask
    for share in (0.25, 0.6, 1.0):
        offset = (1, 0, float(light.towards[0]) * reach * share, 0, 1, -float(light.towards[1]) * reach * share)
        dark = ImageChops.lighter(dark, mask.transform(mask.size, Image.Transform.AFFINE, offset))
    return dark


def _cast_shadow(mask: Image.Image, body: _Body, place: Place) -> Image.Image:
    """Lay the silhouette down on the floor, away from the light."""
    assert place.camera is not None
    x, y, z = (float(part) for part in place.light.towards)
    squash = z / y * math.sin(place.camera.elevation(body.base))
    squash = math.copysign(max(0.14, abs(squash)), z)  # a body has a thickness, so its shadow is no line
    lean = x / y
    base = body.base - 0.06 * body.scale
    # The shadow at (column, row) comes from the height up = (base - row) / squash of the silhouette.
    offset = (1, -lean / squash, lean * base / squash, 0, 1 / squash, base - base / squash)
    return mask.transform(mask.size, Image.Transform.AFFINE, offset, Image.Resampling.BILINEAR)


def _add_contact_shadow(shadow: np.ndarray, body: _Body, place: Place) -> None:
    """Darken a soft ellipse of `shadow` (h, w) where the body meets the floor."""
    assert place.camera is not None
    rows, columns = np.divmod(body.trace.pixel, body.side)
    lowest = columns[rows > rows.max() - max(2, int(0.18 * body.scale))]
    centre, half = float(body.left + (lowest.min() + lowest.max()) / 2), float((lowest.max() - lowest.min() + 4) / 2)
    depth = max(2.0, half * math.sin(place.camera.elevation(body.base)))
    top, left = max(0, int(body.base - 3 * depth)), max(0, int(centre - 2 * half))
    patch = shadow[top : int(body.base + 3 * depth), left : max(left, int(centre + 2 * half))]
    row, column = np.ogrid[top : top + patch.shape[0], left : left + patch.shape[1]]
    across = ((column - centre) / (1.15 * half)).astype(np.float32) ** 2
    distance = across + ((row - body.base + 0.6 * depth) / (1.3 * depth)).astype(np.float32) ** 2
    np.maximum(patch, 0.95 * np.exp(-distance * np.sqrt(distance)), out=patch)


def _draw(canvas: np.ndarray, owner: np.ndarray, body: _Body, place: Place, number: int) -> None:
    """Paint the body over `canvas` (3, h, w) and write its number into `owner` (h, w)."""
    _, height, width = canvas.shape
    row, column = np.divmod(body.trace.pixel, body.side)
    row, column = row + body.top, column + body.left
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    row, column, coverage = row[inside], column[inside], body.trace.coverage[inside]
    colour = _shade(body, place)[:, inside]
    behind = canvas[:, row, column]
    canvas[:, row, column] = behind + coverage * (colour - behind)
    solid = coverage > 0.5
    owner[row[solid], column[solid]] = number


def _shade(body: _Body, place: Place) -> np.ndarray:
    """(3, n) light that the traced points send to the camera."""
    light, normal, point = place.light, body.trace.normal, body.trace.point
    albedo = _open_top(body, body.pattern(point[0], point[1], point[2], 1 / body.scale))
    facing = np.clip((rotate(light.towards[None], normal)[0] + 0.08) / 1.08, 0, None)
    low = np.clip((body.base - body.top - body.trace.pixel // body.side) / (0.7 * body.scale), 0, 1) if place.camera else 1.0
    sky = (0.62 + 0.38 * normal[1]) * (0.55 + 0.45 * low)  # the floor takes the sky away from what is near it
    colour = albedo * (light.ambient[:, None] * sky + light.direct[:, None] * facing * (0.75 + 0.25 * low))
    if body.gloss:
        half = light.towards + np.float32([0, 0, 1])
        half /= np.sqrt((half * half).sum())
        shine = np.clip(rotate(half[None], normal)[0], 0, 1) ** (12 + 70 * body.gloss)
        rim = (1 - np.clip(normal[2], 0, 1)) ** 4
        seen = np.clip(4 * normal[2], 0, 1)  # grazing edges mirror nothing worth drawing, and would sparkle
        colour = colour + body.gloss * seen * (light.direct[:, None] * shine + 0.35 * light.ambient[:, None] * rim)
    return colour


def _open_top(body: _Body, albedo: np.ndarray) -> np.ndarray:
    """A vase is dark inside its mouth; a bottle has a cap."""
    x, y, z = body.trace.point
    if body.kind == "vase":
        reach, mouth = np.sqrt(x * x + z * z), y > 0.93
        if mouth.any():
            albedo = np.where(mouth & (reach < 0.8 * reach[mouth].max()), albedo * 0.08, albedo)
    elif body.kind == "bottle":
        albedo = np.where(y > 0.78, albedo[:, y > 0.78].mean(1, keepdims=True) * 0.4 if (y > 0.78).any() else albedo, albedo)
    return albedo
