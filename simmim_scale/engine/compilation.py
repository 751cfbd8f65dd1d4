"""Regional compilation: torch.compile for each block of the backbone, with ZeRO-3 and activation checkpointing around it.

A block's forward is compiled, not its call: hooks (gathering parameters) and checkpointing stay around the graph. Blocks of one
kind share what was compiled, so a model of any depth costs as many compilations as it has kinds of blocks.
"""

import logging
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Kinds of blocks (stage, shifted, extra norm) in training, in evaluation and with a batch of one: up to some 30 forms of one
# function, of which PyTorch would compile 8 and run the others uncompiled.
MOST_FORMS = 128
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
SECONDS_TO_LINK = 60  # a library that was written to within this time may still be growing

logger = logging.getLogger(__name__)


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

    PyTorch's own default lies in /tmp, which many machines empty at every start. A process that is killed while it links leaves a
    library cut short, which every later start would fail to load: those are removed here.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # PyTorch sets the variable to its default as soon as anything asks for it, so the default is nobody's choice.
    if os.environ.get(CACHE_VARIABLE, default_cache_dir()) == default_cache_dir():
        os.environ[CACHE_VARIABLE] = str(caches / "simmim_scale" / "inductor")
    directory = Path(os.environ[CACHE_VARIABLE])
    for library in directory.rglob("*.so"):
        if _cut_short(library):
            logger.warning("removed %s, which a killed process left incomplete", library)
            library.unlink(missing_ok=True)
    return directory


def _cut_short(library: Path) -> bool:
    """Whether a library ends before its table of sections does, and nobody has written to it for a while."""
    try:
        status = library.stat()
        with library.open("rb") as file:
            header = file.read(64)
    except FileNotFoundError:  # another rank removed it
        return False
    if time.time() - status.st_mtime < SECONDS_TO_LINK:
        return False
    if len(header) < 64:
        return True
    if not header.startswith(b"\x7fELF\x02"):
        return False  # not a library of a 64-bit Linux: nothing is known about its length
    table, size, count = *struct.unpack_from("<Q", header, 40), *struct.unpack_from("<HH", header, 58)
    return table == 0 or status.st_size < table + size * count


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    # Sizes are constants of the code, which is faster, except those that are marked.
    compiled = torch.compile(forward, dynamic=False)

    def call(*args: Tensor | None) -> Any:
        for argument in args:
            if argument is not None:
                torch._dynamo.maybe_mark_dynamic(argument, 0)  # the batch: axis 0 of tokens and of drop path's scales
        return compiled(*args)

    return call
