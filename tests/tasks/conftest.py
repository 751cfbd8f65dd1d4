"""Published checkpoints in small: timm's Swins, whose tensors are renamed here by hand to the published names."""

import math

import pytest
import timm
import torch
from torch import Tensor

SIZES = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}


def coordinates(window: int, pretrained: int) -> Tensor:
    """The published buffer: (1, 2w - 1, 2w - 1, 2), sign(c) log2(1 + |8 c / (w_pre - 1)|) / 3."""
    axis = torch.arange(-(window - 1), window, dtype=torch.float32) * 8 / (pretrained - 1)
    axis = axis.sign() * (axis.abs() + 1).log2() / math.log2(8)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)[None]


def published_buffers(*, version: int, sides: tuple[int, ...], window: int, pretrained: tuple[int, ...], depth: int) -> dict:
    buffers = {}
    for stage, side in enumerate(sides):
        w = min(window, side)
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            buffers[f"{prefix}.attn.relative_position_index"] = torch.zeros(w * w, w * w, dtype=torch.int64)
            if version == 2:
                buffers[f"{prefix}.attn.relative_coords_table"] = coordinates(w, pretrained[stage] or w)
            if block % 2 == 1 and side > window:
                buffers[f"{prefix}.attn_mask"] = torch.zeros((side // w) ** 2, w * w, w * w)
    return buffers


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names -> published names: merging belongs to the stage before it, and the head has no `fc`."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        renamed[".".join(parts).replace("head.fc.", "head.")] = value
    return renamed


@pytest.fixture
def published():
    """published(version, ...) -> (timm model in eval mode with random weights, checkpoint dictionary)."""

    def make(version: int, *, window: int = 4, pretrained: tuple[int, ...] = (0, 0), in_chans: int = 3, buffers: bool = True):
        torch.manual_seed(version)
        if version == 1:
            model = timm.models.swin_transformer.SwinTransformer(**SIZES, window_size=window, in_chans=in_chans)
        else:
            model = timm.models.swin_transformer_v2.SwinTransformerV2(
                **SIZES, window_size=window, in_chans=in_chans, pretrained_window_sizes=pretrained
            )
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
        state = published_names(model.state_dict())
        if buffers:
            state |= published_buffers(version=version, sides=(16, 8), window=window, pretrained=pretrained, depth=2)
        return model.eval(), {"model": state, "max_accuracy": 81.5, "epoch": 99, "optimizer": {"state": {}, "param_groups": []}}

    return make


@pytest.fixture
def published_pretraining(published):
    """A SimMIM pre-training checkpoint: encoder.*, mask token and decoder."""

    def make(version: int, **options) -> dict:
        _, checkpoint = published(version, **options)
        backbone = {name: value for name, value in checkpoint["model"].items() if not name.startswith("head.")}
        state = {f"encoder.{name}": value for name, value in backbone.items()}
        in_chans = options.get("in_chans", 3)
        generator = torch.Generator().manual_seed(7)
        state["encoder.mask_token"] = torch.randn(1, 1, 16, generator=generator)
        state["decoder.0.weight"] = torch.randn(8 * 8 * in_chans, 32, 1, 1, generator=generator)
        state["decoder.0.bias"] = torch.randn(8 * 8 * in_chans, generator=generator)
        return {**checkpoint, "model": state}

    return make
