"""Loaders: micro-batches of a rank in the global order, made by worker processes. Start at the two build functions.

The position in the stream of samples is all the state there is. Orders are computed here, in the rank's process; workers get
sample numbers and hold nothing.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simmim_scale.config.schema import DataConfig, MaskConfig
from simmim_scale.data.dataset import Batch, BatchRequest, ShardDataset, decode_on_device
from simmim_scale.data.device_decode import DeviceDecoder
from simmim_scale.data.order import BatchShare, SampleOrder
from simmim_scale.data.prefetch import NoPrefetch, ShardPrefetcher
from simmim_scale.data.quarantine import Quarantine
from simmim_scale.data.random import Stream
from simmim_scale.data.remote_index import RemoteIndex
from simmim_scale.data.shards import ShardIndex
from simmim_scale.data.stream import ShardReader
from simmim_scale.data.views import PretrainingView, ValidationView
from simmim_scale.data.workers import BatchStream, Workers


def build_training_loader(
    index: ShardIndex,
    *,
    data: DataConfig,
    mask: MaskConfig,
    image_size: tuple[int, int],
    in_chans: int,
    seed: int,
    global_batch: int,
    micro_batch: int,
    accumulation: int,
    rank: int = 0,
    world_size: int = 1,
    start_position: int = 0,
    quarantine: Path | None = None,
    pin_memory: bool = False,
    decode_device: torch.device | None = None,
    second_size: tuple[int, int] | None = None,
) -> "TrainingLoader":
    """The endless stream of pre-training micro-batches of one rank.

    Args:
        index: Samples to train on.
        data, mask: Their sections of the configuration.
        image_size: Height and width of the model's input, pixels.
        in_chans: Channels of the model's input.
        seed: Of the run.
        global_batch, micro_batch, accumulation: Batch arithmetic of the plan, samples and rounds.
        rank, world_size: Whose share to load.
        start_position: First position that no finished step has used.
        quarantine: Directory for the lists of damaged images; None: none is kept.
        pin_memory: Page-lock batches, for copies to a GPU that overlap.
        decode_device: Where `data.decoder: gpu` decodes, and "image" comes out; None: the current CUDA device.
        second_size: Height and width of a second view of every crop; None: there is none.

    Raises:
        ValueError: Fewer samples than a global batch, or no GPU to decode on.
    """
    if len(index) < global_batch:
        raise ValueError(
            f"train.global_batch: {index.directory} holds {len(index):,} samples, fewer than one global"
            f" batch of {global_batch:,}. Lower train.global_batch or train on more images."
        )
    workers = Workers(data.workers, data.prefetch, pin_memory)
    workers.warn_of_cores()
    view = PretrainingView(data=data, mask=mask, image_size=image_size, seed=seed, second_size=second_size)
    order = SampleOrder(shard_sizes(index), seed=seed, mixed_shards=data.mixed_shards)
    return TrainingLoader(
        ShardDataset(
            ShardReader(index),
            view,
            in_chans=in_chans,
            seed=seed,
            band_range=data.band_range,
            send_encoded=data.decoder == "gpu",
        ),
        order=order,
        share=BatchShare(global_batch, micro_batch, accumulation, rank, world_size, lanes=order.lanes),
        start_position=start_position,
        quarantine=Quarantine(quarantine, rank=rank),
        workers=workers,
        prefetch=_prefetch(index, order, downloads=data.remote.downloads),
        decoder=make_decoder(data, image_size=image_size, in_chans=in_chans, device=decode_device),
    )


def build_validation_loader(
    index: ShardIndex,
    *,
    data: DataConfig,
    mask: MaskConfig,
    image_size: tuple[int, int],
    in_chans: int,
    seed: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    samples: int | None = None,
    quarantine: Path | None = None,
    pin_memory: bool = False,
    second_size: tuple[int, int] | None = None,
) -> "ValidationLoader":
    """Validation micro-batches of one rank: centre views under fixed masks, equally many batches on every rank.

    Args (the others as in `build_training_loader`):
        micro_batch: Rows of every batch.
        rank, world_size: Whose share to load.
        samples: Validate on so many samples, a random choice that depends on the seed alone; None: all.
    """
    view = ValidationView(data=data, mask=mask, image_size=image_size, seed=seed, second_size=second_size)
    count = len(index) if samples is None else min(samples, len(index))
    return ValidationLoader(
        ShardDataset(ShardReader(index), view, in_chans=in_chans, seed=seed, band_range=data.band_range, replaced_is_valid=False),
        samples=SampleOrder(shard_sizes(index), seed=seed, stream=Stream.VALIDATION_ORDER).ids(0, count),
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        quarantine=Quarantine(quarantine, rank=rank),
        workers=Workers(data.workers, data.prefetch, pin_memory),
    )


class TrainingLoader:
    """An endless iterator of one rank's micro-batches, `share.accumulation` of them a step.

    Its state is `position`: where the next step starts that has not been handed out whole. A step that was handed out in part
    is done again after a resume. Use it as a context manager, or call `close()`, to end the worker processes.

    Args:
        dataset: Loads micro-batches.
        order: Sample at each position.
        share: Positions of each micro-batch.
        start_position: Where to begin, any position of the stream.
        quarantine: Takes the damaged images.
        workers: Processes that load ahead.
        prefetch: Fetches remote shards ahead.
        decoder: Finishes batches of a dataset that sends encoded images.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        order: SampleOrder,
        share: BatchShare,
        start_position: int,
        quarantine: Quarantine,
        workers: Workers,
        prefetch: ShardPrefetcher | NoPrefetch | None = None,
        decoder: DeviceDecoder | None = None,
    ):
        self.dataset = dataset
        self.order = order
        self.prefetch = prefetch or NoPrefetch()
        self.decoder = decoder
        self.share = share
        self.quarantine = quarantine
        self.workers = workers
        self._stream: BatchStream | None = None
        self.load_state_dict({"position": start_position})

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return self.order.num_samples

    @property
    def position(self) -> int:
        return self._start + self._num_handed // self.share.accumulation * self.share.global_batch

    def __iter__(self) -> "TrainingLoader":
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self.workers.start(self.dataset, self._requests(self._start))
        batch, damaged = next(self._stream)
        if self.decoder is not None:
            batch, damaged = decode_on_device(self.dataset, self.decoder, (batch, damaged))
        for sample in damaged:
            self.quarantine.add(sample)
        self._num_handed += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on at a position, which may come from a run with another world size or batch."""
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"position: expected a whole number of at least 0, got {position!r}. The saved state is damaged.")
        self.close()
        self._start = position
        self._num_handed = 0

    def close(self) -> None:
        """Ends the worker processes. Iterating again goes on at `position`."""
        if self._stream is None:
            return
        self._start, self._num_handed = self.position, 0
        self._stream.close()
        self._stream = None
        self.prefetch.close()

    def __enter__(self) -> "TrainingLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _requests(self, start: int) -> Iterator[BatchRequest]:
        for rounds in self.share.steps(start):
            self.prefetch.advance(rounds.ravel())
            for positions in rounds:
                yield BatchRequest(
                    positions=positions,
                    epochs=self.order.epochs(positions),
                    samples=self.order.at(positions),
                    valid=np.ones(len(positions), dtype=bool),
                )


class ValidationLoader:
    """Micro-batches of one pass over the validation samples; iterate again for another pass.

    Every rank gets `len(self)` batches. Rows past the last sample repeat it with `valid` False, so that counts are exact on any
    world size; rows whose image is damaged are not valid either.

    Args:
        dataset: Loads micro-batches.
        samples: (n,) int64, the samples to validate on. Row i of the pass shows samples[i], and its "position" is i.
        micro_batch: Rows of every batch.
        rank, world_size: Whose share to load.
        quarantine: Takes the damaged images.
        workers: Processes that load ahead; they live for one pass.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        samples: np.ndarray,
        micro_batch: int,
        rank: int,
        world_size: int,
        quarantine: Quarantine,
        workers: Workers,
    ):
        self.dataset = dataset
        self.samples = samples
        self.share = BatchShare(micro_batch * world_size, micro_batch, 1, rank, world_size)
        self.quarantine = quarantine
        self.workers = workers

    @property
    def num_samples(self) -> int:
        """Samples of one pass, over all ranks."""
        return len(self.samples)

    def __len__(self) -> int:
        """Batches of one pass, on every rank."""
        return -(-len(self.samples) // self.share.global_batch)

    def __iter__(self) -> Iterator[Batch]:
        with self.workers.start(self.dataset, map(self._request, self._rounds())) as stream:
            for batch, damaged in stream:
                for sample in damaged:
                    self.quarantine.add(sample)
                yield batch

    def _rounds(self) -> Iterator[np.ndarray]:
        return (self.share.rounds(start)[0] for start in range(0, len(self.samples), self.share.global_batch))

    def _request(self, rows: np.ndarray) -> BatchRequest:
        inside = np.minimum(rows, len(self.samples) - 1)
        return BatchRequest(
            positions=inside, epochs=np.zeros_like(inside), samples=self.samples[inside], valid=rows < len(self.samples)
        )


def shard_sizes(index: ShardIndex) -> np.ndarray:
    """Samples of every shard, int64."""
    return np.diff(index.starts)


def make_decoder(
    data: DataConfig, *, image_size: tuple[int, int], in_chans: int, device: torch.device | None = None
) -> DeviceDecoder | None:
    """What finishes batches on a device, or None where workers decode. Raises ValueError where it cannot work."""
    if data.decoder == "cpu":
        return None
    return DeviceDecoder(
        device or torch.device("cuda"), image_size=image_size, in_chans=in_chans, interpolation=data.interpolation
    )


def _prefetch(index: ShardIndex, order: SampleOrder, *, downloads: int) -> ShardPrefetcher | NoPrefetch:
    if not isinstance(index, RemoteIndex) or index.cache is None or not downloads:
        return NoPrefetch()
    return ShardPrefetcher(index.cache, order, downloads=downloads)
