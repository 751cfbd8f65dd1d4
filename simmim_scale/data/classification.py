"""Classification: labelled micro-batches. Views, labels and mixing on top of the machinery of `data/loader.py`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from simmim_scale.config.schema import ClassificationConfig, DataConfig
from simmim_scale.data.augment import Augment
from simmim_scale.data.dataset import Batch, BatchRequest, DamagedSample, ShardDataset
from simmim_scale.data.loader import TrainingLoader, ValidationLoader, shard_sizes
from simmim_scale.data.mixing import Mixing
from simmim_scale.data.order import BatchShare, SampleOrder
from simmim_scale.data.quarantine import Quarantine
from simmim_scale.data.random import DrawnAhead, Stream, sample_rng
from simmim_scale.data.shards import ShardIndex
from simmim_scale.data.stream import ShardReader
from simmim_scale.data.transforms import Crop, centre_crop, resize_crop, sample_crop
from simmim_scale.data.views import Arrays, View, draw_crop_and_flip
from simmim_scale.data.workers import Workers


@dataclass(frozen=True)
class AugmentedView:
    """Random crop, flip, RandAugment and random erasing, drawn from (seed, epoch, sample)."""

    data: DataConfig
    augment: Augment
    image_size: tuple[int, int]
    seed: int

    def draw(self, *, epoch: int, sample: int) -> tuple[DrawnAhead, np.random.Generator]:
        """Numbers for the crop and the flip, and what the augmentation draws from."""
        return draw_crop_and_flip(self.seed, epoch, sample), sample_rng(self.seed, epoch, sample, Stream.AUGMENT)

    def __call__(self, image: UInt8[np.ndarray, "h w c"], draws: tuple[DrawnAhead, np.random.Generator]) -> Arrays:
        numbers, augment_rng = draws
        crop = sample_crop(numbers, *image.shape[:2], scale=self.data.crop_scale, ratio=self.data.crop_ratio)
        view = resize_crop(image, crop, size=self.image_size, interpolation=self.data.interpolation)
        if numbers.random() < self.data.flip:
            view = view.flip(-1)
        return {"image": self.augment(view, augment_rng)}


@dataclass(frozen=True)
class TestedView:
    """The centre of the image, or all of it: what `classification.test_crop` and `test_resize` say."""

    image_size: tuple[int, int]
    interpolation: str
    crop: float
    resize: str

    def draw(self, *, epoch: int, sample: int) -> None:
        """Nothing is random."""

    def __call__(self, image: UInt8[np.ndarray, "h w c"], draws: None = None) -> Arrays:
        return {"image": resize_crop(image, self.part(*image.shape[:2]), size=self.image_size, interpolation=self.interpolation)}

    def part(self, height: int, width: int) -> Crop:
        """The rectangle that is resized to the input. Cutting first and resizing once gives the published "resize the shorter
        side to size / crop, cut the centre" up to the rounding of that first size."""
        if self.resize == "squash":
            whole = Crop(0, 0, height, width)
        else:
            whole = centre_crop(height, width, aspect=self.image_size[1] / self.image_size[0])
        cut = max(1, round(whole.height * self.crop)), max(1, round(whole.width * self.crop))
        return Crop(whole.top + (whole.height - cut[0]) // 2, whole.left + (whole.width - cut[1]) // 2, *cut)


class LabelledDataset(ShardDataset):
    """Micro-batches with "label" (b,) int64, the class of the image that is shown, and the plan of mixing, if there is any."""

    def __init__(self, reader: ShardReader, view: View, *, mixing: Mixing | None = None, **options):
        super().__init__(reader, view, **options)
        self.mixing = mixing

    def _load_batch(self, request: BatchRequest) -> tuple[Batch, list[DamagedSample]]:
        batch, damaged = super()._load_batch(request)
        labels = np.asarray(self.reader.index.table["label"][batch["sample"].numpy()], dtype=np.int64)
        batch["label"] = torch.from_numpy(labels)
        if self.mixing is not None:
            batch.update({name: torch.from_numpy(values) for name, values in self.mixing.plan(request.positions).items()})
        return batch, damaged


def build_augment(data: DataConfig, classification: ClassificationConfig, image_size: tuple[int, int]) -> Augment:
    """The augmentation that a configuration describes.

    Raises:
        ValueError: a description that timm does not understand.
    """
    augment = Augment(
        rand_augment=classification.rand_augment,
        random_erasing=classification.random_erasing,
        image_size=image_size,
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation,
    )
    augment.check()
    return augment


def build_labelled_training_loader(
    index: ShardIndex,
    *,
    data: DataConfig,
    classification: ClassificationConfig,
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
) -> TrainingLoader:
    """The endless stream of augmented, labelled micro-batches of one rank. Arguments as in `data/loader.py`.

    Raises:
        ValueError: fewer samples than a global batch, or micro-batches that cannot be mixed in pairs.
    """
    if len(index) < global_batch:
        raise ValueError(
            f"train.global_batch: {index.directory} holds {len(index):,} samples, fewer than one global batch of"
            f" {global_batch:,}. Lower train.global_batch or train on more images."
        )
    check_pairs(classification, micro_batch)
    workers = Workers(data.workers, data.prefetch, pin_memory)
    workers.warn_of_cores()
    augment = build_augment(data, classification, image_size)
    dataset = LabelledDataset(
        ShardReader(index),
        AugmentedView(data=data, augment=augment, image_size=image_size, seed=seed),
        mixing=build_mixing(classification, image_size, seed) if classification.mixes else None,
        in_chans=in_chans,
        seed=seed,
        band_range=data.band_range,
    )
    return TrainingLoader(
        dataset,
        order=SampleOrder(shard_sizes(index), seed=seed, mixed_shards=data.mixed_shards),
        # One lane: plain runs of the order, so that neighbours, which are mixed, come to the same micro-batch.
        share=BatchShare(global_batch, micro_batch, accumulation, rank, world_size, lanes=1),
        start_position=start_position,
        quarantine=Quarantine(quarantine, rank=rank),
        workers=workers,
    )


def check_pairs(classification: ClassificationConfig, micro_batch: int) -> None:
    """Raise ValueError where samples are mixed and a micro-batch does not hold whole pairs."""
    if classification.mixes and micro_batch % 2:
        raise ValueError(
            f"train.micro_batch: even where samples are mixed in pairs, got {micro_batch}. Choose an even global batch per rank"
            " and micro-batch, or set classification.mixup and classification.cutmix to 0."
        )


def build_mixing(classification: ClassificationConfig, image_size: tuple[int, int], seed: int) -> Mixing:
    """The mixing that a configuration describes."""
    return Mixing(
        mixup=classification.mixup,
        cutmix=classification.cutmix,
        probability=classification.mix_probability,
        cutmix_share=classification.cutmix_share,
        group=classification.mix_group,
        image_size=image_size,
        seed=seed,
    )


def build_labelled_validation_loader(
    index: ShardIndex,
    *,
    data: DataConfig,
    view: View,
    in_chans: int,
    seed: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    samples: int | None = None,
    quarantine: Path | None = None,
    pin_memory: bool = False,
) -> ValidationLoader:
    """Labelled micro-batches of one rank for a pass over the set: equally many on every rank, `valid` marks what counts.

    Args:
        view: of the tested images, for instance a `TestedView`.
        samples: test on so many samples, a random choice that depends on the seed alone; None: all, in their own order.
    """
    count = len(index) if samples is None else min(samples, len(index))
    chosen = SampleOrder(shard_sizes(index), seed=seed, stream=Stream.VALIDATION_ORDER).ids(0, count)
    return ValidationLoader(
        LabelledDataset(
            ShardReader(index), view, in_chans=in_chans, seed=seed, band_range=data.band_range, replaced_is_valid=False
        ),
        samples=np.sort(chosen),  # in the order of the shards, so that they are read once from end to end
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        quarantine=Quarantine(quarantine, rank=rank),
        workers=Workers(data.workers, data.prefetch, pin_memory),
    )


def class_names(index: ShardIndex, setting: str) -> tuple[str, ...]:
    """Names of the classes of labelled shards, by label.

    Raises:
        ValueError: the shards have no labels, or not all of them do.
    """
    if index.classes is None:
        raise ValueError(
            f"{setting}: the shards in {index.directory} have no labels."
            " Make them with `python -m data_tools shard folder IMAGES DIR` from one folder a class."
        )
    labels = np.asarray(index.table["label"])
    outside = int(((labels < 0) | (labels >= len(index.classes))).sum())
    if outside:
        raise ValueError(
            f"{setting}: {outside:,} of {len(index):,} samples in {index.directory} have no label."
            " Shard a set in which every image lies in the folder of its class."
        )
    return index.classes
