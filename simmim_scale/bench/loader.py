"""`simmim bench loader`: what one image costs from shard to device, stage by stage, and what the whole loader brings.

The other side of every comparison is what most programs do: torchvision's ImageFolder, PIL, RandomResizedCrop, flip, float32 and
normalisation. Both sides get the same files and take turns within the run, so that a busy machine slows both.
"""

import io
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from simmim_scale.config.schema import Config
from simmim_scale.data.dataset import Batch, stack
from simmim_scale.data.decode import DecodeError, decode_image
from simmim_scale.data.loader import build_training_loader, shard_sizes
from simmim_scale.data.order import SampleOrder
from simmim_scale.data.remote_index import open_index
from simmim_scale.data.shards import ShardIndex
from simmim_scale.data.stream import ShardReader
from simmim_scale.data.views import PretrainingView

STAGES = ("reading", "draws", "decoding", "views", "batching", "transfer")
CHUNK = 16  # images between two turns
PAGE = 4096  # bytes
PIL_ERRORS = (OSError, SyntaxError, ValueError, struct.error)


@dataclass(frozen=True)
class BenchOptions:
    """How much to measure: `images` different ones, `turns` of each stage, `workers` processes for the whole loaders, and
    `batches` of `batch` images from each of them in every one of `loader_turns`. 128 images are a GPU's share of a step in the
    published training (2048 on 16 GPUs)."""

    images: int = 1024
    turns: int = 32
    workers: int = 2
    batch: int = 128
    batches: int = 16
    loader_turns: int = 3


def bench_loader(config: Config, options: BenchOptions, *, device: torch.device) -> dict[str, Any]:
    """Measures; returns what `simmim bench loader --json` prints.

    Args:
        config: Names the shards, the views and the size of the model's input.
        options: How much to measure.
        device: Where batches go.

    Raises:
        ValueError: No shards, no image among the first ones that decodes, or images that PIL does not take.
    """
    if not config.data.train:
        raise ValueError("data.train: the shards to measure on are not set. Give data.train=DIR.")
    if config.model.in_chans not in (1, 3):
        raise ValueError(f"model.in_chans: torchvision's side of the comparison takes 1 or 3, got {config.model.in_chans}.")
    index = open_index(config.data.train, config.data.remote)
    reader = ShardReader(index)  # one for all: what it has read once is mapped, as in every epoch after the first
    samples, files = _choose_files(reader, options.images, config.model.in_chans)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # per core
    try:
        stages, baselines = _measure_stages(config, reader, samples, files, options, device)
    finally:
        torch.set_num_threads(before)
    return {
        "images": len(files),
        "mean_bytes": statistics.mean(map(len, files)),
        "mean_pixels": statistics.mean(_num_pixels(data) for data in files),
        "image_size": list(config.model.image_size),
        "device": str(device),
        "stages": _describe_stages(stages),
        "per_core": _compare_per_core(stages, baselines),
        "whole_loader": _measure_loaders(config, index, files, options),
    }


def _choose_files(reader: ShardReader, count: int, in_chans: int) -> tuple[list[int], list[bytes]]:
    """Samples from all over the set, and the bytes of their images; those that one of the sides does not take are left out."""
    index = reader.index
    samples, files = [], []
    for sample in SampleOrder(shard_sizes(index), seed=0).ids(0, min(count, len(index))).tolist():
        data = bytes(reader.read_image(sample))
        try:
            decode_image(data, in_chans=in_chans)
            _open_pil(data, in_chans)
        except (DecodeError, *PIL_ERRORS):
            continue
        samples.append(sample)
        files.append(data)
    if not files:
        raise ValueError(f"{index.directory}: none of the first {count} images decodes. Check the set with `data_tools verify`.")
    return samples, files


