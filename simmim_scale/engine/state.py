"""Run state: what an engine writes and reads, the same whatever the number of ranks and the ZeRO stage.

rank_00000.safetensors ...  the flat tensors of each rank (masters, moments; engine/flats.py) and, in the metadata, which part of
which parameter lies where in them; engine.json says what they belong to. Loading looks up where the parts of its own flat tensors
lie in the saved ones and reads just these: any number of ranks and any stage can go on, and nothing is ever held whole.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from simmim_scale.config.schema import EngineConfig
from simmim_scale.engine.flats import Flat, Layout, Piece, layout_of, set_steps, state_of, steps_of
from simmim_scale.engine.runtime import Runtime
from simmim_scale.engine.scale_state import load_scale, scale_state
from simmim_scale.engine.tensor_file import Entry, entry_of, write_tensors

STATE_FILE = "engine.json"
FORMER_FOLDER = "deepspeed"  # what saves of the first version consisted of
MASTER, AVERAGE, FROZEN, BUFFER = "master", "average", "frozen", "buffer"
MAX_LISTED = 8  # differing parameters that an error lists


@dataclass(frozen=True)
class Snapshot:
    """A state that can be written. Without a copy it shares the engine's tensors: write it before the next step.

    Attributes:
        entries: this rank's tensors; sources: the same as flat tensors to open, or as tensors.
        facts: what engine.json says; None on all ranks but the main one.
    """

    file: str
    entries: tuple[Entry, ...]
    sources: tuple["Flat | Tensor", ...]
    metadata: Mapping[str, str]
    inner: Any
    facts: Mapping[str, Any] | None

    @property
    def nbytes(self) -> int:
        """Size of this rank's tensors."""
        return sum(entry.nbytes for entry in self.entries)

    def write(self, folder: Path) -> list[Path]:
        """Write this rank's files into a folder; returns them.

        Raises:
            OSError: the disk is full, or a file cannot be written.
        """
        path = folder / self.file
        write_tensors(path, self.entries, self._tensors(), self.metadata)
        if self.facts is None:
            return [path]
        state_file = folder / STATE_FILE
        state_file.write_text(json.dumps(self.facts, indent=1))
        return [path, state_file]

    def copied(self) -> "Snapshot":
        """The same with its own copy of every tensor, on the CPU: training may go on while it is written."""
        own = tuple(tensor.detach().to("cpu", copy=True) for tensor in self._tensors())
        return Snapshot(self.file, self.entries, own, self.metadata, None, self.facts)

    def _tensors(self) -> Iterator[Tensor]:
        with ExitStack() as stack:
            opened: Flat | None = None
            for entry, source in zip(self.entries, self.sources, strict=True):
                if isinstance(source, Tensor):
                    yield source
                    continue
                if source is not opened:
                    stack.close()  # one flat tensor is in memory at a time
                    master = stack.enter_context(source.resident())
                    opened = source
                kind = entry.name.split(".")[0]
                yield master if kind == MASTER else self.inner.state[master][kind]


