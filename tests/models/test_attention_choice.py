"""A model is the same whichever implementation of window attention runs: loss and gradients, with and without checkpointing."""

import copy

import pytest
import torch

from simmim_scale.config.schema import SwinConfig, SwinV2Config
from simmim_scale.engine.activation_checkpointing import apply_activation_checkpointing
from simmim_scale.models import build_backbone

SIZES = {"embed_dim": 32, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4, "image_size": 64}


class Module(torch.nn.Module):
    """What activation checkpointing looks for: a module with a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def gradients(state, section, attention, policy):
    backbone = build_backbone(section(**SIZES), attention=attention)
    backbone.load_state_dict(state)
    apply_activation_checkpointing(Module(backbone), policy)
    image = torch.rand(2, 3, 72, 64, generator=torch.Generator().manual_seed(0))  # 18x16 tokens: padded to the window
    loss = backbone(image).square().mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in backbone.named_parameters()}


@pytest.mark.parametrize("policy", ["none", "block"])
@pytest.mark.parametrize("name", ["cpu", "sdpa"])
@pytest.mark.parametrize("section", [SwinConfig, SwinV2Config])
def test_loss_and_gradients_do_not_depend_on_the_implementation(section, name, policy):
    backbone = build_backbone(section(**SIZES))
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            if "norm" in key and key.endswith("weight"):
                parameter.fill_(1.0)  # V2's residual norms start at 0 and would hide the branches
    state = copy.deepcopy(backbone.state_dict())
    loss, expected = gradients(state, section, "reference", "none")
    ours, got = gradients(state, section, name, policy)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    for key, gradient in expected.items():
        assert (got[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key
