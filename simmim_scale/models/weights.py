"""Portable weights: a directory with model.safetensors and config.yaml, written by training and import, read by everything else.

`save_weights` and `load_weights` are the two ends, `load_into` puts a state into a module and says by name what does not fit.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from simmim_scale.models.initialization import assign

FORMAT = "simmim-scale-weights"
VERSION = "1"
TENSORS, CONFIG = "model.safetensors", "config.yaml"
CONFIG_HEADER = f"# Configuration these weights belong to. The copy that counts is inside {TENSORS}; this one is for reading.\n"
SHOWN_NAMES = 8  # of each kind in a message


@dataclass(frozen=True)
class Weights:
    """What a weights directory holds: tensors by name, the resolved configuration, and facts such as the step they are from."""

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any]
    extra: dict[str, str]


# -------------------------------------------------------------------------------------------------------------- writing


def save_weights(
    directory: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any], extra: Mapping[str, str] | None = None
) -> Path:
    """Write portable weights; each file is complete or not there, and older weights in the directory are replaced.

    The configuration is stored inside the tensors' file, so that the two can never be of different saves.

    Args:
        directory: created if need be.
        state: full tensors by name, on any device.
        config: the resolved configuration as plain numbers, strings, lists and mappings.
        extra: facts to keep, such as {"step": "1200"}.

    Returns:
        The directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(config), "extra": json.dumps(dict(extra or {}))}
    tensors = _with_own_memory(state)
    text = CONFIG_HEADER + yaml.safe_dump(dict(config), sort_keys=False, width=120, default_flow_style=None)
    with _replacing(directory / TENSORS) as aside:
        save_file(tensors, aside, metadata=metadata)
    with _replacing(directory / CONFIG) as aside:
        aside.write_text(text, encoding="utf-8")
    return directory


def _with_own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors; those that share memory, which safetensors refuses, are copied, the others are not."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        tensors[name] = tensor
    return tensors


class _replacing:  # noqa: N801 - used as a function: `with _replacing(path) as aside`
    """A path beside `path` to write to; on success it is synced and takes the place of `path`, on failure it is removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_name(f".{path.name}.tmp")  # one name, so that a killed save leaves nothing behind but this

    def __enter__(self) -> Path:
        return self.aside

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.aside.unlink(missing_ok=True)
            return
        _sync(self.aside)
        os.replace(self.aside, self.path)
        _sync(self.path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------------------------- reading


def load_weights(directory: str | Path) -> Weights:
    """Read a weights directory onto the CPU.

    Raises:
        ValueError: the directory or its file is missing, truncated, or of another program.
    """
    path = Path(directory) / TENSORS
    config, extra = _read_header(path)
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors file is no mapping
    return Weights(path=Path(directory), state=state, config=config, extra=extra)


def read_weights_config(directory: str | Path) -> dict[str, Any]:
    """The resolved configuration of a weights directory, without reading its tensors. Raises ValueError as `load_weights`."""
    return _read_header(Path(directory) / TENSORS)[0]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    directory = path.parent
    if not directory.is_dir():
        raise ValueError(f"weights: no directory {directory}. Give a run directory or one that `simmim import-weights` wrote.")
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in directory.iterdir())[:SHOWN_NAMES]) or "nothing"
        raise ValueError(f"weights: expected {TENSORS} in {directory}, found {found}. Give the directory that holds it.")
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"weights: {path} was not written by simmim_scale (no format {FORMAT!r} in its header)."
            " Convert checkpoints from elsewhere with `simmim import-weights`."
        )
    if metadata.get("version") != VERSION:
        raise ValueError(f"weights: {path} has version {metadata.get('version')}, expected {VERSION}. Update simmim_scale.")
    return json.loads(metadata["config"]), json.loads(metadata.get("extra", "{}"))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights: {path} cannot be read: it is truncated or no safetensors file ({error})."
            " Copy it again or use another save."
        ) from error


# -------------------------------------------------------------------------------------------------- into a module


@dataclass(frozen=True)
class Mismatch:
    """A tensor whose shape in the file differs from the module's."""

    name: str
    got: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What did not fit when a state was put into a module, by name."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def describe(self) -> str:
        """One line per kind of difference; a few names each."""
        shapes = [f"{item.name} (file {item.got}, model {item.expected})" for item in self.mismatched]
        kinds = (("in the model only", self.missing), ("in the file only", self.unexpected), ("of another shape", shapes))
        return "\n".join(f"  {len(names)} {what}: {_some(names)}" for what, names in kinds if names)


def _some(names: Sequence[str]) -> str:
    more = f", ... and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def compare_state(module: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """Names and shapes of `state` against those of the module, whole or partitioned by ZeRO-3."""
    expected = {name: _full_shape(tensor) for name, tensor in _own_tensors(module)}
    return LoadReport(
        missing=[name for name in expected if name not in state],
        unexpected=[name for name in state if name not in expected],
        mismatched=[
            Mismatch(name, tuple(state[name].shape), shape)
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ],
    )


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: Sequence[str] = ()) -> LoadReport:
    """Put `state` into the module; nothing is written unless everything fits.

    Args:
        module: whole, partitioned by ZeRO-3 (every rank calls this alike), or on the meta device (only compared).
        state: tensors by the module's names.
        source: where the state is from, for messages.
        optional: prefixes of names that may be absent on either side: ("head.",) for a head of another task.

    Returns:
        What was left out because it was optional.

    Raises:
        ValueError: names or shapes differ elsewhere; lists them.
    """
    report = compare_state(module, state)
    optional = tuple(optional)
    problems = LoadReport(
        missing=[name for name in report.missing if not name.startswith(optional)],
        unexpected=[name for name in report.unexpected if not name.startswith(optional)],
        mismatched=report.mismatched,
    )
    if not problems.fits:
        raise ValueError(
            f"weights: {source} does not fit this model:\n{problems.describe()}\n"
            "Use the model section of the weights' own configuration, or weights of this architecture."
        )
    for name, tensor in _own_tensors(module):
        if name in state:
            _write(tensor, state[name])
    return report


def _full_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # under ZeRO-3 the tensor itself is empty


def _write(tensor: Tensor, value: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        assign(tensor, lambda *_: value, torch.Generator())  # gathers what ZeRO-3 has partitioned
    elif not tensor.is_meta:
        tensor.copy_(value)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name: what a state dict names, but with the tensors themselves."""
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    return ((name, tensors[name]) for name in module.state_dict() if name in tensors)
