"""Writing initial values into parameters: the same bits on any device, plain or partitioned by `deepspeed.zero.Init`.

Values are drawn in fp32 on the CPU from an explicit generator and then copied, so device, precision and sharding cannot
change them.
"""

import contextlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

# Draws the values of one parameter: (shape, generator) -> fp32 CPU tensor of that shape.
Rule = Callable[[tuple[int, ...], torch.Generator], Tensor]


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape of a parameter, also when ZeRO-3 left only a piece of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def constant(value: float) -> Rule:
    """Every element is `value`."""
    return lambda shape, _: _blank(shape).fill_(value)


def trunc_normal(std: float = 0.02) -> Rule:
    """Normal around 0, cut at +-2 as in timm and torch (so in effect uncut for small `std`)."""
    return lambda shape, generator: nn.init.trunc_normal_(_blank(shape), std=std, generator=generator)


def fan_out_normal(fan_out: int) -> Rule:
    """N(0, 2 / fan out), for convolutions that a ReLU follows (arXiv 1502.01852)."""
    std = math.sqrt(2.0 / fan_out)
    return lambda shape, generator: _blank(shape).normal_(0.0, std, generator=generator)


def uniform(bound: float) -> Rule:
    """Uniform in [-bound, bound]."""
    return lambda shape, generator: _blank(shape).uniform_(-bound, bound, generator=generator)


def fan_in_uniform(fan_in: int) -> Rule:
    """Uniform with bound 1 / sqrt(fan in): what torch gives convolutions, and what published models left them with."""
    return uniform(1.0 / math.sqrt(fan_in))


def initialize(model: nn.Module, rule_for: Callable[[nn.Module, str, str], Rule], generator: torch.Generator) -> None:
    """Give every parameter of `model` its initial value, in the order of `named_modules`.

    Args:
        rule_for: (module that owns the parameter, its dotted path, the parameter's own name) -> rule.
        generator: CPU generator; the only source of randomness. Parameters on the meta device are left alone.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            assign(parameter, rule_for(module, path, name), generator)


def assign(parameter: nn.Parameter, rule: Rule, generator: torch.Generator) -> None:
    """Draw by `rule` and write into `parameter`, gathering it first where `zero.Init` has partitioned it.

    Every rank draws, so that generators stay in step; DeepSpeed spreads rank 0's values.
    """
    if parameter.is_meta:
        return
    values = rule(shape_of(parameter), generator)
    with _gathered(parameter), torch.no_grad():
        parameter.copy_(values)


def _gathered(parameter: nn.Parameter) -> contextlib.AbstractContextManager:
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    # Writing to a partitioned parameter outside this context is silently lost (its local tensor is empty).
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _blank(shape: tuple[int, ...]) -> Tensor:
    # By way of numpy: zero.Init patches torch's constructors to another type and device, even where both are given.
    return torch.from_numpy(np.empty(shape, dtype=np.float32))
