"""Swin V1 and V2 against an independent float64 computation of the published formulas, written out here, loss and every gradient.

The computation reads a state dict and knows nothing of our modules: roll, partition, slice-built mask, padding before the shift.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from simmim_scale.config.schema import SwinConfig, SwinV2Config
from simmim_scale.models import build_backbone

SMALL = {"embed_dim": 12, "depths": (2, 2), "num_heads": (3, 4)}
V2_CASES = {
    "divides": SwinV2Config(image_size=(32, 32), window_size=4, **SMALL),
    "one window in the last stage": SwinV2Config(image_size=(32, 32), window_size=8, **SMALL),
    "padded": SwinV2Config(image_size=(44, 28), window_size=4, **SMALL),
    "odd everywhere": SwinV2Config(image_size=(37, 51), window_size=3, **SMALL),
    "window smaller on one axis": SwinV2Config(image_size=(16, 48), window_size=6, **SMALL),
    "pre-trained windows": SwinV2Config(image_size=(56, 56), window_size=7, pretrained_window_sizes=(6, 3), **SMALL),
    "extra norm": SwinV2Config(image_size=(32, 32), window_size=4, extra_norm_period=2, **SMALL),
    "no qkv bias": SwinV2Config(image_size=(32, 32), window_size=4, qkv_bias=False, in_chans=1, **SMALL),
}
V1_CASES = {
    "divides": SwinConfig(image_size=(32, 32), window_size=4, **SMALL),
    "one window in the last stage": SwinConfig(image_size=(32, 32), window_size=8, **SMALL),
    "padded": SwinConfig(image_size=(44, 28), window_size=4, **SMALL),
    "odd everywhere": SwinConfig(image_size=(37, 51), window_size=3, **SMALL),
    "window smaller on one axis": SwinConfig(image_size=(16, 48), window_size=6, **SMALL),
    "no qkv bias": SwinConfig(image_size=(32, 32), window_size=4, qkv_bias=False, in_chans=5, **SMALL),
}


def published_mask(height, width, window, shift):
    """The mask of the published code: number the nine slices of the rolled image, compare tokens of each window."""
    image = torch.zeros(height, width)
    slices = [
        (slice(0, -size), slice(-size, -moved), slice(-moved, None)) if moved else (slice(None),)
        for size, moved in zip(window, shift, strict=True)
    ]
    number = 0
    for rows in slices[0]:
        for columns in slices[1]:
            image[rows, columns] = number
            number += 1
    cut = image.unfold(0, window[0], window[0]).unfold(1, window[1], window[1]).reshape(-1, window[0] * window[1])
    return (cut[:, None, :] != cut[:, :, None]).double() * -100.0


def position_bias(state, prefix, config, stage, window):
    offsets = [
        (a - c, b - d) for a in range(window[0]) for b in range(window[1]) for c in range(window[0]) for d in range(window[1])
    ]
    tokens = window[0] * window[1]
    if config.name == "swin":
        sides = [math.ceil(math.ceil(side / 4) / 2**stage) for side in config.image_size]
        full = [min(side, config.window_size) for side in sides]
        rows = torch.tensor([(dy + full[0] - 1) * (2 * full[1] - 1) + dx + full[1] - 1 for dy, dx in offsets])
        return state[prefix + "relative_position_bias_table"][rows].reshape(tokens, tokens, -1).permute(2, 0, 1)
    reference = (config.pretrained_window_sizes[stage],) * 2 if config.pretrained_window_sizes else window

    # In fp32, as the published code computes this table; the MLP then runs in the model's precision.
    scaled = 8 * torch.tensor(offsets, dtype=torch.float32) / (torch.tensor(reference, dtype=torch.float32) - 1)
    inputs = (scaled.sign() * torch.log2(scaled.abs() + 1) / math.log2(8)).double()
    hidden = F.relu(inputs @ state[prefix + "cpb_mlp.0.weight"].T + state[prefix + "cpb_mlp.0.bias"])
    return 16 * torch.sigmoid(hidden @ state[prefix + "cpb_mlp.2.weight"].T).reshape(tokens, tokens, -1).permute(2, 0, 1)


def attention(x, state, prefix, config, stage, shifted):
    batch, height, width, channels = x.shape
    limit = config.window_size
    window = (min(height, limit), min(width, limit))
    shift = tuple(limit // 2 if shifted and side > limit else 0 for side in (height, width))
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    padded_height, padded_width = x.shape[1:3]
    x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    heads, tokens = config.num_heads[stage], window[0] * window[1]
    x = x.unfold(1, window[0], window[0]).unfold(2, window[1], window[1]).permute(0, 1, 2, 4, 5, 3).reshape(-1, tokens, channels)
    qkv = x @ state[prefix + "qkv.weight"].T
    if config.name == "swin":
        qkv = qkv + state.get(prefix + "qkv.bias", 0)
    elif config.qkv_bias:
        bias = state[prefix + "qkv.q_bias"], torch.zeros(channels, dtype=x.dtype), state[prefix + "qkv.v_bias"]
        qkv = qkv + torch.cat(bias)
    q, k, v = qkv.reshape(-1, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    if config.name == "swin":
        logits = q @ k.mT / math.sqrt(channels // heads)
    else:
        scale = state[prefix + "logit_scale"].clamp(max=math.log(1 / 0.01)).exp()
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale
    logits = logits + position_bias(state, prefix, config, stage, window)
    mask = published_mask(padded_height, padded_width, window, shift)
    logits = (logits.unflatten(0, (batch, -1)) + mask[None, :, None]).flatten(0, 1)
    x = (logits.softmax(-1) @ v).transpose(1, 2).reshape(-1, tokens, channels)
    x = x @ state[prefix + "proj.weight"].T + state[prefix + "proj.bias"]
    x = x.reshape(batch, padded_height // window[0], padded_width // window[1], *window, channels).transpose(2, 3)
    x = torch.roll(x.reshape(batch, padded_height, padded_width, channels), shift, (1, 2))
    return x[:, :height, :width]


def forward(image, state, config, scales):
    """Final-normed tokens of the last stage."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"])

    def mlp(x, name):
        x = F.gelu(x @ state[name + ".fc1.weight"].T + state[name + ".fc1.bias"])
        return x @ state[name + ".fc2.weight"].T + state[name + ".fc2.bias"]

    image = F.pad(image, (0, -image.shape[3] % 4, 0, -image.shape[2] % 4))
    x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = norm(x.permute(0, 2, 3, 1), "patch_embed.norm")
    branch = iter(scales[:, :, None, None, None])
    for stage, depth in enumerate(config.depths):
        for number in range(depth):
            name = f"layers.{stage}.blocks.{number}"
            if config.name == "swin":
                x = x + next(branch) * attention(norm(x, name + ".norm1"), state, name + ".attn.", config, stage, number % 2 == 1)
                x = x + next(branch) * mlp(norm(x, name + ".norm2"), name + ".mlp")
            else:
                x = x + next(branch) * norm(attention(x, state, name + ".attn.", config, stage, number % 2 == 1), name + ".norm1")
                x = x + next(branch) * norm(mlp(x, name + ".mlp"), name + ".norm2")
                if config.extra_norm_period and (number + 1) % config.extra_norm_period == 0:
                    x = norm(x, name + ".norm3")
        if stage < len(config.depths) - 1:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            name = f"layers.{stage}.downsample"
            if config.name == "swin":
                x = norm(x, name + ".norm") @ state[name + ".reduction.weight"].T
            else:
                x = norm(x @ state[name + ".reduction.weight"].T, name + ".norm")
    return norm(x, "norm")


