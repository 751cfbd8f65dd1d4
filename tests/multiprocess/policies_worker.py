"""One rank of the test of activation checkpointing and offloading under ZeRO-3: a tiny SimMIM with drop path, losses as JSON.

Arguments: a directory for what is offloaded to a disk, the path of a JSON list of engine settings, and which model.
"""

import json
import sys
from functools import partial
from pathlib import Path

import simmim_worker
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from simmim_scale.config.schema import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CheckpointConfig,
    EngineConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from simmim_scale.engine.checkpoint import RunStateStore
from simmim_scale.engine.engine import Engine, build_engine
from simmim_scale.engine.flats import layout_of, state_of
from simmim_scale.engine.runtime import Runtime, leave, start_runtime
from simmim_scale.objectives.simmim import build_simmim

STEPS, SAVED = 4, 2
PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution")}


class ProductCount(TorchDispatchMode):
    """How many matrix products and convolutions are computed; what a checkpoint finds kept is not."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def build(model: str) -> nn.Module:
    return build_simmim(simmim_worker.MODELS[model], ObjectiveConfig(), mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0)


def make(runtime: Runtime, settings: dict, model: str) -> Engine:
    config = EngineConfig(**{"precision": "fp32", **settings})
    buffers = {"offload_param": {"buffer_size": 2**20}} if config.offload_parameters == "nvme" else {}
    # Sub-groups this small are swapped one by one; without the threshold nothing would be partitioned.
    small = {"stage3_param_persistence_threshold": 0, "sub_group_size": 4000, **buffers} if config.zero_stage == 3 else {}
    return build_engine(
        partial(build, model),
        engine=config,
        optimizer=OptimizerConfig(clip_grad=1.0),
        lr=lambda _step: 2e-3,
        micro_batch=simmim_worker.GLOBAL_BATCH // runtime.world_size,
        accumulation=1,
        global_batch=simmim_worker.GLOBAL_BATCH,
        runtime=runtime,
        extra={"zero_optimization": small},
    )


def state_of_rank(engine: Engine) -> int:
    """Bytes of parameters, masters and moments of this rank, each storage once."""
    layout = layout_of(engine._wrapped)
    tensors = [t for p in engine.module.parameters() for t in (p.data, getattr(p, "ds_tensor", None)) if t is not None]
    for flat in layout.flats:
        with flat.resident() as master:
            tensors += [master, *state_of(layout.inner, master).values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def bytes_on_disk(directory: Path, runtime: Runtime) -> dict[str, int]:
    """What DeepSpeed has swapped out for this rank, by kind: `optimizer`, `float32params`."""
    found: dict[str, int] = {}
    for file in directory.rglob("*"):
        if file.is_file() and f"rank{runtime.rank}" in file.parts:
            kind = file.parts[file.parts.index(f"rank{runtime.rank}") - 1]
            found[kind] = found.get(kind, 0) + file.stat().st_size
    return found


def step(engine: Engine, number: int) -> float:
    return engine.train_step(simmim_worker.share(number, engine.runtime, 1)).loss


def curve(runtime: Runtime, directory: Path, settings: dict, model: str) -> dict:
    """Losses of an undisturbed run, and of one that was saved after two steps and loaded into a new engine."""
    disk = directory / "-".join(map(str, settings.values()))
    settings = {**settings, **({"nvme_path": str(disk)} if "nvme" in settings.values() else {})}
    engine = make(runtime, settings, model)
    offloads = "offload_optimizer" in settings
    store = RunStateStore(directory / "-".join(map(str, settings.values())).replace("/", "_"), runtime, CheckpointConfig())
    losses = []
    for number in range(STEPS):
        if number == SAVED and offloads:
            store.save(engine, {})
        with ProductCount() as counter:
            losses.append(step(engine, number))
        if number == 0:  # a forward without backward in between
            assert engine.evaluate_step(simmim_worker.share(99, runtime, 1)[0])["loss"].isfinite()
    held = state_of_rank(engine)
    on_disk = bytes_on_disk(disk, runtime)
    weights = sum(value.double().abs().sum().item() for value in engine.full_state_dict().values())
    engine.destroy()
    resumed = []
    if offloads:
        engine = make(runtime, settings, model)
        store.load(engine, store.newest())
        resumed = [step(engine, number) for number in range(SAVED, STEPS)]
        engine.destroy()
    return {
        "losses": losses,
        "resumed": resumed,
        "weights": weights,
        "held": held,
        "products": counter.products,
        "on_disk": on_disk,
    }


def main() -> None:
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    runtime = start_runtime(timeout_minutes=5)
    cases = json.loads(Path(sys.argv[2]).read_text())
    found = {"-".join(map(str, case.values())): curve(runtime, directory, case, sys.argv[3]) for case in cases}
    found["elements"] = sum(parameter.numel() for parameter in build(sys.argv[3]).parameters())
    sys.stdout.write(f"RESULT policies {json.dumps(found)}\n")
    runtime.close()
    leave(0)


if __name__ == "__main__":
    main()
