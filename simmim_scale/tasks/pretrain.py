"""Pre-training by masked image modeling: SimMIM on tar shards, validated by its loss under fixed masks.

`build` is what `TASKS` names; the loop asks the task for a module, a training loader and a validation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from simmim_scale.config.plan import Plan
from simmim_scale.config.schema import Config
from simmim_scale.data.loader import TrainingLoader, ValidationLoader, build_training_loader, build_validation_loader
from simmim_scale.data.shards import ShardIndex
from simmim_scale.objectives.simmim import SimMIM, build_simmim
from simmim_scale.tasks.pretrain_evaluators import Gallery, MaskedLoss, MeanColourLoss


def build(config: Config) -> "PretrainTask":
    """Opens the shards that the configuration names.

    Raises:
        ValueError: no shards there, an empty index, or an index that does not fit its shards.
    """
    if not config.data.train:
        raise ValueError(
            "data.train: the directory of shards to train on is not set."
            " Make one with `python -m data_tools shard folder IMAGES DIR` and set data.train=DIR."
        )
    validation = ShardIndex.load(Path(config.data.validation)) if config.data.validation else None
    return PretrainTask(config=config, train_index=ShardIndex.load(Path(config.data.train)), validation_index=validation)


@dataclass(frozen=True)
class PretrainTask:
    """SimMIM pre-training on the samples of `train_index`, compared on those of `validation_index`."""

    config: Config
    train_index: ShardIndex
    validation_index: ShardIndex | None

    @property
    def num_samples(self) -> int:
        return len(self.train_index)

    def build_module(self) -> SimMIM:
        config = self.config
        return build_simmim(
            config.model,
            config.objective,
            mean=config.data.mean,
            std=config.data.std,
            seed=config.seed,
            attention=config.kernels.window_attention,
        )

    def training_loader(self, plan: Plan, *, rank: int, start_step: int, quarantine: Path) -> TrainingLoader:
        """This rank's micro-batches from the step after `start_step` finished ones."""
        config = self.config
        return build_training_loader(
            self.train_index,
            data=config.data,
            mask=config.mask,
            image_size=config.model.image_size,
            in_chans=config.model.in_chans,
            seed=config.seed,
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
            rank=rank,
            world_size=plan.world_size,
            start_position=plan.position_at(start_step),
            quarantine=quarantine,
        )

    def validation(self, plan: Plan, *, rank: int, module: nn.Module, gallery: Path, quarantine: Path) -> "PretrainValidation | None":
        """What to validate with, or None where the configuration names no held-out samples."""
        if self.validation_index is None:
            return None
        return PretrainValidation(
            config=self.config, index=self.validation_index, plan=plan, rank=rank, module=module, gallery=gallery, quarantine=quarantine
        )


@dataclass(frozen=True, kw_only=True)
class PretrainValidation:
    """Masked loss of held-out images in centre view under masks that never change, beside that of a constant colour."""

    config: Config
    index: ShardIndex
    plan: Plan
    rank: int
    module: nn.Module
    gallery: Path
    quarantine: Path

    @property
    def num_samples(self) -> int:
        return min(len(self.index), self.config.validation.samples or len(self.index))

    @contextmanager
    def batches(self) -> Iterator[ValidationLoader]:
        config = self.config
        loader = build_validation_loader(
            self.index,
            data=config.data,
            mask=config.mask,
            image_size=config.model.image_size,
            in_chans=config.model.in_chans,
            seed=config.seed,
            samples=self.num_samples,
            micro_batch=config.validation.micro_batch or self.plan.micro_batch,
            rank=self.rank,
            world_size=self.plan.world_size,
            quarantine=self.quarantine,
        )
        try:
            yield loader
        finally:
            loader.close()

    def evaluators(self, step: int) -> Sequence["MaskedLoss | MeanColourLoss | Gallery"]:
        evaluators: list[MaskedLoss | MeanColourLoss | Gallery] = [MaskedLoss(), MeanColourLoss(self.module)]
        if self.config.validation.gallery:
            chosen = spread(self.config.validation.gallery, self.num_samples)
            evaluators.append(Gallery(self.module, chosen=chosen, path=self.gallery / f"step_{step:08d}.png"))
        return evaluators


def spread(count: int, total: int) -> frozenset[int]:
    """`count` sample ids spread evenly over `total`, so that pictures come from many classes."""
    return frozenset(int(index) for index in np.linspace(0, total - 1, min(count, total)).round())


