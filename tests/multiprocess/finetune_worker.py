"""One rank of the tests of fine-tuning's engine: layer decay and averaged weights in every stage; prints results as JSON."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from simmim_scale.config.schema import EngineConfig, OptimizerConfig, SwinV2Config
from simmim_scale.engine.engine import Engine, build_engine
from simmim_scale.engine.runtime import Runtime, leave, start_runtime
from simmim_scale.models.initialization import assign, trunc_normal
from simmim_scale.models.layer_decay import layer_scales
from simmim_scale.objectives.classifier import build_classifier

MODEL = SwinV2Config(image_size=(16, 16), embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=2)
CASES = ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"))
DECAY, LR, BATCH, EMA = 0.5, 1e-3, 8, 0.9


def build() -> nn.Module:
    """Every parameter random: at the published start, residual norms of zero keep gradients from most of them."""
    module = build_classifier(MODEL, num_classes=5, mean=(0.5,) * 3, std=(0.25,) * 3, seed=0, initialise=False)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        assign(parameter, trunc_normal(0.3), generator)
    return module


def make(runtime: Runtime, stage: int, precision: str, *, ema_decay: float | None = None) -> Engine:
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return build_engine(
        build,
        engine=EngineConfig(zero_stage=stage, precision=precision),
        optimizer=OptimizerConfig(weight_decay=0.0, clip_grad=None),
        lr=lambda step: LR,
        micro_batch=BATCH // runtime.world_size,
        accumulation=1,
        global_batch=BATCH,
        runtime=runtime,
        lr_scales=lambda module: layer_scales(module, DECAY),
        ema_decay=ema_decay,
        extra=extra,
    )


def train(engine: Engine, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (BATCH, 3, 16, 16), dtype=torch.uint8, generator=generator)
    label = torch.randint(0, 5, (BATCH,), generator=generator)
    size = BATCH // engine.runtime.world_size
    mine = slice(engine.runtime.rank * size, (engine.runtime.rank + 1) * size)
    result = engine.train_step([{"image": image[mine], "label": label[mine]}])
    assert not result.skipped


def learning_rates(engine: Engine) -> dict[str, float]:
    """Adam's first step moves an element by the learning rate of its group, whatever its gradient: its rate, from outside."""
    before = engine.full_state_dict()
    train(engine, 0)
    after = engine.full_state_dict()
    return {name: float((after[name].double() - before[name].double()).abs().max()) / LR for name in before}


def averages(runtime: Runtime, stage: int, precision: str) -> dict[str, bool]:
    """The average against one computed from whole weights; and again after a save into an engine of another stage."""
    engine = make(runtime, stage, precision, ema_decay=EMA)
    expected, agree = engine.full_state_dict(), {}
    for step in range(3):
        train(engine, step)
        expected = _blend(expected, engine.full_state_dict(), step)
    agree["average"] = _equal(engine.averaged_state_dict(), expected)
    before = engine.full_state_dict()
    agree["weights untouched"] = all(torch.equal(before[name], value) for name, value in engine.full_state_dict().items())
    path = Path(runtime.broadcast_object(tempfile.mkdtemp()))
    engine.snapshot().write(path)
    runtime.barrier()
    engine.destroy()
    engine = make(runtime, (stage + 1) % 4, precision, ema_decay=EMA)  # the average moves to other flat tensors
    engine.load(path)
    train(engine, 3)
    expected = _blend(expected, engine.full_state_dict(), 3)
    agree["resumed"] = _equal(engine.averaged_state_dict(), expected)
    engine.destroy()
    return agree


def _blend(average: dict[str, Tensor], weights: dict[str, Tensor], updates: int) -> dict[str, Tensor]:
    decay = min(EMA, (1 + updates) / (10 + updates))
    return {name: decay * average[name] + (1 - decay) * value for name, value in weights.items()}


def _equal(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    assert found is not None
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-6) for name, value in expected.items())


def main() -> None:
    torch.set_num_threads(1)
    runtime = start_runtime(timeout_minutes=2)
    found = {}
    for stage, precision in CASES:
        engine = make(runtime, stage, precision)
        groups = len(engine._wrapped.optimizer.param_groups)
        rates = learning_rates(engine)
        engine.destroy()
        found[f"{stage}-{precision}"] = {"rates": rates, "groups": groups, "ema": averages(runtime, stage, precision)}
    sys.stdout.write(f"RESULT {json.dumps(found)}\n")
    sys.stdout.flush()
    runtime.close()
    leave(0)


if __name__ == "__main__":
    main()
