"""The one evaluation loop, for every task: batches through the engine into evaluators, exact on any world size.

Ranks run equally many batches; `valid` marks the samples that count, so padding changes no number. They run a batch together or
not at all: a rank that got none says so before the others would wait for it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from simmim_scale.engine.runtime import Runtime
from simmim_scale.train.ahead import Batch, raise_problems


class Evaluator(Protocol):
    """Accumulates over batches; states of all ranks together give the result."""

    def update(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None: ...

    def state(self) -> Any:
        """What this rank saw, as something that can be pickled."""
        ...

    def result(self, states: Sequence[Any]) -> dict[str, float]:
        """Figures from the states of all ranks, in rank order. Called on the main rank only."""
        ...


class Evaluating(Protocol):
    """What runs a batch: an `Engine` in training, an `InferenceEngine` otherwise."""

    def evaluate_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def evaluate(
    engine: Evaluating,
    batches: Iterable[Batch],
    evaluators: Sequence[Evaluator],
    runtime: Runtime,
    *,
    load_errors: tuple[type[Exception], ...],
) -> dict[str, float]:
    """Runs every batch once. All ranks must call it together; the figures are complete on the main rank and empty elsewhere.

    Args:
        load_errors: what `batches` raises where disks, servers or the set itself fail.

    Raises:
        LoadingError: a batch could not be loaded on some rank; raised on all of them.
    """
    for batch in _together(batches, runtime, load_errors):
        on_device = {name: value.to(runtime.device, non_blocking=True) for name, value in batch.items()}
        outputs = engine.evaluate_step(on_device)
        for evaluator in evaluators:
            evaluator.update(on_device, outputs)
    gathered = [runtime.gather_objects(evaluator.state()) for evaluator in evaluators]
    if not runtime.is_main:
        return {}
    figures: dict[str, float] = {}
    for evaluator, states in zip(evaluators, gathered, strict=True):
        figures.update(evaluator.result(states))
    return figures


def _together(batches: Iterable[Batch], runtime: Runtime, load_errors: tuple[type[Exception], ...]) -> Iterator[Batch]:
    """The batches, each when all ranks have theirs."""
    iterator = iter(batches)
    while True:
        batch, problem = None, None
        try:
            batch = next(iterator, None)
        except load_errors as error:
            problem = error
        if runtime.any_rank(problem is not None):
            raise_problems(runtime, problem)
        if batch is None:
            return
        yield batch
