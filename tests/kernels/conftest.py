"""Launches of Triton kernels without a GPU: what they would compile is recorded, nothing is compiled or run."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest


class _Driver:
    """What Triton asks of a GPU before it compiles for it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[tuple]]]:
    """Kernel name -> what launches on an H100 would have compiled, each once: signature, constants, options, attributes."""
    runtime = pytest.importorskip("triton.runtime")
    jit = pytest.importorskip("triton.runtime.jit")
    asked: dict[str, list[tuple]] = {}

    def record(
        kernel: Any, key: str, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:
        new = (signature, constants, options, attributes)
        known = asked.setdefault(kernel.fn.__name__, [])
        if new not in known:
            known.append(new)

    monkeypatch.setattr(jit.JITFunction, "_do_compile", record)
    monkeypatch.setattr(runtime.driver, "_active", _Driver())
    forget_targets(jit.JITFunction)
    yield asked
    forget_targets(jit.JITFunction)


def forget_targets(kind: type) -> None:
    """Kernels keep for which GPU they compile."""
    modules = [module for name, module in sys.modules.items() if name.startswith("simmim_scale.kernels.")]
    for kernel in (value for module in modules for value in vars(module).values() if isinstance(value, kind)):
        kernel.device_caches.clear()
