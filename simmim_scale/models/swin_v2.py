"""Swin Transformer V2 (arXiv 2111.09883): residual post-norm, scaled cosine attention, log-spaced continuous position bias.

Letters: b batch, c channels, h w tokens per axis, n tokens of one window. Sizes of the published models: S table 1.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.config.schema import SwinV2Config
from simmim_scale.kernels.window_attention import window_attention
from simmim_scale.models.hierarchy import HierarchicalBackbone
from simmim_scale.models.initialization import Rule, constant, fan_in_uniform, initialize, trunc_normal
from simmim_scale.models.layers import Linear, Mlp, PatchConv, fill_nan, pad_axes
from simmim_scale.models.norms import PostNorm, TokenNorm
from simmim_scale.models.position_bias import gather_bias
from simmim_scale.models.windows import WindowTables, window_geometry

CPB_HIDDEN = 512  # width of the position-bias MLP, V2 section 3.4
CPB_RANGE = 16.0  # the bias is 16 * sigmoid(MLP): published code


class QkvLinear(Linear):
    """Projection to q, k, v with biases on q and v only; k's would cancel in the softmax of cosines.

    Owns the biases and adds them in its own forward, so that ZeRO-3 gathers all three together. Published checkpoints call
    them attn.q_bias and attn.v_bias.
    """

    def __init__(self, dim: int, *, bias: bool) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias else None
        fill_nan(self)

    def forward(self, x: Float[Tensor, "*tokens c"]) -> Float[Tensor, "*tokens c3"]:
        """(..., c) -> (..., 3c)."""
        if self.q_bias is None:
            return F.linear(x, self.weight)
        return F.linear(x, self.weight, torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)))


class AttentionV2(nn.Module):
    """Scaled cosine attention in windows with a position bias from log-spaced coordinates.

    Args:
        window: tokens per axis of a full window.
        pretrained_window: (height, width) of the window of pre-training; None: the window itself.
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
        window: int,
        pretrained_window: tuple[int, int] | None,
        shifted: bool,
        qkv_bias: bool,
        tables: WindowTables,
        attention: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.window, self.pretrained_window, self.shifted = num_heads, window, pretrained_window, shifted
        self.attention, self.rows_at_once = attention, 0
        self._tables = tables
        self.qkv = QkvLinear(dim, bias=qkv_bias)
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.cpb_mlp = nn.Sequential(Linear(2, CPB_HIDDEN), nn.ReLU(), Linear(CPB_HIDDEN, num_heads, bias=False))
        self.proj = Linear(dim, dim)
        fill_nan(self)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Same shape; sides that the window does not divide are padded with zeros before the projection, as published."""
        height, width = x.shape[1:3]
        geometry = window_geometry((height, width), (self.window, self.window), shifted=self.shifted)
        attended = window_attention(
            self.qkv(pad_axes(x, 1, 2, *geometry.window)),
            self.position_bias(geometry.window, x.device),
            num_heads=self.num_heads,
            window=geometry.window,
            shift=geometry.shift,
            logit_scale=self.logit_scale.flatten(),
            implementation=self.attention,
            rows_at_once=self.rows_at_once,
        )
        return self.proj(attended[:, :height, :width])

    def position_bias(self, window: tuple[int, int], device: torch.device) -> Float[Tensor, "heads n n"]:
        """16 * sigmoid(MLP(log-spaced offset)) of each pair of tokens, fp32 (fp64 in an fp64 model).

        The MLP computes in the type of its weights, as every linear map does; from the sigmoid on it is fp32, so that the factor
        of 16 and the sum with the logits round nothing more.
        """
        coordinates = self._tables.coordinates(window, self.pretrained_window or window, device)
        table = self.cpb_mlp(coordinates.to(self.cpb_mlp[0].weight.dtype))
        table = CPB_RANGE * torch.sigmoid(table.to(torch.promote_types(table.dtype, torch.float32)))
        return gather_bias(table, self._tables.index(window, window, device), window=window, table_window=window)


class BlockV2(nn.Module):
    """x + LN(attention(x)), x + LN(MLP(x)), and in the largest models a LayerNorm on the main branch (V2 section 3.2)."""

    def __init__(self, dim: int, attn: AttentionV2, *, hidden_dim: int, extra_norm: bool) -> None:
        super().__init__()
        self.attn = attn
        self.norm1 = PostNorm(dim)
        self.mlp = Mlp(dim, hidden_dim)
        self.norm2 = PostNorm(dim)
        self.norm3 = TokenNorm(dim) if extra_norm else None

    def forward(
        self,
        x: Float[Tensor, "b h w c"],
        attn_scale: Float[Tensor, "b"] | None = None,
        mlp_scale: Float[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b h w c"]:
        """Same shape. The scales are drop path's, one per sample; None: 1."""
        x = self.norm1(self.attn(x), x, attn_scale)
        x = self.norm2(self.mlp(x), x, mlp_scale)
        return x if self.norm3 is None else self.norm3(x)


class SwinV2(HierarchicalBackbone):
    """SwinV2 of any size.

    Args:
        config: the model section.
        attention: implementation of window attention (kernels/dispatch.py), or "auto".
    """

    def __init__(self, config: SwinV2Config, *, attention: str = "auto") -> None:
        tables = WindowTables()
        pretrained = config.pretrained_windows

        def build_block(stage: int, number: int) -> BlockV2:
            dim = config.embed_dim * 2**stage
            attn = AttentionV2(
                dim,
                config.num_heads[stage],
                window=config.window_size,
                pretrained_window=pretrained[stage],
                shifted=number % 2 == 1,
                qkv_bias=config.qkv_bias,
                tables=tables,
                attention=attention,
            )
            extra_norm = config.extra_norm_period > 0 and (number + 1) % config.extra_norm_period == 0
            return BlockV2(dim, attn, hidden_dim=int(dim * config.mlp_ratio), extra_norm=extra_norm)

        super().__init__(config, build_block, merge_norm_first=False)

    def init_weights(self, generator: torch.Generator) -> None:
        """Give every parameter its initial value; the bits depend on the generator alone (see models/initialization.py)."""
        initialize(self, _initial_rule, generator)


def _initial_rule(module: nn.Module, path: str, name: str) -> Rule:
    """Published initialisation: linear maps N(0, .02), biases 0, norms 1 and 0; residual post-norms 0, logit scales ln 10."""
    if isinstance(module, PatchConv):
        return fan_in_uniform(module.in_channels * module.kernel_size[0] * module.kernel_size[1])
    if isinstance(module, AttentionV2) and name == "logit_scale":
        return constant(math.log(10.0))
    if isinstance(module, nn.LayerNorm):
        residual = path.endswith((".norm1", ".norm2"))
        return constant(1.0 if name == "weight" and not residual else 0.0)
    if isinstance(module, Linear):
        return trunc_normal() if name == "weight" else constant(0.0)
    raise NotImplementedError(f"no initial value is defined for {path}.{name}")
