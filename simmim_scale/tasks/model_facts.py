"""What a configured model amounts to: parameters, multiply-adds, tokens, mask."""

from typing import Any

import torch

from simmim_scale.config.schema import Config
from simmim_scale.data.masks import num_hidden
from simmim_scale.models.complexity import count_parameters, multiply_adds
from simmim_scale.objectives.simmim import build_simmim


def describe_model(config: Config) -> dict[str, Any]:
    """Sizes of the model, counted on the meta device: no memory is used, whatever the size."""
    with torch.device("meta"):
        module = build_simmim(
            config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=config.seed, initialise=False
        )
    height, width = config.model.image_size
    patch = config.model.patch_size
    rows, columns = height // config.mask.cell, width // config.mask.cell
    return {
        "backbone": config.model.name,
        "parameters": count_parameters(module.backbone),
        "parameters_with_head": count_parameters(module),
        "multiply_adds": multiply_adds(module.backbone, config.model.image_size, in_chans=config.model.in_chans),
        "image_size": [height, width],
        "tokens": -(-height // patch) * -(-width // patch),
        "stride": config.model.stride,
        "mask_cells": rows * columns,
        "hidden_cells": num_hidden((rows, columns), config.mask.ratio),
        "precision": config.engine.precision,
        "zero_stage": config.engine.zero_stage,
        "schedule": config.schedule.name,
    }
