"""The order of samples and who reads what: pure arithmetic on positions in an endless stream, torch-free.

Position p is sample number p % n of epoch p // n. Step s uses positions [s * B, (s + 1) * B) of a global batch B, whatever the
world size: batches run over the ends of epochs, so every sample of an epoch is used exactly once and every step is full.
"""

from dataclasses import dataclass

import numpy as np

from simmim_scale.data.random import Stream, sample_rng


class SampleOrder:
    """Shuffles every epoch anew: `ids(start, stop)` are the samples at these positions of the stream.

    An epoch is one full permutation of all samples, a function of (seed, epoch) alone. It is computed when an epoch is first
    touched (1 s for 14 million samples) and only the last two are kept, so any position is reached at the same cost.

    Args:
        num_samples: Samples in an epoch.
        seed: Of the run.
        stream: Which draws these are; validation has its own.
    """

    def __init__(self, num_samples: int, *, seed: int, stream: Stream = Stream.ORDER):
        if num_samples < 1:
            raise ValueError(f"num_samples: an order needs at least one sample, got {num_samples}. Give other shards.")
        self.num_samples = num_samples
        self.seed = seed
        self.stream = stream
        self._epochs: dict[int, np.ndarray] = {}

    def ids(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64: sample numbers at positions start to stop - 1."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions: expected 0 <= start <= stop, got start {start} and stop {stop}.")
        parts = []
        position = start
        while position < stop:
            epoch, first = divmod(position, self.num_samples)
            last = min(self.num_samples, first + stop - position)
            parts.append(self._permutation(epoch)[first:last])
            position += last - first
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def epochs(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64: the epoch of each position."""
        return np.arange(start, stop, dtype=np.int64) // self.num_samples

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            kept = sorted(self._epochs, key=lambda other: abs(other - epoch))[:1]
            self._epochs = {other: self._epochs[other] for other in kept}
            # 32 bits hold 4 billion samples at half the memory.
            small = np.uint32 if self.num_samples < 2**32 else np.int64
            rng = sample_rng(self.seed, epoch, 0, self.stream)
            self._epochs[epoch] = rng.permutation(np.arange(self.num_samples, dtype=small))
        return self._epochs[epoch]


@dataclass(frozen=True)
class BatchShare:
    """One rank's share of every global batch: `accumulation` rounds of `micro_batch` samples.

    In the step that begins at position s, round a of rank r takes s + (a * world_size + r) * micro_batch + [0, micro_batch).
    """

    global_batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int

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

    def positions(self, start: int, round: int) -> range:
        """Positions of this rank's micro-batch number `round` in the step whose first position is `start`."""
        first = start + (round * self.world_size + self.rank) * self.micro_batch
        return range(first, first + self.micro_batch)
