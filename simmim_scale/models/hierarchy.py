"""What both Swins are made of: stages of blocks with merging between, embed -> encode, and feature maps.

Letters: b batch, c channels, h w tokens per axis, r residual branches (two per block).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.config.schema import SwinBaseConfig
from simmim_scale.models.drop_path import draw_drop_path, drop_path_rates
from simmim_scale.models.layers import PatchEmbed, PatchMerging
from simmim_scale.models.norms import TokenNorm

# (stage, block in the stage) -> block; a block takes (x, attention scale or None, mlp scale or None), all tensors.
BlockBuilder = Callable[[int, int], nn.Module]


class Stage(nn.Module):
    """Blocks at one resolution, then the merging to the next (absent in the last stage).

    Published checkpoints keep the merging at the end of the stage before it; so do we, for the names.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(
        self, x: Float[Tensor, "b h w c"], scales: Float[Tensor, "r b"] | None
    ) -> tuple[Float[Tensor, "b h w c"], Float[Tensor, "b h2 w2 c2"]]:
        """The stage's output, and the input of the next stage (the same tensor in the last).

        Args:
            scales: drop-path scales of this stage's branches, two rows per block; None: nothing is dropped.
        """
        for number, block in enumerate(self.blocks):
            x = block(x, None, None) if scales is None else block(x, scales[2 * number], scales[2 * number + 1])
        return x, x if self.downsample is None else self.downsample(x)


class HierarchicalBackbone(nn.Module):
    """Patch embedding, stages, final norm. `embed` and `encode` only call modules, so ZeRO-3 gathers what they need.

    Attributes:
        embed_dim: channels of the embedding. num_features: channels of the last stage. stride: pixels per token of the last
        stage. num_drop_paths: residual branches. drop_path_rates: their rates.
    """

    def __init__(self, config: SwinBaseConfig, build_block: BlockBuilder, *, merge_norm_first: bool) -> None:
        super().__init__()
        depth = len(config.depths)
        self.patch_size, self.in_chans, self.embed_dim, self.stride = (
            config.patch_size,
            config.in_chans,
            config.embed_dim,
            config.stride,
        )
        self.stage_dims = tuple(config.embed_dim * 2**stage for stage in range(depth))
        self.num_features = self.stage_dims[-1]
        self.drop_path_rates = drop_path_rates(config.drop_path, sum(config.depths))
        self.patch_embed = PatchEmbed(patch_size=config.patch_size, in_chans=config.in_chans, dim=config.embed_dim)
        self.layers = nn.ModuleList(
            Stage(
                [build_block(stage, number) for number in range(config.depths[stage])],
                PatchMerging(self.stage_dims[stage], norm_first=merge_norm_first) if stage < depth - 1 else None,
            )
            for stage in range(depth)
        )
        self.norm = TokenNorm(self.num_features)

    @property
    def num_drop_paths(self) -> int:
        """Rows of the `drop_path` argument of `encode`."""
        return len(self.drop_path_rates)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Pixels per token at each stage."""
        return tuple(self.patch_size * 2**stage for stage in range(len(self.layers)))

    @property
    def num_layer_ids(self) -> int:
        """Layers of layer-wise learning-rate decay: the embedding, every block, and one for the final norm and what follows."""
        return sum(len(stage.blocks) for stage in self.layers) + 2

    def layer_id(self, name: str) -> int:
        """Layer of a parameter, 0 (embedding) to `num_layer_ids` - 1 (final norm), as in the released fine-tuning code.

        A block has its number in the whole network, counted from 1; the merging after a stage has that of the stage's last block.
        """
        parts = name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] != "layers":
            return self.num_layer_ids - 1
        stage = int(parts[1])
        before = sum(len(self.layers[number].blocks) for number in range(stage))
        return before + (int(parts[3]) + 1 if parts[2] == "blocks" else len(self.layers[stage].blocks))

    def forward(self, image: Float[Tensor, "b chans height width"]) -> Float[Tensor, "b h w c"]:
        """encode(embed(image)): final-normed tokens of the last stage, channels last."""
        return self.encode(self.embed(image))

    def embed(self, image: Float[Tensor, "b chans height width"]) -> Float[Tensor, "b h w c"]:
        """Normalised image to tokens, channels last; sides are rounded up to whole patches."""
        return self.patch_embed(image)

    def encode(
        self, tokens: Float[Tensor, "b h w c"], drop_path: Float[Tensor, "r b"] | None = None
    ) -> Float[Tensor, "b h2 w2 c2"]:
        """Tokens of the embedding to final-normed tokens of the last stage.

        Args:
            drop_path: scale of each residual branch and sample (0 or 1 / keep), used as given. None: in training with a
                drop-path rate they are drawn once from torch's generator; otherwise nothing is dropped.
        """
        return self.norm(self._stages(tokens, drop_path)[-1])

    def features(
        self, image: Float[Tensor, "b chans height width"], *, final_norm: bool = True
    ) -> list[Float[Tensor, "b c h w"]]:
        """One map per stage, (b, c_i, h / s_i, w / s_i) with strides 4, 8, 16, 32 and channels first, for dense tasks.

        Args:
            final_norm: whether the last map goes through the backbone's final norm (then it equals `encode`). Dense tasks
                that bring their own norm per map (models/features.py) leave it out, as published.
        """
        maps = self._stages(self.embed(image), None)
        if final_norm:
            maps[-1] = self.norm(maps[-1])
        return [tokens.permute(0, 3, 1, 2) for tokens in maps]

    def checkpointable_blocks(self) -> list[nn.Module]:
        """Blocks whose forward is a pure function of its tensors: activation checkpointing wraps these."""
        return [block for stage in self.layers for block in stage.blocks]

    def checkpointable_stages(self) -> list[list[nn.Module]]:
        """The same blocks by stage: the policy that checkpoints the first stages alone asks for them."""
        return [list(stage.blocks) for stage in self.layers]

    def _stages(self, tokens: Tensor, drop_path: Tensor | None) -> list[Tensor]:
        scales = self._drop_path_scales(tokens, drop_path)
        maps, first = [], 0
        for stage in self.layers:
            last = first + 2 * len(stage.blocks)
            output, tokens = stage(tokens, None if scales is None else scales[first:last])
            maps.append(output)
            first = last
        return maps

    def _drop_path_scales(self, tokens: Tensor, given: Tensor | None) -> Tensor | None:
        if given is None:
            wanted = self.training and max(self.drop_path_rates) > 0
            return draw_drop_path(self.drop_path_rates, tokens.shape[0], tokens) if wanted else None
        expected = (self.num_drop_paths, tokens.shape[0])
        if tuple(given.shape) != expected:
            raise ValueError(
                f"drop_path: one scale per residual branch and sample, expected {expected}, got {tuple(given.shape)}."
                " Make it with sample_drop_path(backbone.drop_path_rates, seed, position)."
            )
        return given.to(torch.promote_types(tokens.dtype, torch.float32))
