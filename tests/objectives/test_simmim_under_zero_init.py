"""SimMIM built, loaded and compared while ZeRO-3 holds its parameters in pieces. A process of its own: DeepSpeed is global."""

import subprocess
import sys

UNDER_ZERO = """
import torch
from simmim_scale.engine.runtime import leave, start_runtime

runtime = start_runtime(device="cpu")
import deepspeed
from simmim_scale.config.schema import ObjectiveConfig, SwinV2Config
from simmim_scale.models.weights import compare_state, load_into
from simmim_scale.objectives.simmim import build_simmim

torch.set_num_threads(1)
model = SwinV2Config(image_size=64, window_size=4, embed_dim=16, depths=(1, 2), num_heads=(2, 4))
build = lambda seed: build_simmim(model, ObjectiveConfig(norm_target_window=7), mean=(.5, .4, .3), std=(.2, .2, .3), seed=seed)


def same(sharded, expected):
    for name, parameter in sharded.named_parameters():
        assert parameter.numel() == 0, name
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter.data, expected[name].to(parameter.dtype)), name


for bf16 in (False, True):
    settings = {"train_batch_size": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": bf16}}
    with deepspeed.zero.Init(config_dict_or_path=settings):
        sharded = build(7)
    same(sharded, build(7).state_dict())
    other = build(8).state_dict()
    assert compare_state(sharded, other).fits
    load_into(sharded, other, source="here")
    same(sharded, other)
    other["mask_token.token"] = torch.zeros(15)
    try:
        load_into(sharded, other, source="here")
    except ValueError as error:
        assert "mask_token.token (file (15,), model (16,))" in str(error)
    else:
        raise AssertionError("a wrong shape was accepted")
    plain = build(9).state_dict()
    with deepspeed.zero.Init(config_dict_or_path=settings):  # as init_from does it
        module = build(7)
        load_into(module, plain, source="here")
    same(module, plain)
runtime.close()
leave(0)
"""


def test_simmim_is_built_and_loaded_the_same_when_partitioned(repository):
    command = [sys.executable, "-c", UNDER_ZERO]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
