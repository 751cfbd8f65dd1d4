"""One rank of the test that trains a real, tiny SimMIM through the engine; prints its curves as JSON."""

import functools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from simmim_scale.config.schema import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EngineConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ResNetConfig,
    SwinV2Config,
    ViTConfig,
)
from simmim_scale.engine.engine import build_engine
from simmim_scale.engine.runtime import Runtime, leave, start_runtime
from simmim_scale.objectives.simmim import build_simmim

GLOBAL_BATCH = 8
SIDE = 32
STEPS = 20
MODELS: dict[str, ModelConfig] = {
    "swin_v2": SwinV2Config(
        image_size=SIDE,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        drop_path=0.3,
        extra_norm_period=1,
        mlp_ratio=2.0,
    ),
    # A rank's half of the second stage's largest matrices is more than the MiB from which DeepSpeed swaps a tensor to a disk.
    "swin_v2_wide": SwinV2Config(image_size=SIDE, embed_dim=256, depths=(2, 2), num_heads=(2, 4), window_size=4, drop_path=0.3),
    "vit": ViTConfig(image_size=SIDE, patch_size=8, embed_dim=32, depth=3, num_heads=2, drop_path=0.3),
    "resnet": ResNetConfig(image_size=SIDE, depths=(1, 1), width=1),
}


def global_batch(step: int) -> dict[str, Tensor]:
    """Photograph-free but learnable: a smooth gradient per image."""
    generator = torch.Generator().manual_seed(step)
    ramp = torch.linspace(0, 1, SIDE)
    weights = torch.rand(GLOBAL_BATCH, 3, 2, generator=generator)
    image = weights[..., :1, None] * ramp[:, None] + weights[..., 1:, None] * ramp
    return {
        "image": (image * 127).to(torch.uint8),
        # Equally many hidden cells in each image, as in real runs: the mean over micro-batches is then the batch's mean.
        "mask": (torch.rand(GLOBAL_BATCH, 16, generator=generator).argsort(1) < 10).view(GLOBAL_BATCH, 4, 4),
        "position": torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH),
        "flip": torch.rand(GLOBAL_BATCH, generator=generator) < 0.5,
    }


def share(step: int, runtime: Runtime, accumulation: int) -> list[dict[str, Tensor]]:
    micro = GLOBAL_BATCH // accumulation // runtime.world_size
    starts = [(round_ * runtime.world_size + runtime.rank) * micro for round_ in range(accumulation)]
    whole = global_batch(step)
    return [{name: value[start : start + micro] for name, value in whole.items()} for start in starts]


def curve(
    runtime: Runtime,
    stage: int,
    accumulation: int,
    precision: str,
    policy: str,
    model: str = "swin_v2",
    attention: str = "auto",
    compiled: str = "none",
) -> dict:
    engine = build_engine(
        lambda: build_simmim(MODELS[model], ObjectiveConfig(), mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, attention=attention),
        engine=EngineConfig(zero_stage=stage, precision=precision, activation_checkpointing=policy, compile=compiled),
        optimizer=OptimizerConfig(clip_grad=1.0),
        lr=lambda _step: 2e-3,
        micro_batch=GLOBAL_BATCH // accumulation // runtime.world_size,
        accumulation=accumulation,
        global_batch=GLOBAL_BATCH,
        runtime=runtime,
        extra={"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {},
    )
    losses, evaluated = [], []
    for step in range(STEPS):
        losses.append(engine.train_step(share(step, runtime, accumulation)).loss)
        if step in (4, 19):  # a forward without backward in between must not disturb training
            outputs = engine.evaluate_step(share(99, runtime, 1)[0])
            evaluated.append(runtime.sum_ranks(outputs["loss_per_sample"].double().sum().item()) / GLOBAL_BATCH)
    weights = engine.full_state_dict()
    total = sum(value.double().abs().sum().item() for value in weights.values())
    engine.destroy()
    return {
        "losses": losses,
        "evaluated": evaluated,
        "weights": total,
        "dtypes": sorted({str(v.dtype) for v in weights.values()}),
    }


def main() -> None:
    torch.set_num_threads(1)
    # Blocks are traced, differentiated and run as one graph each; making machine code of them would take minutes.
    torch.compile = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    runtime = start_runtime(timeout_minutes=2)
    runs = json.loads(Path(sys.argv[1]).read_text())
    found = {"-".join(map(str, run)): curve(runtime, *run) for run in runs}
    sys.stdout.write(f"RESULT simmim {json.dumps(found)}\n")
    runtime.close()
    leave(0)


if __name__ == "__main__":
    main()
