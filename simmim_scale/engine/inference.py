"""A module that is only run: what `train/evaluate.py` calls when nothing is trained. No DeepSpeed, no optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simmim_scale.engine.precision import DTYPES, require_precision
from simmim_scale.engine.runtime import Runtime


class InferenceEngine:
    """The whole module on this rank's device, in eval mode; every rank holds a copy and sees its share of the batches.

    Args:
        module: with its weights.
        runtime: whose device to use.
        precision: "fp32", "bf16" or "fp16", of weights and arithmetic.

    Raises:
        ValueError: the device has no arithmetic for the precision.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, *, precision: str = "fp32") -> None:
        require_precision(precision, runtime.device)
        self.module = module.to(runtime.device, DTYPES[precision]).eval()

    def evaluate_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's outputs for a batch on the device, without gradients."""
        with torch.no_grad():
            return self.module(batch)
