"""Checkpointed blocks compute the same and keep names, hooks and types."""

import pytest
import torch
from torch import nn

from simmim_scale.engine.activation_checkpointing import apply_activation_checkpointing


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x, scale=None):
        self.calls += 1
        return x + torch.tanh(self.fc(x)) * (1 if scale is None else scale)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def checkpointable_blocks(self):
        return list(self.blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, torch.tensor(0.5))
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone()

    def forward(self, x):
        return self.backbone(x).square().sum()


def gradients(model, x):
    model(x).backward()
    return [parameter.grad for parameter in model.parameters()]


def test_the_same_gradients_bit_for_bit_with_the_forward_run_twice():
    x = torch.randn(4, 3)
    plain, checkpointed = Model(), Model()
    assert apply_activation_checkpointing(checkpointed, "block") == 2
    for expected, found in zip(gradients(plain, x), gradients(checkpointed, x), strict=True):
        assert torch.equal(expected, found)
    assert [block.calls for block in checkpointed.backbone.blocks] == [2, 2]
    assert list(checkpointed.state_dict()) == list(plain.state_dict())
    assert all(isinstance(block, Block) and type(block).__name__ == "Block" for block in checkpointed.backbone.blocks)


def test_hooks_of_a_block_run_in_the_recomputation_too():
    model = Model()
    apply_activation_checkpointing(model, "block")
    seen = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda *_: seen.append("gather"))
    gradients(model, torch.randn(4, 3))
    assert seen == ["gather", "gather"], "ZeRO-3 gathers the block's own parameters in these hooks"


def test_nothing_is_kept_or_repeated_without_gradients():
    model = Model()
    apply_activation_checkpointing(model, "block")
    with torch.no_grad():
        model(torch.randn(4, 3))
    assert [block.calls for block in model.backbone.blocks] == [1, 1]


def test_none_changes_nothing_and_a_backbone_without_blocks_is_an_error():
    model = Model()
    assert apply_activation_checkpointing(model, "none") == 0
    assert all(type(block) is Block for block in model.backbone.blocks)
    with pytest.raises(ValueError, match="needs a backbone with checkpointable_blocks"):
        apply_activation_checkpointing(nn.Linear(2, 2), "block")
