"""One rank of the engine's multi-process tests: runs the named scenarios one after another and prints their results as JSON.

Starting DeepSpeed costs seconds, so a process group serves many scenarios. What is expected stands in test_engine.py.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_standin as standin
import torch

from simmim_scale.config.schema import CheckpointConfig, EngineConfig, OptimizerConfig
from simmim_scale.engine import checkpoint, precision, state
from simmim_scale.engine.checkpoint import RunStateStore
from simmim_scale.engine.consolidate import consolidate
from simmim_scale.engine.engine import Engine, build_engine
from simmim_scale.engine.guard import LossScaleError, NonFiniteError
from simmim_scale.engine.runtime import Runtime, leave, start_runtime

STAGES = (0, 1, 2, 3)
CLIP = 0.4


def make(
    runtime: Runtime, stage: int, *, accumulation: int = 2, build: Callable = standin.build, lr=standin.lr_at, **options: Any
) -> Engine:
    limit = options.pop("max_nonfinite_steps", 10)
    engine = EngineConfig(**{"zero_stage": stage, "precision": "fp32", **options})
    # Without this a model so small would never be partitioned.
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return build_engine(
        build,
        engine=engine,
        optimizer=OptimizerConfig(clip_grad=CLIP),
        lr=lr,
        micro_batch=standin.GLOBAL_BATCH // accumulation // runtime.world_size,
        accumulation=accumulation,
        global_batch=standin.GLOBAL_BATCH,
        runtime=runtime,
        max_nonfinite_steps=limit,
        extra=extra,
    )


def train(engine: Engine, batch: dict, accumulation: int = 2):
    runtime = engine.runtime
    return engine.train_step(standin.micro_batches(batch, runtime.rank, runtime.world_size, accumulation))


def curves(runtime: Runtime, _directory: Path) -> dict:
    """Losses, norms and a final sum of the weights: every stage, accumulation 1 and 4, with and without checkpointing."""
    found = {}
    for stage in STAGES:
        for accumulation, policy in ((1, "none"), (4, "block")):
            engine = make(runtime, stage, accumulation=accumulation, activation_checkpointing=policy)
            results = [train(engine, standin.global_batch(step), accumulation) for step in range(20)]
            state = engine.full_state_dict()
            found[f"{stage}-{accumulation}"] = {
                "losses": [result.loss for result in results],
                "norms": [result.grad_norm for result in results],
                "lrs": [result.lr for result in results],
                "names": sorted(state),
                "shapes": all(
                    list(state[name].shape) == list(p.shape) for name, p in standin.build().named_parameters() if state
                ),
                "weights": {name: value.double().abs().sum().item() for name, value in state.items()},
            }
            engine.destroy()
    return found


def nonfinite(runtime: Runtime, _directory: Path) -> dict:
    """A bad step in the middle: against a run that never saw it. Bad is the last sample only, so one rank's last micro-batch."""
    found = {}
    for stage, name in [(stage, name) for stage in STAGES for name in ("fp32", "bf16")]:
        clean = _losses(make(runtime, stage, precision=name, lr=_constant), [0, 1, 2, 3])
        engine = make(runtime, stage, precision=name, lr=_constant, activation_checkpointing="block")
        first = [train(engine, standin.global_batch(step)) for step in (0, 1)]
        before = engine.full_state_dict()
        bad = [train(engine, _spoiled(kind)) for kind in ("x", "y")]
        after = engine.full_state_dict()
        last = [train(engine, standin.global_batch(step)) for step in (2, 3)]
        found[f"{stage}-{name}"] = {
            "clean": clean,
            "losses": [result.loss for result in first + last],
            "steps": [result.step for result in bad],
            "skipped": [result.skipped for result in bad],
            "sources": [result.nonfinite_source for result in bad],
            "untouched": all(torch.equal(before[key], after[key]) for key in before),
            "counted": last[-1].nonfinite_steps,
        }
        engine.destroy()
    return found


def gives_up(runtime: Runtime, _directory: Path) -> dict:
    engine = make(runtime, 2, max_nonfinite_steps=3)
    train(engine, _spoiled("x"))
    train(engine, _spoiled("x"))
    train(engine, standin.global_batch(0))  # a finite step in between: the count begins anew
    train(engine, _spoiled("x"))
    train(engine, _spoiled("x"))
    try:
        train(engine, _spoiled("x"))
    except NonFiniteError as error:
        return {"error": str(error), "step": engine.step}
    finally:
        engine.destroy()
    return {}


