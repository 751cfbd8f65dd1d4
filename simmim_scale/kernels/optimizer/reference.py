"""AdamW written out, one parameter after another: what the others must equal."""

import math
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from simmim_scale.kernels.optimizer import AdamWForm


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """Plain PyTorch runs everywhere."""
    return None


def optimizer() -> AdamWForm:
    """See the contract in `kernels/optimizer/__init__.py`."""
    return AdamWForm(PlainAdamW)


class PlainAdamW(torch.optim.Optimizer):
    """The formula of the contract, in the type of each parameter. State and its names are those of `torch.optim.AdamW`."""

    def __init__(self, params: ParamsT, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "closures would re-run the forward pass outside the engine"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        gradient, (beta1, beta2), count = parameter.grad, group["betas"], float(state["step"])
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2**count)).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**count))
