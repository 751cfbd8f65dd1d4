"""One rank of `simmim evaluate`: argv are weights, shards, directory of the results."""

import sys
from pathlib import Path

import torch

from simmim_scale.cli.evaluate import EvaluationOptions, evaluate_command
from simmim_scale.engine.runtime import leave

if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate_command(sys.argv[1], sys.argv[2], EvaluationOptions(out=Path(sys.argv[3]), micro_batch=5, workers=0))
    leave(0)