def randomised(config, generator, spread=0.2, top_scale=5.0):
    """A backbone in float64 whose every parameter matters: nothing is 0, 1 or constant. Scales above ln 100 = 4.6 are clamped."""
    backbone = build_backbone(config, seed=None).double()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") or (".norm" in name and name.endswith("weight")) else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if name.endswith("logit_scale"):
                parameter.copy_(torch.linspace(1.0, top_scale, parameter.numel()).reshape(parameter.shape))
    return backbone


CASES = [pytest.param(config, id=f"{config.name}, {name}") for cases in (V2_CASES, V1_CASES) for name, config in cases.items()]


@pytest.mark.parametrize("config", CASES)
def test_loss_and_every_gradient_equal_the_published_formulas(config, generator):
    backbone = randomised(config, generator)
    image = torch.randn(2, config.in_chans, *config.image_size, generator=generator, dtype=torch.float64, requires_grad=True)
    scales = torch.rand(backbone.num_drop_paths, 2, generator=generator, dtype=torch.float64) + 0.5
    ours = backbone.encode(backbone.embed(image), scales)
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    names = dict(backbone.named_parameters())
    inputs = [image, *names.values()]
    gradients = torch.autograd.grad((ours * weights).sum(), inputs)

    state = {name: parameter.detach().clone().requires_grad_() for name, parameter in names.items()}
    twin = image.detach().clone().requires_grad_()
    expected = forward(twin, state, config, scales)
    wanted = torch.autograd.grad((expected * weights).sum(), [twin, *state.values()])

    # Not tighter, since the rounding of the fp32 table of log-spaced coordinates may differ by one unit between processors.
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    for name, got, want in zip(["image", *names], gradients, wanted, strict=True):
        assert (got - want).abs().max() <= 1e-6 * max(want.abs().max(), 1e-3), name


@pytest.mark.parametrize("config", [V2_CASES["padded"], V1_CASES["padded"]], ids=["swin_v2", "swin"])
def test_single_precision_stays_within_1e_5(config, generator):
    # Trained-like magnitudes: with the larger ones above, float64 itself would be needed to tell an error from rounding.
    backbone = randomised(config, generator, spread=0.05, top_scale=3.0)
    image = torch.randn(2, 3, *config.image_size, generator=generator, dtype=torch.float64)
    scales = torch.ones(backbone.num_drop_paths, 2, dtype=torch.float64)
    state = {name: parameter.detach().clone().requires_grad_() for name, parameter in backbone.named_parameters()}
    loss = forward(image, state, config, scales).square().mean()
    wanted = torch.autograd.grad(loss, list(state.values()))
    backbone.float()
    ours = backbone(image.float()).square().mean()
    gradients = torch.autograd.grad(ours, list(backbone.parameters()))
    assert abs(ours.item() - loss.item()) <= 1e-5 * abs(loss.item())
    # Per parameter and relative to the largest gradient of its kind in the model: single values may be sums that cancel.
    largest = max(gradient.norm() for gradient in wanted)
    for name, got, want in zip(state, gradients, wanted, strict=True):
        assert (got - want).norm() <= 1e-5 * max(want.norm(), 1e-2 * largest), name
