"""Initial weights: every parameter is set, by the published rule, to the same bits for a seed; also under zero.Init."""

import math
import subprocess
import sys

import pytest
import torch

from simmim_scale.config.schema import ResNetConfig, SwinConfig, SwinV2Config, ViTConfig
from simmim_scale.models import build_backbone

SIZES = {"image_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
CONFIGS = {
    "swin": SwinConfig(**SIZES),
    "swin_v2": SwinV2Config(**SIZES),
    "swin_v2 with extra norms": SwinV2Config(**SIZES, extra_norm_period=2, qkv_bias=False),
    "resnet": ResNetConfig(image_size=64, depths=(1, 2), width=1),
    "vit": ViTConfig(image_size=64, embed_dim=16, depth=2, num_heads=2),
    "vit with a bias per block": ViTConfig(image_size=64, embed_dim=16, depth=2, num_heads=2, position_bias="per_block"),
}


@pytest.fixture(params=CONFIGS, ids=str)
def config(request):
    return CONFIGS[request.param]


def test_a_fresh_backbone_is_nan_and_init_weights_sets_every_parameter(config, generator):
    backbone = build_backbone(config, seed=None)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(float("nan"))
    backbone.init_weights(generator)
    assert [name for name, parameter in backbone.named_parameters() if not parameter.isfinite().all()] == []


def test_construction_draws_nothing(config):
    state = torch.get_rng_state()
    backbone = build_backbone(config, seed=None)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [name for name, parameter in backbone.named_parameters() if "norm" not in name and parameter.isfinite().any()]
    assert drawn == []


def test_values_follow_the_published_rule():
    for name, parameter in build_backbone(SwinV2Config(**SIZES, extra_norm_period=2), seed=3).named_parameters():
        kind = name.rsplit(".", 2)
        if name.endswith("logit_scale"):
            assert torch.all(parameter == math.log(10.0))
        elif name.startswith("patch_embed.proj"):
            assert parameter.abs().max() <= 1 / math.sqrt(48)
            assert parameter.std() > 0.05
        elif kind[-2] in ("norm1", "norm2") or kind[-1].endswith("bias"):
            assert torch.all(parameter == 0), name
        elif "norm" in kind[-2]:
            assert torch.all(parameter == 1), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
    v1 = dict(build_backbone(SwinConfig(**SIZES), seed=3).named_parameters())
    assert torch.all(v1["layers.0.blocks.0.norm1.weight"] == 1)
    assert v1["layers.0.blocks.0.attn.relative_position_bias_table"].std().item() == pytest.approx(0.02, rel=0.25)


def test_a_seed_fixes_the_bits(config):
    first, second, other = (build_backbone(config, seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_no_buffer_reaches_a_checkpoint(config):
    backbone = build_backbone(config)
    backbone(torch.zeros(1, 3, 64, 64))
    kept = {name for name in backbone.state_dict() if not name.endswith((".running_mean", ".running_var"))}
    assert kept == {name for name, _ in backbone.named_parameters()}


UNDER_ZERO = """
import torch
from simmim_scale.engine.runtime import leave, start_runtime

runtime = start_runtime(device="cpu")
import deepspeed
from simmim_scale.config.schema import SwinConfig, SwinV2Config
from simmim_scale.models import build_backbone
from simmim_scale.models.complexity import count_parameters

torch.set_num_threads(1)
settings = dict(image_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4))
for config in (SwinConfig(**settings), SwinV2Config(**settings, extra_norm_period=2)):
    for dtype in (torch.float32, torch.bfloat16):
        plain = build_backbone(config, seed=7)
        settings_of_engine = {
            "train_batch_size": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": dtype == torch.bfloat16}
        }
        with deepspeed.zero.Init(config_dict_or_path=settings_of_engine):
            sharded = build_backbone(config, seed=7)
        assert count_parameters(sharded) == count_parameters(plain)
        pairs = list(zip(plain.named_parameters(), sharded.named_parameters(), strict=True))
        for (name, expected), (other, parameter) in pairs:
            assert name == other and parameter.numel() == 0, name
            with deepspeed.zero.GatheredParameters([parameter]):
                assert parameter.dtype == dtype
                assert torch.equal(parameter.data, expected.data.to(dtype)), name
        assert not list(plain.buffers()) and not list(sharded.buffers())
        # The tables that take the place of buffers keep their type too.
        probe = plain.layers[0].blocks[0].attn
        sharded_tables = sharded.layers[0].blocks[0].attn._tables
        for table in ("index", "coordinates"):
            arguments = ((4, 4), (4, 4), torch.device("cpu"))
            ours, theirs = getattr(probe._tables, table)(*arguments), getattr(sharded_tables, table)(*arguments)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
runtime.close()
leave(0)
"""


def test_zero_init_equals_plain_construction(repository):
    command = [sys.executable, "-c", UNDER_ZERO]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
