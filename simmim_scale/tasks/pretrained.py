"""Trained weights back as a module: `simmim_scale.load(DIR)`.

`load_pretrained` also gives the configuration; `assemble` builds the module that a configuration and a state belong to.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from simmim_scale.config.load import validate
from simmim_scale.config.schema import Config
from simmim_scale.config.yaml_source import ConfigError, Source
from simmim_scale.models.weights import TENSORS, Weights, load_into, load_weights
from simmim_scale.objectives.backbone_alone import build_feature_extractor
from simmim_scale.objectives.classifier import build_classifier
from simmim_scale.objectives.simmim import build_simmim

CLASS_NAMES = "class_names"  # fact of a classifier's weights: a JSON list, in the order of the logits


@dataclass(frozen=True)
class Pretrained:
    """A module in eval mode with trained weights, the configuration it belongs to, and facts such as the step."""

    module: nn.Module
    config: Config
    extra: dict[str, str]

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the logits; () where the weights do not tell them."""
        return tuple(json.loads(self.extra.get(CLASS_NAMES, "[]")))


def load(directory: str | Path, *, attention: str = "auto") -> nn.Module:
    """The trained module of a run directory or a directory of portable weights, on the CPU and in eval mode.

    A pre-trained one is called as module({"image": (b, c, h, w), "mask": (b, h / 4, w / 4) bool}) -> {"loss", "prediction",
    ...}; a classifier as module({"image": ...}) -> {"logits"}, a backbone alone -> {"tokens"}. Images are floating and
    normalised, or uint8.
    `module.backbone.features(image)` gives the maps of stride 4, 8, 16 and 32.

    Raises:
        ValueError: no weights there, or truncated ones, or ones of another program.
    """
    return load_pretrained(directory, attention=attention).module


def load_pretrained(directory: str | Path, *, attention: str = "auto") -> Pretrained:
    """As `load`, with the configuration beside the module."""
    return as_pretrained(load_weights(find_weights(directory)), attention=attention)


def as_pretrained(weights: Weights, *, attention: str = "auto") -> Pretrained:
    """The module of weights that were read. Raises ValueError if they do not fit their configuration, or it this version."""
    try:
        config = validate(Source(tree=weights.config))
    except ConfigError as error:
        raise ValueError(
            f"weights: the configuration in {weights.path} does not fit this version of simmim_scale:\n{error}\n"
            "Use the version that wrote them, or import the weights again."
        ) from error
    module = assemble(config, weights.state, attention=attention)
    load_into(module, weights.state, source=str(weights.path))
    return Pretrained(module=module.eval(), config=config, extra=weights.extra)


def find_weights(directory: str | Path) -> Path:
    """The weights directory itself, or that of a run directory.

    Raises:
        ValueError: neither; says what a run that has not finished lacks.
    """
    directory = Path(directory)
    if (directory / "weights" / TENSORS).is_file():
        return directory / "weights"
    if (directory / TENSORS).is_file() or not directory.is_dir():
        return directory  # where there is nothing, reading it says so
    if (directory / "checkpoints").is_dir():
        raise ValueError(
            f"weights: {directory} is a run that has not written its weights yet."
            " Run the same command again to finish it; then load this directory."
        )
    return directory


def assemble(config: Config, state: Mapping[str, Tensor], *, attention: str = "auto") -> nn.Module:
    """The module that `state` belongs to, its parameters not set yet."""
    if config.task not in ASSEMBLERS:
        raise ValueError(f"task: weights of task {config.task!r} cannot be loaded here. Known: {', '.join(ASSEMBLERS)}.")
    return ASSEMBLERS[config.task](config, state, attention)


def _simmim(config: Config, state: Mapping[str, Tensor], attention: str) -> nn.Module:
    return build_simmim(
        config.model,
        config.objective,
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
        attention=attention,
        initialise=False,
    )


def _classifier(config: Config, state: Mapping[str, Tensor], attention: str) -> nn.Module:
    if "head.weight" not in state:
        raise ValueError("weights: a classifier without 'head.weight'. Save or import the weights again.")
    return build_classifier(
        config.model,
        num_classes=state["head.weight"].shape[0],
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
        attention=attention,
        initialise=False,
    )


def _features(config: Config, state: Mapping[str, Tensor], attention: str) -> nn.Module:
    return build_feature_extractor(config.model, mean=config.data.mean, std=config.data.std, attention=attention)


# task -> function of (config, state, attention)
ASSEMBLERS: dict[str, Callable[[Config, Mapping[str, Tensor], str], nn.Module]] = {
    "pretrain": _simmim,
    "classification": _classifier,
    "backbone": _features,
}
