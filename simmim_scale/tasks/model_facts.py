"""What a configured model amounts to: parameters, multiply-adds, tokens, mask."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from simmim_scale.config.schema import Config, MaskConfig
from simmim_scale.data.mask_distance import Distance, mask_grid, setting_distance
from simmim_scale.data.masks import num_hidden
from simmim_scale.data.shards import ShardIndex
from simmim_scale.models.complexity import count_parameters, head_multiply_adds, multiply_adds
from simmim_scale.objectives.classifier import build_classifier
from simmim_scale.objectives.complexity import objective_sizes
from simmim_scale.objectives.simmim import build_simmim

DESCRIBED_MASKS = 400  # 1.6 ms each at 192 x 192
IMAGENET_CLASSES = 1000  # of a head, where neither the configuration nor shards say how many


def describe_model(config: Config) -> dict[str, Any]:
    """Sizes of the model, counted on the meta device: no memory is used, whatever the size."""
    with torch.device("meta"):
        module = _build(config)
    height, width = config.model.image_size
    patch = config.model.patch_size
    return {
        "backbone": config.model.name,
        "parameters": count_parameters(module.backbone),
        "parameters_with_head": count_parameters(module),
        "multiply_adds": multiply_adds(module.backbone, config.model.image_size, in_chans=config.model.in_chans),
        "image_size": [height, width],
        "tokens": -(-height // patch) * -(-width // patch),
        "stride": config.model.stride,
        **_task_facts(config, module),
        "precision": config.engine.precision,
        "zero_stage": config.engine.zero_stage,
        "schedule": config.schedule.name,
    }


def describe_distance(mask: MaskConfig, image_size: tuple[int, int]) -> Distance:
    """AvgDist of the configured masking, in pixels, from few enough masks that a command answers at once.

    Raises:
        ValueError: the setting hides every cell.
    """
    return setting_distance(
        image_size=image_size, cell=mask.cell, ratio=mask.ratio, sampler=mask.sampler, samples=DESCRIBED_MASKS
    )


def _build(config: Config) -> nn.Module:
    if config.task == "classification":
        return build_classifier(
            config.model,
            num_classes=_num_classes(config),
            mean=config.data.mean,
            std=config.data.std,
            seed=config.seed,
            initialise=False,
        )
    return build_simmim(
        config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=config.seed, initialise=False
    )


def _task_facts(config: Config, module: nn.Module) -> dict[str, Any]:
    if config.task == "classification":
        return {
            "head_multiply_adds": module.head.weight.numel(),
            "num_classes": module.num_classes,
            "layer_decay": config.optimizer.layer_decay,
        }
    mask, objective = config.mask, objective_sizes(module, config.model.image_size)
    grid = mask_grid(config.model.image_size, mask.cell)
    return {
        "head": config.objective.head,
        "head_parameters": objective.head_parameters,
        "head_multiply_adds": _head_multiply_adds(config, module),
        "target": config.objective.target,
        "target_multiply_adds": objective.target_multiply_adds,
        "predicted": list(objective.predicted),
        "predicted_per_token": [objective.predicted[0], objective.patch, objective.patch],
        "mask_cells": grid[0] * grid[1],
        "hidden_cells": num_hidden(grid, mask.ratio),
        "avg_dist": round(describe_distance(mask, config.model.image_size).mean, 2),
    }


def _head_multiply_adds(config: Config, module: nn.Module) -> int:
    """Of SimMIM's head for one image in training: a tokenwise head is asked for hidden tokens alone, where cells are tokens."""
    stride, mask = module.backbone.stride, config.mask
    sides = (-(-side // stride) for side in config.model.image_size)
    features = torch.empty(1, *sides, module.backbone.num_features, device="meta")
    whole = head_multiply_adds(module.head, module.meeting.features(features))
    if mask.cell % stride or not getattr(module.head, "tokenwise", False):
        return whole
    grid = mask_grid(config.model.image_size, mask.cell)
    return whole * num_hidden(grid, mask.ratio) // (grid[0] * grid[1])


def _num_classes(config: Config) -> int:
    if config.classification.num_classes:
        return config.classification.num_classes
    place = config.data.train
    if place and (Path(place) / "index.json").exists():
        return len(ShardIndex.load(Path(place)).classes or ()) or IMAGENET_CLASSES
    return IMAGENET_CLASSES
