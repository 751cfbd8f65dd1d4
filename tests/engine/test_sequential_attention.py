"""Attention of the early stages in turn: which blocks, the same training, and where it cannot be."""

import pytest
import torch
from torch import nn

from simmim_scale.config.load import load_config
from simmim_scale.config.schema import EngineConfig, SwinConfig, SwinV2Config
from simmim_scale.engine.activation_checkpointing import apply_activation_checkpointing
from simmim_scale.engine.sequential_attention import apply_sequential_attention
from simmim_scale.models import build_backbone

SIZES = {"image_size": 64, "embed_dim": 8, "depths": (2, 1, 2), "num_heads": (1, 2, 2), "window_size": 4}


def model(config):
    module = nn.Module()
    module.backbone = build_backbone(config, attention="reference", seed=0)
    return module.train()


def trained(module, generator):
    image = torch.randn(2, 3, 64, 64, generator=generator)
    output = module.backbone(image)
    output.square().sum().backward()
    return output, {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("policy", ["none", "block", "stage", "selective"])
@pytest.mark.parametrize("config", [SwinConfig(**SIZES), SwinV2Config(**SIZES)], ids=["swin", "swin_v2"])
def test_the_first_two_stages_train_the_same(config, policy):
    plain, turns = model(config), model(config)
    assert apply_sequential_attention(plain, 0) == 0
    assert apply_sequential_attention(turns, 1) == 3
    assert [block.attn.rows_at_once for block in turns.backbone.checkpointable_blocks()] == [1, 1, 1, 0, 0]
    apply_activation_checkpointing(turns, policy)
    expected, wanted = trained(plain, torch.Generator().manual_seed(0))
    output, gradients = trained(turns, torch.Generator().manual_seed(0))
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * wanted[name].abs().max().item(), msg=name)


def test_a_backbone_without_windows_is_an_error():
    with pytest.raises(
        ValueError, match=r"sequential_attention: needs a backbone with attention in windows, which Linear has not"
    ):
        apply_sequential_attention(nn.Linear(2, 2), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model={name: resnet}"], r"engine.sequential_attention: for attention in windows \(swin, swin_v2\), got 2 for resnet"),
        (["kernels.window_attention=triton"], "Triton's window attention holds no n x n matrix, so there is nothing to spare"),
        (["engine.compile=block"], "torch.compile cannot follow, got 2 with compile=block. Set engine.sequential_attention=0"),
        (["engine.sequential_attention=-1"], "sequential_attention"),
    ],
)
def test_what_it_does_not_go_with_is_said_before_anything_starts(repository, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(repository / "configs/debug/tiny_swinv2.yaml", ["engine.sequential_attention=2", *overrides])


def test_off_by_default():
    assert EngineConfig().sequential_attention == 0
