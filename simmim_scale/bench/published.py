"""SimMIM on Swin as the published repositories compute it, written anew in plain PyTorch: what `simmim bench step` compares with.

Tokens are rolled and cut into windows in memory, every logit gets an explicit mask, softmax is taken over whole tensors, the head
predicts every pixel, the loss looks at every pixel, and the normalised target comes from 47x47 poolings. The parameters are ours,
under our names, so that both sides compute the same loss. 16-bit runs are autocast over fp32 parameters, as published.
Letters: b batch, h w tokens per axis, n tokens of one window, c channels.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from simmim_scale.config.schema import Config, SwinBaseConfig, SwinConfig, SwinV2Config
from simmim_scale.models.windows import log_coordinates, relative_index

VARIANCE_EPSILON, LOSS_EPSILON = 1e-6, 1e-5


class PublishedSimMIM(nn.Module):
    """A module that trains: `module(image, mask)` is the loss.

    Args:
        config: the run; model and objective are read.
        state: parameters by the names of `objectives/simmim.py`, on any device.
        checkpointed: recompute each block in backward, as the published option USE_CHECKPOINT.
    Raises:
        ValueError: a model that the published code does not have, or sizes that need the padding it does not have.
    """

    def __init__(self, config: Config, state: Mapping[str, Tensor], *, checkpointed: bool = False) -> None:
        super().__init__()
        check_published(config)
        self.config, self.objective, self.checkpointed = config.model, config.objective, checkpointed
        self.values = nn.ParameterDict({name.replace(".", "/"): tensor.detach().clone() for name, tensor in state.items()})
        for stage, side in enumerate(_sides(self.config)):
            window = (min(side, self.config.window_size),) * 2
            self.register_buffer(f"index_{stage}", torch.from_numpy(relative_index(window, window)).reshape(-1))
            if isinstance(self.config, SwinV2Config):
                self.register_buffer(f"coordinates_{stage}", torch.from_numpy(_coordinates(self.config, stage, window)))
            self.register_buffer(f"mask_{stage}", _shift_mask(side, window[0], self.config.window_size // 2))

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """The published loss.

        Args:
            image: (b, c, height, width), normalised fp32, as the published loader gives it.
            mask: (b, height / patch, width / patch), 1 where hidden.
        """
        predicted = self._decode(self._encode(self._hide(self._embed(image), mask)))
        with record_function("loss"):
            return self._loss(image, predicted, mask)

    def _get(self, name: str) -> Tensor:
        return self.values[name.replace(".", "/")]

    def _has(self, name: str) -> bool:
        return name.replace(".", "/") in self.values

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self._get(f"{name}.bias") if self._has(f"{name}.bias") else None
        return F.linear(x, self._get(f"{name}.weight"), bias)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._get(f"{name}.weight"), self._get(f"{name}.bias"))

    def _embed(self, image: Tensor) -> Tensor:
        name = "backbone.patch_embed"
        patches = F.conv2d(image, self._get(f"{name}.proj.weight"), self._get(f"{name}.proj.bias"), stride=self.config.patch_size)
        return self._norm(patches.flatten(2).transpose(1, 2), f"{name}.norm")

    def _hide(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self._get("mask_token.token").expand(tokens.shape[0], tokens.shape[1], -1)
        weight = mask.flatten(1).unsqueeze(-1).type_as(hidden)
        return tokens * (1.0 - weight) + hidden * weight

    def _encode(self, x: Tensor) -> Tensor:
        last = len(self.config.depths) - 1
        for stage, (depth, side) in enumerate(zip(self.config.depths, _sides(self.config), strict=True)):
            for number in range(depth):
                x = (
                    checkpoint(self._block, x, stage, number, side, use_reentrant=False)
                    if self.checkpointed
                    else self._block(x, stage, number, side)
                )
            if stage < last:
                x = self._merge(x, f"backbone.layers.{stage}.downsample", side)
        return self._norm(x, "backbone.norm")

    def _block(self, x: Tensor, stage: int, number: int, side: int) -> Tensor:
        name = f"backbone.layers.{stage}.blocks.{number}"
        shift = self.config.window_size // 2 if number % 2 and side > self.config.window_size else 0
        if isinstance(self.config, SwinConfig):
            x = x + self._attention(self._norm(x, f"{name}.norm1"), f"{name}.attn", stage, side, shift)
            return x + self._mlp(self._norm(x, f"{name}.norm2"), f"{name}.mlp")
        x = x + self._norm(self._attention(x, f"{name}.attn", stage, side, shift), f"{name}.norm1")
        x = x + self._norm(self._mlp(x, f"{name}.mlp"), f"{name}.norm2")
        return self._norm(x, f"{name}.norm3") if self._has(f"{name}.norm3.weight") else x

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        return self._linear(F.gelu(self._linear(x, f"{name}.fc1")), f"{name}.fc2")

    def _attention(self, x: Tensor, name: str, stage: int, side: int, shift: int) -> Tensor:
        batch, _, channels = x.shape
        window = min(side, self.config.window_size)
        with record_function("attention"):
            grid = x.view(batch, side, side, channels)
            if shift:
                grid = torch.roll(grid, shifts=(-shift, -shift), dims=(1, 2))
            cut = grid.view(batch, side // window, window, side // window, window, channels).permute(0, 1, 3, 2, 4, 5)
            windows = cut.contiguous().view(-1, window * window, channels)
            attended = self._linear(self._attend(self._qkv(windows, name), name, stage, shift), f"{name}.proj")
            joined = attended.view(batch, side // window, side // window, window, window, channels).permute(0, 1, 3, 2, 4, 5)
            grid = joined.contiguous().view(batch, side, side, channels)
            if shift:
                grid = torch.roll(grid, shifts=(shift, shift), dims=(1, 2))
            return grid.view(batch, side * side, channels)

    def _qkv(self, windows: Tensor, name: str) -> Tensor:
        if not self._has(f"{name}.qkv.q_bias"):
            return self._linear(windows, f"{name}.qkv")
        value_bias = self._get(f"{name}.qkv.v_bias")
        bias = torch.cat((self._get(f"{name}.qkv.q_bias"), torch.zeros_like(value_bias, requires_grad=False), value_bias))
        return F.linear(windows, self._get(f"{name}.qkv.weight"), bias)

    def _attend(self, qkv: Tensor, name: str, stage: int, shift: int) -> Tensor:
        cut, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        heads = self.config.num_heads[stage]
        q, k, v = qkv.reshape(cut, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if isinstance(self.config, SwinV2Config):
            logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            logits = logits * torch.clamp(self._get(f"{name}.logit_scale"), max=math.log(1.0 / 0.01)).exp()
        else:
            logits = (q * (channels // heads) ** -0.5) @ k.transpose(-2, -1)
        logits = logits + self._position_bias(name, stage, tokens).unsqueeze(0)
        if shift:
            mask = getattr(self, f"mask_{stage}")
            logits = logits.view(cut // mask.shape[0], mask.shape[0], heads, tokens, tokens) + mask.unsqueeze(1).unsqueeze(0)
            logits = logits.view(-1, heads, tokens, tokens)
        return (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(cut, tokens, channels)

    def _position_bias(self, name: str, stage: int, tokens: int) -> Tensor:
        index = getattr(self, f"index_{stage}")
        if isinstance(self.config, SwinConfig):
            return self._get(f"{name}.relative_position_bias_table")[index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        hidden = F.relu(self._linear(getattr(self, f"coordinates_{stage}"), f"{name}.cpb_mlp.0"))
        table = self._linear(hidden, f"{name}.cpb_mlp.2")
        return 16 * torch.sigmoid(table[index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous())

    def _merge(self, x: Tensor, name: str, side: int) -> Tensor:
        batch, _, channels = x.shape
        grid = x.view(batch, side, side, channels)
        quads = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = torch.cat(quads, -1).view(batch, -1, 4 * channels)
        if isinstance(self.config, SwinConfig):
            return self._linear(self._norm(x, f"{name}.norm"), f"{name}.reduction")
        return self._norm(self._linear(x, f"{name}.reduction"), f"{name}.norm")

    def _decode(self, features: Tensor) -> Tensor:
        side = _sides(self.config)[-1]
        grid = features.transpose(1, 2).reshape(features.shape[0], -1, side, side)
        pixels = F.conv2d(grid, self._get("head.proj.weight")[:, :, None, None], self._get("head.proj.bias"))
        return F.pixel_shuffle(pixels, self.config.stride)

    def _loss(self, image: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
        patch = self.config.patch_size
        pixels = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1).contiguous()
        window = self.objective.norm_target_window
        target = image if window is None else _norm_target(image, window)
        error = F.l1_loss(target, predicted, reduction="none")
        return (error * pixels).sum() / (pixels.sum() + LOSS_EPSILON) / image.shape[1]


def _norm_target(image: Tensor, window: int) -> Tensor:
    def pooled(values: Tensor, *, padded: bool) -> Tensor:
        return F.avg_pool2d(values, window, stride=1, padding=window // 2, count_include_pad=padded)

    mean = pooled(image, padded=False)
    square = pooled(image**2, padded=False)
    count = pooled(torch.ones_like(image), padded=True) * window**2
    variance = torch.clamp((square - mean**2) * (count / (count - 1)), min=0.0)
    return (image - mean) / (variance + VARIANCE_EPSILON) ** 0.5


def _sides(config: SwinBaseConfig) -> list[int]:
    return [config.image_size[0] // config.patch_size // 2**stage for stage in range(len(config.depths))]


def _coordinates(config: SwinV2Config, stage: int, window: tuple[int, int]) -> "torch.Tensor":
    pretrained = config.pretrained_window_sizes[stage] if config.pretrained_window_sizes else 0
    return log_coordinates(window, (pretrained, pretrained) if pretrained else window)


def _shift_mask(side: int, window: int, shift: int) -> Tensor:
    """(windows, n, n): -100 between tokens of different regions of the rolled picture."""
    bounds = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    region = torch.zeros(side, side)
    for number, (rows, columns) in enumerate((rows, columns) for rows in bounds for columns in bounds):
        region[rows, columns] = number
    cut = region.view(side // window, window, side // window, window).permute(0, 2, 1, 3).reshape(-1, window * window)
    return (cut.unsqueeze(1) != cut.unsqueeze(2)).float() * -100.0


def check_published(config: Config) -> None:
    """Raise ValueError for a model, an objective or sizes that the published code does not have."""
    model = config.model
    if not isinstance(model, SwinBaseConfig):
        raise ValueError(f"--against reference: the published code has swin and swin_v2, got model.name {model.name}.")
    height, width = model.image_size
    sides = _sides(model)
    fits = all(side % min(side, model.window_size) == 0 and side >= 1 for side in sides) and height % model.stride == 0
    if height != width or not fits:
        raise ValueError(
            f"--against reference: the published code pads nothing and takes squares, got {height}x{width} pixels with windows of"
            f" {model.window_size} at {sides} tokens a side. Choose a window that divides each."
        )
    if config.objective.head != "linear" or config.objective.target != "pixels":
        raise ValueError(
            "--against reference: the published code has a linear head on pixels, got"
            f" {config.objective.head} on {config.objective.target}."
        )
