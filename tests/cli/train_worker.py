"""Runs `simmim pretrain` many times in one process (starting one costs seconds) and prints exit code and messages as JSON.

argv: a JSON object {case name: [CONFIG, KEY=VALUE, ...]}.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from simmim_scale.cli.train import train
from simmim_scale.engine.runtime import Runtime
from simmim_scale.train.stop import StopRequest


def run(config: str, *overrides: str) -> dict:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            tasks = ("classification",) if Path(config).stem == "finetune" else ("pretrain",)
            code = train(Path(config), overrides, tasks=tasks, stop=StopRequest())
        except SystemExit as leaving:
            code = leaving.code
    return {"code": code, "message": errors.getvalue()}


if __name__ == "__main__":
    Runtime.close = lambda self: None  # DeepSpeed keeps the first process group for good: one serves all runs of this process
    results = {name: run(*arguments) for name, arguments in json.loads(sys.argv[1]).items()}
    sys.stdout.write("RESULTS " + json.dumps(results) + "\n")
