"""`simmim bench kernels`: window attention, norms and masked loss of the published models, against what this device could do.

The floor of a pass is the larger of two times: its bytes at the measured speed of a device copy, its multiply-adds at that of a
matrix product. `kernel_cases.py` says which bytes those are.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor

from simmim_scale.bench.comparisons import Contender, find_contenders
from simmim_scale.bench.kernel_cases import Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Ceilings:
    """What this device was measured to do: copied bytes per second (read and written ones both count), FLOP/s of a product."""

    copy: float
    product: float


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        turns: times that every implementation gets its turn; the median is reported.
        comparisons: also torch.compile on the references, and FlexAttention.
    """

    device: torch.device
    dtype: torch.dtype
    turns: int = 5
    comparisons: bool = False


def choose_settings(dtype: str | None, *, turns: int, comparisons: bool) -> Settings:
    """Settings for this machine; None: bf16 on a GPU, fp32 without one.

    Raises:
        ValueError: unknown type.
    """
    cuda = torch.cuda.is_available()
    name = dtype or ("bf16" if cuda else "fp32")
    if name not in DTYPES:
        raise ValueError(f"unknown type {name!r}. Known: {', '.join(DTYPES)}.")
    device = torch.device("cuda" if cuda else "cpu")
    return Settings(device, DTYPES[name], turns=turns, comparisons=comparisons)


def bench_kernels(all_cases: Iterable[Case], settings: Settings, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure; the result is what `simmim bench kernels --out` writes as kernels.json."""
    ceilings = measure_ceilings(settings)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, dict[str, str]] = {}
    for case in all_cases:
        progress(f"{case.op}: {case.layer}")
        found, reasons = _bench_case(case, settings, ceilings)
        rows += found
        left_out.setdefault(case.op, {}).update(reasons)
    return {"environment": environment(settings), "ceilings": asdict(ceilings), "rows": rows, "left_out": left_out}


def environment(settings: Settings) -> dict[str, Any]:
    """Hardware and versions."""
    cuda = settings.device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(settings.device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "turns": settings.turns,
    }


def measure_ceilings(settings: Settings) -> Ceilings:
    """Copy and matrix product of this device, large enough not to fit its caches: the best of many turns."""
    cuda = settings.device.type == "cuda"
    elements, side = (1 << 30, 8192) if cuda else (1 << 27, 1024)
    source = torch.zeros(elements, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), settings)
    a = torch.randn(side, side, device=settings.device).to(settings.dtype)
    multiplied = _best(lambda: a @ a, settings)
    return Ceilings(copy=2 * elements / copied, product=2 * side**3 / multiplied)


def _bench_case(case: Case, settings: Settings, ceilings: Ceilings) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of a case, and why what is missing in them is."""
    torch._dynamo.reset()  # forms of earlier cases count against its limit, beyond which it quietly compiles no more
    found, left_out = find_contenders(case, device=settings.device, dtype=settings.dtype, comparisons=settings.comparisons)
    layers = {name: _Layer(contender, case, settings) for name, contender in found.items()}
    times: dict[str, dict[str, list[float]]] = {name: {direction: [] for direction in layers[name].passes} for name in layers}
    for _ in range(settings.turns):
        for name, layer in layers.items():  # in turns, so that a busy machine slows all of them
            for direction, work in layer.passes.items():
                times[name][direction].append(_once(work, settings))
    floors = floor_seconds(case, settings.dtype.itemsize, ceilings)
    expected = {direction: work() for direction, work in layers["reference"].passes.items()}
    rows = []
    for name, layer in layers.items():
        row = {"op": case.op, "layer": case.layer, "implementation": name, "case": asdict(case)}
        for direction, work in layer.passes.items():
            row[direction] = _figures(case, direction, times[name][direction], floors, settings.dtype.itemsize)
            row[direction]["difference"] = _difference(work(), expected[direction])
        rows.append(row)
    return rows, left_out


def _difference(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest |ours - reference| / |reference| of several tensors, in norm."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, expected, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _figures(case: Case, direction: str, times: list[float], floors: dict[str, float], itemsize: int) -> dict[str, Any]:
    seconds = statistics.median(times)
    return {
        "seconds": seconds,
        "bytes": case.bytes(itemsize)[direction],
        "flops": case.flops()[direction],
        "floor_seconds": floors[direction],
        "times_floor": seconds / floors[direction],
    }


def floor_seconds(case: Case, itemsize: int, ceilings: Ceilings) -> dict[str, float]:
    """The least time of each pass on a device with these ceilings."""
    moved, computed = case.bytes(itemsize), case.flops()
    return {name: max(moved[name] / ceilings.copy, computed[name] / ceilings.product) for name in moved}


class _Layer:
    """One form on one case: its inputs, and `passes`, what is measured."""

    def __init__(self, contender: Contender, case: Case, settings: Settings) -> None:
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(settings.device)

        self._prepared = case.prepare(random, settings.dtype)
        self._function = contender.function
        self.passes: dict[str, Callable[[], tuple[Tensor, ...]]] = {"forward": self.forward}
        if contender.no_backward is None:
            for leaf in self._prepared.leaves:
                leaf.requires_grad_()
            self._outputs = self.forward()
            self._grads = [random(*output.shape).to(output.dtype) for output in self._outputs]
            self.passes["backward"] = self.backward

    def forward(self) -> tuple[Tensor, ...]:
        return self._prepared.apply(self._function)

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._outputs, self._prepared.leaves, self._grads, retain_graph=True)


def _once(work: Callable[[], Any], settings: Settings) -> float:
    """Seconds of one call, after one that is not counted; on a GPU a mean over several in a row."""
    work()
    if settings.device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    repetitions = 20
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(repetitions):
        work()
    events[1].record()
    torch.cuda.synchronize(settings.device)
    return events[0].elapsed_time(events[1]) / 1e3 / repetitions


def _best(work: Callable[[], Any], settings: Settings) -> float:
    return min(_once(work, settings) for _ in range(4 * settings.turns))
