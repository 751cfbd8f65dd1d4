"""Whole fp32 parameters from the files of a save, on one process, whatever number of ranks and ZeRO stage wrote them."""

import json
import math
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from simmim_scale.engine.flats import Piece
from simmim_scale.engine.state import BUFFER, FROZEN, MASTER, STATE_FILE, SavedParts, open_files, refuse_former


def consolidate(save: Path) -> dict[str, Tensor]:
    """Every parameter of a complete save by name, fp32, and persistent buffers: what `Engine.full_state_dict` would give.

    Raises:
        ValueError: a parameter that the save lists is not whole in its files, or an earlier version wrote them.
    """
    refuse_former(save)
    shapes = json.loads((save / STATE_FILE).read_text())["parameters"]
    with ExitStack() as stack:
        files = open_files(save, stack)
        parts = SavedParts(save, files)
        main = {name: files[0].get_tensor(name) for name in files[0].keys() if name.startswith((FROZEN, BUFFER))}  # noqa: SIM118
        state = {name: _whole(parts, name, shape) for name, shape in shapes.items() if f"{FROZEN}.{name}" not in main}
    loose = {name.partition(".")[2]: _fp32(value) for name, value in main.items()}
    return {**{name: state[name] if name in state else loose[name] for name in shapes}, **loose}


def _whole(parts: SavedParts, name: str, shape: list[int]) -> Tensor:
    numel = math.prod(shape)
    flat = torch.empty(numel, dtype=torch.float32)
    parts.read(MASTER, Piece(name, 0, 0, numel), flat)
    return flat.view(shape)


def _fp32(value: Tensor) -> Tensor:
    return value.to(torch.float32) if value.is_floating_point() else value