def fp16(runtime: Runtime, _directory: Path) -> dict:
    """The loss scale: it starts too high, comes down, training goes on; at the floor it stops with advice."""
    from deepspeed.accelerator import get_accelerator

    # CPUs without fast fp16 are refused, rightly; PyTorch computes it anyway, which is enough to see the scale work.
    get_accelerator().is_fp16_supported = lambda: True
    precision._supports = lambda _precision, _device: True
    found = {}
    for stage in STAGES:
        engine = make(runtime, stage, precision="fp16", fp16_initial_scale_power=24, fp16_scale_window=5)
        results = [train(engine, standin.global_batch(step)) for step in range(20)]
        found[str(stage)] = {
            "losses": [result.loss for result in results],
            "norms": [result.grad_norm for result in results],
            "scales": [result.loss_scale for result in results],
            "skipped": [result.skipped for result in results],
            "sources": [result.nonfinite_source for result in results],
        }
        engine.destroy()
        engine = make(runtime, stage, precision="fp16", fp16_initial_scale_power=1)
        found[str(stage)]["floor"] = _floor(engine)
        engine.destroy()
    return found


def saves(runtime: Runtime, directory: Path) -> dict:
    """Save at step 5, go on to 10; then die by SIGKILL in the middle of the next save."""
    found = {}
    for stage in STAGES:
        store = RunStateStore(directory / str(stage), runtime, CheckpointConfig(keep=1))
        engine = make(runtime, stage)
        for step in range(10):
            result = train(engine, _spoiled("x") if step == 3 else standin.global_batch(step))
            if step == 4:
                store.save(engine, {"position": 40})
            found.setdefault(str(stage), []).append(result.loss)
        engine.destroy()
    _report(runtime, "saves", found)
    checkpoint._write_synced = lambda _path, _text: os.kill(os.getpid(), signal.SIGKILL)  # files written, manifest not
    engine = make(runtime, 3)
    engine.step = 7
    store.save(engine, {"position": 56})
    raise AssertionError("unreachable")


def consolidates(runtime: Runtime, directory: Path) -> dict:
    """Files of a save against the whole state that the engine gathers, key by key, in every stage and in bf16."""
    found = {}
    for stage in STAGES:
        for kind in ("fp32", "bf16"):
            store = RunStateStore(directory / f"whole-{stage}-{kind}", runtime, CheckpointConfig(keep=1))
            engine = make(runtime, stage, precision=kind)
            for step in range(3):
                train(engine, standin.global_batch(step))
            store.save(engine, {})
            path, state = store.newest().path, engine.full_state_dict()
            if runtime.is_main:
                read = consolidate(path)
                # Buffers stay in the run's type in the engine; in the files' reading everything is fp32.
                exact = all(torch.equal(read[name], value.float()) for name, value in state.items())
                found[f"{stage}-{kind}"] = {"exact": exact, "names": list(read) if set(read) != set(state) else "the same"}
            engine.destroy()
    return found


def resumes(runtime: Runtime, directory: Path) -> dict:
    """In new processes: from the newest complete save of each stage to step 10, and what a wrong resume says."""
    found = {}
    for stage in STAGES:
        store = RunStateStore(directory / str(stage), runtime, CheckpointConfig(keep=1))
        saved = store.newest()
        engine = make(runtime, stage)
        store.load(engine, saved)
        found[str(stage)] = {
            "client_state": dict(saved.client_state),
            "losses": [train(engine, standin.global_batch(step)).loss for step in range(engine.step, 10)],
            "skipped_before": engine._guard.total,
        }
        store.save(engine, {"position": 80})
        found[str(stage)]["left"] = sorted(path.name for path in store.directory.iterdir())
        engine.destroy()
    found["errors"] = _wrong_resumes(runtime, directory)
    return found


def _wrong_resumes(runtime: Runtime, directory: Path) -> dict[str, str]:
    def narrower():
        module = standin.build()
        module.head = torch.nn.Linear(standin.WIDTH, 5)
        module.extra = torch.nn.Linear(2, 2)
        return module

    errors = {}
    saved = directory / "2" / "step_00000010"
    for name, engine in (("model", make(runtime, 2, build=narrower)), ("precision", make(runtime, 2, precision="bf16"))):
        try:
            engine.load(saved)
        except ValueError as error:
            errors[name] = str(error)
        engine.destroy()
    return errors


def disk_full(runtime: Runtime, directory: Path) -> dict:
    """One rank cannot write: all ranks raise, the older save stays the newest, nothing half-written is left."""
    store = RunStateStore(directory / "full", runtime, CheckpointConfig(keep=1))
    engine = make(runtime, 3)
    train(engine, standin.global_batch(0))
    store.save(engine, {"position": 8})
    original, message = state.write_tensors, None

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    train(engine, standin.global_batch(1))
    if runtime.rank == runtime.world_size - 1:
        state.write_tensors = refuse
    try:
        store.save(engine, {"position": 16})
    except OSError as error:
        message = str(error)
    state.write_tensors = original
    newest = store.newest()
    loss = train(engine, standin.global_batch(2)).loss
    engine.destroy()
    return {"message": message, "newest": newest.step, "left": sorted(p.name for p in store.directory.iterdir()), "loss": loss}


