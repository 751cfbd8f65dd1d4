"""Samples by number to one batch: read, decode, replace what does not decode, view, stack. Runs in the worker processes.

Letters: b = samples of the micro-batch, h, w = height and width in pixels, c = channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from simmim_scale.data.decode import DecodeError, decode_image, jpeg_orientation
from simmim_scale.data.device_decode import DeviceDecoder, decoded_row, encoded_row, pack, plain_jpeg_size
from simmim_scale.data.quarantine import DamagedSample
from simmim_scale.data.random import Stream, sample_rng
from simmim_scale.data.stream import ShardReader
from simmim_scale.data.views import Arrays, View

Batch = dict[str, Tensor]
# So many damaged images in a row are no accident: the set is not made of images.
MAX_REPLACEMENTS = 64


class UndecodableSetError(ValueError):
    """Not one of many images in a row decodes."""


# What keeps samples from being loaded and is no fault of this code: the set itself, and disks, servers and networks.
LoadError = UndecodableSetError | OSError
LOAD_ERRORS: tuple[type[Exception], ...] = (UndecodableSetError, OSError)
Loaded = tuple[Batch, list[DamagedSample]] | LoadError


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One micro-batch to load: equally long int64 arrays (b,), and `valid` (b,) bool, False for rows that only fill it up."""

    positions: np.ndarray
    epochs: np.ndarray
    samples: np.ndarray
    valid: np.ndarray


class ShardDataset(Dataset):
    """Loads whole micro-batches.

    Args:
        reader: Bytes of the samples.
        view: Turns pixels into the entries of a batch.
        in_chans: Channels to decode to.
        seed: Of the run; with a sample's number it decides what replaces the sample if it is damaged.
        band_range: Values of multi-band files that become 0 and 255; None: those of their type.
        send_encoded: Leave plain JPEGs to a `DeviceDecoder`; `view` is a `CropView` then.
        replaced_is_valid: Whether a row counts whose image was replaced: in training yes, in evaluation no.
    """

    def __init__(
        self,
        reader: ShardReader,
        view: View,
        *,
        in_chans: int,
        seed: int,
        band_range: tuple[float, float] | None = None,
        send_encoded: bool = False,
        replaced_is_valid: bool = True,
    ):
        self.reader = reader
        self.view = view
        self.in_chans = in_chans
        self.seed = seed
        self.band_range = band_range
        self.send_encoded = send_encoded
        self.replaced_is_valid = replaced_is_valid

    def __len__(self) -> int:
        return len(self.reader.index)

    def __getitems__(self, request: BatchRequest) -> Loaded:
        """One micro-batch, and the damaged images met on the way; a `LoadError` as a value, so that it crosses to the rank's
        process without a worker's traceback. DataLoader hands over what its batch sampler gave."""
        try:
            return self._load_batch(request)
        except LOAD_ERRORS as error:
            return error  # type: ignore[return-value]

    def _load_batch(self, request: BatchRequest) -> tuple[Batch, list[DamagedSample]]:
        ordered = list(zip(request.epochs.tolist(), request.samples.tolist(), strict=True))
        # First all draws: in a loop of their own they take a third of the time that they take between two images.
        draws = [self.view.draw(epoch=epoch, sample=sample) for epoch, sample in ordered]
        load = self._load_encoded if self.send_encoded else self._load_decoded
        rows, used, damaged = [], [], []
        for (_, sample), drawn in zip(ordered, draws, strict=True):
            row, actual, failures = load(sample, drawn)
            rows.append(row)
            used.append(actual)
            damaged.extend(failures)
        sample_ids = np.array(used, dtype=np.int64)
        valid = request.valid if self.replaced_is_valid else request.valid & (sample_ids == request.samples)
        batch = self._stack(rows)
        batch["sample"] = torch.from_numpy(sample_ids)
        batch["position"] = torch.from_numpy(request.positions.astype(np.int64))
        batch["valid"] = torch.from_numpy(valid.astype(bool))
        if self.send_encoded:
            batch["epoch"] = torch.from_numpy(request.epochs.astype(np.int64))
        return batch, damaged

    def _stack(self, rows: list[Arrays]) -> Batch:
        if not self.send_encoded:
            return stack(rows)
        entries, packed = pack(rows)
        return {**stack(entries), **packed}

    def load_row(self, epoch: int, sample: int) -> tuple[Arrays, int, list[DamagedSample]]:
        """The view of a sample, the sample whose image it shows, and what failed before it."""
        return self._load_decoded(sample, self.view.draw(epoch=epoch, sample=sample))

    def _load_encoded(self, sample: int, draws: Any) -> tuple[Arrays, int, list[DamagedSample]]:
        """As `_load_decoded`, but a plain JPEG is left encoded, with the crop that belongs to its view."""
        data = self.reader.read_image(sample)
        size = plain_jpeg_size(data)
        if size is None:
            row, actual, failures = self._load_decoded(sample, draws)
            return decoded_row(row), actual, failures
        height, width = size if jpeg_orientation(data) < 5 else size[::-1]
        return encoded_row(data, *self.view.place(height, width, draws)), sample, []  # type: ignore[attr-defined]

    def _load_decoded(self, sample: int, draws: Any) -> tuple[Arrays, int, list[DamagedSample]]:
        failures: list[tuple[int, str]] = []
        for candidate in replacements(sample, len(self), seed=self.seed):
            try:
                image = decode_image(self.reader.read_image(candidate), in_chans=self.in_chans, band_range=self.band_range)
            except DecodeError as error:
                failures.append((candidate, str(error)))
                continue
            try:
                row = self.view(image, draws)
            except Exception as error:
                error.add_note(f"While making the view of {self.reader.index.describe(candidate)}.")
                raise
            return row, candidate, [self._damaged(*failure, candidate) for failure in failures]
        raise self._all_bad(failures)

    def _damaged(self, sample: int, cause: str, replacement: int) -> DamagedSample:
        return DamagedSample(sample, self.reader.index.describe(sample), cause, replacement)

    def _all_bad(self, failures: Sequence[tuple[int, str]]) -> "UndecodableSetError":
        sample, cause = failures[0]
        return UndecodableSetError(
            f"data: none of {len(failures)} images tried in a row decodes; the first is"
            f" {self.reader.index.describe(sample)} ({cause}). Check the set with `python -m data_tools verify`."
        )


