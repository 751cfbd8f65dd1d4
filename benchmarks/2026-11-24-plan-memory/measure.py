"""One rank: what real runs hold on a CPU, beside what `simmim plan` says. Prints one JSON object on the main rank.

Start it with torchrun, or alone for one rank (README.md has the command).
Arguments: CONFIG, samples at once, then STAGE-PRECISION of each case, for example 3-bf16.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim_scale.cli.activation_count import count_configured
from simmim_scale.cli.plan import make_sharding
from simmim_scale.config.load import load_config
from simmim_scale.config.memory import ModelCost, state_bytes
from simmim_scale.config.schema import Config
from simmim_scale.engine.engine import Engine, build_engine
from simmim_scale.engine.flats import layout_of, state_of
from simmim_scale.engine.runtime import Runtime, leave, start_runtime
from simmim_scale.objectives.simmim import build_simmim

MIB = 2**20


def state_of_rank(engine: Engine) -> int:
    """Bytes of the parameters, masters and moments that this rank holds between steps, each storage once."""
    module, layout = engine.module, layout_of(engine._wrapped)
    tensors = [tensor for p in module.parameters() for tensor in (p.data, getattr(p, "ds_tensor", None)) if tensor is not None]
    for flat in layout.flats:
        with flat.resident() as master:
            tensors += [master, *state_of(layout.inner, master).values()]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())


class Saved:
    """Bytes that autograd saves, each storage once; those of the module itself are left out."""

    def __init__(self, module: Any) -> None:
        self.held: dict[int, Any] = {}
        self.own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}

    def save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.held[storage.data_ptr()] = storage  # kept alive: no other storage gets its address
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self.held.values())


def batch(config: Config, samples: int) -> dict[str, Tensor]:
    height, width = config.model.image_size
    cells = (height // config.mask.cell, width // config.mask.cell)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(samples, cells[0] * cells[1], generator=generator).argsort(1)
    return {
        "image": torch.randint(0, 255, (samples, 3, height, width), generator=generator, dtype=torch.uint8),
        "mask": (order < config.mask.ratio * order.shape[1]).view(samples, *cells),
        "position": torch.arange(samples),
        "flip": torch.zeros(samples, dtype=torch.bool),
    }


def case(runtime: Runtime, config: Config, samples: int, stage: int, precision: str) -> dict[str, float]:
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"zero_stage": stage, "precision": precision})})

    def build() -> Any:
        return build_simmim(config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=0)

    engine = build_engine(
        build,
        engine=config.engine.model_copy(update={"activation_checkpointing": "none"}),
        optimizer=config.optimizer,
        lr=lambda _step: 1e-4,
        micro_batch=samples,
        accumulation=1,
        global_batch=samples * runtime.world_size,
        runtime=runtime,
    )
    data = batch(config, samples)
    engine.train_step([data])
    held = state_of_rank(engine)
    # A forward by the module itself: stage 0 alone, where it is whole between steps.
    saved = 0
    if stage == 0:
        watch = Saved(engine.module)
        with torch.autograd.graph.saved_tensors_hooks(watch.save, lambda tensor: tensor):
            loss = engine.module(data)["loss"]
        saved = watch.nbytes
        del loss, watch
    engine.destroy()
    model = count_configured(config, on_gpu=False)
    planned = _planned(config, model, runtime.world_size, stage)
    row = {"state": held / MIB, "planned state": planned / MIB}
    if stage == 0:
        row |= {"activations": saved / MIB, "planned activations": model.kept_by_forward("none", samples) / MIB}
    return {name: round(value, 2) for name, value in row.items()}


def _planned(config: Config, model: ModelCost, ranks: int, stage: int) -> float:
    """Parameters and optimizer state as the plan counts them; under ZeRO-3 with the small parameters that stay whole."""
    sharding = make_sharding(config, model, ranks, stage=stage, places=("none", "none"))
    state = state_bytes(model.parameters, sharding)
    whole = sum(size for size in model.sizes if size <= sharding.persistence) if stage == 3 else 0
    return state["parameters"] + state["optimizer"] + whole * (2 if sharding.half else 4)


def main() -> None:
    torch.set_num_threads(1)
    config, samples, cases = load_config(Path(sys.argv[1]), []), int(sys.argv[2]), sys.argv[3:]
    runtime = start_runtime(timeout_minutes=5)
    found = {}
    for name in cases:
        stage, precision = name.split("-")
        found[name] = case(runtime, config, samples, int(stage), precision)
    if runtime.is_main:
        sys.stdout.write(f"RESULT {json.dumps({'ranks': runtime.world_size, 'cases': found})}\n")
        sys.stdout.flush()
    runtime.close()
    leave(0)


if __name__ == "__main__":
    main()
