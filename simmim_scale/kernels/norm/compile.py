"""The reference, fused by torch.compile: one kernel per function and direction, made on first use (seconds; cached on disk).

Inside a block that is compiled as a whole (engine.compile) it becomes part of that graph.
"""

import functools
import shutil
import sysconfig
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simmim_scale.kernels.norm import reference


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """Needs a C++ compiler on a CPU, Triton on a GPU."""
    if not dtype.is_floating_point:
        return f"it needs a floating-point type, got {dtype}"
    if device.type == "cpu":
        names = ("g++", "clang++", (sysconfig.get_config_var("CXX") or "g++").split()[0])
        return None if any(shutil.which(name) for name in names) else "it needs a C++ compiler (g++), and none was found"
    return None if torch.utils._triton.has_triton() else "torch.compile needs Triton, which does not know this GPU"


def layer_norm(x: Float[Tensor, "b *tokens c"], weight: Tensor, bias: Tensor, *, eps: float) -> Float[Tensor, "b *tokens c"]:
    """See the contract in `kernels/norm/__init__.py`."""
    return _form("layer_norm")(_rows_vary(x), weight, bias, eps=eps)


def post_norm(
    branch: Float[Tensor, "b *tokens c"],
    residual: Float[Tensor, "b *tokens c"],
    scale: Float[Tensor, "b"] | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
) -> Float[Tensor, "b *tokens c"]:
    """See the contract."""
    return _form("post_norm")(_rows_vary(branch), _rows_vary(residual), _rows_vary(scale), weight, bias, eps=eps)


def pre_norm(
    branch: Float[Tensor, "b *tokens c"],
    residual: Float[Tensor, "b *tokens c"],
    scale: Float[Tensor, "b"] | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
) -> tuple[Float[Tensor, "b *tokens c"], Float[Tensor, "b *tokens c"]]:
    """See the contract."""
    return _form("pre_norm")(_rows_vary(branch), _rows_vary(residual), _rows_vary(scale), weight, bias, eps=eps)


def _form(name: str) -> Callable[..., Any]:
    function = getattr(reference, name)
    return function if torch.compiler.is_compiling() else _compiled(name)


@functools.cache
def _compiled(name: str) -> Callable[..., Any]:
    # A model has up to ten widths and shapes, in training and in evaluation: PyTorch's limit of 8 forms would end compilation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(getattr(reference, name), dynamic=False)


def _rows_vary(x: Tensor | None) -> Tensor | None:
    """Another number of samples shall not compile anew; another width or resolution may."""
    if x is not None and not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return x
