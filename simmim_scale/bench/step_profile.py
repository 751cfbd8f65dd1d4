"""Where one training step's time goes: every operator that the profiler saw, put into one of a few categories.

An operator of backward belongs where its forward was: autograd gives both the same sequence number. Names alone would put the
same addition now into the loss and now into a block.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CATEGORIES = ("matrix products", "attention", "norms and pointwise", "loss", "optimizer", "communication", "idle")

# Marked by `record_function` around the work, by whoever measures.
SCOPES = ("attention", "loss", "optimizer")
_COMMUNICATION = re.compile(r"nccl|gloo|c10d::|all_?reduce|all_?gather|reduce_?scatter|record_param_comms", re.IGNORECASE)
_ATTENTION = re.compile(r"::\w*attention|_Attention|window_attention|fmha|flash_?att|_query_gradient|_key_value", re.IGNORECASE)
_OUTSIDE_PRODUCT = re.compile(r"^aten::(_?softmax\w*|_safe_softmax|bmm|baddbmm|roll)$")  # only attention does these here
_PRODUCT = re.compile(
    r"^aten::(mm|addmm|linear|matmul|convolution|_convolution|mkldnn_convolution|\w*conv\w*backward\w*|_addmm\w*)$"
)
_PRODUCT_MORE = re.compile(r"^(mkldnn|mkl|quantized)::|^aten::(mkldnn_linear|_scaled_mm|thnn_conv2d|_slow_conv2d)", re.IGNORECASE)
_PRODUCT_KERNEL = re.compile(r"gemm|cutlass|nvjet|xmma|wgmma|cublas|conv", re.IGNORECASE)
_OPTIMIZER_KERNEL = re.compile(r"multi_tensor|adam", re.IGNORECASE)
_COMPILED = re.compile(r"CompiledFunction|Torch-Compiled|inductor|cpp_fused|triton_", re.IGNORECASE)
_BACKWARD = "autograd::engine::evaluate_function"


def profile_step(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of one call of `step` by category; together they are its wall-clock time.

    On a CPU, "idle" is what no operator accounts for: Python, the framework, waiting. On a GPU it is the time without a kernel;
    where kernels overlap on several streams, it is that much too small.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, acc_events=True) as found:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - start
    events = list(found.events())
    busy = _device_seconds(events) if device.type == "cuda" else _host_seconds(events)
    return {**{name: busy.get(name, 0.0) for name in CATEGORIES}, "idle": max(wall - sum(busy.values()), 0.0)}


def _host_seconds(events: list[Any]) -> dict[str, float]:
    scopes = _forward_scopes(events)
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CPU and _computes(event.name):
            seconds[category(event, scopes)] += event.self_cpu_time_total / 1e6
    return dict(seconds)


def _device_seconds(events: list[Any]) -> dict[str, float]:
    """Kernels under the operator that launched them; by their own name where the profiler links none."""
    scopes = _forward_scopes(events)
    seconds: dict[str, float] = defaultdict(float)
    linked: dict[str, float] = defaultdict(float)
    for event in events:
        for kernel in event.kernels if event.device_type == DeviceType.CPU else ():
            seconds[category(event, scopes, kernel=kernel.name)] += kernel.duration / 1e6
            linked[kernel.name] += kernel.duration / 1e6
    total: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CUDA:
            total[event.name] += event.self_device_time_total / 1e6
    for name, spent in total.items():
        seconds[_by_kernel(name) or "norms and pointwise"] += max(spent - linked[name], 0.0)
    return dict(seconds)


def _computes(name: str) -> bool:
    """Whether an event's own time is work: an operator or compiled code, not a scope, a hook or autograd's bookkeeping."""
    return ("::" in name and not name.startswith("autograd::")) or _COMPILED.search(name) is not None


def category(event: Any, scopes: dict[int, str], *, kernel: str = "") -> str:
    """The category of an operator, from its ancestors, from the scope of its forward, and from its name."""
    names = [event.name, *(parent.name for parent in _ancestors(event))]
    if any(_COMMUNICATION.search(name) for name in names):
        return "communication"
    scope = next((name for name in names if name in SCOPES), None) or _scope_of_backward(event, scopes)
    if scope in ("optimizer", "loss"):
        return scope
    if any(_ATTENTION.search(name) for name in names) or _OUTSIDE_PRODUCT.match(event.name):
        return "attention"
    if _PRODUCT.match(event.name) or _PRODUCT_MORE.match(event.name):
        return "matrix products"
    return _by_kernel(kernel) or ("attention" if scope == "attention" else "norms and pointwise")


def _by_kernel(name: str) -> str | None:
    rules = (
        (_COMMUNICATION, "communication"),
        (_ATTENTION, "attention"),
        (_OPTIMIZER_KERNEL, "optimizer"),
        (_PRODUCT_KERNEL, "matrix products"),
    )
    return next((found for pattern, found in rules if name and pattern.search(name)), None)


def _ancestors(event: Any) -> Iterator[Any]:
    parent = event.cpu_parent
    while parent is not None:
        yield parent
        parent = parent.cpu_parent


def _forward_scopes(events: list[Any]) -> dict[int, str]:
    """Sequence number of a forward operator -> the scope it ran in."""
    scopes: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            scope = next((parent.name for parent in _ancestors(event) if parent.name in SCOPES), None)
            if scope is not None:
                scopes.setdefault(event.sequence_nr, scope)
    return scopes


def _scope_of_backward(event: Any, scopes: dict[int, str]) -> str | None:
    for parent in (event, *_ancestors(event)):
        if parent.name.startswith(_BACKWARD):
            return scopes.get(parent.sequence_nr)
    return None
