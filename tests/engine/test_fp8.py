"""fp8 by torchao: what is converted, what is refused and why; products emulated on the CPU."""

import pytest
import torch
from torch import nn

from simmim_scale.config.schema import EngineConfig
from simmim_scale.engine.fp8 import convert_to_fp8, require_fp8

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.small = nn.Linear(512, 640), nn.Linear(640, 512), nn.Linear(512, 12)

    def forward(self, x):
        return self.fc2(self.fc1(x)) + self.small(x).mean()


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def make(block: nn.Module) -> nn.Module:
    model, model.backbone = nn.Module(), nn.Module()
    model.backbone.block, model.head = block, nn.Linear(512, 512)
    model.backbone.checkpointable_blocks = lambda: [block]
    return model


def test_large_maps_of_blocks_are_converted_and_stay_near_their_bf16_results():
    pytest.importorskip("torchao")
    model = make(Block()).bfloat16()
    x = torch.randn(64, 512, dtype=torch.bfloat16)
    names, before = list(model.state_dict()), model.backbone.block(x).detach().double()
    assert convert_to_fp8(model, "rowwise_with_gw_hp", emulate=True) == ["backbone.block.fc1", "backbone.block.fc2"]
    assert list(model.state_dict()) == names
    after = model.backbone.block(x)
    after.square().mean().backward()
    error = float((after.detach().double() - before).norm() / before.norm())
    assert 1e-3 < error < 0.1  # it is fp8, and it is not noise
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


def test_nothing_to_convert_is_an_error():
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=r"engine\.fp8: no linear map in the backbone's blocks has 512 channels"):
        convert_to_fp8(make(OwnForward(512, 512)), "tensorwise", emulate=True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"precision": "fp32"}, "belongs to engine.precision bf16, got fp32"),
        ({"zero_stage": 3}, "the whole model on each GPU. Set engine.zero_stage=1 or 2"),
        ({"zero_stage": 1}, "this CPU has no fp8 arithmetic"),
    ],
)
def test_refusals_say_what_to_do(settings, reason):
    with pytest.raises(ValueError, match=r"engine\.fp8: rowwise was asked for, but") as caught:
        require_fp8(EngineConfig(fp8="rowwise", **settings), CPU)
    assert reason in str(caught.value)


def test_not_asking_is_fine_anywhere():
    require_fp8(EngineConfig(), CPU)
    assert convert_to_fp8(nn.Linear(2, 2), "none") == []