def take_snapshot(
    wrapped: Any, config: EngineConfig, runtime: Runtime, state: Mapping[str, Any], *, averages: Sequence[Tensor] = ()
) -> Snapshot:
    """What a DeepSpeed engine has to save, and `state` beside it. Collective.

    Args:
        averages: a tensor for each flat tensor of this rank that goes with it element by element (engine/ema.py), or none.
    """
    layout = layout_of(wrapped)
    writes_flats = runtime.is_main or not layout.replicated
    entries: list[Entry] = []
    sources: list[Flat | Tensor] = []
    pieces: list[list[list[Any]]] = []
    steps: list[int] = []
    for number, flat in enumerate(layout.flats if writes_flats else ()):
        with flat.resident() as master:
            tensors = {MASTER: master, **state_of(layout.inner, master)}
            entries += [entry_of(f"{kind}.{number}", tensor) for kind, tensor in tensors.items()]
            sources += [flat] * len(tensors)
            if averages:
                entries.append(entry_of(f"{AVERAGE}.{number}", averages[number]))
                sources.append(averages[number])
            steps.append(steps_of(layout.inner, flat, master))
        pieces.append([[piece.name, piece.offset, piece.start, piece.numel] for piece in flat.pieces])
    loose = {**_frozen(wrapped.module, runtime), **_named(BUFFER, persistent_buffers(wrapped.module))}
    entries += [entry_of(name, tensor) for name, tensor in loose.items()]
    sources += loose.values()
    metadata = {"pieces": json.dumps(pieces), "steps": json.dumps(steps)}
    facts = {**_facts(wrapped.module, config, runtime), "loss_scale": scale_state(wrapped.optimizer), **state}
    return Snapshot(
        _file(runtime.rank), tuple(entries), tuple(sources), metadata, layout.inner, facts if runtime.is_main else None
    )


