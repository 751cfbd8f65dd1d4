"""What a set of shards is like: classes, sizes, bytes, mean and standard deviation; counted, and measured on a random sample."""

import functools
import io
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.images import DECODER_ERRORS, ImageError, check_image
from data_tools.jobs import run_jobs
from simmim_scale.data.shards import NO_LABEL, ShardIndex

_CHUNK = 64  # images a job
_THUMBNAIL = 128  # pixels; the largest side of a picture of the sample sheet


@dataclass(frozen=True)
class Spread:
    """Smallest, quartiles, largest and mean of some numbers."""

    least: float
    quarter: float
    median: float
    three_quarters: float
    largest: float
    mean: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        return cls(*(float(value) for value in np.percentile(values, (0, 25, 50, 75, 100))), float(np.mean(values)))


@dataclass(frozen=True, eq=False)
class Pictures:
    """What was measured on some images.

    Args:
        sizes: (n, 2) width and height in pixels.
        count: Values summed up, per channel.
        sums: (3,) sums of RGB in [0, 1]; `squares` of their squares.
        broken: Images that did not decode.
    """

    sizes: np.ndarray
    count: int
    sums: np.ndarray
    squares: np.ndarray
    broken: int

    @property
    def mean(self) -> np.ndarray:
        """(3,) mean of R, G, B in [0, 1] over all pixels."""
        return self.sums / max(1, self.count)

    @property
    def std(self) -> np.ndarray:
        """(3,) standard deviation over all pixels."""
        return np.sqrt(np.maximum(self.squares / max(1, self.count) - self.mean**2, 0))


@dataclass(frozen=True, eq=False)
class Stats:
    """Facts of a set. `class_counts` follows the class names; `pictures` were measured on a sample of the images."""

    samples: int
    shards: int
    bytes: int
    classes: tuple[str, ...] | None
    class_counts: np.ndarray
    unlabelled: int
    image_bytes: np.ndarray
    pictures: Pictures

    def as_json(self) -> dict[str, Any]:
        """Numbers for other programs."""
        sizes = self.pictures.sizes
        return {
            "samples": self.samples,
            "shards": self.shards,
            "bytes": self.bytes,
            "unlabelled": self.unlabelled,
            "classes": None if self.classes is None else dict(zip(self.classes, self.class_counts.tolist(), strict=True)),
            "image_bytes": asdict(Spread.of(self.image_bytes)),
            "measured_images": len(sizes),
            "broken_images": self.pictures.broken,
            "width": asdict(Spread.of(sizes[:, 0])) if len(sizes) else None,
            "height": asdict(Spread.of(sizes[:, 1])) if len(sizes) else None,
            "mean": self.pictures.mean.round(6).tolist(),
            "std": self.pictures.std.round(6).tolist(),
        }


def measure(
    index: ShardIndex, *, images: int = 5000, seed: int = 0, jobs: int = 1, progress: Callable[[int], None] | None = None
) -> Stats:
    """Measure a set.

    Args:
        images: How many random images are decoded for sizes, mean and standard deviation; 0: all. Counts and bytes are exact.
        progress: Called with numbers of images decoded.
    """
    chosen = choose(len(index), images or len(index), seed)
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    found = []
    for chunk in run_jobs(functools.partial(_measure_chunk, index), chunks, jobs):
        found.append(chunk)
        if progress:
            progress(len(chunk.sizes) + chunk.broken)
    labels = np.asarray(index.table["label"])
    return Stats(
        samples=len(index),
        shards=len(index.shards),
        bytes=sum(shard.bytes for shard in index.shards),
        classes=index.classes,
        class_counts=np.bincount(labels[labels != NO_LABEL], minlength=len(index.classes or ())),
        unlabelled=int((labels == NO_LABEL).sum()),
        image_bytes=np.asarray(index.table["image_bytes"]),
        pictures=_add_up(found),
    )


def choose(count: int, wanted: int, seed: int) -> np.ndarray:
    """Sorted numbers of `wanted` random samples out of `count`."""
    if wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))


def thumbnails(index: ShardIndex, samples: np.ndarray) -> list[tuple[Image.Image, str]]:
    """(small RGB picture, class name or key) of each sample that decodes."""
    found = []
    for sample in samples:
        try:
            picture = open_picture(index, int(sample))
        except DECODER_ERRORS:
            continue
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        label = index.locate(int(sample)).label
        name = index.key(int(sample)) if label == NO_LABEL or index.classes is None else index.classes[label]
        found.append((picture, name))
    return found


def _measure_chunk(index: ShardIndex, samples: np.ndarray) -> Pictures:
    sizes, sums, squares, count, broken = [], np.zeros(3), np.zeros(3), 0, 0
    for sample in samples:
        try:
            pixels = np.asarray(open_picture(index, int(sample)), dtype=np.float32) / 255
        except DECODER_ERRORS:
            broken += 1
            continue
        flat = pixels.reshape(-1, 3)
        sizes.append((pixels.shape[1], pixels.shape[0]))
        sums += flat.sum(0, dtype=np.float64)
        squares += (flat * flat).sum(0, dtype=np.float64)
        count += len(flat)
    return Pictures(np.array(sizes, dtype=np.int64).reshape(-1, 2), count, sums, squares, broken)


def open_picture(index: ShardIndex, sample: int) -> Image.Image:
    """An image as RGB.

    Raises:
        One of DECODER_ERRORS: It does not decode.
    """
    where = index.locate(sample)
    with open(index.shard_path(where.shard), "rb") as file:
        file.seek(where.image_offset)
        data = file.read(where.image_bytes)
    try:
        check_image(data, "header")  # too many pixels are not even opened
    except ImageError as error:
        raise ValueError(str(error)) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")


def _add_up(parts: list[Pictures]) -> Pictures:
    return Pictures(
        sizes=np.concatenate([part.sizes for part in parts]),
        count=sum(part.count for part in parts),
        sums=np.sum([part.sums for part in parts], axis=0),
        squares=np.sum([part.squares for part in parts], axis=0),
        broken=sum(part.broken for part in parts),
    )


def default_output(directory: Path) -> Path:
    """Beside the shards: nothing but shards and index belongs among them."""
    absolute = directory.resolve()
    return absolute.with_name(f"{absolute.name}_stats")
