"""S table 1: parameters to the printed rounding and multiply-adds within 0.5 %, without memory or arithmetic (meta device)."""

import pytest
import torch

from simmim_scale.config.schema import SwinConfig, SwinV2Config
from simmim_scale.models import build_backbone
from simmim_scale.models.complexity import count_parameters, multiply_adds

SWIN_B = {"embed_dim": 128, "num_heads": (4, 8, 16, 32)}
SWIN_L = {"embed_dim": 192, "num_heads": (6, 12, 24, 48)}
SWIN_V2_H = {"embed_dim": 352, "num_heads": (11, 22, 44, 88)}
SWIN_V2_G = {"embed_dim": 512, "num_heads": (16, 32, 64, 128), "depths": (2, 2, 42, 4)}

# section, sizes, (pixels, window), parameters with a 1000-class head in millions as printed, multiply-adds in units of 1e9
TABLE_1 = [
    (SwinConfig, SWIN_B, (192, 6), 88, 11.3),
    (SwinConfig, SWIN_B, (224, 7), 88, 15.4),
    (SwinConfig, SWIN_L, (192, 12), 197, 26.0),
    (SwinConfig, SWIN_L, (224, 14), 197, 35.8),
    (SwinV2Config, SWIN_V2_H, (192, 12), 658, 86.2),
    (SwinV2Config, SWIN_V2_H, (224, 14), 658, 118.1),
]


def on_meta(section, sizes, pixels, window, **more):
    with torch.device("meta"):
        return build_backbone(section(image_size=pixels, window_size=window, **sizes, **more))


@pytest.mark.parametrize(("section", "sizes", "view", "millions", "giga"), TABLE_1)
def test_table_1(section, sizes, view, millions, giga):
    backbone = on_meta(section, sizes, *view)
    with_head = count_parameters(backbone) + 1000 * (backbone.num_features + 1)
    assert round(with_head / 1e6) == millions
    assert multiply_adds(backbone, (view[0], view[0])) == pytest.approx(giga * 1e9, rel=0.005)


def test_exact_counts_of_the_supplement():
    assert count_parameters(on_meta(SwinConfig, SWIN_B, 192, 6)) + 1000 * 1025 == pytest.approx(87.75e6, abs=5e3)
    assert count_parameters(on_meta(SwinConfig, SWIN_L, 192, 12)) + 1000 * 1537 == pytest.approx(196.7e6, abs=5e4)
    assert count_parameters(on_meta(SwinV2Config, SWIN_V2_H, 192, 12)) == pytest.approx(655.2e6, abs=5e4)


def test_swin_v2_g_has_three_billion():
    backbone = on_meta(SwinV2Config, SWIN_V2_G, 192, 12, extra_norm_period=6)
    assert count_parameters(backbone) == pytest.approx(3.0e9, rel=0.02)


def test_counting_leaves_the_model_as_it_was():
    backbone = build_backbone(SwinV2Config(image_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.train()
    assert multiply_adds(backbone, (64, 96)) > multiply_adds(backbone, (64, 64)) > 0
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
