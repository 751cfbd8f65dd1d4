"""A training step on a GPU under PyTorch's own check: any call that makes the host wait raises."""

import pytest
import torch

from simmim_scale.config.schema import EngineConfig, ObjectiveConfig, OptimizerConfig, SwinV2Config
from simmim_scale.engine.engine import build_engine
from simmim_scale.engine.runtime import start_runtime
from simmim_scale.objectives.simmim import build_simmim

MODEL = SwinV2Config(image_size=(64, 64), window_size=4, embed_dim=32, depths=(2, 2), num_heads=(1, 2), drop_path=0.2)


@pytest.mark.gpu
def test_a_launched_step_never_makes_the_host_wait():
    runtime = start_runtime()
    engine = build_engine(
        lambda: build_simmim(MODEL, ObjectiveConfig(norm_target_window=7), mean=(0.4,) * 3, std=(0.2,) * 3, seed=0),
        engine=EngineConfig(zero_stage=2, precision="bf16"),
        optimizer=OptimizerConfig(),
        lr=lambda step: 1e-3,
        micro_batch=2,
        accumulation=2,
        global_batch=4,
        runtime=runtime,
    )
    batch = {
        "image": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, device=runtime.device),
        "mask": torch.rand(2, 8, 8, device=runtime.device) < 0.6,
        "flip": torch.tensor([True, False], device=runtime.device),
        "position": torch.tensor([3, 4], device=runtime.device),
    }
    first = engine.train_step([batch] * 2)  # tables, state and kernels are made here
    try:
        torch.cuda.set_sync_debug_mode("error")
        launched = [engine.launch_step([batch] * 2) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    results = [engine.finish_step(step) for step in launched]
    assert [result.step for result in results] == [2, 3, 4]
    assert not any(result.skipped for result in results)
    assert results[-1].loss < first.loss
    engine.destroy()
