"""What can be known to be wrong with head, target and masking before a run opens any data."""

import psutil
import torch

from simmim_scale.config.schema import Config
from simmim_scale.models.complexity import count_parameters
from simmim_scale.objectives.simmim import SimMIM, build_simmim

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SUM_BYTES = 4  # gradients of a head for classes are summed in fp32


def build_on_meta(config: Config) -> SimMIM:
    """The whole model without its numbers: shapes only, whatever the size."""
    with torch.device("meta"):
        return build_simmim(
            config.model,
            config.objective,
            mean=config.data.mean,
            std=config.data.std,
            seed=config.seed,
            attention=config.kernels.window_attention,
            initialise=False,
        )


def check_objective(config: Config) -> None:
    """Raises ValueError for files that are missing or of the wrong shape, sizes that do not fit each other, and a head that no
    device here can hold."""
    module = build_on_meta(config)
    scale, cell = module.target.scale, config.mask.cell
    if cell % scale:
        raise ValueError(
            f"mask.cell: a predicted pixel must lie in one cell, got {cell} for predicted pixels of {scale} image pixels."
            f" Choose a multiple of {scale}."
        )
    if hasattr(module.head, "proj"):
        _check_memory(count_parameters(module.head), config.engine.precision, config.objective.target)


def _check_memory(parameters: int, precision: str, target: str) -> None:
    """The least that any ZeRO stage needs on one device for a head: its gathered weight, that gradient, and the fp32 sums."""
    needed = parameters * (2 * BYTES[precision] + SUM_BYTES)
    available, place = device_memory()
    if needed > available:
        raise ValueError(
            f"objective.head: the head for target {target!r} has {parameters:,} parameters; its weight and gradient alone need"
            f" {needed / 2**30:.1f} GiB, {place} has {available / 2**30:.1f} GiB. Predict at a lower resolution"
            " (objective.downsample), or fewer classes (objective.bins)."
        )


def device_memory() -> tuple[int, str]:
    """Bytes of the device that a rank trains on, and what it is."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, "the GPU"
    return psutil.virtual_memory().total, "this machine"
