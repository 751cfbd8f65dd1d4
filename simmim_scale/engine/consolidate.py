"""Whole fp32 parameters from the files of a save, on one process, whatever world size and ZeRO stage wrote them.

DeepSpeed's files are unpickled: call this only on the checkpoints of a run of your own.
"""

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim_scale.engine.state import MASTERS, STATE_FILE, TAG

MODEL_STATES = "mp_rank_00_model_states.pt"  # of stage 0, whose ranks hold the same


def consolidate(save: Path) -> dict[str, Tensor]:
    """Every parameter of a complete save by name, fp32, and persistent buffers: what `Engine.full_state_dict` would give.

    Raises:
        ValueError: the files do not hold every parameter that the save lists, in its shape.
    """
    facts = json.loads((save / STATE_FILE).read_text())
    state = _from_stage_0(save, facts) if facts["zero_stage"] == 0 else _from_zero(save)
    _check(save, state, facts["parameters"])
    return state


def _from_zero(save: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it tells its progress with print, and draws bars
        state = get_fp32_state_dict_from_zero_checkpoint(str(save), tag=TAG)
    return {name: _fp32(value.detach()) for name, value in state.items()}


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
