"""AdamW with the published no-decay and layer-decay groups, and a guard for where DeepSpeed checks no gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simmim_scale.config.schema import OptimizerConfig
from simmim_scale.kernels.optimizer import AdamWForm

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


class GuardedStep:
    """Mixed into an AdamW: it does nothing until armed, and clips and refuses non-finite gradients where DeepSpeed does not.

    Arming: DeepSpeed's stage 0 in bf16 and fp16 takes a step with zero gradients when it is built, which would advance Adam's
    step count. Guarding (`guards_itself` says where): the norm stays on the device. A form that skips there reads it in the very
    kernel that updates, which also divides the gradients by the clipping factor: no pass over memory, no wait. Others wait.
    """

    def guard(self, config: OptimizerConfig, *, guards: bool, skips_on_device: bool) -> None:
        """Set up, right after construction."""
        self.armed = False
        self.guards = guards
        self.clip = config.clip_grad
        self._skips_on_device = skips_on_device
        # Over all ranks and groups, where this rank holds but a part (set before each step); None: of the gradients held here.
        self.measured_norm: Tensor | None = None
        self.last_norm: Tensor | None = None  # before clipping, of the latest guarded step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None, "closures would re-run the forward pass outside the engine"
        if self.armed and (not self.guards or self._admit()):
            super().step()  # type: ignore[misc]

    def _admit(self) -> bool:
        """Arrange for this step to be clipped, or to leave everything alone; False: do not even call it."""
        groups: list[dict[str, Any]] = self.param_groups  # type: ignore[attr-defined]
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if self.measured_norm is None else self.measured_norm
        self.last_norm = norm
        # As DeepSpeed computes it in its other stages. Of a norm that is not finite nothing is used.
        factor = None if self.clip is None else torch.clamp((norm + 1e-6) / self.clip, min=1.0)
        if self._skips_on_device:
            self.found_inf = (~torch.isfinite(norm)).to(torch.float32)
            self.grad_scale = factor if factor is None else factor.to(torch.float32)
            return True
        if not bool(torch.isfinite(norm)):
            return False
        if factor is not None:
            torch._foreach_div_(gradients, factor)
        return True


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig, form: AdamWForm, *, guards: bool) -> Any:
    """The form's optimizer with the guard mixed in. The learning rate is set before every step (engine/schedule.py)."""
    cls = type(f"Guarded{form.cls.__name__}", (GuardedStep, form.cls), {})
    adamw = cls(groups, lr=0.0, betas=config.betas, eps=config.eps, **form.arguments)
    adamw.guard(config, guards=guards, skips_on_device=form.skips_on_device)
    return adamw
