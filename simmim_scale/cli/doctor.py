"""`simmim doctor`: whether this machine, or this container image, can run what it is meant to run, and what to do where not.

Each check returns rows; the checks of packages and machine are in `doctor_machine.py`, those that compute in `doctor_work.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

Status = Literal["ok", "note", "fail"]
COLOURS = {"ok": "green", "note": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        check: what was looked at.
        status: "ok"; "note" for what only some users need; "fail" for what training needs.
        found: what is there.
        advice: what to do; empty for "ok".
    """

    check: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the machine is expected to offer.

    Attributes:
        gpus: GPUs that must be visible at least.
        apex: whether NVIDIA Apex must be usable.
        nodes: whether this is one of several nodes that a hostfile names.
    """

    gpus: int = 0
    apex: bool = False
    nodes: bool = False


def examine(wanted: Wanted, *, quick: bool = False) -> list[Row]:
    """Every check's rows, in order. A check that breaks is a failure of its own, not the end of the others.

    Args:
        quick: only what takes a few seconds: no kernel is run and nothing is trained.
    """
    from simmim_scale.cli import doctor_machine, doctor_work

    checks: list[Callable[[Wanted], Iterable[Row]]] = [*doctor_machine.CHECKS]
    if not quick:
        checks += doctor_work.CHECKS
    return [row for check in checks for row in _rows(check, wanted)]


def exit_code(rows: Sequence[Row]) -> int:
    """1 if anything failed, else 0."""
    return int(any(row.status == "fail" for row in rows))


def as_json_object(rows: Sequence[Row]) -> dict[str, Any]:
    """`healthy` and the rows, for other programs."""
    return {"healthy": exit_code(rows) == 0, "checks": [asdict(row) for row in rows]}


def doctor_table(rows: Sequence[Row]) -> Table:
    """The rows for a person."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("check", "", "found", "advice"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.check, f"[{COLOURS[row.status]}]{row.status}[/]", row.found, row.advice)
    return table


def _rows(check: Callable[[Wanted], Iterable[Row]], wanted: Wanted) -> list[Row]:
    try:
        return list(check(wanted))
    # The purpose of this command is to report what breaks, whatever it is: imports of broken installations raise anything.
    except Exception as error:  # noqa: BLE001
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return [Row(name, "fail", f"{type(error).__name__}: {error}", "Mend what the message names, or install again.")]
