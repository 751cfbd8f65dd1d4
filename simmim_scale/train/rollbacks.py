"""RUN_DIR/rollbacks.json: where a run went back to an earlier state, and which samples it has passed over since.

A rollback belongs to the save it went back to. A run that goes on from that save or a later one passes over its samples; one that
goes on from an older save meets them again, and may roll back again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from simmim_scale.reports.atomic_write import replace_file

ROLLBACKS_FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """One return to an earlier state.

    Attributes:
        from_step: steps done when something went wrong.
        to_step: steps done at the save that the run went back to.
        reason: what went wrong.
        skipped_samples: samples that were consumed in between, which are not seen again.
    """

    from_step: int
    to_step: int
    reason: str
    skipped_samples: int


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """All rollbacks of a run, oldest first.

    Raises:
        ValueError: the file was damaged.
    """
    path = run_dir / ROLLBACKS_FILE
    if not path.is_file():
        return []
    try:
        return [Rollback(**entry) for entry in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}). It says which samples were passed over;"
            " restore it, or remove it to see them again."
        ) from error


def add_rollback(run_dir: Path, rollback: Rollback) -> None:
    """Writes one more, in one go."""
    entries = [asdict(entry) for entry in (*read_rollbacks(run_dir), rollback)]
    replace_file(run_dir / ROLLBACKS_FILE, json.dumps(entries, indent=1).encode())


def skipped_at(rollbacks: Sequence[Rollback], start_step: int) -> int:
    """Samples that a run which goes on at `start_step` has passed over."""
    return sum(rollback.skipped_samples for rollback in rollbacks if rollback.to_step <= start_step)
