"""Whole fp32 parameters from the files of a save, on one process, whatever world size and ZeRO stage wrote them.

DeepSpeed's files are unpickled: call this only on the checkpoints of a run of your own.
"""

import io
import json
import math
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim_scale.engine.state import MASTERS, STATE_FILE, TAG

MODEL_STATES = "mp_rank_00_model_states.pt"  # of stages 0 to 2, whose ranks hold the same
BF16_STATES = "bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
PARTS = "single_partition_of_fp32_groups"


def consolidate(save: Path) -> dict[str, Tensor]:
    """Every parameter of a complete save by name, fp32, and persistent buffers: what `Engine.full_state_dict` would give.

    Raises:
        ValueError: the files do not hold every parameter that the save lists, in its shape.
    """
    facts = json.loads((save / STATE_FILE).read_text())
    readers = {(0, facts["precision"]): _from_stage_0, (1, "bf16"): _from_bf16_stage_1}
    state = readers.get((facts["zero_stage"], facts["precision"]), _from_zero)(save, facts)
    _check(save, state, facts["parameters"])
    return state


def _from_zero(save: Path, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it tells its progress with print, and draws bars
        state = get_fp32_state_dict_from_zero_checkpoint(str(save), tag=TAG)
    return {name: _fp32(value.detach()) for name, value in state.items()}


def _from_bf16_stage_1(save: Path, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Stage 1 in bf16 has an optimizer whose files DeepSpeed's script does not know (0.19.8). Each rank holds a part of
    every group's flat fp32 vector, whose parameters lie one after another, padded at its end."""
    content = torch.load(save / TAG / MODEL_STATES, map_location="cpu", weights_only=False)
    ranks = [save / TAG / BF16_STATES.format(rank=rank) for rank in range(facts["world_size"])]
    parts = [torch.load(path, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"][PARTS] for path in ranks]
    state = {name: _fp32(content["module"][name]) for name in content.get("buffer_names") or []}
    for number, shapes in enumerate(content["param_shapes"]):
        flat = torch.cat([rank[number] for rank in parts])
        sizes = [math.prod(shape) for shape in shapes.values()]
        values = flat[: sum(sizes)].split(sizes)
        state.update({name: value.view(shape).clone() for (name, shape), value in zip(shapes.items(), values, strict=True)})
    return state


def _from_stage_0(save: Path, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The module's tensors; where they are bf16 or fp16, the fp32 masters that the optimizer keeps without names."""
    content = torch.load(save / TAG / MODEL_STATES, map_location="cpu", weights_only=False)
    state = {name: _fp32(value) for name, value in content["module"].items()}
    names, masters = facts.get(MASTERS, []), (content.get("optimizer") or {}).get("fp32_groups", [])
    if facts["precision"] != "fp32" and not (names and masters):
        raise ValueError(
            f"{save}: an older save in {facts['precision']} that does not say which fp32 master belongs to which parameter."
            " Run its command again until the next save."
        )
    for group, values in zip(names, masters, strict=True):
        state.update({name: value.detach() for name, value in zip(group, values, strict=True)})
    return state


def _fp32(value: Tensor) -> Tensor:
    return value.to(torch.float32) if value.is_floating_point() else value


def _check(save: Path, state: Mapping[str, Tensor], expected: Mapping[str, list[int]]) -> None:
    wrong = [name for name, shape in expected.items() if name not in state or list(state[name].shape) != shape]
    if wrong:
        raise ValueError(
            f"{save}: {len(wrong)} of {len(expected)} parameters are missing or have another shape: {', '.join(wrong[:5])}."
            " Use another save."
        )