def collectives(runtime: Runtime, _directory: Path) -> dict:
    last = runtime.world_size - 1
    return {
        "world": [runtime.rank, runtime.world_size, runtime.local_rank],
        "any": [runtime.any_rank(runtime.rank == last), runtime.any_rank(False)],
        "sum": runtime.sum_ranks(runtime.rank + 1),
        "bounds": [runtime.min_ranks(runtime.rank), runtime.max_ranks(runtime.rank)],
        "broadcast": runtime.broadcast_object({"from": runtime.rank}),
        "gathered": runtime.gather_objects(f"rank {runtime.rank}"),
        "memory": runtime.memory_bytes() > 2**20,
    }


def host_reads(runtime: Runtime, _directory: Path) -> dict:
    """What a launched step asks of the device, per stage and precision."""
    from tests.host_reads import HostReads

    found = {}
    for stage, name in [*((stage, "fp32") for stage in STAGES), *((stage, "bf16") for stage in STAGES[1:])]:
        engine = make(runtime, stage, precision=name)
        train(engine, standin.global_batch(0))  # state and traces are made in the first step
        batches = list(standin.micro_batches(standin.global_batch(1), runtime.rank, runtime.world_size, 2))
        with HostReads() as reads:
            launched = engine.launch_step(batches)
        found[f"{stage}-{name}"] = dict(reads.found)
        found.setdefault("losses", []).append(engine.finish_step(launched).loss)
        engine.destroy()
    return found


def gathered(runtime: Runtime, _directory: Path) -> int:
    """How many gradients a step of stage 0 copies into a buffer to sum them over the ranks."""
    engine = make(runtime, 0)
    copied = []
    flatten = engine._wrapped.flatten
    engine._wrapped.flatten = lambda tensors: copied.extend(tensors) or flatten(tensors)
    train(engine, standin.global_batch(0))
    engine.destroy()
    return len(copied)


def late(runtime: Runtime, _directory: Path) -> dict:
    """Every step read one step late, as the loop does on a GPU, with a bad one among them: the same losses, the same account."""
    found = {}
    for stage in (2, 3):
        engine = make(runtime, stage, precision="bf16", lr=_constant)
        launched, results = None, []
        for batch in [standin.global_batch(0), standin.global_batch(1), _spoiled("x"), _spoiled("y"), standin.global_batch(2)]:
            following = engine.launch_step(standin.micro_batches(batch, runtime.rank, runtime.world_size, 2), stop=lambda: True)
            results += [engine.finish_step(launched)] if launched else []
            launched = following
        results.append(engine.finish_step(launched))
        found[str(stage)] = {
            "late": [result.loss for result in results if not result.skipped],
            "at_once": _losses(make(runtime, stage, precision="bf16", lr=_constant), [0, 1, 2]),
            "steps": [result.step for result in results],
            "sources": [result.nonfinite_source for result in results],
            "counted": results[-1].nonfinite_steps,
            "stop": [result.stop for result in results],
        }
        engine.destroy()
    return found


def _constant(_step: int) -> float:
    return 1e-3


def _losses(engine: Engine, steps: list[int]) -> list[float]:
    losses = [train(engine, standin.global_batch(step)).loss for step in steps]
    engine.destroy()
    return losses


def _spoiled(name: str) -> dict:
    batch = standin.global_batch(50)
    batch[name][-1, 0] = float("nan") if name == "x" else float("inf")
    return batch


def _floor(engine: Engine) -> str | None:
    batch = {**standin.global_batch(0), "factor": torch.full((standin.GLOBAL_BATCH,), 1e7)}
    try:
        for _ in range(5):
            train(engine, batch)
    except LossScaleError as error:
        return str(error)
    return None


def _report(runtime: Runtime, name: str, found: dict) -> None:
    sys.stdout.write(f"RESULT {name} {json.dumps(found)}\n")
    sys.stdout.flush()


def main() -> None:
    torch.set_num_threads(1)
    directory, names = Path(sys.argv[1]), sys.argv[2:]
    scenarios = {
        f.__name__: f
        for f in (
            curves,
            nonfinite,
            gives_up,
            fp16,
            saves,
            consolidates,
            resumes,
            disk_full,
            collectives,
            host_reads,
            late,
            gathered,
        )
    }
    runtime = start_runtime(timeout_minutes=2)
    for name in names:
        _report(runtime, name, scenarios[name](runtime, directory))
    runtime.close()
    leave(0)


if __name__ == "__main__":
    main()
