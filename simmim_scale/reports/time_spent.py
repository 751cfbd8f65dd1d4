"""The report page's account of wall-clock time: data wait, compute, validation, saving, other; with the rates beside it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from simmim_scale.reports.records import spent_key
from simmim_scale.reports.terminal import format_count, format_duration
from simmim_scale.reports.throughput import SPENT

# Waiting is what one would want gone, so it stands out.
LOOKS = {
    "data wait": ("#d97706", "the next images were not ready"),
    "compute": ("#2f6fdf", "forward, backward, update; and waiting for other ranks"),
    "validation": ("#3f8f5f", "held-out loss and pictures"),
    "saving": ("#8a6d3b", "run state, written and checked"),
    "other": ("#b4bac4", "records, copies to the device, start of the first step"),
}


@dataclass(frozen=True)
class Part:
    """One row: `percent` is the width of its piece of the strip."""

    label: str
    time: str
    share: str
    percent: float
    colour: str
    note: str


@dataclass(frozen=True)
class TimeSpent:
    """What the page shows; `rates` are (label, value)."""

    parts: list[Part]
    rates: list[tuple[str, str]]
    note: str
    summary: str


def account(records: Sequence[Mapping[str, Any]]) -> TimeSpent | None:
    """The account of all records; None where they hold none (written by an older version)."""
    seconds = {what: math.fsum(record.get(spent_key(what)) or 0.0 for record in records) for what in SPENT}
    total = math.fsum(seconds.values())
    if total <= 0:
        return None
    parts = [_part(what, seconds[what], total) for what in SPENT]
    summary = ", ".join(f"{part.label} {part.share}" for part in parts)
    note = f"{format_duration(total)} of this run on its main rank, up to the last record; what it saved after that is not in it."
    return TimeSpent(parts, _rates(records), note, summary)


def _part(what: str, seconds: float, total: float) -> Part:
    share, (colour, note) = seconds / total, LOOKS[what]
    time = format_duration(seconds) if seconds >= 10 else f"{seconds:.1f}s"
    return Part(what, time, f"{share:.1%}", round(100 * share, 3), colour, note)


def _rates(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Medians over the steps, so that a slow start does not count."""
    found = []
    for key, label, text in (
        ("images_per_second", "images per second", format_count),
        ("mfu", "MFU", lambda value: f"{value:.1%} of the devices' peak, by the multiply-adds of backbone and head"),
    ):
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            found.append((label, text(median(values))))
    return found
