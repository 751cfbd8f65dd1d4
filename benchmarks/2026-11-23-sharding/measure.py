"""How fast images are packed, and what bounds it: python measure.py DIRECTORY [IMAGES].

Writes JPEGs of about 110 kB (500x375), packs them with each check and number of jobs, several times, and beside it, in the same
run, measures what the steps cost alone: reading, sha256, writing with fsync, the checks. Needs three times their bytes of disk.
"""

import functools
import hashlib
import io
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.images import check_image
from data_tools.plan import ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.folder import list_folder

WIDTH, HEIGHT, BYTES = 500, 375, 110_000


def photo(seed: int) -> bytes:
    """A JPEG of about 110 kB: smooth colours with as much grain as it takes."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth, np.float32) + rng.normal(0, 11.5, (HEIGHT, WIDTH, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def steps(files: list[Path], directory: Path) -> dict[str, float]:
    """Microseconds an image of each step alone, one process, files in the page cache."""
    data = [path.read_bytes() for path in files]
    each = 1e6 / len(files)
    work: dict[str, Callable[[], object]] = {
        "read": lambda: [path.read_bytes() for path in files],
        "sha256": lambda: [hashlib.sha256(item).digest() for item in data],
        "write and fsync": lambda: write_synced(directory / "written", data),
        "check header": lambda: [check_image(item, "header") for item in data],
        "check structure": lambda: [check_image(item, "structure") for item in data],
        "check full": lambda: [check_image(item, "full") for item in data[:200]],
    }
    scale = {"check full": len(files) / min(200, len(files))}
    return {name: min(seconds(step) for _ in range(3)) * each * scale.get(name, 1) for name, step in work.items()}


def write_synced(path: Path, data: list[bytes]) -> None:
    with open(path, "wb") as file:
        for item in data:
            file.write(item)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def main() -> None:
    """Measure and say so."""
    directory, images = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 12_000
    source = directory / "photos"
    distinct = [photo(seed) for seed in range(100)]
    for number in range(images):
        path = source / f"c{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(distinct[number % len(distinct)])
    out = sys.stdout.write
    out(f"{images} images, {np.mean([len(item) for item in distinct]) / 1000:.1f} kB each\n")
    listed = list_folder(source)
    for name, cost in steps([Path(s.image.place) for s in listed.samples[:1000]], directory).items():
        out(f"{name:>16}: {cost:7.1f} us an image\n")
    for jobs, check in ((1, "structure"), (2, "structure"), (2, "header"), (2, "full")):
        rates, costs, cores = [], [], []
        for _ in range(2 if check == "full" else 3):
            shutil.rmtree(directory / "set", ignore_errors=True)
            options, before = ShardOptions(check=check), cpu_seconds()
            took = seconds(functools.partial(write_shards, list_folder(source), directory / "set", options, jobs=jobs))
            rates.append(images / took)
            costs.append((cpu_seconds() - before) / images * 1e6)
            cores.append((cpu_seconds() - before) / took)
        shown = ", ".join(f"{rate:,.0f}" for rate in rates)
        out(f"{jobs} jobs, check {check:>9}: {shown} images/s; {min(costs):.0f} us of CPU an image, {max(cores):.1f} cores got\n")


if __name__ == "__main__":
    main()
