"""What the parameter groups of layer decay cost a step: two groups against two for each layer, in every ZeRO stage.

    python benchmarks/2026-11-24-layer-groups/measure.py [TURNS]

One rank, a SwinV2 with the 24 blocks of the published models and narrow enough for a CPU. The two engines of a stage take steps
in turn, so what else the machine does meets both alike; the median over all steps counts.
"""

import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from simmim_scale.config.schema import EngineConfig, OptimizerConfig, SwinV2Config
from simmim_scale.engine.engine import Engine, build_engine
from simmim_scale.engine.runtime import Runtime, leave, start_runtime
from simmim_scale.models.layer_decay import layer_scales
from simmim_scale.objectives.classifier import build_classifier

MODEL = SwinV2Config(image_size=(64, 64), embed_dim=32, depths=(2, 2, 18, 2), num_heads=(1, 2, 4, 8), window_size=4)
BATCH, STEPS_A_TURN = 4, 2


def make(runtime: Runtime, stage: int, decay: float) -> Engine:
    return build_engine(
        lambda: build_classifier(MODEL, num_classes=100, mean=(0.5,) * 3, std=(0.25,) * 3, seed=0),
        engine=EngineConfig(zero_stage=stage, precision="fp32"),
        optimizer=OptimizerConfig(),
        lr=lambda step: 1e-4,
        micro_batch=BATCH,
        accumulation=1,
        global_batch=BATCH,
        runtime=runtime,
        lr_scales=lambda module: layer_scales(module, decay),
    )


def main(turns: int) -> None:
    torch.set_num_threads(1)
    runtime = start_runtime()
    batch = {"image": torch.randint(0, 256, (BATCH, 3, 64, 64), dtype=torch.uint8), "label": torch.arange(BATCH)}
    for stage in (0, 1, 2, 3):
        engines = {"one rate": make(runtime, stage, 1.0), "layer decay": make(runtime, stage, 0.9)}
        times: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(turns + 1):
            for name, engine in engines.items():
                for _ in range(STEPS_A_TURN):
                    start = time.process_time()
                    engine.train_step([batch])
                    if turn:  # the first turn allocates
                        times[name].append(time.process_time() - start)
        medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        groups = {name: len(engine._wrapped.optimizer.param_groups) for name, engine in engines.items()}
        shown = ", ".join(f"{name} ({groups[name]} groups) {value:.1f} ms" for name, value in medians.items())
        sys.stdout.write(f"ZeRO-{stage}: {shown}, +{medians['layer decay'] - medians['one rate']:.1f} ms\n")
        sys.stdout.flush()
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
