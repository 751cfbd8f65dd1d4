"""Bodies given by signed distance functions, and the tracing of parallel rays onto them.

A body is about one unit in radius around the origin, y up. Axes of the view: x right, y up, z towards the camera.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_tools.synth.noise import smooth_step

Distance = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

REACH = 1.25  # no body is farther from the origin than this
_STEPS = 48
_HIT = 2e-3
_BLOCK = 4  # pixels


class Solid(NamedTuple):
    """One kind of body. `sample(rng)` draws its proportions; an upright kind stands on its base, others lie in any pose."""

    sample: Callable[[np.random.Generator], Distance]
    upright: bool


class Trace(NamedTuple):
    """Where rays met a body, one row a pixel: flat pixel number, coverage in (0, 1], and points and normals.

    `point` (3, n) is in the body's own axes, `normal` (3, n) in those of the view, `depth` (n,) grows away from the camera.
    """

    pixel: np.ndarray
    coverage: np.ndarray
    point: np.ndarray
    normal: np.ndarray
    depth: np.ndarray


def _ball(rng: np.random.Generator) -> Distance:
    del rng
    return lambda x, y, z: np.sqrt(x * x + y * y + z * z) - 1


def _box(rng: np.random.Generator) -> Distance:
    a, b, c = rng.uniform(0.45, 0.72, 3).astype(np.float32)
    edge = np.float32(rng.uniform(0.02, 0.1))

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        x, y, z = np.abs(x) - a, np.abs(y) - b, np.abs(z) - c
        inside = np.minimum(np.maximum(np.maximum(x, y), z), 0)
        x, y, z = np.maximum(x, 0), np.maximum(y, 0), np.maximum(z, 0)
        return inside + np.sqrt(x * x + y * y + z * z) - edge

    return distance


def _turned(radius: Callable[[np.ndarray], np.ndarray], half_height: float, edge: float, safety: float) -> Distance:
    """Body of revolution about y. `safety` < 1 shortens the steps, since the distance to a sloping profile is overestimated."""

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        side = (np.sqrt(x * x + z * z) - radius(y)) * safety + edge
        cap = np.abs(y) - (half_height - edge)
        outside_side, outside_cap = np.maximum(side, 0), np.maximum(cap, 0)
        return np.minimum(np.maximum(side, cap), 0) + np.sqrt(outside_side * outside_side + outside_cap * outside_cap) - edge

    return distance


def _can(rng: np.random.Generator) -> Distance:
    radius = np.float32(rng.uniform(0.5, 0.7))
    return _turned(lambda y: radius, float(rng.uniform(0.55, 0.9)), 0.05, 1.0)


def _cone(rng: np.random.Generator) -> Distance:
    base = np.float32(rng.uniform(0.6, 0.75))
    return _turned(lambda y: base * (0.52 - 0.5 * np.clip(y / 0.9, -1, 1)), 0.9, 0.03, 0.85)


def _vase(rng: np.random.Generator) -> Distance:
    middle, swing = np.float32(rng.uniform(0.36, 0.46)), np.float32(rng.uniform(0.14, 0.24))
    shift, bend = np.float32(rng.uniform(0.1, 0.5)), np.float32(rng.uniform(2.6, 3.6))
    return _turned(lambda y: middle + swing * np.cos(bend * (np.clip(y, -1, 1) + shift)), 0.95, 0.04, 0.75)


def _bottle(rng: np.random.Generator) -> Distance:
    body, neck = np.float32(rng.uniform(0.38, 0.5)), np.float32(rng.uniform(0.13, 0.19))
    shoulder = float(rng.uniform(-0.05, 0.25))
    return _turned(lambda y: body + (neck - body) * smooth_step(shoulder, shoulder + 0.5, y), 1.0, 0.04, 0.6)


def _ring(rng: np.random.Generator) -> Distance:
    tube = np.float32(rng.uniform(0.22, 0.33))
    radius = np.float32(1 - tube)

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        across = np.sqrt(x * x + y * y) - radius
        return np.sqrt(across * across + z * z) - tube

    return distance


def _folded(x: np.ndarray, y: np.ndarray, sides: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn (x, y) into the sector around +x of a figure with `sides`-fold symmetry."""
    sector = np.float32(2 * np.pi / sides)
    angle, reach = np.arctan2(y, x), np.sqrt(x * x + y * y)
    angle = angle - sector * np.round(angle / sector)
    return reach * np.cos(angle), reach * np.sin(angle)


