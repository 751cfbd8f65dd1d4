"""Many trainings in one process, for tests: starting one costs seconds."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 900  # seconds


def train_many(runs: dict[str, list[str]]) -> dict[str, dict]:
    """name -> [CONFIG, KEY=VALUE, ...] becomes name -> {"code": exit code, "message": what went to stderr}."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.train_worker", json.dumps(runs)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("RESULTS "))
