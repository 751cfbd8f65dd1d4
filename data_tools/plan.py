"""What determines the bytes of shards, and which samples go into which: pure functions of the source's list and the options.

Every process and every machine that knows both computes the same plan, so that they can split the work without talking.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.images import CHECKS
from data_tools.reencode import Reencoding
from data_tools.sources import UNKNOWN_SIZE, Source, SourceSample
from data_tools.tarwriter import member_bytes

DEFAULT_SAMPLES = 1000
BROKEN = ("leave-out", "keep", "error")
_COMPANION_BYTES = 1024  # KEY.cls, with its header
_END_BYTES = 1024  # zeros after the last member


@dataclass(frozen=True)
class ShardOptions:
    """What determines the bytes of the shards, besides the source.

    Args:
        samples_per_shard: Images a shard (fewer where some were left out, and in the last); None: by bytes, or 1000.
        shuffle: Mix all images once, by `seed`; else keep the order of their names.
        seed: Seed of the shuffle.
        check: How images are checked before they are taken, see `images.check_image`.
        bytes_per_shard: Most bytes a shard instead, as the source has the images (one larger image is a shard of its own).
        undecodable: Images that do not decode: "leave-out", "keep" (both listed in the report) or "error".
        unreachable: URLs that give nothing, because they are gone or fail after several tries: "error" or "leave-out" (listed in
            the report).
        max_side: See `reencode.Reencoding`.
        quality: See `reencode.Reencoding`.
        captions: Also KEY.txt: the list's column "caption", else the name of the class.
    """

    samples_per_shard: int | None = None
    shuffle: bool = True
    seed: int = 0
    check: str = "structure"
    bytes_per_shard: int | None = None
    undecodable: str = "leave-out"
    unreachable: str = "error"
    max_side: int | None = None
    quality: int | None = None
    captions: bool = False

    def __post_init__(self) -> None:
        if self.samples_per_shard is not None and self.bytes_per_shard is not None:
            raise ValueError("--samples-per-shard and --bytes-per-shard: give one of them.")
        for name, least in (("samples_per_shard", 1), ("bytes_per_shard", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(
                    f"--{name.replace('_', '-')}: at least {least}, got {value}. 1000 images or 200MB are good values."
                )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed: 0 to {2**32 - 1}, got {self.seed}.")
        for name, known in (("check", CHECKS), ("undecodable", BROKEN), ("unreachable", ("error", "leave-out"))):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name}: one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.reencoding and self.undecodable == "keep":
            raise ValueError(
                "--undecodable keep: what does not decode cannot be encoded anew; leave out --max-side and --quality."
            )

    @property
    def reencoding(self) -> Reencoding:
        return Reencoding(self.max_side, self.quality)

    def facts(self) -> dict[str, Any]:
        """As the index states them."""
        facts = asdict(self) | self.reencoding.facts()
        if not self.captions:  # a set made before there were captions stays the same set
            del facts["captions"]
        if self.bytes_per_shard is None:
            facts["samples_per_shard"] = self.samples_per_shard or DEFAULT_SAMPLES
        return facts


@dataclass(frozen=True)
class Task:
    """One of `count` equal parts of the work, `number` from 0: of a Slurm array, or one a machine."""

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Task":
        """From "i/n".

        Raises:
            ValueError: Another form, or i not below n.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ValueError(
                f"--task: i/n with i from 0 to n - 1, got {text!r}. For a Slurm array of 16, --array=0-15 and"
                " --task $SLURM_ARRAY_TASK_ID/16."
            )
        return cls(int(number), int(count))

    def has(self, shard: int) -> bool:
        return shard % self.count == self.number


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: everything a process needs to know."""

    directory: Path
    number: int
    plan: str  # digest of source and options: a note of another plan is not ours
    options: ShardOptions
    samples: tuple[SourceSample, ...]
    classes: tuple[str, ...] | None
    largest_map_value: int = 255
    again: bool = False  # made anew although the set has its index: a repair

    @property
    def name(self) -> str:
        return shard_name(self.number)


def shard_name(number: int) -> str:
    """File name of a shard; numbers from 0."""
    return f"shard-{number:06d}.tar"


@dataclass(frozen=True)
class ShardPlan:
    """Which samples go into which shard.

    Args:
        order: (n,) numbers of samples in the order of the shards.
        starts: (shards + 1,) where each shard starts in `order`.
    """

    source: Source
    options: ShardOptions
    digest: str
    order: np.ndarray
    starts: np.ndarray

    @property
    def num_shards(self) -> int:
        return len(self.starts) - 1

    def samples(self, shard: int) -> tuple[SourceSample, ...]:
        """The samples of a shard, in order."""
        return tuple(self.source.samples[index] for index in self.order[self.starts[shard] : self.starts[shard + 1]])

    def jobs(self, destination: Path, shards: list[int], *, again: bool = False) -> Iterator[ShardJob]:
        """The jobs that write these shards."""
        for number in shards:
            yield ShardJob(
                destination,
                number,
                self.digest,
                self.options,
                self.samples(number),
                self.source.classes,
                self.source.largest_map_value,
                again,
            )

    def estimate(self, shards: list[int]) -> int:
        """Bytes that these shards need at most, if images keep their bytes; unknown sizes count as nothing."""
        return sum(sample_bytes(sample) for shard in shards for sample in self.samples(shard)) + len(shards) * _END_BYTES


def make_plan(source: Source, options: ShardOptions, digest: str) -> ShardPlan:
    """Mix the samples and cut them into shards.

    Raises:
        ValueError: Shards by bytes, but sizes are not known.
    """
    count = len(source.samples)
    order = np.random.default_rng(options.seed).permutation(count) if options.shuffle else np.arange(count)
    if options.bytes_per_shard is None:
        step = options.samples_per_shard or DEFAULT_SAMPLES
        starts = np.append(np.arange(0, count, step), count)
    else:
        starts = _cut_by_bytes(source, order, options.bytes_per_shard)
    return ShardPlan(source, options, digest, order, starts)


def _cut_by_bytes(source: Source, order: np.ndarray, most: int) -> np.ndarray:
    if any(sample.image.size == UNKNOWN_SIZE for sample in source.samples):
        raise ValueError("--bytes-per-shard: the sizes of images behind URLs are not known. Use --samples-per-shard.")
    ends = np.cumsum([sample_bytes(source.samples[index]) for index in order], dtype=np.int64)
    starts = [0]
    while starts[-1] < len(order):
        before = int(ends[starts[-1] - 1]) if starts[-1] else 0
        fitting = int(np.searchsorted(ends, before + most - _END_BYTES, side="right"))
        starts.append(max(fitting, starts[-1] + 1))
    return np.array(starts)


def sample_bytes(sample: SourceSample) -> int:
    """Bytes of a sample in a tar, a little too many."""
    pieces = [sample.image, *(piece for _, piece in sample.companions)]
    about = member_bytes(len(sample.about.encode()) + len(sample.name) + 512)
    long_name = 2048 if len(sample.key) > 80 else 0  # pax headers
    return sum(member_bytes(max(0, piece.size)) + long_name for piece in pieces) + about + _COMPANION_BYTES + 2 * long_name