def _star(rng: np.random.Generator) -> Distance:
    points, inner = int(rng.integers(5, 7)), float(rng.uniform(0.45, 0.6))
    thick = np.float32(rng.uniform(0.16, 0.24))
    tip = np.array([1.0, 0.0])
    notch = inner * np.array([np.cos(np.pi / points), np.sin(np.pi / points)])
    along = (notch - tip) / np.linalg.norm(notch - tip)
    out_x, out_y = np.float32(along[1]), np.float32(-along[0])  # outward normal of the edge from tip to notch

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        fold_x, fold_y = _folded(x, y, points)
        edge = (fold_x - 1) * out_x + np.abs(fold_y) * out_y
        pillow = thick * np.sqrt(np.clip(-edge * 4, 0.02, 1))  # thick in the middle, thin at the rim
        return np.maximum(edge, np.abs(z) - pillow) * np.float32(0.55)

    return distance


def _gem(rng: np.random.Generator) -> Distance:
    sides = int(rng.integers(5, 9))
    crown, pavilion = rng.uniform(0.45, 0.75), rng.uniform(0.75, 1.0)
    table = np.float32(rng.uniform(0.3, 0.42))
    up, down = np.float32([np.cos(crown), np.sin(crown)]), np.float32([np.cos(pavilion), np.sin(pavilion)])

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        reach = _folded(x, z, sides)[0] - np.float32(0.9)
        upper = reach * up[1] + (y - 0.05) * up[0]
        lower = reach * down[0] - (y + 0.05) * down[1] * np.float32(0.8)
        return np.maximum(np.maximum(upper, lower), np.maximum(y - table, reach)) * np.float32(0.95)

    return distance


def _cushion(rng: np.random.Generator) -> Distance:
    depth, half = np.float32(rng.uniform(0.75, 0.88)), np.float32(rng.uniform(0.3, 0.42))

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        rim_x, rim_y = np.clip(1 - (x / 0.88) ** 2, 0, 1), np.clip(1 - (y / depth) ** 2, 0, 1)
        pillow = half * np.sqrt(rim_x * rim_y + 1e-4)
        return np.maximum(np.maximum(np.abs(x) - 0.88, np.abs(y) - depth), np.abs(z) - pillow) * np.float32(0.55)

    return distance


SOLIDS = {
    "ball": Solid(_ball, upright=False),
    "bottle": Solid(_bottle, upright=True),
    "box": Solid(_box, upright=True),
    "can": Solid(_can, upright=True),
    "cone": Solid(_cone, upright=True),
    "cushion": Solid(_cushion, upright=False),
    "gem": Solid(_gem, upright=False),
    "ring": Solid(_ring, upright=False),
    "star": Solid(_star, upright=False),
    "vase": Solid(_vase, upright=True),
}


