"""Prediction heads: the last stage's tokens to predicted pixels. One table, each entry a function with the same arguments.

A head is built for `stride` predicted pixels per token and side, and maps features (b, th, tw, d) to a picture
(b, channels, th * stride, tw * stride); it may have `init_weights(generator)`. One that also has `trunk` and `proj` (a
`Projection`) need not compute all of it: see `TokenHead`.
Letters: b batch, th tw token grid of the last stage, d its width, o output channels, h w picture height and width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.models.initialization import assign, fan_in_uniform
from simmim_scale.models.layers import Linear
from simmim_scale.objectives.prediction import Consumer, to_picture

# name -> "module:function"; the function takes (num_features, stride, channels) and `objective.head_options` by keyword and
# returns the head; `attention` too, the implementation of window attention, if it has a parameter of that name. S table 3.
HEADS = {
    "linear": "simmim_scale.objectives.heads:LinearHead",
    "mlp2": "simmim_scale.objectives.heads:MlpHead",
    "inverse_swin_t": "simmim_scale.objectives.inverse_swin:build_tiny",
    "inverse_swin_b": "simmim_scale.objectives.inverse_swin:build_base",
}


class Projection(Linear):
    """A linear map that hands its weights to a function instead of giving outputs that are too large to exist at once. It does so
    in its own forward, so that ZeRO-3 has gathered them."""

    def forward(self, inputs: Float[Tensor, "*tokens d"], consume: Consumer | None = None) -> Any:
        """(*, d) -> (*, l), or what `consume(inputs, weight, bias)` returns."""
        return F.linear(inputs, self.weight, self.bias) if consume is None else consume(inputs, self.weight, self.bias)

    def init_weights(self, generator: torch.Generator) -> None:
        """U(-1/sqrt(d), 1/sqrt(d)) for weight and bias: PyTorch's default of a convolution, which the published code leaves as
        it is."""
        for parameter in (self.weight, self.bias):
            assign(parameter, fan_in_uniform(self.in_features), generator)


class TokenHead(nn.Module):
    """A head that ends in a linear map per token.

    Attributes:
        tokenwise: whether a token's prediction depends on that token alone; then only hidden tokens are asked for.
        patch: predicted pixels per token of the trunk and side.
        proj: from the trunk's width to channels * patch^2. Row (o * patch + i) * patch + j of its weight is channel o of pixel
            (i, j), so the published `decoder.0.weight`, without its two trailing axes of length 1, is `proj.weight`.
    """

    tokenwise: bool
    patch: int
    proj: Projection

    def trunk(self, features: Tensor) -> Tensor:
        """(b, th, tw, d) -> (b, rows, columns, e); of a tokenwise head (*, d) -> (*, e)."""
        return features

    def forward(self, features: Float[Tensor, "b th tw d"]) -> Float[Tensor, "b o h w"]:
        """The whole picture."""
        inputs = self.trunk(features)
        values = self.proj(inputs).flatten(1, 2)
        return to_picture(values, grid=(inputs.shape[1], inputs.shape[2]), patch=self.patch)


class LinearHead(TokenHead):
    """One linear map per token, to the pixels it covers: the published 1x1 convolution and pixel shuffle.

    Args:
        num_features: width d of the last stage.
        stride: predicted pixels per token and side.
        channels: channels o of a predicted pixel.
    """

    tokenwise = True

    def __init__(self, *, num_features: int, stride: int, channels: int) -> None:
        super().__init__()
        self.patch, self.channels = stride, channels
        self.proj = Projection(num_features, channels * stride**2)

    def init_weights(self, generator: torch.Generator) -> None:
        """As the published code leaves it, see `Projection`."""
        self.proj.init_weights(generator)


class MlpHead(TokenHead):
    """Two linear maps per token with a GELU between.

    Args (the others as in `LinearHead`):
        hidden_dim: width between them; None: that of the features (a choice: S does not tell it).
    """

    tokenwise = True

    def __init__(self, *, num_features: int, stride: int, channels: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden_dim = num_features if hidden_dim is None else hidden_dim
        self.patch, self.channels = stride, channels
        self.fc = Projection(num_features, hidden_dim)
        self.proj = Projection(hidden_dim, channels * stride**2)

    def init_weights(self, generator: torch.Generator) -> None:
        """Both as the linear head's."""
        self.fc.init_weights(generator)
        self.proj.init_weights(generator)

    def trunk(self, features: Tensor) -> Tensor:
        """(*, d) -> (*, hidden)."""
        return F.gelu(self.fc(features))
