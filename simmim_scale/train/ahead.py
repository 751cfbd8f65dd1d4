"""Batches fetched some steps ahead, so that a rank that gets no more of them can say so before it would have to stay away.

Ranks train a step together or not at all. That one of them has no more data travels as a request to stop does, with the loss of a
step; it still has the batches for the steps that pass until all ranks have read it.
"""

from collections import deque
from collections.abc import Iterator, Mapping

from torch import Tensor

from simmim_scale.engine.runtime import Runtime

Batch = Mapping[str, Tensor]


class LoadingError(Exception):
    """Some rank got no more data."""


def raise_problems(runtime: Runtime, problem: Exception | None) -> None:
    """Raises what any rank met as a LoadingError, on all ranks; nothing where all have data. All ranks call it together."""
    texts = runtime.gather_objects(None if problem is None else str(problem))
    found = list(dict.fromkeys(text for text in texts if text is not None))
    if found:
        raise LoadingError("\n".join(found)) from problem


class Ahead:
    """The micro-batches of the next steps.

    Args:
        batches: micro-batches without end.
        accumulation: micro-batches of a step.
        steps: steps to fetch for at most.
        depth: steps to be ahead of the one in hand.
        errors: what `batches` raises where disks, servers or the set itself fail; the first such error is kept in `problem`.
    """

    def __init__(
        self, batches: Iterator[Batch], *, accumulation: int, steps: int, depth: int, errors: tuple[type[Exception], ...]
    ) -> None:
        self.problem: Exception | None = None
        self._batches, self._accumulation, self._errors = batches, accumulation, errors
        self._left, self._depth = steps, depth
        self._queue: deque[list[Batch]] = deque()

    def fill(self) -> None:
        """Fetch until `depth` steps follow the next one, as far as there are batches."""
        while len(self._queue) <= self._depth and self._left and self.problem is None:
            try:
                self._queue.append([next(self._batches) for _ in range(self._accumulation)])
            except self._errors as error:
                self.problem = error
            else:
                self._left -= 1

    def take(self) -> list[Batch]:
        """The micro-batches of the next step."""
        return self._queue.popleft()
