"""Non-finite losses and gradients: which module broke, how many steps in a row, and when to give up."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradients that were not finite."""


class LossScaleError(RuntimeError):
    """fp16 gradients overflow even at the smallest loss scale that is allowed."""


class NonFiniteGuard:
    """Counts skipped steps; raises when skipping does not help any more."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self.total = 0

    def finite(self) -> None:
        """A step was applied."""
        self.in_a_row = 0

    def nonfinite(self, step: int, source: str) -> None:
        """A step was skipped because `source` was not finite."""
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"step {step}: loss or gradients were not finite {self.in_a_row} steps in a row, first in {source}."
                f" At most {self.limit} are tolerated (train.max_nonfinite_steps). The saved state is from before. Try a lower"
                " optimizer.base_lr, a longer schedule.warmup_epochs, a smaller optimizer.clip_grad, or engine.precision bf16 or"
                " fp32; and check that the images near this step are sound."
            )

    def overflow_at_floor(self, step: int, scale: float) -> None:
        """fp16 overflowed at the floor of the loss scale: going on would skip every step."""
        raise LossScaleError(
            f"step {step}: fp16 gradients overflow at a loss scale of {scale:g}, the smallest allowed (engine.fp16_min_scale)."
            " The model leaves the range of fp16. Use engine.precision bf16 (same speed, the range of fp32) or fp32, or a lower"
            " optimizer.base_lr."
        )

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.in_a_row, self.total = state["in_a_row"], state["total"]


def first_nonfinite_module(module: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Run `forward` and name the first submodule of `module` whose output holds a NaN or an infinity; None if all are finite.

    "First" is by the end of its computation, so the innermost module is named: a dotted name that begins with its block's.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in _float_tensors(output)):
                found.append(name)

        return hook

    handles = [child.register_forward_hook(watch(name)) for name, child in module.named_modules() if name]
    try:
        # Compiled blocks would not call the hooks of what is inside them.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _float_tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _float_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _float_tensors(item)