def _num_pixels(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return image.width * image.height


# ------------------------------------------------------------------------------------------------------------- per core


class _Stopwatch:
    """Seconds of processor time per image, one value for every turn of a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def time(self, stage: str, count: int, action: Callable[[], Any], *, clock: Callable[[], float] = time.process_time) -> Any:
        start = clock()
        result = action()
        self.note(stage, (clock() - start) / count)
        return result

    def note(self, stage: str, seconds: float) -> None:
        self.seconds.setdefault(stage, []).append(seconds)

    def medians(self) -> dict[str, float]:
        return {stage: statistics.median(values) for stage, values in self.seconds.items()}


def _measure_stages(
    config: Config, reader: ShardReader, samples: list[int], files: list[bytes], options: BenchOptions, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds per image of our stages, and of the two baselines."""
    view = PretrainingView(data=config.data, mask=config.mask, image_size=config.model.image_size, seed=config.seed)
    baselines = {"float32": pil_views(config), "uint8": pil_views(config, normalise=False)}
    ours, theirs = _Stopwatch(), _Stopwatch()
    for turn in range(options.turns + 2):
        if turn == 2:  # the first two turns warm caches up
            ours, theirs = _Stopwatch(), _Stopwatch()
        rows = [(turn * CHUNK + i) % len(files) for i in range(CHUNK)]
        _time_ours(ours, reader, view, [samples[row] for row in rows], config.model.in_chans, device)
        _time_theirs(theirs, baselines, [files[row] for row in rows], config.model.in_chans)
    return ours.medians(), theirs.medians()


def _time_ours(
    watch: _Stopwatch,
    reader: ShardReader,
    view: PretrainingView,
    samples: list[int],
    in_chans: int,
    device: torch.device,
) -> None:
    count = len(samples)
    data = watch.time("reading", count, lambda: [_touched(reader.read_image(sample)) for sample in samples])
    draws = watch.time("draws", count, lambda: [view.draw(epoch=0, sample=sample) for sample in samples])
    # Image after image, as a worker does it: pixels are still in the cache when their view is made.
    rows, decoding, views = [], 0.0, 0.0
    for encoded, drawn in zip(data, draws, strict=True):
        start = time.process_time()
        image = decode_image(encoded, in_chans=in_chans)
        decoded = time.process_time()
        rows.append(view(image, drawn))
        decoding += decoded - start
        views += time.process_time() - decoded
    watch.note("decoding", decoding / count)
    watch.note("views", views / count)
    batch = watch.time("batching", count, lambda: stack(rows))
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        watch.time("transfer", count, lambda: _transfer(batch, device), clock=time.perf_counter)


def _time_theirs(watch: _Stopwatch, baselines: dict[str, transforms.Compose], files: list[bytes], in_chans: int) -> None:
    for name, transform in baselines.items():
        watch.time(name, len(files), lambda t=transform: [t(_open_pil(data, in_chans)) for data in files])


def _touched(data: memoryview) -> memoryview:
    """The same bytes, in memory for certain: one of every page has been read."""
    np.frombuffer(data, np.uint8)[::PAGE].max()
    return data


def _transfer(batch: Batch, device: torch.device) -> None:
    for tensor in batch.values():
        tensor.to(device, non_blocking=True)
    torch.cuda.synchronize(device)


def _open_pil(data: bytes, in_chans: int) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB" if in_chans == 3 else "L")


def pil_views(config: Config, *, normalise: bool = True) -> transforms.Compose:
    """The usual views of SimMIM with torchvision on PIL images: crop, flip, float32 and normalisation (or bytes)."""
    mode = transforms.InterpolationMode(config.data.interpolation)
    crop = transforms.RandomResizedCrop(
        config.model.image_size, scale=config.data.crop_scale, ratio=config.data.crop_ratio, interpolation=mode
    )
    flip = transforms.RandomHorizontalFlip(config.data.flip)
    if not normalise:
        return transforms.Compose([crop, flip, transforms.PILToTensor()])
    return transforms.Compose([crop, flip, transforms.ToTensor(), transforms.Normalize(config.data.mean, config.data.std)])


def _describe_stages(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    total = sum(seconds.values())
    return {
        stage: {
            "microseconds": seconds[stage] * 1e6,
            "images_per_second": 1 / seconds[stage] if seconds[stage] else float("inf"),
            "share": seconds[stage] / total,
        }
        for stage in STAGES
        if stage in seconds
    }


def _compare_per_core(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    decode_and_views = ours["draws"] + ours["decoding"] + ours["views"]
    return {
        "images_per_second": 1 / sum(seconds for stage, seconds in ours.items() if stage != "transfer"),
        "decode_and_views": 1 / decode_and_views,
        "torchvision": {name: 1 / seconds for name, seconds in theirs.items()},
        "speedup": {name: seconds / decode_and_views for name, seconds in theirs.items()},
    }


# -------------------------------------------------------------------------------------------------------- whole loaders


def _measure_loaders(config: Config, index: ShardIndex, files: list[bytes], options: BenchOptions) -> dict[str, Any]:
    """Images per second of our loader and of ImageFolder with DataLoader, median over turns that they take."""
    batch = min(options.batch, len(index))
    rates: dict[str, list[float]] = {"ours": [], "torchvision": []}
    with TemporaryDirectory(prefix="simmim-bench-") as folder:
        write_image_folder(Path(folder), files)
        for _ in range(options.loader_turns):
            rates["ours"].append(_rate(_our_batches(config, index, batch, options), batch, config, options))
            rates["torchvision"].append(_rate(_folder_batches(config, Path(folder), batch, options), batch, config, options))
    return {
        "workers": options.workers,
        "batch": batch,
        "images_per_second": statistics.median(rates["ours"]),
        "torchvision_images_per_second": statistics.median(rates["torchvision"]),
        "speedup": statistics.median(ours / theirs for ours, theirs in zip(*rates.values(), strict=True)),
    }


def _rate(batches: Iterator[Any], batch: int, config: Config, options: BenchOptions) -> float:
    """Images per second once everything that was loaded ahead is used up."""
    for _ in range(max(1, options.workers) * config.data.prefetch + 1):
        next(batches)
    start = time.perf_counter()
    for _ in range(options.batches):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return options.batches * batch / seconds


def _our_batches(config: Config, index: ShardIndex, batch: int, options: BenchOptions) -> Iterator[Batch]:
    loader = build_training_loader(
        index,
        data=config.data.model_copy(update={"workers": options.workers}),
        mask=config.mask,
        image_size=config.model.image_size,
        in_chans=config.model.in_chans,
        seed=config.seed,
        global_batch=batch,
        micro_batch=batch,
        accumulation=1,
    )
    with loader:
        yield from loader


def _folder_batches(config: Config, folder: Path, batch: int, options: BenchOptions) -> Iterator[Any]:
    opener = _PilOpener(config.model.in_chans)
    dataset = ImageFolder(str(folder), transform=pil_views(config), loader=opener)
    endless = RandomSampler(dataset, replacement=True, num_samples=10**9, generator=torch.Generator().manual_seed(config.seed))
    loader = DataLoader(
        dataset,
        batch_size=batch,
        sampler=endless,
        num_workers=options.workers,
        prefetch_factor=config.data.prefetch if options.workers else None,
    )
    yield from loader


@dataclass(frozen=True)
class _PilOpener:
    """What ImageFolder opens files with by default, for any number of channels."""

    in_chans: int

    def __call__(self, path: str) -> Image.Image:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB" if self.in_chans == 3 else "L")


def write_image_folder(folder: Path, files: list[bytes]) -> None:
    """Writes images as a folder that ImageFolder takes, in one class."""
    (folder / "class").mkdir()
    for number, data in enumerate(files):
        extension = "jpg" if data[:2] == b"\xff\xd8" else "png"
        (folder / "class" / f"{number:06d}.{extension}").write_bytes(data)