def decode_on_device(
    dataset: ShardDataset, decoder: DeviceDecoder, loaded: tuple[Batch, list[DamagedSample]]
) -> tuple[Batch, list[DamagedSample]]:
    """Finishes on the device what a dataset with `send_encoded` loaded: the batch, and all damaged images.

    Rows that the device refuses are loaded again by the dataset, which replaces damaged images by the rule that holds everywhere.
    """
    encoded, damaged = loaded
    batch, refused = decoder(encoded)
    for row in refused:
        sample = int(batch["sample"][row])
        entries, actual, failures = dataset.load_row(int(encoded["epoch"][row]), sample)
        for name, value in entries.items():  # all of them: draws after the crop depend on the size of the image
            batch[name][row] = torch.as_tensor(value).to(batch[name].device)
        batch["sample"][row] = actual
        batch["valid"][row] &= dataset.replaced_is_valid or actual == sample
        damaged = [*damaged, *failures]
    return batch, damaged


def replacements(sample: int, num_samples: int, *, seed: int) -> Iterator[int]:
    """The sample itself, then what to use in its place if it is damaged: a walk through other samples, each at most once.

    Pure in (sample, num_samples, seed): every rank, epoch and resume replaces a damaged image by the same one.
    """
    yield sample
    if num_samples == 1:
        return
    rng = sample_rng(seed, 0, sample, Stream.REPLACEMENT)
    stride = 1 + int(rng.random() * (num_samples - 1))
    while gcd(stride, num_samples) != 1:  # only a coprime stride visits every sample
        stride = stride % (num_samples - 1) + 1
    for step in range(1, min(num_samples, MAX_REPLACEMENTS)):
        yield (sample + step * stride) % num_samples


def stack(rows: Sequence[Arrays]) -> Batch:
    """Stacks the entries of samples; images (c, h, w) become one channels-last (b, c, h, w) tensor."""
    batch: Batch = {}
    for name in rows[0]:
        if name == "image":
            batch[name] = _stack_images([row[name] for row in rows])  # type: ignore[misc]
        else:
            batch[name] = torch.from_numpy(np.stack([np.asarray(row[name]) for row in rows]))
    return batch


def _stack_images(images: Sequence[Tensor]) -> Tensor:
    shape = (len(images), *images[0].shape)
    out = torch.empty(shape, dtype=images[0].dtype, memory_format=torch.channels_last)
    for slot, image in zip(out, images, strict=True):
        slot.copy_(image)
    return out
