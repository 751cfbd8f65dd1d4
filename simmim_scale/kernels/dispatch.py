"""Which implementation of an op runs: literal tables, a reason for every refusal, no silent fall-back.

`choose` answers for one call, `describe` for the run header. An implementation is a module that holds the op's function and a
function `unavailable(device, dtype, **facts)`, which says in words why it cannot run here, or None if it can.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: what the configuration calls it.
        module: importable module that defines the op's function (under the op's name) and `unavailable`.
        needs: optional package without which the module must not be imported; None: nothing beyond the core dependencies.
    """

    name: str
    module: str
    needs: str | None = None


@dataclass(frozen=True)
class Choice:
    """What `choose` found: the implementation's name, why it was taken, and where the op's function is."""

    name: str
    reason: str
    op: str
    module: str

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        """The op's function; an op that has several imports the module by itself."""
        return getattr(importlib.import_module(self.module), self.op)


# Fastest first on each device: "auto" takes the first that can run. The reference comes last and runs everywhere.
IMPLEMENTATIONS: Mapping[str, tuple[Implementation, ...]] = {
    "window_attention": (
        Implementation("cpu", "simmim_scale.kernels.window_attention.cpu"),
        # Triton's kernels are checked in its interpreter and compile for the listed devices, but have not run on one: until their
        # gpu tests have passed there, they are used when asked for by name.
        Implementation("sdpa", "simmim_scale.kernels.window_attention.sdpa"),
        Implementation("triton", "simmim_scale.kernels.window_attention.triton", needs="triton"),
        Implementation("reference", "simmim_scale.kernels.window_attention.reference"),
    ),
    "norm": (
        # PyTorch's own first: it is traced through, so a compiled block fuses it. Apex and the Triton kernels have not run on a
        # GPU of ours yet, and compiling takes seconds per shape: all three are used when asked for by name.
        Implementation("torch_native", "simmim_scale.kernels.norm.torch_native"),
        Implementation("triton", "simmim_scale.kernels.norm.triton", needs="triton"),
        Implementation("apex", "simmim_scale.kernels.norm.apex"),
        Implementation("compile", "simmim_scale.kernels.norm.compile"),
        Implementation("reference", "simmim_scale.kernels.norm.reference"),
    ),
    "masked_loss": (
        Implementation("one_pass", "simmim_scale.kernels.masked_loss.one_pass"),
        # Asked for by name until it has run on a GPU, as above.
        Implementation("triton", "simmim_scale.kernels.masked_loss.triton", needs="triton"),
        Implementation("reference", "simmim_scale.kernels.masked_loss.reference"),
    ),
    "optimizer": (
        # First, since it alone clips and skips on the device; the others make a guarded step wait for the norm.
        Implementation("torch_fused", "simmim_scale.kernels.optimizer.torch_fused"),
        Implementation("apex", "simmim_scale.kernels.optimizer.apex"),
        Implementation("deepspeed", "simmim_scale.kernels.optimizer.deepspeed", needs="deepspeed"),
        Implementation("torch_foreach", "simmim_scale.kernels.optimizer.torch_foreach"),
        # Behind one that runs everywhere, so that auto never compiles for two minutes.
        Implementation("deepspeed_cpu", "simmim_scale.kernels.optimizer.deepspeed_cpu", needs="deepspeed"),
        Implementation("reference", "simmim_scale.kernels.optimizer.reference"),
    ),
}


def choose(op: str, name: str, *, device: torch.device, dtype: torch.dtype, **facts: Any) -> Choice:
    """The implementation of `op` for tensors of `dtype` on `device`.

    Args:
        op: a key of `IMPLEMENTATIONS`.
        name: "auto" for the first that can run here, or an implementation's name, which then never falls back.
        facts: shape facts that an implementation may depend on (head_dim, tokens, ...); hashable.

    Raises:
        ValueError: unknown op or name, or the named implementation cannot run here (with the reason and the alternatives).
    """
    return _choose(op, name, torch.device(device).type, dtype, tuple(sorted(facts.items())))


@torch.compiler.assume_constant_result
def choose_name(op: str, name: str, *, device: torch.device, dtype: torch.dtype, **facts: Any) -> str:
    """As `choose`, but only the name, which torch.compile takes for a constant of its graph.

    It cannot follow `choose` to a function that was imported by its path: ops inside a model go from the name to the function by
    import statements of their own.
    """
    return choose(op, name, device=device, dtype=dtype, **facts).name


@functools.lru_cache(maxsize=4096)  # a pure function that runs once per layer and step
def _choose(op: str, name: str, device_type: str, dtype: torch.dtype, facts: tuple[tuple[str, Any], ...]) -> Choice:
    table = _table(op)
    reasons = _reasons(op, device_type, dtype, dict(facts))
    able = [entry for entry in table if reasons[entry.name] is None]
    if name == "auto":
        if not able:
            listed = "; ".join(f"{key}: {reason}" for key, reason in reasons.items())
            raise ValueError(
                f"{op}: no implementation can run on {device_type} in {dtype} ({listed}). Use another device or precision."
            )
        return Choice(able[0].name, _why_first(able[0], reasons), op, able[0].module)
    if name not in reasons:
        raise ValueError(f"{op}: unknown implementation {name!r}. Known: auto, {', '.join(reasons)}.")
    if reasons[name] is not None:
        others = ", ".join(entry.name for entry in able) or "none"
        raise ValueError(f"{op}: {name} cannot run here: {reasons[name]}. Can run here: {others}. Choose one of them, or auto.")
    entry = next(entry for entry in table if entry.name == name)
    return Choice(name, "asked for by name", op, entry.module)


def refusals(op: str, *, device: torch.device, dtype: torch.dtype, **facts: Any) -> dict[str, str | None]:
    """Why each implementation of `op` cannot run here, in words; None: it can."""
    return _reasons(op, torch.device(device).type, dtype, facts)


def _reasons(op: str, device_type: str, dtype: torch.dtype, facts: dict[str, Any]) -> dict[str, str | None]:
    return {entry.name: _unavailable(entry, device_type, dtype, facts) for entry in _table(op)}


def describe(names: Mapping[str, str], *, device: torch.device, dtype: torch.dtype, **facts: Any) -> list[dict[str, str]]:
    """Rows for the run header, one per op: `op`, `implementation`, `reason`.

    Args:
        names: op -> asked name, as in the configuration section `kernels`.
    """
    rows = []
    for op, name in names.items():
        choice = choose(op, name, device=device, dtype=dtype, **facts)
        rows.append({"op": op, "implementation": choice.name, "reason": choice.reason})
    return rows


def implementations(op: str) -> tuple[str, ...]:
    """Names of the implementations of `op`, fastest first."""
    return tuple(entry.name for entry in _table(op))


def _table(op: str) -> tuple[Implementation, ...]:
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"unknown op {op!r}. Known: {', '.join(IMPLEMENTATIONS)}.")
    return IMPLEMENTATIONS[op]


def _why_first(first: Implementation, reasons: Mapping[str, str | None]) -> str:
    before = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    preferred = before[: list(reasons).index(first.name)]
    return "auto: the fastest that can run here" + (f" ({'; '.join(preferred)})" if preferred else "")


def _unavailable(entry: Implementation, device_type: str, dtype: torch.dtype, facts: dict[str, Any]) -> str | None:
    if entry.needs is not None and importlib.util.find_spec(entry.needs) is None:
        return f"the package {entry.needs} is not installed"
    return importlib.import_module(entry.module).unavailable(torch.device(device_type), dtype, **facts)
