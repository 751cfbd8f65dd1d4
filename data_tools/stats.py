"""What a set of shards is like: classes, sizes, bytes, mean and standard deviation; counted, and measured on a random sample.

Images are decoded as training does, so that mean and std are those of the pixels that it sees.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.jobs import run_jobs
from simmim_scale.data.decode import DecodeError, decode_image
from simmim_scale.data.shards import NO_LABEL, DamageError, ShardIndex

_CHUNK = 64  # images a job
_THUMBNAIL = 128  # pixels; the largest side of a picture of the sample sheet
_MOST_CAUSES = 20  # of images that do not decode; each may have its own


@dataclass(frozen=True)
class Channels:
    """What training takes images for.

    Args:
        count: model.in_chans: 3 for RGB, 1 for luma, others for images that have so many bands.
        band_range: data.band_range: values of NPY and multi-band TIFF files that become 0 and 255; None: those of 8 or 16 bits.
    """

    count: int = 3
    band_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--in-chans: at least 1 channel, got {self.count}.")
        if self.band_range is not None and not self.band_range[0] < self.band_range[1]:
            raise ValueError(f"--band-range: LOW HIGH with LOW < HIGH, got {self.band_range}. Swap the values.")


RGB = Channels()


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
        sums: (c,) sums of the channels in [0, 1]; `squares` of their squares.
        broken: Images that did not decode, by the cause.
    """

    sizes: np.ndarray
    count: int
    sums: np.ndarray
    squares: np.ndarray
    broken: Counter[str]

    @property
    def mean(self) -> np.ndarray:
        """(c,) mean of the channels in [0, 1] over all pixels."""
        return self.sums / max(1, self.count)

    @property
    def std(self) -> np.ndarray:
        """(c,) standard deviation over all pixels."""
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
            "broken_images": self.pictures.broken.total(),
            "broken_causes": dict(self.pictures.broken.most_common(_MOST_CAUSES)),
            "width": asdict(Spread.of(sizes[:, 0])) if len(sizes) else None,
            "height": asdict(Spread.of(sizes[:, 1])) if len(sizes) else None,
            "mean": self.pictures.mean.round(6).tolist() if len(sizes) else None,
            "std": self.pictures.std.round(6).tolist() if len(sizes) else None,
        }


def measure(
    index: ShardIndex,
    *,
    images: int = 5000,
    channels: Channels = RGB,
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Stats:
    """Measure a set.

    Args:
        images: How many random images are decoded for sizes, mean and standard deviation; 0: all. Counts and bytes are exact.
        progress: Called with numbers of images decoded.

    Raises:
        DamageError: A shard cannot be read.
    """
    chosen = choose(len(index), images or len(index), seed)
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    found = []
    for chunk in run_jobs(functools.partial(_measure_chunk, index, channels), chunks, jobs):
        found.append(chunk)
        if progress:
            progress(len(chunk.sizes) + chunk.broken.total())
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


def thumbnails(index: ShardIndex, samples: np.ndarray, *, channels: Channels = RGB) -> list[tuple[Image.Image, str]]:
    """(small RGB picture, class name or key) of each sample that decodes: its first three channels, or the first as grey."""
    found = []
    for sample in samples.tolist():
        try:
            pixels = open_pixels(index, sample, channels=channels)
        except DecodeError:
            continue
        shown = pixels[..., :3] if channels.count >= 3 else pixels[..., 0]
        picture = Image.fromarray(np.ascontiguousarray(shown)).convert("RGB")
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        label = index.locate(sample).label
        name = index.key(sample) if label == NO_LABEL or index.classes is None else index.classes[label]
        found.append((picture, name))
    return found


def _measure_chunk(index: ShardIndex, channels: Channels, samples: np.ndarray) -> Pictures:
    sizes, sums, squares, count, broken = [], np.zeros(channels.count), np.zeros(channels.count), 0, Counter[str]()
    for sample in samples.tolist():
        try:
            pixels = open_pixels(index, sample, channels=channels).astype(np.float32) / 255
        except DecodeError as error:
            broken[str(error)] += 1
            continue
        flat = pixels.reshape(-1, channels.count)
        sizes.append((pixels.shape[1], pixels.shape[0]))
        sums += flat.sum(0, dtype=np.float64)
        squares += (flat * flat).sum(0, dtype=np.float64)
        count += len(flat)
    return Pictures(np.array(sizes, dtype=np.int64).reshape(-1, 2), count, sums, squares, broken)


def open_pixels(index: ShardIndex, sample: int, *, channels: Channels = RGB) -> np.ndarray:
    """(h, w, c) uint8, as training decodes it.

    Raises:
        DecodeError: It does not decode.
        DamageError: The shard cannot be read.
        ValueError: A multi-band TIFF, and tifffile is not installed.
    """
    where = index.locate(sample)
    path = index.shard_path(where.shard)
    try:
        with open(path, "rb") as file:
            file.seek(where.image_offset)
            data = file.read(where.image_bytes)
    except OSError as error:
        raise DamageError(
            f"{path}: cannot be read ({error.strerror})", "Repair the disk or the rights, or copy the shard again."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large but allowed images, odd metadata
            return decode_image(data, in_chans=channels.count, band_range=channels.band_range)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error


def _add_up(parts: list[Pictures]) -> Pictures:
    return Pictures(
        sizes=np.concatenate([part.sizes for part in parts]),
        count=sum(part.count for part in parts),
        sums=np.sum([part.sums for part in parts], axis=0),
        squares=np.sum([part.squares for part in parts], axis=0),
        broken=sum((part.broken for part in parts), Counter()),
    )


def default_output(directory: Path) -> Path:
    """Beside the shards: nothing but shards and index belongs among them."""
    absolute = directory.resolve()
    return absolute.with_name(f"{absolute.name}_stats")
