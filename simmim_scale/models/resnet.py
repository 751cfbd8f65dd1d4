"""ResNet for masked image modeling (S section 5): mask tokens replace features after a stem of one convolution and a max-pool.

Behind the stem it is the residual network of arXiv 1512.03385, its stride in the 3x3 convolutions, `width` times as wide.

Letters: b batch, c channels, h w tokens per axis.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.config.schema import ResNetConfig
from simmim_scale.models.initialization import Rule, constant, fan_out_normal, initialize
from simmim_scale.models.layers import PatchConv, pad_axes

STEM_CHANNELS = 64  # of a network of width 1
EXPANSION = 4  # channels of a bottleneck's output over its middle
STEM_STRIDE = 4


class BatchNorm(nn.Module):
    """Batch normalisation with running statistics that survive what training does to them.

    They are fp32 whatever the precision, they are not touched by the second forward pass of activation checkpointing, and a batch
    that is not finite, whose update the engine skips, leaves them as they were. Statistics are those of one rank's micro-batch.

    Args:
        channels: c.
        momentum: share of the new batch in the running statistics.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.full((channels,), float("nan")))
        self.bias = nn.Parameter(torch.full((channels,), float("nan")))
        self.register_buffer("running_mean", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(channels, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape and dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        if not self.training:
            return F.batch_norm(x, self.running_mean.to(wide), self.running_var.to(wide), weight, bias, eps=self.eps)
        mean, variance = self.running_mean.to(wide, copy=True), self.running_var.to(wide, copy=True)
        out = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=self.momentum, eps=self.eps)
        # Inside backward this is the recomputation of activation checkpointing: the batch has been counted already.
        if torch._C._current_graph_task_id() == -1:
            self._keep(self.running_mean, mean)
            self._keep(self.running_var, variance)
        return out

    @staticmethod
    @torch.no_grad()
    def _keep(running: Tensor, new: Tensor) -> None:
        running.copy_(torch.where(torch.isfinite(new), new, running))


class ConvNorm(nn.Module):
    """A convolution without bias and its batch normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = PatchConv(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.norm(self.conv(x))


class Stem(nn.Module):
    """A 3x3 convolution of stride 2, batch normalisation, ReLU, a 2x2 max-pool: 4 pixels per token (S section 5)."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.conv = ConvNorm(in_chans, channels, 3, stride=2)

    def forward(self, image: Float[Tensor, "b chans height width"]) -> Float[Tensor, "b h w c"]:
        """Tokens, channels last; an image that 4 does not divide is padded with zeros at the right and bottom.

        Raises:
            ValueError: another number of channels than the network was built for.
        """
        if image.dim() != 4 or image.shape[1] != self.in_chans:
            raise ValueError(
                f"image: expected (batch, {self.in_chans}, height, width), got {tuple(image.shape)}."
                " Put channels second, or set model.in_chans to the number of channels."
            )
        image = pad_axes(image, 2, 3, STEM_STRIDE, STEM_STRIDE).to(self.conv.norm.weight.dtype)
        return F.max_pool2d(F.relu(self.conv(image)), 2).permute(0, 2, 3, 1)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, middle: int, *, stride: int) -> None:
        super().__init__()
        outputs = middle * EXPANSION
        self.reduce = ConvNorm(inputs, middle, 1)
        self.spatial = ConvNorm(middle, middle, 3, stride=stride)
        self.expand = ConvNorm(middle, outputs, 1)
        self.shortcut = ConvNorm(inputs, outputs, 1, stride=stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        branch = self.expand(F.relu(self.spatial(F.relu(self.reduce(x)))))
        return F.relu(branch + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """ResNet-50 and its like, of any width.

    Args:
        config: the model section.
        attention: not used; every backbone is built with it.

    Attributes:
        embed_dim: channels after the stem. num_features: channels of the last stage. stride: pixels per token of the last stage.
    """

    patch_size = STEM_STRIDE

    def __init__(self, config: ResNetConfig, *, attention: str = "auto") -> None:
        super().__init__()
        del attention
        self.in_chans = config.in_chans
        self.embed_dim = STEM_CHANNELS * config.width
        self.stride = config.stride
        self.stage_dims = tuple(self.embed_dim * EXPANSION * 2**stage for stage in range(len(config.depths)))
        self.stage_strides = tuple(STEM_STRIDE * 2**stage for stage in range(len(config.depths)))
        self.num_features = self.stage_dims[-1]
        self.stem = Stem(config.in_chans, self.embed_dim)
        self.layers = nn.ModuleList(self._stage(stage, depth) for stage, depth in enumerate(config.depths))

    def _stage(self, stage: int, depth: int) -> nn.Sequential:
        middle = self.embed_dim * 2**stage
        inputs = self.embed_dim if stage == 0 else self.stage_dims[stage - 1]
        first = Bottleneck(inputs, middle, stride=1 if stage == 0 else 2)
        return nn.Sequential(first, *(Bottleneck(middle * EXPANSION, middle, stride=1) for _ in range(depth - 1)))

    @property
    def num_layer_ids(self) -> int:
        """Layers of layer-wise learning-rate decay, counted as for Swin: the stem, every block, and one for what follows."""
        return sum(len(stage) for stage in self.layers) + 2

    def layer_id(self, name: str) -> int:
        """Layer of a parameter: 0 for the stem, then the number of its block in the whole network, from 1."""
        parts = name.split(".")
        if parts[0] == "stem":
            return 0
        return sum(len(self.layers[stage]) for stage in range(int(parts[1]))) + int(parts[2]) + 1

    def forward(self, image: Float[Tensor, "b chans height width"]) -> Float[Tensor, "b h w c"]:
        """encode(embed(image)): the last stage's features, channels last."""
        return self.encode(self.embed(image))

    def embed(self, image: Float[Tensor, "b chans height width"]) -> Float[Tensor, "b h w c"]:
        """Features after the stem, channels last: what hidden tokens replace."""
        return self.stem(image)

    def encode(self, tokens: Float[Tensor, "b h w c"], drop_path: Tensor | None = None) -> Float[Tensor, "b h2 w2 c2"]:
        """Features of the last stage, channels last. There are no branches to drop: `drop_path` is None."""
        assert drop_path is None, "a ResNet has no drop_path_rates, so nobody makes scales for it"
        return self._stages(tokens)[-1].permute(0, 2, 3, 1)

    def features(self, image: Float[Tensor, "b chans height width"]) -> list[Float[Tensor, "b c h w"]]:
        """One map per stage, strides 4, 8, 16, 32."""
        return self._stages(self.embed(image))

    def checkpointable_blocks(self) -> list[nn.Module]:
        """Blocks that activation checkpointing wraps."""
        return [block for stage in self.layers for block in stage]

    def init_weights(self, generator: torch.Generator) -> None:
        """Convolutions N(0, 2 / fan out), norms 1 and 0 (arXiv 1512.03385 and its common implementations)."""
        initialize(self, _initial_rule, generator)

    def _stages(self, tokens: Tensor) -> list[Tensor]:
        x, maps = tokens.permute(0, 3, 1, 2), []  # channels last in memory, which convolutions like
        for stage in self.layers:
            x = stage(x)
            maps.append(x)
        return maps


def _initial_rule(module: nn.Module, path: str, name: str) -> Rule:
    if isinstance(module, PatchConv):
        return fan_out_normal(module.out_channels * module.kernel_size[0] * module.kernel_size[1])
    if isinstance(module, BatchNorm):
        return constant(1.0 if name == "weight" else 0.0)
    raise NotImplementedError(f"no initial value is defined for {path}.{name}")
