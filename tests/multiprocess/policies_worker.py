"""One rank of the test of activation checkpointing and offloading under ZeRO-3: a tiny SimMIM with drop path, losses as JSON.

Arguments: a directory for what is offloaded to a disk, and the path of a JSON list of engine settings.
"""

import json
import sys
from pathlib import Path

import simmim_worker
import torch
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


def make(runtime: Runtime, settings: dict) -> Engine:
    config = EngineConfig(**{"precision": "fp32", **settings})
    # Sub-groups this small are swapped one by one; without the threshold nothing would be partitioned.
    small = {"stage3_param_persistence_threshold": 0, "sub_group_size": 4000} if config.zero_stage == 3 else {}
    return build_engine(
        lambda: build_simmim(simmim_worker.MODELS["swin_v2"], ObjectiveConfig(), mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0),
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


def step(engine: Engine, number: int) -> float:
    return engine.train_step(simmim_worker.share(number, engine.runtime, 1)).loss


def curve(runtime: Runtime, directory: Path, settings: dict) -> dict:
    """Losses of an undisturbed run, and of one that was saved after two steps and loaded into a new engine."""
    settings = {**settings, **({"nvme_path": str(directory / "nvme")} if "nvme" in settings.values() else {})}
    engine = make(runtime, settings)
    offloads = "offload_optimizer" in settings
    store = RunStateStore(directory / "-".join(map(str, settings.values())).replace("/", "_"), runtime, CheckpointConfig())
    losses = []
    for number in range(STEPS):
        if number == SAVED and offloads:
            store.save(engine, {})
        with ProductCount() as counter:
            losses.append(step(engine, number))
    held = state_of_rank(engine)
    weights = sum(value.double().abs().sum().item() for value in engine.full_state_dict().values())
    engine.destroy()
    resumed = []
    if offloads:
        engine = make(runtime, settings)
        store.load(engine, store.newest())
        resumed = [step(engine, number) for number in range(SAVED, STEPS)]
        engine.destroy()
    return {"losses": losses, "resumed": resumed, "weights": weights, "held": held, "products": counter.products}


def main() -> None:
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    runtime = start_runtime(timeout_minutes=5)
    cases = json.loads(Path(sys.argv[2]).read_text())
    found = {"-".join(map(str, case.values())): curve(runtime, directory, case) for case in cases}
    module = build_simmim(simmim_worker.MODELS["swin_v2"], ObjectiveConfig(), mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0)
    found["elements"] = sum(parameter.numel() for parameter in module.parameters())
    sys.stdout.write(f"RESULT policies {json.dumps(found)}\n")
    runtime.close()
    leave(0)


if __name__ == "__main__":
    main()
