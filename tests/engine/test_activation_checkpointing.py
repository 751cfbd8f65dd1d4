"""Checkpointed blocks compute the same and keep names, hooks and types."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simmim_scale.config.schema import IMAGENET_MEAN, IMAGENET_STD, ObjectiveConfig, SwinV2Config
from simmim_scale.engine.activation_checkpointing import _linear_as_zero3, apply_activation_checkpointing
from simmim_scale.objectives.simmim import build_simmim


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


POLICIES = ("block", "stage", "selective", "offload")
BACKENDS = ("torch", "torch_reentrant", "fairscale")  # deepspeed needs a process group: tests/multiprocess/test_policies.py


def simmim(policy="none", backend="torch"):
    """A tiny SwinV2 with drop path and main-branch norms under the reconstruction loss: (loss, gradients, multiply-adds)."""
    config = SwinV2Config(
        image_size=32, embed_dim=8, depths=(1, 1, 2), num_heads=(1, 1, 2), window_size=4, drop_path=0.4, extra_norm_period=1
    )
    module = build_simmim(config, ObjectiveConfig(), mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0).train()
    apply_activation_checkpointing(module, policy, backend)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randint(0, 255, (4, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "mask": torch.rand(4, 2, 2, generator=generator) < 0.5,
        "position": torch.arange(4),
        "flip": torch.tensor([True, False, True, False]),
    }
    with FlopCounterMode(display=False) as counter:
        loss = module(batch)["loss"]
        loss.backward()
    return loss, [parameter.grad for parameter in module.parameters()], counter.get_total_flops() // 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_of_every_back_end_gives_the_same_bits(policy, backend):
    if policy == "selective" and backend != "torch":
        with pytest.raises(ValueError, match=f"checkpointing_backend: {backend} cannot keep a part of a block.*Choose torch"):
            simmim(policy, backend)
        return
    (loss, gradients, _), (expected, wanted, _) = simmim(policy, backend), simmim()
    assert torch.equal(loss, expected)
    assert all(torch.equal(found, gradient) for found, gradient in zip(gradients, wanted, strict=True))


def test_policies_differ_in_what_they_compute_again():
    work = {policy: simmim(policy)[2] for policy in ("none", *POLICIES)}
    # Our attention on a CPU is an op of its own, which nobody counts: selective computes nothing else again that is a product.
    assert work["none"] == work["selective"] < work["stage"] < work["block"]
    assert work["offload"] == work["block"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(2, 3, 3), (18,)], ids=["image", "matrix"])
def test_a_linear_map_that_the_policy_sees_has_the_bits_of_zero_3s(tokens, bias, generator):
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    shapes = [(*tokens, 704), (96, 704), *([(96,)] if bias else [])]  # from 352 on F.linear differs
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    grad = torch.randn(*tokens, 96, generator=generator)
    results = []
    for linear in (zero3_linear_wrap, _linear_as_zero3):
        out = linear(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_backbone_without_stages_says_what_it_lacks():
    with pytest.raises(ValueError, match=r"'stage' needs a backbone with checkpointable_stages\(\), which Backbone lacks"):
        apply_activation_checkpointing(Model(), "stage")


def test_a_missing_fairscale_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairscale.nn.checkpoint", None)
    with pytest.raises(ValueError, match=r"fairscale needs pip install 'simmim-scale\[fairscale\]'"):
        apply_activation_checkpointing(Model(), "block", "fairscale")
