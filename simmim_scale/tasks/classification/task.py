"""Fine-tuning for classification: a pre-trained backbone and a new head on labelled shards, validated by top-1 and top-5.

`build` is what `TASKS` names; the loop asks the task for a module, a training loader and a validation.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import nn

from simmim_scale.config.plan import Plan
from simmim_scale.config.schema import Config
from simmim_scale.data.classification import (
    TestedView,
    build_augment,
    build_labelled_training_loader,
    build_labelled_validation_loader,
    check_pairs,
    class_names,
)
from simmim_scale.data.loader import TrainingLoader, ValidationLoader
from simmim_scale.data.remote_index import open_index
from simmim_scale.data.shards import ShardIndex
from simmim_scale.models.weights import Weights
from simmim_scale.objectives.classifier import Classifier, build_classifier
from simmim_scale.tasks.classification.evaluators import CrossEntropy, TopK
from simmim_scale.tasks.classification.initial import load_initial

log = logging.getLogger(__name__)


def build(config: Config) -> "ClassificationTask":
    """Opens the labelled shards that the configuration names.

    Raises:
        ValueError: no shards there, no labels, other classes in validation than in training, or settings that do not fit them.
    """
    if not config.data.train:
        raise ValueError(
            "data.train: the directory of shards to train on is not set."
            " Make one with `python -m data_tools shard folder IMAGES DIR` (one folder a class) and set data.train=DIR."
        )
    if config.data.decoder == "gpu":
        raise ValueError("data.decoder: gpu does not do the augmentation of fine-tuning. Set data.decoder=cpu.")
    train = open_index(config.data.train, config.data.remote)
    classes = class_names(train, "data.train")
    num_classes = config.classification.num_classes or len(classes)
    if num_classes < len(classes):
        raise ValueError(
            f"classification.num_classes: at least the {len(classes)} classes of {train.directory}, got {num_classes}."
            " Leave it out to take theirs."
        )
    validation = open_index(config.data.validation, config.data.remote) if config.data.validation else None
    if validation is not None:
        check_same_classes(classes, class_names(validation, "data.validation"), where=f"data.validation: {validation.directory}")
    build_augment(config.data, config.classification, config.model.image_size)  # an error in it is found here, not in a worker
    return ClassificationTask(config=config, num_classes=num_classes, train_index=train, validation_index=validation)


def check_same_classes(expected: Sequence[str], found: Sequence[str], *, where: str) -> None:
    """Raise ValueError unless both name the same classes in the same order: a label must mean the same in both."""
    if tuple(found) == tuple(expected):
        return
    differing = [pair for pair in zip(expected, found, strict=False) if pair[0] != pair[1]]
    example = f"; the first that differs is {differing[0][1]!r} for {differing[0][0]!r}" if differing else ""
    raise ValueError(
        f"{where} names {len(found)} classes, expected the {len(expected)} of training in the same order{example}."
        " Shard both sets from folders with the same names."
    )


@dataclass(frozen=True)
class ClassificationTask:
    """Classification of the samples of `train_index`, tested on those of `validation_index`."""

    config: Config
    num_classes: int
    train_index: ShardIndex
    validation_index: ShardIndex | None

    @property
    def num_samples(self) -> int:
        return len(self.train_index)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the logits; classes beyond those of the shards (classification.num_classes) have none."""
        return class_names(self.train_index, "data.train")

    def build_module(self) -> Classifier:
        config = self.config
        return build_classifier(
            config.model,
            num_classes=self.num_classes,
            mean=config.data.mean,
            std=config.data.std,
            seed=config.seed,
            label_smoothing=config.classification.label_smoothing,
            attention=config.kernels.window_attention,
        )

    def check_plan(self, plan: Plan) -> None:
        """Raise ValueError for micro-batches that the configured mixing cannot pair."""
        check_pairs(self.config.classification, plan.micro_batch)

    def load_initial(self, module: nn.Module, weights: Weights) -> None:
        """The weights' backbone, and their head where it is for as many classes."""
        load_initial(module, weights, model=self.config.model)

    def training_loader(
        self, plan: Plan, *, rank: int, start_position: int, quarantine: Path, pin_memory: bool
    ) -> TrainingLoader:
        """This rank's micro-batches from the sample at `start_position` of the stream."""
        config = self.config
        return build_labelled_training_loader(
            self.train_index,
            data=config.data,
            classification=config.classification,
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
        )

    def validation(self, plan: Plan, *, rank: int, module: nn.Module, run_dir: Path) -> "ClassificationValidation | None":
        """What to validate with, or None where the configuration names no held-out samples."""
        if self.validation_index is None:
            return None
        return ClassificationValidation(
            config=self.config,
            index=self.validation_index,
            micro_batch=self.config.validation.micro_batch or plan.micro_batch,
            rank=rank,
            world_size=plan.world_size,
            quarantine=run_dir / "quarantine",
        )


@dataclass(frozen=True, kw_only=True)
class ClassificationValidation:
    """Top-1, top-5 and cross-entropy of held-out images."""

    config: Config
    index: ShardIndex
    micro_batch: int
    rank: int
    world_size: int
    quarantine: Path | None

    def batches(self) -> ValidationLoader:
        config = self.config
        return build_labelled_validation_loader(
            self.index,
            data=config.data,
            view=tested_view(config),
            in_chans=config.model.in_chans,
            seed=config.seed,
            samples=config.validation.samples,
            micro_batch=self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            quarantine=self.quarantine,
        )

    def evaluators(self, step: int) -> Sequence[TopK | CrossEntropy]:
        return [TopK(), CrossEntropy()]

    def pictures(self, step: int) -> dict[str, Image.Image]:
        """Nothing is drawn while training; `simmim evaluate` draws."""
        return {}


def tested_view(config: Config) -> TestedView:
    """How an image is shown to a model that is tested."""
    return TestedView(
        image_size=config.model.image_size,
        interpolation=config.data.interpolation,
        crop=config.classification.test_crop,
        resize=config.classification.test_resize,
    )
