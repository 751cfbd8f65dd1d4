"""Doing things on several ranks so that an error of one is the error of all: nobody waits for a rank that has left."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

from simmim_scale.cli import exit_codes
from simmim_scale.engine.runtime import Runtime
from simmim_scale.train.ahead import LoadingError

log = logging.getLogger(__name__)
T = TypeVar("T")


def on_every_rank(runtime: Runtime, action: Callable[[], T]) -> T:
    """Runs `action`, which must use no collectives, on every rank.

    Raises:
        ValueError: it failed on some rank; raised on all of them, with each different message once.
    """
    result, problem = _attempt(action)
    problems = runtime.gather_objects(problem)
    if any(text is not None for text in problems):
        raise ValueError(_join(problems))
    return result  # type: ignore[return-value]  # no problem: the action returned


def on_main(runtime: Runtime, action: Callable[[], T]) -> T | None:
    """Runs `action` on the main rank; the others get None, and all of them its ValueError."""
    result, problem = _attempt(action) if runtime.is_main else (None, None)
    problem = runtime.broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)
    return result


@contextlib.contextmanager
def data_errors(runtime: Runtime) -> Iterator[None]:
    """Turns images that cannot be read, on whatever rank, into one message and exit code 4."""
    try:
        yield
    except LoadingError as error:
        if runtime.is_main:
            log.error("the images cannot be read: %s", error)
            log.error("Nothing was written. Run the same command again when they can.")
        raise SystemExit(exit_codes.NO_DATA) from None


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    except ValueError as error:
        return None, str(error)


def _join(problems: list[str | None]) -> str:
    """Every message once; with the ranks that met it, unless all of them did."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(problems):
        if text is not None:
            ranks.setdefault(text, []).append(rank)
    if len(ranks) == 1 and None not in problems:
        return next(iter(ranks))
    return "\n".join(f"on rank {', '.join(map(str, where))}: {text}" for text, where in ranks.items())
