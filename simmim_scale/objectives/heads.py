"""Prediction heads: the last stage's tokens to a picture. One table, each entry a function with the same arguments.

A head maps features (b, th, tw, d) to (b, channels, th * stride, tw * stride); it may have `init_weights(generator)`.
Letters: b batch, th tw token grid of the last stage, d its width, o output channels, h w picture height and width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.models.initialization import assign, fan_in_uniform
from simmim_scale.models.layers import Linear

# name -> "module:function"; the function takes (num_features, stride, channels) by keyword and returns the head. S table 3.
HEADS = {"linear": "simmim_scale.objectives.heads:LinearHead"}


class LinearHead(nn.Module):
    """One linear map per token, to the stride x stride pixels it covers: the published 1x1 convolution and pixel shuffle.

    Row (o * stride + i) * stride + j of the weight is channel o of pixel (i, j), so the published `decoder.0.weight`, without
    its two trailing axes of length 1, is `proj.weight`.

    Args:
        num_features: width d of the last stage.
        stride: pixels per token and side.
        channels: channels o of the picture.
    """

    def __init__(self, *, num_features: int, stride: int, channels: int) -> None:
        super().__init__()
        self.stride, self.channels = stride, channels
        self.proj = Linear(num_features, channels * stride**2)

    def init_weights(self, generator: torch.Generator) -> None:
        """U(-1/sqrt(d), 1/sqrt(d)) for weight and bias: PyTorch's default of a convolution, which the published code leaves as
        it is."""
        for parameter in (self.proj.weight, self.proj.bias):
            assign(parameter, fan_in_uniform(self.proj.in_features), generator)

    def forward(self, features: Float[Tensor, "b th tw d"]) -> Float[Tensor, "b o h w"]:
        b, th, tw, _ = features.shape
        s = self.stride
        pixels = self.proj(features).view(b, th, tw, self.channels, s, s)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(b, self.channels, th * s, tw * s)
