"""Regional compilation: torch.compile for each block of the backbone, with ZeRO-3 and activation checkpointing around it.

A block's forward is compiled, not its call: hooks (gathering parameters) and checkpointing stay around the graph. Blocks of one
kind share what was compiled, so a model of any depth costs as many compilations as it has kinds of blocks.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Kinds of blocks (stage, shifted, extra norm) in training, in evaluation and with a batch of one: up to some 30 forms of one
# function, of which PyTorch would compile 8 and run the others uncompiled.
MOST_FORMS = 128
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compile_blocks(module: nn.Module, mode: str, device: torch.device) -> int:
    """Compile the blocks that `module.backbone.checkpointable_blocks()` lists, in place, on first use; returns how many.

    Nothing is compiled twice for another batch size, nor (the cache is on disk, see `use_cache`) for another start.

    Args:
        mode: "none" or "block".

    Raises:
        ValueError: the backbone lists no blocks, or there is no compiler here.
    """
    if mode == "none":
        return 0
    blocks_of = getattr(getattr(module, "backbone", None), "checkpointable_blocks", None)
    if blocks_of is None:
        raise ValueError(
            f"engine.compile: {mode!r} needs a backbone with checkpointable_blocks(), which"
            f" {type(getattr(module, 'backbone', module)).__name__} lacks. Add the method, or set it to 'none'."
        )
    require_compiler(device)
    use_cache()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_FORMS)
    blocks = list(blocks_of())
    for block in blocks:
        block.forward = _compiled(block.forward)
    return len(blocks)


def require_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile cannot work: it needs a C++ compiler on a CPU, Triton on a GPU."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise ValueError(
            "engine.compile: torch.compile needs a C++ compiler on a CPU, and found none. Install g++, or set it to 'none'."
        )
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        raise ValueError(
            "engine.compile: torch.compile needs Triton, which is not installed or does not know this GPU. Set it to 'none'."
        )


def use_cache() -> Path:
    """The directory that keeps compiled code between starts: $TORCHINDUCTOR_CACHE_DIR, else one below the user's caches.

    PyTorch's own default lies in /tmp, which many machines empty at every start.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.setdefault(CACHE_VARIABLE, str(caches / "simmim_scale" / "inductor")))


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    # Sizes are constants of the code, which is faster, except those that are marked.
    compiled = torch.compile(forward, dynamic=False)

    def call(*args: Tensor | None) -> Any:
        for argument in args:
            if argument is not None:
                torch._dynamo.maybe_mark_dynamic(argument, 0)  # the batch: axis 0 of tokens and of drop path's scales
        return compiled(*args)

    return call
