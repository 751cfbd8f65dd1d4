"""Activation checkpointing: keep little of a block's forward and compute the rest again in backward.

Which blocks and what is kept is the policy (`engine.activation_checkpointing`); whose code recomputes is the back end
(`engine.checkpointing_backend`). A block is a pure function of its arguments (drop path's scales are arguments), so the second
computation gives the first one's bits, and no generator needs rewinding.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

EARLY_STAGES = 2  # V2 section 3.4 saves memory in "the first two stages": most tokens, fewest multiply-adds for each byte kept

KEPT_BY_SELECTIVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}

# runs(inner, args): computes inner(*args) and arranges for its recomputation
Runner = Callable[[Callable[..., Any], Sequence[Any]], Any]


def apply_activation_checkpointing(module: nn.Module, policy: str, backend: str = "torch", *, pin_memory: bool = False) -> int:
    """Checkpoint blocks of `module.backbone`, and those of a head that lists some, in place; returns how many.

    Args:
        policy: none; block: every block of `checkpointable_blocks()`, of which its input is kept; stage: those of the first two
            of `checkpointable_stages()`; selective: every block, of which results of matrix products, convolutions and PyTorch's
            attention are kept and only what is cheap is computed again; offload: as block, with the inputs in CPU memory.
        backend: torch (non-reentrant), torch_reentrant, deepspeed (deepspeed.checkpointing) or fairscale (checkpoint_wrapper).
        pin_memory: page-locked CPU memory for offload, so that copies overlap with computing; needs a GPU.
    Raises:
        ValueError: the backbone offers no blocks or stages, the back end cannot do the policy, or fairscale is not installed.
    """
    if policy == "none":
        return 0
    blocks = _blocks(getattr(module, "backbone", None), module, policy)
    run = _runner(policy, backend, pin_memory)
    for block in blocks:
        block.__class__ = _checkpointed(type(block), run)
    return len(blocks)


def _blocks(backbone: Any, module: nn.Module, policy: str) -> list[nn.Module]:
    method = "checkpointable_stages" if policy == "stage" else "checkpointable_blocks"
    offered = getattr(backbone, method, None)
    if offered is None:
        raise ValueError(
            f"engine.activation_checkpointing: {policy!r} needs a backbone with {method}(), which"
            f" {type(backbone or module).__name__} lacks. Add the method, or set it to 'none'."
        )
    if policy == "stage":
        return [block for stage in offered()[:EARLY_STAGES] for block in stage]
    return [*offered(), *getattr(getattr(module, "head", None), "checkpointable_blocks", list)()]


def _checkpointed(cls: type[nn.Module], run: Runner) -> type[nn.Module]:
    """A subclass whose call is checkpointed as a whole, hooks included.

    Wrapping `forward` instead would leave ZeRO-3's hooks out of the recomputation: parameters that the block itself owns
    would still be partitioned then. A wrapper module would rename every parameter.
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner: Callable[..., Any] = super(subclass, self).__call__
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return run(partial(inner, **kwargs), args)

    subclass = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__})
    return subclass


def _runner(policy: str, backend: str, pin_memory: bool) -> Runner:
    if policy == "selective" and backend != "torch":
        raise ValueError(
            f"engine.checkpointing_backend: {backend} cannot keep a part of a block, which selective asks for. Choose torch, or"
            " engine.activation_checkpointing=block."
        )
    makers = {"torch": _torch, "torch_reentrant": _torch_reentrant, "deepspeed": _deepspeed, "fairscale": _fairscale}
    return makers[backend](policy, pin_memory)


def _torch(policy: str, pin_memory: bool) -> Runner:
    kept: dict[str, Any] = {"context_fn": _selective_contexts} if policy == "selective" else {}

    def run(inner: Callable[..., Any], args: Sequence[Any]) -> Any:
        return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **kept)

    return _offloaded(run, pin_memory) if policy == "offload" else run


