"""Inverse Swins as prediction heads: the pyramid of a Swin turned upside down, from its coarsest maps to the finest.

A stage is Swin blocks at one resolution; between stages a patch expansion doubles each side and halves the width. S table 3 names
the heads "inverse Swin-T" and "inverse Swin-B"; that they have the depths and widths of these models in reverse is our choice.
Letters: b batch, th tw token grid, c channels.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.models.initialization import Rule, constant, initialize, trunc_normal
from simmim_scale.models.layers import Linear
from simmim_scale.models.swin import AttentionV1, BlockV1
from simmim_scale.models.windows import WindowTables
from simmim_scale.objectives.heads import Projection, TokenHead

MLP_RATIO = 4
DEFAULT_WINDOW = 6  # tokens: divides the 6, 12, 24 and 48 tokens per side at 192 px


@dataclass(frozen=True)
class Pyramid:
    """Width of the coarsest stage; depths and heads of the stages, coarsest first."""

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


TINY = Pyramid(dim=768, depths=(2, 6, 2, 2), num_heads=(24, 12, 6, 3))
BASE = Pyramid(dim=1024, depths=(2, 18, 2, 2), num_heads=(32, 16, 8, 4))


def build_tiny(
    *, num_features: int, stride: int, channels: int, window: int = DEFAULT_WINDOW, attention: str = "auto"
) -> "InverseSwin":
    """Inverse Swin-T."""
    return InverseSwin(
        num_features=num_features, stride=stride, channels=channels, pyramid=TINY, window=window, attention=attention
    )


def build_base(
    *, num_features: int, stride: int, channels: int, window: int = DEFAULT_WINDOW, attention: str = "auto"
) -> "InverseSwin":
    """Inverse Swin-B."""
    return InverseSwin(
        num_features=num_features, stride=stride, channels=channels, pyramid=BASE, window=window, attention=attention
    )


class PatchExpanding(nn.Module):
    """Doubles each side and halves the channels: a linear map to 2x2 tokens, then LayerNorm. The counterpart of patch merging."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expansion = Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x: Float[Tensor, "b th tw c"]) -> Float[Tensor, "b th2 tw2 c2"]:
        """(b, th, tw, c) -> (b, 2 th, 2 tw, c / 2)."""
        b, th, tw, c = x.shape
        quads = self.expansion(x).view(b, th, tw, 2, 2, c // 2).transpose(2, 3)
        return self.norm(quads.reshape(b, 2 * th, 2 * tw, c // 2))


class InverseSwin(TokenHead):
    """Swin blocks from the backbone's resolution up to 8 times finer, or as far as single predicted pixels; then a linear map to
    the pixels that are left.

    Args:
        num_features: width of the backbone's last stage, mapped to the pyramid's first where they differ.
        stride: predicted pixels per token of the backbone and side.
        channels: of a predicted pixel.
        pyramid: widths, depths and heads.
        window: side of an attention window, tokens.
        attention: implementation of window attention, or "auto".
    """

    tokenwise = False

    def __init__(
        self,
        *,
        num_features: int,
        stride: int,
        channels: int,
        pyramid: Pyramid,
        window: int = DEFAULT_WINDOW,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        # A stride with an odd factor is not halved to the end: the last linear map covers what is left.
        doublings = min(len(pyramid.depths) - 1, int(math.log2(stride & -stride)))
        self.patch, self.channels = stride >> doublings, channels
        self.embed = nn.Identity() if num_features == pyramid.dim else Linear(num_features, pyramid.dim)
        tables = WindowTables()
        dims = [pyramid.dim >> stage for stage in range(doublings + 1)]
        self.layers = nn.ModuleList(
            nn.ModuleList(
                _block(dims[stage], pyramid.num_heads[stage], number, window, tables, attention)
                for number in range(pyramid.depths[stage])
            )
            for stage in range(doublings + 1)
        )
        self.expansions = nn.ModuleList(PatchExpanding(dim) for dim in dims[:-1])
        self.norm = nn.LayerNorm(dims[-1])
        self.proj = Projection(dims[-1], channels * self.patch**2)

    def init_weights(self, generator: torch.Generator) -> None:
        """As a Swin; the last linear map as in the linear head."""
        initialize(self, _initial_rule, generator)
        self.proj.init_weights(generator)

    def trunk(self, features: Float[Tensor, "b th tw c"]) -> Float[Tensor, "b th2 tw2 c2"]:
        """Tokens of the finest stage, normed."""
        x = self.embed(features)
        for stage, blocks in enumerate(self.layers):
            for block in blocks:
                x = block(x, None, None)
            if stage < len(self.expansions):
                x = self.expansions[stage](x)
        return self.norm(x)

    def checkpointable_blocks(self) -> list[nn.Module]:
        """Blocks that activation checkpointing may wrap."""
        return [block for blocks in self.layers for block in blocks]


def _block(dim: int, num_heads: int, number: int, window: int, tables: WindowTables, attention: str) -> BlockV1:
    attn = AttentionV1(
        dim,
        num_heads,
        window=(window, window),
        shifted=number % 2 == 1,
        qkv_bias=True,
        tables=tables,
        attention=attention,
    )
    return BlockV1(dim, attn, hidden_dim=MLP_RATIO * dim)


def _initial_rule(module: nn.Module, path: str, name: str) -> Rule:
    if isinstance(module, nn.LayerNorm):
        return constant(1.0 if name == "weight" else 0.0)
    return trunc_normal() if name in ("weight", "relative_position_bias_table") else constant(0.0)