def load_state(
    wrapped: Any, config: EngineConfig, runtime: Runtime, path: Path, *, averages: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """Read into a DeepSpeed engine, and into `averages`, what a snapshot wrote; returns its `state`. Collective.

    Raises:
        ValueError: another model or precision, no averages in the save, or a save of the first version.
    """
    refuse_former(path)
    saved = json.loads((path / STATE_FILE).read_text())
    _check_facts(path, saved, _facts(wrapped.module, config, runtime))
    layout = layout_of(wrapped)
    with ExitStack() as stack:
        files = open_files(path, stack)
        parts = SavedParts(path, files)
        layout.prepare()
        for number, flat in enumerate(layout.flats):
            with flat.resident() as master:
                _fill(layout, flat, master, parts)
            for piece in flat.pieces if averages else ():
                parts.read(AVERAGE, piece, averages[number].view(-1))
        layout.refresh()
        _load_frozen(wrapped.module, files[0], runtime)
        # Statistics that a module keeps differ from rank to rank; a rank that is new begins with those of another.
        _load_buffers(wrapped.module, files[runtime.rank % len(files)])
    load_scale(wrapped.optimizer, saved["loss_scale"])
    wrapped.global_steps = saved["step"]
    return saved


def refuse_former(path: Path) -> None:
    """Raise ValueError for a save of the first version, which consisted of DeepSpeed's own files."""
    if (path / FORMER_FOLDER).exists():
        raise ValueError(
            f"{path}: was saved by an earlier version of simmim_scale, whose run states this one does not read."
            " Finish the run with that version, or begin another run_dir with init_from."
        )


def open_files(path: Path, stack: ExitStack) -> list[Any]:
    """The safetensors files of all ranks that saved, in their order; closed with the stack."""
    return [stack.enter_context(safe_open(file, framework="pt")) for file in sorted(path.glob("rank_*.safetensors"))]


def parameter_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Full shape of every parameter, also where ZeRO-3 has partitioned it."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state dict, on the CPU."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    kept = module.state_dict()  # under ZeRO-3 its parameters are empty, its buffers whole
    return {name: value.detach().cpu().clone() for name, value in kept.items() if name not in parameters}


class SavedParts:
    """Where the parts of parameters lie in a save's files.

    Args:
        path: the save, for messages. files: its files, opened by `open_files`.
    """

    def __init__(self, path: Path, files: list[Any]) -> None:
        self._path, self._files = path, files
        self.kinds: set[str] = set()
        self._where: dict[str, list[tuple[int, int, Piece, int]]] = {}  # parameter -> file, flat tensor, piece, steps
        for index, file in enumerate(files):
            self.kinds |= {name.split(".")[0] for name in file.keys()} - {MASTER, AVERAGE, FROZEN, BUFFER}  # noqa: SIM118 (no mapping)
            metadata = file.metadata()
            rows = zip(json.loads(metadata["pieces"]), json.loads(metadata["steps"]), strict=True)
            for number, (pieces, steps) in enumerate(rows):
                for piece in (Piece(*row) for row in pieces):
                    self._where.setdefault(piece.name, []).append((index, number, piece, steps))

    def steps(self, flat: Flat) -> int:
        """Updates of a flat tensor: of the parameter that had most, since one that took no part in the loss may have fewer."""
        return max((row[3] for piece in flat.pieces for row in self._where.get(piece.name, ())), default=0)

    def read(self, kind: str, wanted: Piece, into: Tensor) -> None:
        """Copy a part of a parameter into its place in the flat tensor `into`; zeros where the save has no such state."""
        found = 0
        for index, number, piece, _ in self._where.get(wanted.name, ()):
            first = max(wanted.offset, piece.offset)
            last = min(wanted.offset + wanted.numel, piece.offset + piece.numel)
            name = f"{kind}.{number}"
            if first >= last or name not in self._files[index].keys():  # noqa: SIM118 (no mapping)
                continue
            begin = piece.start + first - piece.offset
            values = self._flattened(index, name)[begin : begin + last - first]
            into.narrow(0, wanted.start + first - wanted.offset, last - first).copy_(values)
            found += last - first
        if kind in (MASTER, AVERAGE) and found != wanted.numel:
            raise ValueError(
                f"{self._path}: the {kind} of {wanted.name} is not whole in it ({found} of {wanted.numel} values there)."
                " Resume from another save, or begin again."
            )

    def _flattened(self, index: int, name: str) -> Any:
        part = self._files[index].get_slice(name)
        return part if len(part.get_shape()) == 1 else self._files[index].get_tensor(name).reshape(-1)


def _fill(layout: Layout, flat: Flat, master: Tensor, parts: SavedParts) -> None:
    """Fill one flat tensor and its optimizer state; what is padding becomes 0."""
    masters = master.data.view(-1)
    for piece in flat.pieces:
        parts.read(MASTER, piece, masters)
    if not parts.kinds:  # saved before the first update
        layout.inner.state.pop(master, None)
        return
    state = layout.inner.state[master]
    for kind in sorted(parts.kinds):
        if kind not in state:
            state[kind] = torch.zeros_like(master.data)
        values = state[kind].view(-1).zero_()
        for piece in flat.pieces:
            parts.read(kind, piece, values)
    set_steps(layout.inner, flat, master, parts.steps(flat))


def _frozen(module: nn.Module, runtime: Runtime) -> dict[str, Tensor]:
    """Parameters that no optimizer holds, on the main rank. Collective under ZeRO-3."""
    import deepspeed

    frozen = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                if runtime.is_main:
                    frozen[f"{FROZEN}.{name}"] = p.detach().to("cpu", copy=True)
    return frozen


def _load_frozen(module: nn.Module, file: Any, runtime: Runtime) -> None:
    import deepspeed

    for name, p in module.named_parameters():
        if p.requires_grad:
            continue
        partitioned = hasattr(p, "ds_id")
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=partitioned):
            if runtime.is_main or not partitioned:
                p.data.copy_(file.get_tensor(f"{FROZEN}.{name}"))


def _load_buffers(module: nn.Module, file: Any) -> None:
    wanted = set(persistent_buffers(module))
    for name, buffer in module.named_buffers():
        if name in wanted:
            buffer.copy_(file.get_tensor(f"{BUFFER}.{name}"))


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


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
    if saved["precision"] != now["precision"]:
        raise ValueError(
            f"{path}: was saved in precision {saved['precision']}, got {now['precision']}, which trains differently."
            f" Resume with engine.precision={saved['precision']}, or begin another run_dir with init_from."
        )


def _differing_parameters(saved: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> list[str]:
    differing = []
    for name in dict.fromkeys([*saved, *now]):
        if saved.get(name) != now.get(name):
            differing.append(f"{name} is {saved.get(name, 'absent')} in the save and {now.get(name, 'absent')} in the model")
    return differing
