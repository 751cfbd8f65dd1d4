"""Swin V1 and V2 against timm's on shared weights, where timm and the published code agree: sizes that divide."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from simmim_scale.bench.timm_step import names_of_timm
from simmim_scale.config.schema import SwinConfig, SwinV2Config
from simmim_scale.models import build_backbone

SIZES = {"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (2, 3, 4)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("size", "window"), [(64, 4), (96, 12), (64, 8)])
@pytest.mark.parametrize("kind", ["swin", "swin_v2"])
def test_loss_and_gradients_equal_timms(kind, size, window, dtype, generator):
    section, theirs = (SwinConfig, SwinTransformer) if kind == "swin" else (SwinV2Config, SwinTransformerV2)
    ours = build_backbone(section(image_size=size, window_size=window, **SIZES), seed=None)
    timm_model = theirs(img_size=size, window_size=window, num_classes=0, global_pool="", drop_path_rate=0.0, **SIZES)
    with torch.no_grad():
        for name, parameter in timm_model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (1.0 if "norm" in name else 0.0))
    ours.load_state_dict(names_of_timm(timm_model.state_dict()))
    ours, timm_model = ours.to(dtype), timm_model.to(dtype)
    image = torch.randn(2, 3, size, size, generator=generator, dtype=dtype)
    loss, their_loss = ours(image).pow(4).mean(), timm_model(image).pow(4).mean()
    loss.backward()
    their_loss.backward()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert abs(loss.item() - their_loss.item()) <= tolerance * abs(their_loss.item())
    wanted = names_of_timm({name: parameter.grad for name, parameter in timm_model.named_parameters()})
    assert set(wanted) == {name for name, _ in ours.named_parameters()}
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - wanted[name]).norm() <= tolerance * max(wanted[name].norm(), 1e-2 * largest), name
