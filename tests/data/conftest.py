"""Small directories of shards with pictures whose content says which sample they are."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim_scale.data.shards import NO_LABEL, ROW, ShardFile, ShardIndex

MakeShards = Callable[..., ShardIndex]


def picture(sample: int, *, height: int = 40, width: int = 56) -> np.ndarray:
    """Smooth colours that differ from sample to sample, (h, w, 3) uint8."""
    rng = np.random.default_rng(sample)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def write_shards(
    directory: Path, images: Sequence[bytes], *, per_shard: int = 7, labels: Sequence[int] | None = None, extension: str = "jpg"
) -> ShardIndex:
    """Writes images as tars with their index, as the data tools do, but from the description of the format alone."""
    directory.mkdir(parents=True, exist_ok=True)
    shards, rows = [], []
    for number, start in enumerate(range(0, len(images), per_shard)):
        path = directory / f"part-{number:05d}.tar"
        chunk = range(start, min(start + per_shard, len(images)))
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in chunk:
                offset, label = tar.offset, NO_LABEL if labels is None else labels[sample]
                members = {extension: images[sample], "json": f'{{"source": "image {sample}"}}'.encode()}
                if labels is not None:
                    members["cls"] = str(label).encode()
                for name, data in members.items():
                    info = tarfile.TarInfo(f"some/sample{sample:05d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                rows.append((offset, tar.offset - offset, 512, len(images[sample]), label))
        content = path.read_bytes()
        shards.append(ShardFile(path.name, len(chunk), len(content), hashlib.sha256(content).hexdigest()))
    classes = None if labels is None else tuple(f"class {label}" for label in range(max(labels) + 1))
    index = ShardIndex(directory, tuple(shards), np.array(rows, dtype=ROW), classes=classes, source={"kind": "test"})
    index.write()
    return ShardIndex.load(directory)


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """make_shards(images, name="set", ...) -> ShardIndex; an int stands for so many pictures."""

    def make(images: int | Sequence[bytes], *, name: str = "set", **options: object) -> ShardIndex:
        if isinstance(images, int):
            images = [encode(picture(sample)) for sample in range(images)]
        return write_shards(tmp_path / name, images, **options)

    return make


@pytest.fixture
def make_picture() -> Callable[..., np.ndarray]:
    return picture


@pytest.fixture
def make_file() -> Callable[..., bytes]:
    """make_file(pixels, "PNG", ...) -> the bytes of an image file."""
    return encode
