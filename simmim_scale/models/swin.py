"""Swin Transformer (V1, arXiv 2103.14030): pre-norm, scaled dot-product attention, a learned table of relative position biases.

Letters: b batch, c channels, h w tokens per axis, n tokens of one window. Sizes of the published models: S table 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.config.schema import SwinConfig
from simmim_scale.kernels.window_attention import window_attention
from simmim_scale.models.drop_path import add_branch
from simmim_scale.models.hierarchy import HierarchicalBackbone
from simmim_scale.models.initialization import Rule, constant, fan_in_uniform, initialize, trunc_normal
from simmim_scale.models.layers import Linear, Mlp, PatchConv, fill_nan, pad_axes
from simmim_scale.models.norms import PreNorm, TokenNorm
from simmim_scale.models.position_bias import gather_bias
from simmim_scale.models.windows import WindowTables, stage_sides, window_geometry


class AttentionV1(nn.Module):
    """Scaled dot-product attention in windows with a table of relative position biases.

    Args:
        window: (height, width) in tokens; the bias table belongs to it. Smaller windows use the table's middle.
        shifted: whether windows are shifted by half a window.
        tables: shared by the blocks of a backbone.
        attention: implementation of window attention, or "auto".

    Attributes:
        rows_at_once: see `window_attention`; the engine sets it (engine/sequential_attention.py).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: tuple[int, int],
        shifted: bool,
        qkv_bias: bool,
        tables: WindowTables,
        attention: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.window, self.shifted = num_heads, window, shifted
        self.attention, self.rows_at_once = attention, 0
        self._tables = tables
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        fill_nan(self)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Same shape; sides that the window does not divide are padded with zeros before the projection, as published."""
        height, width = x.shape[1:3]
        geometry = window_geometry((height, width), self.window, shifted=self.shifted)
        attended = window_attention(
            self.qkv(pad_axes(x, 1, 2, *geometry.window)),
            self.position_bias(geometry.window, x.device),
            num_heads=self.num_heads,
            window=geometry.window,
            shift=geometry.shift,
            logit_scale=None,
            implementation=self.attention,
            rows_at_once=self.rows_at_once,
        )
        return self.proj(attended[:, :height, :width])

    def position_bias(self, window: tuple[int, int], device: torch.device) -> Float[Tensor, "heads n n"]:
        """The table's entry for each pair of tokens, in the table's type."""
        index = self._tables.index(window, self.window, device)
        return gather_bias(self.relative_position_bias_table, index, window=window, table_window=self.window)


class BlockV1(nn.Module):
    """x + attention(LN(x)), x + MLP(LN(x))."""

    def __init__(self, dim: int, attn: AttentionV1, *, hidden_dim: int) -> None:
        super().__init__()
        self.norm1 = TokenNorm(dim)
        self.attn = attn
        self.norm2 = PreNorm(dim)
        self.mlp = Mlp(dim, hidden_dim)

    def forward(
        self,
        x: Float[Tensor, "b h w c"],
        attn_scale: Float[Tensor, "b"] | None = None,
        mlp_scale: Float[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b h w c"]:
        """Same shape. The scales are drop path's, one per sample; None: 1."""
        x, normed = self.norm2(self.attn(self.norm1(x)), x, attn_scale)
        return add_branch(x, self.mlp(normed), mlp_scale)


class Swin(HierarchicalBackbone):
    """Swin V1 of any size.

    Args:
        config: the model section. `image_size` fixes the window of each stage, and with it the shape of its bias table.
        attention: implementation of window attention (kernels/dispatch.py), or "auto".
    """

    def __init__(self, config: SwinConfig, *, attention: str = "auto") -> None:
        tables = WindowTables()
        limit = (config.window_size, config.window_size)
        sides = stage_sides(config.image_size, config.patch_size, len(config.depths))

        def build_block(stage: int, number: int) -> BlockV1:
            dim = config.embed_dim * 2**stage
            attn = AttentionV1(
                dim,
                config.num_heads[stage],
                window=window_geometry(sides[stage], limit, shifted=False).window,
                shifted=number % 2 == 1,
                qkv_bias=config.qkv_bias,
                tables=tables,
                attention=attention,
            )
            return BlockV1(dim, attn, hidden_dim=int(dim * config.mlp_ratio))

        super().__init__(config, build_block, merge_norm_first=True)

    def init_weights(self, generator: torch.Generator) -> None:
        """Give every parameter its initial value; the bits depend on the generator alone (see models/initialization.py)."""
        initialize(self, _initial_rule, generator)


def _initial_rule(module: nn.Module, path: str, name: str) -> Rule:
    """Published initialisation: linear maps and bias tables N(0, .02), biases 0, norms 1 and 0."""
    if isinstance(module, PatchConv):
        return fan_in_uniform(module.in_channels * module.kernel_size[0] * module.kernel_size[1])
    if isinstance(module, AttentionV1) and name == "relative_position_bias_table":
        return trunc_normal()
    if isinstance(module, nn.LayerNorm):
        return constant(1.0 if name == "weight" else 0.0)
    if isinstance(module, Linear):
        return trunc_normal() if name == "weight" else constant(0.0)
    raise NotImplementedError(f"no initial value is defined for {path}.{name}")
