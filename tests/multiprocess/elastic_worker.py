"""One rank of the test that goes on with a run on other numbers of ranks and in other ZeRO stages; prints its losses as JSON.

Arguments: directory, steps to begin from and to end at. The model has two parameter groups, a frozen parameter, and a buffer that
counts.
"""

import json
import sys
from pathlib import Path

import engine_standin as standin
import torch
from engine_worker import make, train
from torch import Tensor, nn

from simmim_scale.config.schema import CheckpointConfig
from simmim_scale.engine import precision as precisions
from simmim_scale.engine.checkpoint import RunStateStore
from simmim_scale.engine.runtime import Runtime, leave, start_runtime

CASES = [("fp32", stage) for stage in (0, 1, 2, 3)] + [("bf16", 1), ("bf16", 3), ("fp16", 3)]
ACCUMULATION = {1: 4, 2: 2, 4: 1}


class Counting(nn.Module):
    """Adds a frozen offset, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.full((standin.WIDTH,), 0.1), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.frozen


class Model(standin.Standin):
    def __init__(self) -> None:
        super().__init__()
        self.counting = Counting()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().forward({**batch, "x": self.counting(batch["x"].to(self.head.weight.dtype))})


def build() -> nn.Module:
    module = Model()
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        with standin._gathered(parameter):
            value = torch.randn(getattr(parameter, "ds_shape", parameter.shape), generator=generator) * 0.3
            if parameter.numel():
                parameter.data.copy_(value)
    return module


def run(runtime: Runtime, directory: Path, precision: str, stage: int, first: int, last: int) -> dict:
    accumulation = ACCUMULATION[runtime.world_size]
    # Each start of the chain is in another stage: 0 -> 1 -> 2 -> 3 -> 0; bf16 and fp16 stay among the stages that are sharded.
    shift = {1: 1, 2: 0, 4: 2}[runtime.world_size]
    now = (stage + shift) % 4 if precision == "fp32" else stage
    engine = make(
        runtime,
        now,
        precision=precision,
        build=build,
        accumulation=accumulation,
        fp16_initial_scale_power=14,
        fp16_scale_window=3,
    )
    # Half of the saves are written while the steps that follow change what they hold.
    config = CheckpointConfig(asynchronous=stage in (0, 3))
    store = RunStateStore(directory / f"{precision}-{stage}", runtime, config)
    if first:
        # A state in memory is overwritten, not added to: what was trained before loading must not show.
        train(engine, standin.global_batch(77), accumulation)
        store.load(engine, store.newest())
    scale = engine._scaler.value if engine._scaler else None
    losses = [train(engine, standin.global_batch(step), accumulation).loss for step in range(engine.step, last)]
    store.save(engine, {})
    calls = int(engine.module.counting.calls)  # before the steps below
    uninterrupted = (
        [train(engine, standin.global_batch(step), accumulation).loss for step in range(last, 12)] if not first else []
    )
    store.wait()
    engine.destroy()
    return {"losses": losses, "rest": uninterrupted, "scale": scale, "calls": calls, "stage": now}


def main() -> None:
    torch.set_num_threads(1)
    directory, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    runtime = start_runtime(timeout_minutes=2)
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # as in engine_worker.fp16
    precisions._supports = lambda _precision, _device: True
    found = {f"{precision}-{stage}": run(runtime, directory, precision, stage, first, last) for precision, stage in CASES}
    sys.stdout.write(f"RESULT elastic {json.dumps(found)}\n")
    runtime.close()
    leave(0)


if __name__ == "__main__":
    main()
