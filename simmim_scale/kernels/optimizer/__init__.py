"""AdamW: the contract; the modules beside this one each name a way to compute it.

    moment1 = beta1 * moment1 + (1 - beta1) * g          moment2 = beta2 * moment2 + (1 - beta2) * g^2
    p = p * (1 - lr * decay) - lr * (moment1 / (1 - beta1^t)) / (sqrt(moment2 / (1 - beta2^t)) + eps)

Decay is decoupled (arXiv 1711.05101), both moments are corrected for their start at 0, t counts applied steps. All of it is in
the type of the parameters, which are the fp32 masters. A module's `optimizer()` says which class does it; the engine adds the
guard.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from simmim_scale.kernels.dispatch import choose


@dataclass(frozen=True)
class AdamWForm:
    """One way to compute AdamW.

    Attributes:
        cls: the optimizer; its constructor takes (groups, lr=, betas=, eps=, **arguments).
        arguments: what else the constructor needs to compute the formula above.
        skips_on_device: it honours the attributes `found_inf` (1: leave parameters and state alone) and `grad_scale` (gradients
            are divided by it), both tensors on the device, as PyTorch's fused optimizers do. Then a step is clipped, or skipped,
            without the host ever learning the norm.
    """

    cls: type[torch.optim.Optimizer]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    skips_on_device: bool = False


def choose_optimizer(name: str, *, device: torch.device) -> AdamWForm:
    """The form of AdamW called `name` ("auto": the first that can run here) for fp32 masters on `device`.

    Raises:
        ValueError: unknown name, or it cannot run here.
    """
    form: Any = choose("optimizer", name, device=device, dtype=torch.float32).function()
    return form
