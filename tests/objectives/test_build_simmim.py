"""SimMIM built from configuration sections, around the real backbones."""

import math

import pytest
import torch
from torch import nn

from simmim_scale.config.schema import CustomModelConfig, ObjectiveConfig, SwinConfig, SwinV2Config
from simmim_scale.objectives.simmim import build_simmim

SIZES = {"image_size": 64, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4, "drop_path": 0.2}
GREY = {"mean": (0.5,), "std": (0.25,)}
COLOUR = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}


@pytest.mark.parametrize("model", [SwinConfig(**SIZES), SwinV2Config(**SIZES, extra_norm_period=2)], ids=["swin", "swin_v2"])
def test_a_step_of_training_lowers_the_loss_of_its_own_batch(model, generator):
    module = build_simmim(model, ObjectiveConfig(norm_target_window=7), **COLOUR, seed=0)
    batch = {
        "image": torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "mask": torch.rand(4, 4, 4, generator=generator) < 0.6,
        "position": torch.arange(4),
        "flip": torch.tensor([True, False, False, True]),
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = module(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_the_seed_alone_decides_every_parameter():
    build = lambda seed: build_simmim(SwinV2Config(**SIZES), ObjectiveConfig(), **COLOUR, seed=seed).state_dict()  # noqa: E731
    torch.manual_seed(1)
    first = build(3)
    torch.manual_seed(2)
    second, other = build(3), build(4)
    assert all(torch.isfinite(value).all() for value in first.values())
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["head.proj.weight"], other["head.proj.weight"])
    assert not torch.equal(first["backbone.patch_embed.proj.weight"], other["backbone.patch_embed.proj.weight"])


def test_in_chans_reach_embedding_head_and_target():
    module = build_simmim(SwinConfig(**SIZES, in_chans=1), ObjectiveConfig(), **GREY, seed=0).eval()
    parts = module({"image": torch.zeros(1, 1, 64, 64), "mask": torch.ones(1, 2, 2, dtype=torch.bool)})
    assert parts["prediction"].shape == (1, 1, 64, 64)


class OwnBackbone(nn.Module):
    """The least that SimMIM needs; draws its weights from the global generator."""

    def __init__(self, image_size, patch_size, in_chans, width):
        super().__init__()
        self.stride, self.patch_size, self.embed_dim, self.num_features = patch_size, patch_size, width, width
        self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)

    def embed(self, image):
        return self.proj(image).permute(0, 2, 3, 1)

    def encode(self, tokens, drop_path=None):
        return tokens


def test_a_backbone_of_ones_own_needs_only_the_contract(monkeypatch):
    monkeypatch.setattr(math, "own_backbone", OwnBackbone, raising=False)
    config = CustomModelConfig(name="math:own_backbone", image_size=32, patch_size=8, options={"width": 5})
    module, again = (build_simmim(config, ObjectiveConfig(), **COLOUR, seed=1) for _ in range(2))
    batch = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "mask": torch.ones(2, 4, 4, dtype=torch.bool)}
    assert torch.isfinite(module(batch)["loss"])
    assert torch.equal(module.backbone.proj.weight, again.backbone.proj.weight)


def test_a_backbone_that_lacks_the_contract_is_named(monkeypatch):
    monkeypatch.setattr(math, "not_a_backbone", lambda **_: nn.Linear(2, 2), raising=False)
    with pytest.raises(ValueError, match="without embed, encode, stride"):
        build_simmim(CustomModelConfig(name="math:not_a_backbone"), ObjectiveConfig(), **COLOUR, seed=0)


def test_mean_of_another_length_than_the_channels_is_refused():
    with pytest.raises(ValueError, match="one value per input channel"):
        build_simmim(SwinV2Config(**SIZES), ObjectiveConfig(), **GREY, seed=0)
