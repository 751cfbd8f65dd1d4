"""Activation checkpointing: keep a block's input, compute the rest again in backward."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_activation_checkpointing(module: nn.Module, policy: str) -> int:
    """Checkpoint the blocks that `checkpointable_blocks()` of the backbone lists, in place, and those of a head that has it too;
    returns how many.

    Args:
        policy: "none", or "block" for PyTorch's non-reentrant checkpointing of each block.
    Raises:
        ValueError: the backbone offers no blocks.
    """
    if policy == "none":
        return 0
    blocks_of = getattr(getattr(module, "backbone", None), "checkpointable_blocks", None)
    if blocks_of is None:
        raise ValueError(
            f"engine.activation_checkpointing: {policy!r} needs a backbone with checkpointable_blocks(), which"
            f" {type(getattr(module, 'backbone', module)).__name__} lacks. Add the method, or set it to 'none'."
        )
    of_head = getattr(getattr(module, "head", None), "checkpointable_blocks", list)
    blocks = [*blocks_of(), *of_head()]
    for block in blocks:
        block.__class__ = _checkpointed(type(block))
    return len(blocks)


def _checkpointed(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose call is checkpointed as a whole, hooks included.

    Wrapping `forward` instead would leave ZeRO-3's hooks out of the recomputation: parameters that the block itself owns
    would still be partitioned then. A wrapper module would rename every parameter.
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner: Callable[..., Any] = super(subclass, self).__call__
        # A block is a pure function of its arguments (drop path scales are arguments), so no generator needs rewinding.
        return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    subclass = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__})
    return subclass
