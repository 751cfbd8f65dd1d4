"""AdamW with the published no-decay and layer-decay groups, and a guard for the one case where DeepSpeed checks no gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from simmim_scale.config.schema import OptimizerConfig

# Besides 1-D parameters and biases: the mask token and what describes relative positions (released SimMIM and Swin code).
NO_DECAY = ("mask_token", "cpb_mlp", "rpe_mlp", "logit_scale", "relative_position_bias_table", "absolute_pos_embed")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter. Under ZeRO-3 the tensor is empty here and `ds_shape` holds its shape."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and not name.endswith(".bias") and not any(word in name for word in NO_DECAY)


def parameter_groups(
    module: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The module's trainable parameters in as few groups as their weight decay and learning rate allow.

    Without layer decay these are "decay" and "no_decay"; with it, up to two for each layer. A group is a flat buffer of its own
    under ZeRO, so fewer are faster; merging groups further would change the learning rate of some parameter.

    Args:
        lr_scales: factor of the learning rate of each parameter by name; None, or a name that is missing: 1.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            scale = (lr_scales or {}).get(name, 1.0)
            groups.setdefault((scale, decays(name, parameter)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], not item[0][1]))  # the head first, "decay" before "no_decay"
    return [
        {"name": _group_name(scale, decay), "params": params, "weight_decay": weight_decay if decay else 0.0, "lr_scale": scale}
        for (scale, decay), params in ordered
    ]


def _group_name(scale: float, decay: bool) -> str:
    name = "decay" if decay else "no_decay"
    return name if scale == 1.0 else f"{name} x{scale:.6g}"


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that does nothing until it is armed, and that can refuse non-finite gradients and clip by itself.

    Arming: DeepSpeed's stage 0 in bf16 and fp16 takes a step with zero gradients when it is built, which would advance
    Adam's step count. Guarding: in stage 0 with fp32 DeepSpeed hands the gradients over unchecked; then `guard` makes
    this class clip, and offer `overflow` and `_global_grad_norm` under the names DeepSpeed reads from its own wrappers.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, *, guard: bool) -> None:
        # fused: one pass over memory instead of about ten, on CPU as on GPU. The rate is set before every step.
        super().__init__(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        self.armed = False
        self.guard = guard
        self.clip = config.clip_grad
        if guard:
            self.overflow = False
            self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None, "closures would re-run the forward pass outside the engine"
        if self.armed and (not self.guard or self._clip_finite()):
            super().step()

    def _clip_finite(self) -> bool:
        """Measure the gradients, clip them, and say whether they were finite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        if self.clip is not None and not self.overflow:
            factor = torch.clamp(self.clip / (norm + 1e-6), max=1.0)  # as DeepSpeed computes it in its other stages
            torch._foreach_mul_(gradients, factor)
        return not self.overflow
