"""Pre-training by masked image modeling: SimMIM on tar shards, validated by its loss under fixed masks.

`build` is what `TASKS` names; the loop asks the task for a module, a training loader and a validation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import nn

from simmim_scale.config.plan import Plan
from simmim_scale.config.schema import Config, MaskConfig
from simmim_scale.data.loader import (
    TrainingLoader,
    ValidationLoader,
    build_training_loader,
    build_validation_loader,
    make_decoder,
)
from simmim_scale.data.mask_distance import mask_grid
from simmim_scale.data.masks import num_hidden
from simmim_scale.data.remote_index import open_index
from simmim_scale.data.shards import ShardIndex
from simmim_scale.models.weights import Weights, load_into
from simmim_scale.objectives.simmim import HiddenCells, SimMIM, build_simmim
from simmim_scale.reports.reconstructions import gallery_path
from simmim_scale.tasks.model_facts import describe_distance
from simmim_scale.tasks.objective_check import check_objective
from simmim_scale.tasks.pretrain_evaluators import Gallery, MaskDistance, MaskedLoss, MeanColourLoss

PretrainEvaluator = MaskedLoss | MeanColourLoss | MaskDistance | Gallery


def build(config: Config) -> "PretrainTask":
    """Opens the shards that the configuration names.

    Raises:
        ValueError: no shards there, an empty index, or an index that does not fit its shards; a head or a target that does not
            fit the model, the masking or this machine.
    """
    if not config.data.train:
        raise ValueError(
            "data.train: the directory of shards to train on is not set."
            " Make one with `python -m data_tools shard folder IMAGES DIR` and set data.train=DIR."
        )
    check_objective(config)
    # Built again with the loader; here it tells early what it cannot do.
    make_decoder(config.data, image_size=config.model.image_size, in_chans=config.model.in_chans)
    remote = config.data.remote
    validation = open_index(config.data.validation, remote) if config.data.validation else None
    return PretrainTask(config=config, train_index=open_index(config.data.train, remote), validation_index=validation)


def hidden_cells(mask: MaskConfig, image_size: tuple[int, int]) -> HiddenCells:
    """What every mask hides: every sampler hides exactly as many cells."""
    grid = mask_grid(image_size, mask.cell)
    return HiddenCells(grid, num_hidden(grid, mask.ratio))


def build_module(config: Config) -> SimMIM:
    """The module that a pre-training run trains, without its data."""
    return build_simmim(
        config.model,
        config.objective,
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
        attention=config.kernels.window_attention,
        masked_loss=config.kernels.masked_loss,
        hidden_cells=hidden_cells(config.mask, config.model.image_size),
    )


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
        return build_module(self.config)

    def load_initial(self, module: nn.Module, weights: Weights) -> None:
        """All weights: of the backbone, the mask token and the head."""
        load_into(module, weights.state, source=str(weights.path))

    def training_loader(
        self, plan: Plan, *, rank: int, start_position: int, quarantine: Path, pin_memory: bool
    ) -> TrainingLoader:
        """This rank's micro-batches from the sample at `start_position` of the stream."""
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
            start_position=start_position,
            quarantine=quarantine,
            pin_memory=pin_memory,
            second_size=config.objective.second_size(config.model.image_size),
        )

    def validation(self, plan: Plan, *, rank: int, module: nn.Module, run_dir: Path) -> "PretrainValidation | None":
        """What to validate with, or None where the configuration names no held-out samples."""
        if self.validation_index is None:
            return None
        return PretrainValidation(
            config=self.config, index=self.validation_index, plan=plan, rank=rank, module=module, run_dir=run_dir
        )


@dataclass(frozen=True, kw_only=True)
class PretrainValidation:
    """Masked loss of held-out images in centre view under masks that never change, beside that of a constant colour."""

    config: Config
    index: ShardIndex
    plan: Plan
    rank: int
    module: nn.Module
    run_dir: Path

    def batches(self) -> ValidationLoader:
        config = self.config
        return build_validation_loader(
            self.index,
            data=config.data,
            mask=config.mask,
            image_size=config.model.image_size,
            in_chans=config.model.in_chans,
            seed=config.seed,
            samples=config.validation.samples,
            micro_batch=config.validation.micro_batch or self.plan.micro_batch,
            rank=self.rank,
            world_size=self.plan.world_size,
            quarantine=self.run_dir / "quarantine",
            second_size=config.objective.second_size(config.model.image_size),
        )

    def evaluators(self, step: int) -> Sequence[PretrainEvaluator]:
        distance = describe_distance(self.config.mask, self.config.model.image_size)
        evaluators: list[PretrainEvaluator] = [MaskedLoss(), MeanColourLoss(self.module), MaskDistance(distance.mean)]
        if self.config.validation.gallery:
            evaluators.append(Gallery(self.module, count=self.config.validation.gallery, path=gallery_path(self.run_dir, step)))
        return evaluators

    def pictures(self, step: int) -> dict[str, Image.Image]:
        """What the validation at `step` drew, for the sinks that show pictures."""
        path = gallery_path(self.run_dir, step)
        return {"reconstructions": Image.open(path)} if path.exists() else {}
