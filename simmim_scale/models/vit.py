"""ViT as the main paper pre-trains it: timm's BEiT blocks, which share a relative position bias, behind embed and encode.

Letters: b batch, h w tokens per axis, d width, n tokens with the class token, r residual branches (two per block).
"""

import math

import torch
from jaxtyping import Float
from timm.models.beit import Beit
from torch import Tensor, nn

from simmim_scale.config.schema import ViTConfig
from simmim_scale.models.drop_path import draw_drop_path, drop_path_rates
from simmim_scale.models.initialization import Rule, constant, initialize, trunc_normal
from simmim_scale.models.layers import fill_nan

INITIAL_STD = 0.02  # R


class ClassToken(nn.Module):
    """The learnt class token. A module of its own, so that ZeRO-3 gathers it when it is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))
        fill_nan(self)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n1 d"]:
        """The class token in front of the others."""
        return torch.cat((self.token.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens), 1)


class BranchScale(nn.Module):
    """Takes the place of timm's drop path: scales a residual branch by what `ViT.encode` was given, one scale per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor | None = None

    def forward(self, branch: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return branch if self.scale is None else branch * self.scale.to(branch.dtype)[:, None, None]


class ViT(nn.Module):
    """A Vision Transformer without absolute positions.

    Args:
        config: the model section; `image_size` fixes the grid of tokens, and with it the bias tables.
        attention: not used; every backbone is built with it.

    Attributes:
        embed_dim, num_features: d. stride, patch_size: pixels per token. drop_path_rates: of the residual branches.
    """

    def __init__(self, config: ViTConfig, *, attention: str = "auto") -> None:
        super().__init__()
        del attention
        self.image_size, self.in_chans = config.image_size, config.in_chans
        self.patch_size = self.stride = config.patch_size
        self.embed_dim = self.num_features = config.embed_dim
        self.layer_scale = config.layer_scale
        self.drop_path_rates = drop_path_rates(config.drop_path, config.depth)
        shared = config.position_bias == "shared"
        with torch.random.fork_rng(devices=[]):  # timm draws values, which `init_weights` replaces
            network = Beit(
                img_size=config.image_size,
                patch_size=config.patch_size,
                in_chans=config.in_chans,
                num_classes=0,
                embed_dim=config.embed_dim,
                depth=config.depth,
                num_heads=config.num_heads,
                mlp_ratio=config.mlp_ratio,
                init_values=config.layer_scale,
                use_abs_pos_emb=False,
                use_shared_rel_pos_bias=shared,
                use_rel_pos_bias=not shared,
            )
        self.patch_embed, self.blocks = network.patch_embed, network.blocks
        self.rel_pos_bias, self.norm = network.rel_pos_bias, nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.cls_token = ClassToken(config.embed_dim)
        for block in self.blocks:
            # timm would use the projection's weight without calling it, which ZeRO-3 does not see.
            block.attn.qkv_bias_separate = True
            block.drop_path1, block.drop_path2 = BranchScale(), BranchScale()
        for module in self.modules():
            if not isinstance(module, nn.LayerNorm):
                fill_nan(module)

    @property
    def num_drop_paths(self) -> int:
        """Rows of the `drop_path` argument of `encode`."""
        return len(self.drop_path_rates)

    @property
    def num_layer_ids(self) -> int:
        """Layers of layer-wise learning-rate decay: the embedding, every block, and one for the final norm and what follows."""
        return len(self.blocks) + 2

    def layer_id(self, name: str) -> int:
        """Layer of a parameter, as in the released fine-tuning code: a shared bias table belongs to the last one."""
        first, *rest = name.split(".")
        if first in ("cls_token", "patch_embed"):
            return 0
        return int(rest[0]) + 1 if first == "blocks" else self.num_layer_ids - 1

    def forward(self, image: Float[Tensor, "b chans height width"]) -> Float[Tensor, "b h w d"]:
        """encode(embed(image)): normed tokens without the class token, channels last."""
        return self.encode(self.embed(image))

    def embed(self, image: Float[Tensor, "b chans height width"]) -> Float[Tensor, "b h w d"]:
        """Patches as tokens, channels last.

        Raises:
            ValueError: another size or number of channels than the network was built for: its bias tables belong to one grid.
        """
        if image.dim() != 4 or tuple(image.shape[1:]) != (self.in_chans, *self.image_size):
            raise ValueError(
                f"image: expected (batch, {self.in_chans}, {self.image_size[0]}, {self.image_size[1]}), got {tuple(image.shape)}."
                " Set model.image_size and model.in_chans to the pictures'."
            )
        tokens = self.patch_embed(image.to(self.cls_token.token.dtype))
        rows, columns = (side // self.patch_size for side in self.image_size)
        return tokens.reshape(image.shape[0], rows, columns, self.embed_dim)

    def encode(self, tokens: Float[Tensor, "b h w d"], drop_path: Float[Tensor, "r b"] | None = None) -> Float[Tensor, "b h w d"]:
        """Normed tokens of the last block, without the class token.

        Args:
            drop_path: scale of each residual branch and sample. None: in training with a drop-path rate they are drawn from
                torch's generator; otherwise nothing is dropped.
        """
        if drop_path is None and self.training and max(self.drop_path_rates) > 0:
            drop_path = draw_drop_path(self.drop_path_rates, tokens.shape[0], tokens)
        x = self.cls_token(tokens.flatten(1, 2))
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for number, block in enumerate(self.blocks):
            # Kept until the next call, since activation checkpointing runs the block once more in backward.
            block.drop_path1.scale = None if drop_path is None else drop_path[2 * number]
            block.drop_path2.scale = None if drop_path is None else drop_path[2 * number + 1]
            x = block(x, shared_rel_pos_bias=bias)
        return self.norm(x)[:, 1:].reshape(tokens.shape)

    def features(self, image: Float[Tensor, "b chans height width"]) -> list[Float[Tensor, "b d h w"]]:
        """The one map there is, at the stride of the patches."""
        return [self(image).permute(0, 3, 1, 2)]

    def checkpointable_blocks(self) -> list[nn.Module]:
        """Blocks that activation checkpointing wraps."""
        return list(self.blocks)

    def init_weights(self, generator: torch.Generator) -> None:
        """As released: linear maps, patch embedding and class token N(0, .02), the last map of each branch smaller with depth."""
        initialize(self, self._initial_rule, generator)

    def _initial_rule(self, module: nn.Module, path: str, name: str) -> Rule:
        if isinstance(module, nn.LayerNorm):
            return constant(1.0 if name == "weight" else 0.0)
        if name.startswith("gamma_"):
            return constant(self.layer_scale or 0.0)
        if name in ("bias", "q_bias", "v_bias", "relative_position_bias_table"):
            return constant(0.0)
        if path.endswith(("attn.proj", "mlp.fc2")):
            number = int(path.split(".")[1])
            return trunc_normal(INITIAL_STD / math.sqrt(2.0 * (number + 1)))
        return trunc_normal(INITIAL_STD)