def turn(axis: int, angle: float) -> np.ndarray:
    """(3, 3) rotation by `angle` radians about axis 0, 1 or 2."""
    first, second = ((1, 2), (2, 0), (0, 1))[axis]
    matrix = np.eye(3, dtype=np.float32)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def rotate(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """`matrix` (k, 3) times `vectors` (3, n), without the threads that a matrix library would start for it."""
    return matrix[:, :1] * vectors[0] + matrix[:, 1:2] * vectors[1] + matrix[:, 2:3] * vectors[2]


def trace(distance: Distance, pose: np.ndarray, side: int, scale: float) -> Trace:
    """Send one parallel ray through each pixel of a side x side picture centred on the body.

    `pose` (3, 3) turns the body's axes into those of the view; `scale` is pixels per unit. Blocks of pixels travel together
    until the body is as near as they are wide; most never come that near.
    """
    heading = -pose[2]  # the camera looks along -z of the view
    blocks = -(-side // _BLOCK)
    row, column = np.divmod(np.arange(blocks * blocks), blocks)
    middle = (_BLOCK - 1) / 2
    travel = _approach(
        distance, _origin(pose, row * _BLOCK + middle, column * _BLOCK + middle, side, scale), heading, 0.88 * _BLOCK / scale
    )
    near = np.flatnonzero(np.isfinite(travel))
    inner_row, inner_column = np.divmod(np.arange(_BLOCK * _BLOCK), _BLOCK)
    row = (row[near, None] * _BLOCK + inner_row).ravel()
    column = (column[near, None] * _BLOCK + inner_column).ravel()
    origin = _origin(pose, row, column, side, scale)
    travel, nearest = _march(distance, origin, heading, travel[near].repeat(_BLOCK * _BLOCK))
    coverage = np.clip(1.25 - nearest * np.float32(scale), 0, 1)  # a near miss covers its pixel partly
    seen = np.flatnonzero((coverage > 0) & (row < side) & (column < side))
    point = origin[:, seen] + heading[:, None] * travel[seen]
    pixel = row[seen] * side + column[seen]
    return Trace(pixel, coverage[seen], point, rotate(pose, _gradient(distance, point)), travel[seen])


def _origin(pose: np.ndarray, row: np.ndarray, column: np.ndarray, side: int, scale: float) -> np.ndarray:
    """(3, n) where the rays through the pixels start, in the body's axes."""
    centre = (side - 1) / 2
    view = np.stack([(column - centre) / scale, (centre - row) / scale, np.full(len(row), REACH)])
    return rotate(pose.T, view.astype(np.float32))


def _approach(distance: Distance, origin: np.ndarray, heading: np.ndarray, radius: float) -> np.ndarray:
    """(n,) how far a ray travels until the body is nearer than `radius`; infinite if that never happens."""
    travel = np.full(origin.shape[1], np.inf, np.float32)
    active, here = np.arange(origin.shape[1]), np.zeros(origin.shape[1], np.float32)
    for _ in range(_STEPS):
        gap = distance(*(origin[:, active] + heading[:, None] * here))
        arrived = gap < radius
        travel[active[arrived]] = here[arrived]
        here = here + (gap - np.float32(0.62 * radius))  # which leaves the rays at a block's corners outside the body
        going = ~arrived & (here < 2 * REACH)
        active, here = active[going], here[going]
        if not len(active):
            break
    return travel


def _march(distance: Distance, origin: np.ndarray, heading: np.ndarray, here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sphere tracing from `here` (n,) on: (travelled length at the nearest approach, that distance), both (n,)."""
    travel, nearest = here.copy(), np.full(len(here), np.inf, np.float32)
    active, start = np.arange(len(here)), origin
    best, place = nearest, travel  # the same for the rays that still travel
    for step in range(_STEPS):
        gap = distance(*(start + heading[:, None] * here))
        place = np.where(gap < best, here, place)
        best = np.minimum(best, gap)
        here = here + np.maximum(gap, np.float32(1e-3))
        if step % 3 == 2 or step == _STEPS - 1:
            nearest[active], travel[active] = best, place
            going = np.flatnonzero((gap > _HIT) & (here < 2 * REACH))
            active, here, start, best, place = active[going], here[going], start[:, going], best[going], place[going]
            if not len(active):
                break
    return travel, nearest


def _gradient(distance: Distance, point: np.ndarray) -> np.ndarray:
    """(3, n) unit normals, from four samples at the corners of a tetrahedron."""
    normal = np.zeros_like(point)
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        offset = np.float32(corner)[:, None]
        normal += offset * distance(*(point + offset * np.float32(4e-3)))
    return normal / np.maximum(np.sqrt((normal * normal).sum(0)), 1e-6)
