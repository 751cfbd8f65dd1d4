"""The report on a run that hung: which rank is the suspect, on which node, and where every rank was."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from launch.watch import RankReport

NAME = "stall-report"


def suspects(reports: Sequence[RankReport], *, heartbeat: float) -> tuple[list[RankReport], str]:
    """The ranks to look at first, and why.

    A rank that gives no heartbeat keeps all others waiting; among those that do, the one that has passed fewer marks than the
    others; if all are at the same mark, they wait for each other, and the network between them is the suspect.
    """
    stopped = [one for one in reports if one.state[:1] in "TtDZ" or one.state == "gone"]
    if stopped:
        return stopped, "its process does not run; the others wait for it in a collective"
    silent = [one for one in reports if one.silent is not None and one.silent > heartbeat]
    if silent:
        return silent, "it gives no heartbeat; the others wait for it in a collective"
    marks = Counter(one.marks for one in reports)
    if len(marks) > 1:
        least = min(marks)
        return [one for one in reports if one.marks == least], "it is behind the others, which wait for it in a collective"
    return [], "all ranks are at the same point and wait for each other: look at the network between the nodes"


def render(reason: str, reports: Sequence[RankReport], *, heartbeat: float, missing: Sequence[str] = ()) -> str:
    """The whole report as text.

    Args:
        reason: what the watchdog noticed first.
        missing: what is to be said about nodes that did not answer.
    """
    found, why = suspects(reports, heartbeat=heartbeat)
    lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}  {reason}", ""]
    lines += [f"LOST {text}" for text in missing]
    lines += [f"SUSPECT {_place(one)}: {why}" for one in found]
    if not found and not missing:
        lines.append(f"NO SUSPECT: {why}")
    lines += ["", "rank  node  pid  state  step  phase  marks  without heartbeat  without progress"]
    ordered = sorted(reports, key=lambda one: (one not in found, one.rank))
    for one in ordered:
        times = [f"{value:.1f} s" if value is not None else "-" for value in (one.silent, one.standing)]
        words = (one.rank, one.node or "here", one.pid, one.state, one.step, one.phase, one.marks, *times)
        lines.append("  ".join(map(str, words)))
    for one in ordered:
        lines += [
            "",
            f"----- {_place(one)}, in phase {one.phase!r}; the stack of the main thread is the last one",
            one.stack.rstrip(),
        ]
    return "\n".join(lines) + "\n"


def write(log_dir: Path, text: str) -> Path | None:
    """Writes the report into a file of its own; None if that is not possible."""
    path = log_dir / f"{NAME}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError:
        return None
    return path


def headline(text: str) -> str:
    """The lines of a report that name who is to blame."""
    named = [line for line in text.splitlines() if line.startswith(("SUSPECT", "LOST", "NO SUSPECT"))]
    return "\n".join(named)


def _place(one: RankReport) -> str:
    return f"rank {one.rank} on {one.node or 'this node'} (pid {one.pid}, {one.state})"