def _torch_reentrant(policy: str, pin_memory: bool) -> Runner:
    def run(inner: Callable[..., Any], args: Sequence[Any]) -> Any:
        return checkpoint(inner, *args, use_reentrant=True, preserve_rng_state=False)

    return _offloaded(run, pin_memory) if policy == "offload" else run


def _offloaded(run: Runner, pin_memory: bool) -> Runner:
    def offloaded(inner: Callable[..., Any], args: Sequence[Any]) -> Any:
        with save_on_cpu(pin_memory=pin_memory):  # what `checkpoint` itself saves: the inputs
            return run(inner, args)

    return offloaded


def _deepspeed(policy: str, pin_memory: bool) -> Runner:
    import deepspeed

    deepspeed.checkpointing.configure(None)

    def run(inner: Callable[..., Any], args: Sequence[Any]) -> Any:
        return deepspeed.checkpointing.checkpoint(inner, *args)

    # Not by its own `checkpoint_in_cpu`, which empties the block's input in place, whoever else may hold it, and which fails
    # without a GPU (DeepSpeed 0.19.8). The gradient of the input takes the way through CPU memory too.
    return partial(_through_cpu, run) if policy == "offload" else run


def _through_cpu(run: Runner, inner: Callable[..., Any], args: Sequence[Any]) -> Any:
    devices = [arg.device if isinstance(arg, Tensor) else None for arg in args]

    def on_device(*held: Any) -> Any:
        return inner(*(arg if device is None else arg.to(device) for arg, device in zip(held, devices, strict=True)))

    return run(on_device, [arg if device is None else arg.to("cpu") for arg, device in zip(args, devices, strict=True)])


def _fairscale(policy: str, pin_memory: bool) -> Runner:
    try:
        from fairscale.nn.checkpoint import checkpoint_wrapper
    except ImportError as error:
        raise ValueError(
            f"engine.checkpointing_backend: fairscale needs pip install 'simmim-scale[fairscale]' ({error}). Or choose torch."
        ) from error

    def run(inner: Callable[..., Any], args: Sequence[Any]) -> Any:
        return checkpoint_wrapper(_Call(inner), offload_to_cpu=policy == "offload")(*args)

    return run


class _Call(nn.Module):
    """A call as a module, which is what fairscale wraps. Made for one call; it registers nothing of the block."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def _selective_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first computation, which keeps, and for the second, which finds what was kept."""
    keeping, finding = create_selective_checkpoint_contexts(_keeps)
    return _with_linears_seen(keeping), _with_linears_seen(finding)


@contextlib.contextmanager
def _with_linears_seen(policy: AbstractContextManager[Any]) -> Iterator[None]:
    """Linear maps of ZeRO-3 as operators that a policy sees, within this context alone.

    zero.Init replaces `F.linear` by a function with its own backward, which frees the weight after forward. Inside it gradients
    are off and the bias is added in place: no result to keep. A checkpointed block keeps no weight of its first computation
    anyway. PyTorch's own `F.linear` would be seen too, but adds the bias inside the product: other bits from 352 channels on.
    """
    before = torch.nn.functional.linear
    if before.__name__ == "zero3_linear_wrap":
        torch.nn.functional.linear = _linear_as_zero3  # type: ignore[assignment]
    try:
        with policy:
            yield
    finally:
        torch.nn.functional.linear = before


def _linear_as_zero3(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`deepspeed.runtime.zero.linear` (0.19.8) bit for bit: a product, then the bias; both at once for a matrix."""
    if input.dim() == 2 and bias is not None:
        return torch.addmm(bias, input, weight.t())
    product = input.matmul(weight.t())
    return product if bias is None else product + bias


def _keeps(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what is expensive to compute: matrix products, convolutions, attention."""
    # Gradients are off inside an op that brings its own backward (our attention on a CPU): its steps work in place and are
    # no results to keep. Such an op is computed again as a whole.
    if op in KEPT_BY_SELECTIVE and torch.is_grad_enabled():
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
