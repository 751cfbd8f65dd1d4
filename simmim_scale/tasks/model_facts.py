"""What a configured model amounts to: parameters, multiply-adds, tokens, mask."""

from typing import Any

import torch

from simmim_scale.config.schema import Config, MaskConfig
from simmim_scale.data.mask_distance import Distance, mask_grid, setting_distance
from simmim_scale.data.masks import num_hidden
from simmim_scale.models.complexity import count_parameters, multiply_adds
from simmim_scale.objectives.simmim import build_simmim

DESCRIBED_MASKS = 400  # 1.6 ms each at 192 x 192


def describe_model(config: Config) -> dict[str, Any]:
    """Sizes of the model, counted on the meta device: no memory is used, whatever the size."""
    with torch.device("meta"):
        module = build_simmim(
            config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=config.seed, initialise=False
        )
    height, width = config.model.image_size
    patch = config.model.patch_size
    mask = config.mask
    rows, columns = mask_grid((height, width), mask.cell)
    return {
        "backbone": config.model.name,
        "parameters": count_parameters(module.backbone),
        "parameters_with_head": count_parameters(module),
        "multiply_adds": multiply_adds(module.backbone, config.model.image_size, in_chans=config.model.in_chans),
        "image_size": [height, width],
        "tokens": -(-height // patch) * -(-width // patch),
        "stride": config.model.stride,
        "mask_cells": rows * columns,
        "hidden_cells": num_hidden((rows, columns), mask.ratio),
        "avg_dist": round(describe_distance(mask, (height, width)).mean, 2),
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
