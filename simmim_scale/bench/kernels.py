"""`simmim bench kernels`: window attention at every stage of the published models, against what this device could do at best.

The floor of a pass is the larger of two times: its bytes at the measured speed of a device copy, its multiply-adds at that of a
matrix product. Bytes are those that no implementation can avoid: forward reads the projection and writes the output and the
log-sum-exp; backward reads projection, output, its gradient and log-sum-exp, and writes the projection's gradient.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor

from simmim_scale.bench.comparisons import compiled_reference, flex
from simmim_scale.kernels.dispatch import choose, implementations

OP = "window_attention"
HEAD_DIM = 32
# Model -> base channels, window, cosine; all at 192 px with patches of 4 (S table 1).
MODELS = {"swin_b": (128, 6, False), "swin_l": (192, 12, False), "swinv2_h": (352, 12, True)}
SIDES = (48, 24, 12, 6)  # tokens per axis of the four stages
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One attention layer: a stage of a model at a batch size."""

    model: str
    stage: int
    batch: int
    side: int
    heads: int
    window: int
    shift: int
    cosine: bool

    @property
    def units(self) -> int:
        """Matrices of logits: images * windows * heads."""
        return self.batch * (self.side // self.window) ** 2 * self.heads

    def bytes(self, itemsize: int) -> dict[str, int]:
        """Bytes that must be moved, forward and backward."""
        tokens = self.window**2
        values, statistics_ = self.units * tokens * HEAD_DIM * itemsize, self.units * tokens * 4
        return {"forward": 4 * values + statistics_, "backward": 8 * values + statistics_}

    def flops(self) -> dict[str, int]:
        """Floating-point operations of the matrix products; backward includes the logits once more."""
        product = 2 * self.units * self.window**4 * HEAD_DIM
        return {"forward": 2 * product, "backward": 5 * product}


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
        comparisons: also torch.compile on the reference and FlexAttention.
    """

    device: torch.device
    dtype: torch.dtype
    turns: int = 5
    comparisons: bool = False


def choose_settings(dtype: str | None, *, turns: int, comparisons: bool | None) -> Settings:
    """Settings for this machine; None: bf16 and all comparisons on a GPU, fp32 and the project's own forms without one.

    Raises:
        ValueError: unknown type.
    """
    cuda = torch.cuda.is_available()
    name = dtype or ("bf16" if cuda else "fp32")
    if name not in DTYPES:
        raise ValueError(f"unknown type {name!r}. Known: {', '.join(DTYPES)}.")
    device = torch.device("cuda" if cuda else "cpu")
    return Settings(device, DTYPES[name], turns=turns, comparisons=cuda if comparisons is None else comparisons)


def cases(models: Iterable[str], batches: Iterable[int]) -> list[Case]:
    """All stages of the models at each batch size; stages of more than one window are measured shifted.

    Raises:
        ValueError: unknown model.
    """
    found = []
    batches = list(batches)
    for model in models:
        if model not in MODELS:
            raise ValueError(f"unknown model {model!r}. Known: {', '.join(MODELS)}.")
        channels, window, cosine = MODELS[model]
        for batch in batches:
            for stage, side in enumerate(SIDES):
                own = min(window, side)
                heads = channels * 2**stage // HEAD_DIM
                found.append(Case(model, stage + 1, batch, side, heads, own, own // 2 if side > own else 0, cosine))
    return found


def bench_kernels(all_cases: Iterable[Case], settings: Settings, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure; the result is what `simmim bench kernels --json` writes."""
    ceilings = measure_ceilings(settings)
    rows = []
    for case in all_cases:
        progress(f"{case.model} stage {case.stage}, batch {case.batch}")
        rows += _bench_case(case, settings, ceilings)
    return {"environment": environment(settings), "ceilings": asdict(ceilings), "rows": rows}


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
    """Copy and matrix product of this device, large enough not to fit its caches."""
    cuda = settings.device.type == "cuda"
    elements, side = (1 << 30, 8192) if cuda else (1 << 27, 1024)
    source = torch.zeros(elements, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    copied = _median(lambda: target.copy_(source), settings)
    a = torch.randn(side, side, device=settings.device).to(settings.dtype)
    multiplied = _median(lambda: a @ a, settings)
    return Ceilings(copy=2 * elements / copied, product=2 * side**3 / multiplied)


def contenders(settings: Settings, case: Case) -> dict[str, Callable[..., Tensor]]:
    """Name -> function, for what can run here."""
    facts = {"head_dim": HEAD_DIM, "tokens": case.window**2}
    able = {}
    for name in implementations(OP):
        try:
            able[name] = choose(OP, name, device=settings.device, dtype=settings.dtype, **facts).function
        except ValueError:  # refused here, with a reason; the table shows what ran
            continue
    if settings.comparisons:
        able["reference, compiled"] = compiled_reference()
        if settings.device.type == "cuda":
            able["flex, compiled"] = flex(compiled=True)
    return able


def _bench_case(case: Case, settings: Settings, ceilings: Ceilings) -> list[dict[str, Any]]:
    layers = {name: _Layer(function, case, settings) for name, function in contenders(settings, case).items()}
    expected = layers["reference"].output().float()
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in layers}
    for _ in range(settings.turns):
        for name, layer in layers.items():  # in turns, so that a busy machine slows all of them
            times[name]["forward"].append(_once(layer.forward, settings))
            times[name]["backward"].append(_once(layer.backward, settings))
    rows = []
    floors = floor_seconds(case, settings.dtype.itemsize, ceilings)
    for name, layer in layers.items():
        medians = {direction: statistics.median(values) for direction, values in times[name].items()}
        difference = (layer.output().float() - expected).norm() / expected.norm()
        rows.append(_row(case, name, medians, floors, settings.dtype.itemsize) | {"difference": float(difference)})
    return rows


def _row(case: Case, name: str, medians: dict[str, float], floors: dict[str, float], itemsize: int) -> dict[str, Any]:
    row = asdict(case) | {"implementation": name}
    for direction, seconds in medians.items():
        row[direction] = {
            "seconds": seconds,
            "bytes": case.bytes(itemsize)[direction],
            "flops": case.flops()[direction],
            "floor_seconds": floors[direction],
            "times_floor": seconds / floors[direction],
        }
    return row


def floor_seconds(case: Case, itemsize: int, ceilings: Ceilings) -> dict[str, float]:
    """The least time of each pass on a device with these ceilings."""
    moved, computed = case.bytes(itemsize), case.flops()
    return {name: max(moved[name] / ceilings.copy, computed[name] / ceilings.product) for name in moved}


class _Layer:
    """One implementation on one case: its inputs, and the two passes."""

    def __init__(self, function: Callable[..., Tensor], case: Case, settings: Settings) -> None:
        generator = torch.Generator().manual_seed(case.stage)
        tokens, channels = case.window**2, case.heads * HEAD_DIM
        shape = (case.batch, case.side, case.side, 3 * channels)
        qkv = torch.randn(shape, generator=generator).to(settings.device, settings.dtype)
        bias = torch.randn(case.heads, tokens, tokens, generator=generator).to(settings.device)
        scale = torch.full((case.heads,), 2.3, device=settings.device) if case.cosine else None
        self._inputs = [tensor.requires_grad_() for tensor in (qkv, bias, scale) if tensor is not None]
        self._scale = scale
        self._function = function
        self._arguments = {"num_heads": case.heads, "window": (case.window,) * 2, "shift": (case.shift,) * 2}
        self._output = self.forward()
        self._grad = torch.randn(self._output.shape, generator=generator).to(settings.device, settings.dtype)
        self.backward()  # compiles where something is compiled

    def forward(self) -> Tensor:
        return self._function(*self._inputs[:2], logit_scale=self._scale, **self._arguments)

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._output, self._inputs, self._grad, retain_graph=True)

    def output(self) -> Tensor:
        return self._output.detach()


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


def _median(work: Callable[[], Any], settings: Settings) -> float:
    return statistics.median(_once(work, settings) for _ in range(settings.turns))
