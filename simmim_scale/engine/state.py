"""What an engine writes and reads: DeepSpeed's files of all ranks, beside one JSON file that says what they belong to."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from simmim_scale.config.schema import EngineConfig
from simmim_scale.engine.runtime import Runtime

TAG = "deepspeed"  # the directory of DeepSpeed's files inside a save
STATE_FILE = "engine.json"
MASTERS = "masters"  # in it: names of the fp32 masters, in the order in which stage 0's optimizer saves them
MAX_LISTED = 8  # differing parameters that an error lists


def save_state(
    wrapped: Any,
    config: EngineConfig,
    runtime: Runtime,
    path: Path,
    state: Mapping[str, Any],
    own: Mapping[str, Callable[[Path], None]] | None = None,
) -> list[Path]:
    """Write a DeepSpeed engine's state and `state` into `path`; returns the files this rank wrote. Collective.

    Args:
        own: further files of this rank, by name, each with what writes it.
    """
    wrapped._copy_recovery_script = lambda _path: None  # portable weights are ours; its copy would escape the record below
    with _recorded_writes(wrapped.checkpoint_engine) as writes:
        wrapped.save_checkpoint(str(path), tag=TAG, client_state={}, save_latest=False)
        if runtime.is_main:
            facts = {**_facts(wrapped.module, config, runtime), MASTERS: _master_names(wrapped), **state}
            writes.attempt(path / STATE_FILE, lambda: (path / STATE_FILE).write_text(json.dumps(facts, indent=1)))
        for name, write in (own or {}).items():
            writes.attempt(path / name, functools.partial(write, path / name))
    failures = [failure for failure in runtime.gather_objects(writes.failure) if failure]
    if failures:
        raise OSError(
            f"{path}: the run state could not be saved: {failures[0]}. Free space or fix the disk; older saves are untouched."
        )
    return writes.files


def load_state(wrapped: Any, config: EngineConfig, runtime: Runtime, path: Path) -> dict[str, Any]:
    """Read into a freshly built DeepSpeed engine what `save_state` wrote; returns its `state`. Collective."""
    saved = json.loads((path / STATE_FILE).read_text())
    _check_facts(path, saved, _facts(wrapped.module, config, runtime))
    loaded, _ = wrapped.load_checkpoint(str(path), tag=TAG)
    if loaded is None:
        raise ValueError(f"{path}: DeepSpeed found no state in it. Remove nothing; choose an older save to resume from.")
    return saved


def full_state_dict(wrapped: Any, runtime: Runtime) -> dict[str, Tensor]:
    """Parameters in fp32 and persistent buffers on the CPU of the main rank, {} elsewhere. One at a time; collective."""
    masters = _unfused_masters(wrapped.optimizer)
    state: dict[str, Tensor] = {}
    for name, parameter in wrapped.module.named_parameters():
        value = _full_fp32(parameter, masters)
        if runtime.is_main:
            state[name] = value.detach().to("cpu", torch.float32, copy=True)
    if runtime.is_main:
        state.update(_persistent_buffers(wrapped.module))
    return state


def parameter_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Full shape of every parameter, also where ZeRO-3 has partitioned it."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def _facts(module: nn.Module, config: EngineConfig, runtime: Runtime) -> dict[str, Any]:
    return {
        "world_size": runtime.world_size,
        "zero_stage": config.zero_stage,
        "precision": config.precision,
        "parameters": parameter_shapes(module),
    }


def _check_facts(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = _differing_parameters(saved["parameters"], now["parameters"])
    if differing:
        listed = "; ".join(differing[:MAX_LISTED]) + (
            f"; and {len(differing) - MAX_LISTED} more" if len(differing) > MAX_LISTED else ""
        )
        raise ValueError(
            f"{path}: the saved model is not the configured one: {listed}."
            " Restore the model section that the run began with, or choose another run_dir (init_from takes over weights)."
        )
    for key, word in (("world_size", "ranks"), ("zero_stage", "ZeRO stage"), ("precision", "precision")):
        if saved[key] != now[key]:
            raise ValueError(
                f"{path}: was saved with {word} {saved[key]}, got {word} {now[key]}, and its files are cut for the former."
                f" Resume with {word} {saved[key]}, or begin again in another run_dir."
            )


def _differing_parameters(saved: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> list[str]:
    differing = []
    for name in dict.fromkeys([*saved, *now]):
        if saved.get(name) != now.get(name):
            differing.append(f"{name} is {saved.get(name, 'absent')} in the save and {now.get(name, 'absent')} in the model")
    return differing


class _Writes:
    """Files a rank has written, and the first failure. Failing later keeps this rank in step with the others' collectives."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.failure: str | None = None

    def attempt(self, path: Path, write: Callable[[], Any]) -> None:
        try:
            write()
            self.files.append(path)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
            self.failure = self.failure or f"{path.name}: {error}"


@contextmanager
def _recorded_writes(checkpoint_engine: Any) -> Iterator[_Writes]:
    """Record what DeepSpeed writes through its checkpoint engine while the block runs."""
    writes = _Writes()
    original = checkpoint_engine.save
    checkpoint_engine.save = lambda state_dict, path: writes.attempt(Path(path), lambda: original(state_dict, path))
    try:
        yield writes
    finally:
        checkpoint_engine.save = original


def _full_fp32(parameter: nn.Parameter, masters: Mapping[int, Tensor]) -> Tensor:
    """A whole parameter, from its fp32 master where there is one."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if id(parameter) in masters:
        return masters[id(parameter)]
    if parameter.requires_grad:
        full = safe_get_full_fp32_param(parameter)
        if full is not None:
            return full
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def _unfused_masters(optimizer: Any) -> dict[int, Tensor]:
    """Stage 0 in bf16 or fp16 keeps its fp32 masters in lists beside the parameters."""
    pairs = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def _master_names(wrapped: Any) -> list[list[str]]:
    """Names of what `_unfused_masters` finds, group by group."""
    names = {id(parameter): name for name, parameter in wrapped.module.named_parameters()}
    masters = _unfused_masters(wrapped.optimizer)
    groups = getattr(wrapped.optimizer, "fp16_groups", []) if masters else []
    return [[names[id(low)] for low in group] for group in groups]


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    kept = module.state_dict()  # under ZeRO-3 its parameters are empty, its buffers whole
    return {name: value.detach().cpu().clone() for name, value in kept.items() if name not in parameters}
