"""Where DeepSpeed keeps the fp32 masters and the optimizer's state of each parameter, whatever the ZeRO stage.

Every stage updates one or more flat tensors. `flats_of` lists those of this rank, and which part of which parameter lies where
in them: with that, a state can be saved and loaded without knowing the stage (`engine/state.py`). Read from DeepSpeed 0.19.8.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """A contiguous part of a parameter inside a flat tensor; all numbers count elements.

    Attributes:
        name: the parameter's.
        offset: where the part begins in the flattened whole parameter.
        start: where it begins in the flat tensor.
        numel: its length.
    """

    name: str
    offset: int
    start: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """A tensor of fp32 masters that the optimizer updates as one.

    Attributes:
        numel: its length, padding included.
        pieces: what of the parameters lies in it.
        group: the parameter group it belongs to.
        resident: a context in which the tensor is in memory (ZeRO-Infinity keeps it on a disk otherwise) and may be changed.
    """

    numel: int
    pieces: tuple[Piece, ...]
    group: dict[str, Any]
    resident: Callable[[], AbstractContextManager[Tensor]]


@dataclass(frozen=True)
class Layout:
    """All flat tensors of this rank.

    Attributes:
        inner: the optimizer that updates them.
        replicated: every rank holds the same, so one needs to write it.
        prepare: call before masters are changed. refresh: call afterwards: makes the model's parameters follow. Both collective.
    """

    inner: Any
    flats: tuple[Flat, ...]
    replicated: bool
    prepare: Callable[[], None]
    refresh: Callable[[], None]


def layout_of(wrapped: Any) -> Layout:
    """The layout of a DeepSpeed engine."""
    optimizer = wrapped.optimizer
    names = {id(parameter): name for name, parameter in wrapped.module.named_parameters()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _stage_3(optimizer, names)
    for masters in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):  # stages 1 and 2; stage 1 in bf16
        if hasattr(optimizer, masters):
            return _stages_1_and_2(optimizer, getattr(optimizer, masters), names)
    if hasattr(optimizer, "fp32_groups"):
        return _stage_0_with_masters(optimizer, names)
    if hasattr(optimizer, "fp32_groups_flat"):
        raise ValueError(
            "engine.zero_stage: stage 0 with this fused optimizer cannot be saved. Choose engine.zero_stage 1, which holds the"
            " same on one rank, or kernels.optimizer torch_fused."
        )
    return _stage_0(optimizer, names)


def state_of(inner: Any, master: Tensor) -> dict[str, Tensor]:
    """The optimizer's tensors that go with a flat tensor, element by element; {} before its first step."""
    state = inner.state.get(master, {})
    return {
        key: value for key, value in state.items() if key != "step" and isinstance(value, Tensor) and value.shape == master.shape
    }


def steps_of(inner: Any, flat: Flat, master: Tensor) -> int:
    """Updates that the optimizer has applied to a flat tensor: Adam's bias correction depends on it."""
    counted = inner.state.get(master, {}).get("step", flat.group.get("step", 0))  # NVIDIA's FusedAdam counts in the group
    return int(counted)


def set_steps(inner: Any, flat: Flat, master: Tensor, steps: int) -> None:
    """Set what `steps_of` reads, in the form that the optimizer's class keeps it."""
    state = inner.state[master]
    if isinstance(inner, torch.optim.AdamW | torch.optim.Adam):
        on_device = bool(flat.group.get("fused") or flat.group.get("capturable"))
        # A tensor for each flat tensor: one shared tensor would count once for each of them.
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=master.device if on_device else "cpu")
    else:
        state["step"] = flat.group["step"] = steps


def _stage_0(optimizer: Any, names: dict[int, str]) -> Layout:
    """fp32: the parameters are their own masters."""
    flats = [
        Flat(p.numel(), (Piece(names[id(p)], 0, 0, p.numel()),), group, _always(p))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return Layout(optimizer, tuple(flats), True, _nothing, _nothing)


def _stage_0_with_masters(optimizer: Any, names: dict[int, str]) -> Layout:
    """bf16 and fp16: a master beside each parameter."""
    groups = optimizer.optimizer.param_groups
    rows = list(zip(groups, optimizer.fp16_groups, optimizer.fp32_groups, strict=True))
    pairs = [(group, low, high) for group, lows, highs in rows for low, high in zip(lows, highs, strict=True)]
    flats = [Flat(high.numel(), (Piece(names[id(low)], 0, 0, low.numel()),), group, _always(high)) for group, low, high in pairs]

    def refresh() -> None:
        for _, low, high in pairs:
            low.data.copy_(high.data)

    return Layout(optimizer.optimizer, tuple(flats), True, _nothing, refresh)


def _stages_1_and_2(optimizer: Any, masters: list[Tensor], names: dict[int, str]) -> Layout:
    """A flat tensor per group, cut into one part a rank. Each parameter knows its part (`_hp_mapping`), if it has one here."""
    groups = optimizer.optimizer.param_groups
    parameters = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    flats = []
    for group, master, members in zip(groups, masters, parameters, strict=True):
        mappings = [(names[id(p)], p._hp_mapping) for p in members if p._hp_mapping is not None]
        pieces = tuple(
            Piece(name, m.lp_fragment_address.start, m.hp_fragment_address.start, m.lp_fragment_address.numel)
            for name, m in mappings
        )
        flats.append(Flat(master.numel(), pieces, group, _always(master)))

    def refresh() -> None:
        optimizer.update_lp_params()
        optimizer._hp_optimizer_states_linked = False  # it keeps views of the state's tensors: renewed at the next step

    return Layout(optimizer.optimizer, tuple(flats), False, _nothing, refresh)


def _stage_3(optimizer: Any, names: dict[int, str]) -> Layout:
    """Every parameter is cut into one part a rank, padded to equal length; sub-groups of these parts are flat tensors."""
    groups = optimizer.optimizer.param_groups
    flats = []
    for number, members in enumerate(optimizer.fp16_groups):
        pieces, start = [], 0
        for p in members:
            length = p.partition_numel()
            offset = optimizer._get_param_partition_rank(p) * length
            numel = min(length, p.ds_numel - offset)
            if numel > 0:  # the last ranks may hold nothing but padding
                pieces.append(Piece(names[id(p)], offset, start, numel))
            start += length
        group = groups[optimizer.sub_group_to_group_id[number]]
        flats.append(Flat(start, tuple(pieces), group, _sub_group(optimizer, number)))

    def refresh() -> None:
        for number in range(len(optimizer.fp16_groups)):
            with flats[number].resident():
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters that stay whole

    return Layout(optimizer.optimizer, tuple(flats), False, optimizer.checkpoint_event_prologue, refresh)


def _sub_group(optimizer: Any, number: int) -> Callable[[], AbstractContextManager[Tensor]]:
    @contextmanager
    def resident() -> Iterator[Tensor]:
        swapped = optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        try:
            yield optimizer.fp32_partitioned_groups_flat[number]
        finally:
            if swapped:
                optimizer._optimizer_states_and_gradient_swap_out(number)

    return resident


def _always(master: Tensor | nn.Parameter) -> Callable[[], AbstractContextManager[Tensor]]:
    return lambda: nullcontext(master)


def _nothing() -> None:
    """There is nothing to do."""
