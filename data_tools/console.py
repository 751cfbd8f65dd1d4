"""What the commands share: lines to a person, a bar on a terminal, numbers with units."""

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Jobs = Annotated[int | None, typer.Option(help="Processes; default: all cores. The result does not depend on it.", min=1)]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def say(message: str) -> None:
    """A line on standard output; rich's markup works."""
    Console(soft_wrap=True).print(message, highlight=False)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, nothing when output goes to a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around what writes below `place`: an error of the disk becomes a message that names it.

    Raises:
        ValueError: It cannot be written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise ValueError(
            f"{place}: cannot be written ({error.strerror}). Free some space, check the rights, or choose another place."
        ) from error


@contextmanager
def resumable(destination: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end what runs in here in order, with a line that says how to go on, and the exit code of the signal."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        message = f"{destination}: stopped. Finished shards are kept: run the same command again to go on."
        Console(stderr=True, soft_wrap=True).print(escape(message), highlight=False)
        raise typer.Exit(128 + (error.args[0] if error.args else signal.SIGINT)) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def parse_range(name: str, text: str) -> tuple[int, int]:
    """(low, high) from "LOW-HIGH" or one number."""
    parts = text.split("-")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name}: a range LOW-HIGH of whole numbers, or one number, got {text!r}.")
    return int(parts[0]), int(parts[-1])


def parse_bytes(name: str, text: str | None) -> int | None:
    """Bytes from a number with an optional unit: "200MB", "1GiB", "500000"."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{name}: a number of bytes such as 200MB, 1GiB or 500000000, got {text!r}.")
    return int(float(match[1]) * _UNITS[match[2]])
