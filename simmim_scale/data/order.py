"""The order of samples and who reads what: pure arithmetic on positions in an endless stream, torch-free.

Position p is number p % n of epoch p // n, and step s uses positions [s * B, (s + 1) * B) of a global batch B, whatever the
world size: batches run over the ends of epochs, so every sample of an epoch is used exactly once and every step is full.

How an epoch is shuffled (`SampleOrder`), so that batches are mixed although a node opens few shards:

1. Across shards: the shards are lined up in a new random order, and the line is cut into equal pieces, the lanes. Position p
   belongs to lane bit_reversed(p % lanes), so every batch takes equally much from all lanes, that is from everywhere in the set.
2. Within a shard that a cut divides, which samples go to which side is drawn at random.
3. Within a lane, samples are shuffled in blocks. The blocks that are in play together hold `mixed_shards` shards' worth of
   samples; a set with no more shards has one block a lane. Blocks of different lanes end at different times.
4. Ranks share a batch by lanes (`BatchShare`): rank r of w takes the lanes from r / w to (r + 1) / w, whatever the step, so a
   node touches its part of the epoch's shards and the two at its ends. Ranks, workers and batch size move no sample elsewhere.

`tests/data/test_mixing.py` measures this against full permutations. 48 shards sorted by class, all of them mixed: the number of
a batch's samples that come from one shard varies .23 times as much as by chance (batches are more even), and two samples meet
again in the next epoch 1.003 times as often as by chance. With 16 of the 48 mixed at a time: 7.5 and 1.04. Any position is
reached at the cost of its blocks: .01 s for ImageNet.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from simmim_scale.data.random import Stream, sample_rng

MAX_LANES = 64
DEFAULT_MIXED_SHARDS = 256
LaneBlock = tuple[int, int, int]  # epoch, lane, number of the block in the lane


class SampleOrder:
    """Shuffles every epoch anew: `ids(start, stop)` are the samples at these positions of the stream.

    Args:
        shard_sizes: Samples of every shard, in the order of their numbers. One number: a set that is one shard.
        seed: Of the run.
        stream: Which draws these are; validation has its own.
        mixed_shards: Shards' worth of samples among which samples are shuffled at any time.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray | int,
        *,
        seed: int,
        stream: Stream = Stream.ORDER,
        mixed_shards: int = DEFAULT_MIXED_SHARDS,
    ):
        self.sizes = np.atleast_1d(np.asarray(shard_sizes, dtype=np.int64))
        self.num_samples = int(self.sizes.sum())
        if self.num_samples < 1:
            raise ValueError(f"shard_sizes: an order needs at least one sample, got {self.num_samples}. Give other shards.")
        if mixed_shards < 1:
            raise ValueError(f"mixed_shards: expected at least 1, got {mixed_shards}.")
        self.seed = seed
        self.stream = stream
        self.lanes = num_lanes(mixed_shards)
        self._first = np.concatenate([[0], np.cumsum(self.sizes)])  # sample number at which each shard starts
        self._block_size = _block_size(self.num_samples, len(self.sizes), mixed_shards, self.lanes)
        self._residues = bit_reversal(self.lanes)
        # By how much blocks of a residue's lane end early, so that a node does not open all its next shards at once.
        self._shifts = (self._block_size or 0) * np.arange(self.lanes) // self.lanes
        self._lines: OrderedDict[int, _EpochLine] = OrderedDict()
        self._blocks: OrderedDict[LaneBlock, np.ndarray] = OrderedDict()

    def ids(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64: sample numbers at positions start to stop - 1."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions: expected 0 <= start <= stop, got start {start} and stop {stop}.")
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """int64, as many as `positions` (int64, at least 0): sample numbers at these positions."""
        epochs, lanes, blocks, places = self._places(positions)
        keys = zip(epochs.tolist(), lanes.tolist(), blocks.tolist(), strict=True)
        return np.fromiter(
            (self._block(key)[place] for key, place in zip(keys, places.tolist(), strict=True)), np.int64, len(positions)
        )

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """int64, as many as `positions`: the epoch of each."""
        return positions // self.num_samples

    def blocks_in_play(self, positions: np.ndarray) -> list[LaneBlock]:
        """The blocks that these positions are drawn from, each once."""
        epochs, lanes, blocks, _ = self._places(positions)
        return sorted(set(zip(epochs.tolist(), lanes.tolist(), blocks.tolist(), strict=True)))

    def block_after(self, block: LaneBlock) -> LaneBlock:
        """The next block of the same lane; at the end of an epoch, the first of the next one."""
        epoch, lane, number = block
        next_block = (epoch, lane, number + 1)
        return next_block if self._extent(next_block)[0] < self._line(epoch).counts[lane] else (epoch + 1, lane, 0)

    def shards_of(self, block: LaneBlock) -> list[int]:
        """Numbers of the shards that a block has samples of."""
        return [shard for shard, _, _ in self._pieces(block)]

    def _places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, lane, block in the lane and place in the block of every position."""
        epochs, index = np.divmod(positions, self.num_samples)
        residues = positions % self.lanes
        # Number of earlier positions of the same epoch in the same lane: those of its residue.
        turn = index // self.lanes
        shift = self._shifts[residues]
        if self._block_size is None:
            return epochs, self._residues[residues], np.zeros_like(turn), turn
        blocks = (turn + shift) // self._block_size
        return epochs, self._residues[residues], blocks, turn - np.maximum(0, blocks * self._block_size - shift)

    def _extent(self, block: LaneBlock) -> tuple[int, int]:
        """Places in the lane at which a block starts and ends."""
        epoch, lane, number = block
        count = int(self._line(epoch).counts[lane])
        if self._block_size is None:
            return (0, count) if number == 0 else (count, count)
        start = number * self._block_size - int(self._shifts[self._residues[lane]])
        return max(0, start), min(count, start + self._block_size)

    def _block(self, block: LaneBlock) -> np.ndarray:
        """Sample numbers of a block, shuffled. Two blocks a lane are kept."""
        ids = self._blocks.get(block)
        if ids is None:
            while len(self._blocks) >= 2 * self.lanes:
                self._blocks.popitem(last=False)
            ids = np.concatenate([self._piece(block[0], *piece) for piece in self._pieces(block)])
            number = 2 * ((block[1] << 40) + block[2]) + 1
            ids = ids[_shuffle(len(ids), self.seed, block[0], number, self.stream)]
            # 32 bits hold 4 billion samples at half the memory.
            self._blocks[block] = ids.astype(np.uint32) if self.num_samples < 2**32 else ids
        return ids

    def _pieces(self, block: LaneBlock) -> list[tuple[int, int, int]]:
        """The shards that a block is made of, and which part of each: shard, first and last + 1 place in it."""
        line = self._line(block[0])
        start, stop = (int(line.starts[block[1]]) + place for place in self._extent(block))
        pieces = []
        at = int(np.searchsorted(line.edges, start, side="right")) - 1
        while at < len(line.shards) and line.edges[at] < stop:
            shard, edge = int(line.shards[at]), int(line.edges[at])
            low, high = max(start - edge, 0), min(stop - edge, int(self.sizes[shard]))
            if low < high:
                pieces.append((shard, low, high))
            at += 1
        return pieces

    def _piece(self, epoch: int, shard: int, low: int, high: int) -> np.ndarray:
        size = int(self.sizes[shard])
        if high - low == size:
            return np.arange(size) + self._first[shard]
        return np.sort(_shuffle(size, self.seed, epoch, 2 * shard + 2, self.stream)[low:high]) + self._first[shard]

    def _line(self, epoch: int) -> "_EpochLine":
        if epoch not in self._lines:
            while len(self._lines) >= 2:
                self._lines.popitem(last=False)
            shards = _shuffle(len(self.sizes), self.seed, epoch, 0, self.stream)
            offset = epoch * self.num_samples % self.lanes
            first_index = (self._residues - offset) % self.lanes  # of each lane, in the epoch
            counts = np.maximum(0, -(-(self.num_samples - first_index) // self.lanes))
            self._lines[epoch] = _EpochLine(
                shards=shards,
                edges=np.concatenate([[0], np.cumsum(self.sizes[shards])]),
                counts=counts,
                starts=np.concatenate([[0], np.cumsum(counts)]),
            )
        return self._lines[epoch]


@dataclass(frozen=True, slots=True)
class _EpochLine:
    """The shards of an epoch in their order, where each starts on the line of samples, and the samples and start of each lane."""

    shards: np.ndarray
    edges: np.ndarray
    counts: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class BatchShare:
    """One rank's share of every global batch: `accumulation` rounds of `micro_batch` samples.

    The positions of a step, sorted by lane, are dealt to the ranks in equal runs; the rounds of a rank follow their order in the
    stream. One lane means plain runs: rank r takes [s + r * B / w, s + (r + 1) * B / w) of the step that starts at s.
    """

    global_batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    lanes: int = 1

    def __post_init__(self) -> None:
        product = self.micro_batch * self.accumulation * self.world_size
        if product != self.global_batch or product < 1:
            raise ValueError(
                f"global_batch: expected micro_batch * accumulation * world_size, got {self.global_batch} for"
                f" {self.micro_batch} * {self.accumulation} * {self.world_size} = {product}."
                " Choose a global batch that the ranks divide."
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: expected 0 to {self.world_size - 1}, got {self.rank}.")

    def rounds(self, start: int) -> np.ndarray:
        """(accumulation, micro_batch) int64: this rank's positions in the step whose first position is `start`."""
        positions = np.arange(start, start + self.global_batch, dtype=np.int64)
        by_lane = positions[np.argsort(bit_reversal(self.lanes)[positions % self.lanes], kind="stable")]
        size = self.global_batch // self.world_size
        mine = np.sort(by_lane[self.rank * size : (self.rank + 1) * size])
        return mine.reshape(self.accumulation, self.micro_batch)

    def steps(self, start: int) -> Iterator[np.ndarray]:
        """`rounds` of the step that starts at `start`, and of all that follow, without end."""
        while True:
            yield self.rounds(start)
            start += self.global_batch


def num_lanes(mixed_shards: int) -> int:
    """The largest power of two that is at most `mixed_shards` and `MAX_LANES`."""
    return 1 << (min(mixed_shards, MAX_LANES).bit_length() - 1)


def bit_reversal(size: int) -> np.ndarray:
    """(size,) int64: 0 to size - 1 (a power of two), each with its bits reversed: any run of them is spread evenly."""
    numbers, reversed_ = np.arange(size), np.zeros(size, dtype=np.int64)
    for bit in range(size.bit_length() - 1):
        reversed_ |= ((numbers >> bit) & 1) << (size.bit_length() - 2 - bit)
    return reversed_


def _block_size(num_samples: int, num_shards: int, mixed_shards: int, lanes: int) -> int | None:
    """Samples of a lane that are shuffled together; None: all of them."""
    return None if mixed_shards >= num_shards else max(1, num_samples * mixed_shards // (num_shards * lanes))


def _shuffle(size: int, seed: int, epoch: int, number: int, stream: Stream) -> np.ndarray:
    # Sorting plain draws rather than `permutation`, whose algorithm numpy may change.
    return np.argsort(sample_rng(seed, epoch, number, stream).random(size), kind="stable")
