"""How a start ended: one exit code from those of the ranks, and what a person is told about it."""

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.output import log_path, without_stamp
from launch.processes import describe_status, exit_code

FINISHED = 0
FAILED = 1
USER_ERROR = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: a complete save was written; the same command goes on from it
STALLED = 76  # a rank, a node or the network between them hung or was lost; RUN_DIR/logs has a report

MOST_SHOWN = 3  # ranks whose output is shown after a failure
LINES_SHOWN = 40
TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one rank ended.

    Args:
        rank: which one.
        status: its exit code, or minus the number of the signal that ended it.
        by_us: the supervisor had sent that signal, so another rank or a person is the reason.
    """

    rank: int
    status: int
    by_us: bool = False

    @property
    def failed(self) -> bool:
        return self.status not in (FINISHED, PREEMPTED)


def overall_code(endings: Sequence[Ending]) -> int:
    """The exit code of the whole start, from the endings of the ranks in the order in which they happened.

    A user error anywhere explains the failures around it. Otherwise the first rank that failed by itself speaks for all, as its
    peers fail in consequence. Preempted if any rank was: then every one of them took part in the save.
    """
    failed = [ending for ending in endings if ending.failed]
    if any(ending.status == USER_ERROR for ending in failed):
        return USER_ERROR
    if failed:
        return exit_code(min(failed, key=lambda ending: ending.by_us).status)
    if not endings:
        return FAILED
    return max(ending.status for ending in endings)


def count(number: int, word: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def explain(endings: Sequence[Ending], *, log_dir: Path, asked: Iterable[int]) -> str:
    """What a person reads after the output of rank 0; empty if that says it all."""
    code = overall_code(endings)
    if code == PREEMPTED:
        return f"launch: stopped as asked, after a complete save (exit code {PREEMPTED}). The same command goes on from there.\n"
    failed = [ending for ending in endings if ending.failed]
    if not failed or any(ending.rank == 0 and ending.status == USER_ERROR for ending in failed):
        return ""
    own = [ending for ending in failed if not ending.by_us]
    if not own:
        return _killed(failed, asked, log_dir)
    shown = [ending for ending in own if ending.rank != 0][:MOST_SHOWN]
    parts = [_line(ending, log_dir) for ending in own[:1] if ending.rank == 0]
    parts += [_line(ending, log_dir) + _tail(log_path(log_dir, ending.rank)) for ending in shown]
    if len(own) > len(parts):
        parts.append(f"launch: {len(own)} of {len(endings)} ranks failed; the output of each is in {log_dir}.\n")
    return "".join(parts)


def _killed(failed: Sequence[Ending], asked: Iterable[int], log_dir: Path) -> str:
    names = ", ".join(signal.Signals(number).name for number in asked) or "the supervisor"
    ranks = ", ".join(f"{ending.rank} ({describe_status(ending.status)})" for ending in failed)
    return (
        f"launch: stopped by {names} before a complete save; rank {ranks}. The next start goes on from the last complete save, "
        f"if there is one. Output of each rank: {log_dir}. If saving took too long, give it more time with --grace.\n"
    )


def _line(ending: Ending, log_dir: Path) -> str:
    hint = " (if nobody sent it, the machine was probably out of memory)" if ending.status == -signal.SIGKILL else ""
    return f"launch: rank {ending.rank} failed: {describe_status(ending.status)}{hint}. Log: {log_path(log_dir, ending.rank)}\n"


def _tail(path: Path) -> str:
    lines = read_tail(path)[-LINES_SHOWN:]
    return "".join(f"  | {line}\n" for line in lines)


def read_tail(path: Path) -> list[str]:
    """The last lines of a log file since the last start; of a long one, only its end is read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = text.splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("===== ")]
    return [without_stamp(line) for line in (lines[starts[-1] + 1 :] if starts else lines)]
