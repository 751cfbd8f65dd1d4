"""The model section: Swin V1, Swin V2, ResNet, ViT, or a backbone of one's own."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, NonNegativeInt, PositiveInt, Tag, field_validator, model_validator

from simmim_scale.config.section import Section, setting


class SwinBaseConfig(Section):
    """What Swin V1 and V2 share. Sizes of the published models: S table 1."""

    image_size: tuple[PositiveInt, PositiveInt] = setting(
        (192, 192), "Height and width of the input; one number means a square.", unit="pixels", source="S table 1"
    )
    patch_size: PositiveInt = setting(4, "Side of one patch, the unit of the embedding.", unit="pixels", source="R")
    in_chans: PositiveInt = setting(3, "Channels of the input image.", unit="channels", source="R")
    embed_dim: PositiveInt = setting(
        128, "Width of the first stage; it doubles with every stage.", unit="channels", source="S table 1"
    )
    depths: tuple[PositiveInt, ...] = setting((2, 2, 18, 2), "Blocks in each stage.", unit="blocks", source="S table 1")
    num_heads: tuple[PositiveInt, ...] = setting((4, 8, 16, 32), "Attention heads in each stage.", unit="heads", source="R")
    window_size: PositiveInt = setting(6, "Side of an attention window.", unit="tokens", source="S table 1")
    mlp_ratio: float = setting(4.0, "Hidden width of a block's MLP over its width.", unit="ratio", source="R", gt=0)
    qkv_bias: bool = setting(True, "Learnable bias of q, k, v (V1) or of q and v (V2).", source="R")
    drop_path: float = setting(
        0.0, "Stochastic depth: rate of the last block, growing linearly from 0.", unit="probability", source="R", ge=0, lt=1
    )

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return (value, value)
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _stages_agree(self) -> "SwinBaseConfig":
        if not self.depths:
            raise ValueError("depths: a model needs at least one stage, got an empty list. Give one number of blocks per stage.")
        if len(self.num_heads) != len(self.depths):
            raise ValueError(
                f"num_heads: one number per stage, got {len(self.num_heads)} for {len(self.depths)} depths."
                " Make both lists equally long."
            )
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * 2**stage
            if width % heads:
                raise ValueError(
                    f"num_heads: stage {stage} has width {width}, which {heads} heads do not divide. Choose a divisor of {width}."
                )
        return self

    @property
    def stride(self) -> int:
        """Pixels per token of the last stage, per side."""
        return self.patch_size * 2 ** (len(self.depths) - 1)


class SwinConfig(SwinBaseConfig):
    """Swin Transformer (V1): pre-norm, dot-product attention, a table of relative position biases."""

    name: Literal["swin"] = setting("swin", "Backbone.")


class SwinV2Config(SwinBaseConfig):
    """Swin Transformer V2: residual post-norm, scaled cosine attention, log-spaced continuous position bias."""

    name: Literal["swin_v2"] = setting("swin_v2", "Backbone.")
    window_size: PositiveInt = setting(12, "Side of an attention window.", unit="tokens", source="S table 1")
    pretrained_window_sizes: tuple[NonNegativeInt | tuple[PositiveInt, PositiveInt], ...] = setting(
        (),
        "Window of each stage in pre-training (a number, or height and width), for fine-tuning at another; 0: the window itself."
        " Empty: those of init_from where it has others, else the window itself.",
        unit="tokens",
        source="R",
    )
    extra_norm_period: int = setting(
        0,
        "A LayerNorm on the main branch after every so many blocks of a stage; 0: none. SwinV2-H and G use 6.",
        unit="blocks",
        source="V2",
        ge=0,
    )

    @model_validator(mode="after")
    def _pretrained_windows(self) -> "SwinV2Config":
        if self.pretrained_window_sizes and len(self.pretrained_window_sizes) != len(self.depths):
            raise ValueError(
                f"pretrained_window_sizes: one number per stage, got {len(self.pretrained_window_sizes)} for"
                f" {len(self.depths)} stages."
                " Give one window per stage, or leave it out."
            )
        return self

    @property
    def pretrained_windows(self) -> tuple[tuple[int, int] | None, ...]:
        """Window of each stage in pre-training, (height, width) in tokens; None: the window itself."""
        told = self.pretrained_window_sizes or (0,) * len(self.depths)
        pairs = ((window, window) if isinstance(window, int) else window for window in told)
        return tuple(pair if any(pair) else None for pair in pairs)


class ResNetConfig(Section):
    """ResNet with the stem of masked image modeling: 3x3 stride-2 convolution, 2x2 max-pool (S section 5)."""

    name: Literal["resnet"] = setting("resnet", "Backbone.")
    image_size: tuple[PositiveInt, PositiveInt] = setting(
        (192, 192), "Height and width of the input; one number means a square.", unit="pixels", source="S sec. 5: as Swin-B"
    )
    in_chans: PositiveInt = setting(3, "Channels of the input image.", unit="channels", source="R")
    depths: tuple[PositiveInt, ...] = setting((3, 4, 6, 3), "Blocks in each stage: ResNet-50.", unit="blocks", source="S sec. 5")
    width: PositiveInt = setting(4, "Factor of every number of channels: ResNet-50x4.", unit="factor", source="S sec. 5")

    _square = field_validator("image_size", mode="before")(SwinBaseConfig._square.__func__)  # type: ignore[attr-defined]

    @property
    def patch_size(self) -> int:
        """Pixels per token after the stem, per side."""
        return 4

    @property
    def stride(self) -> int:
        """Pixels per token of the last stage, per side."""
        return self.patch_size * 2 ** (len(self.depths) - 1)


class ViTConfig(Section):
    """ViT-B as the main paper pre-trains it; names and defaults are those of the released configuration."""

    name: Literal["vit"] = setting("vit", "Backbone.")
    image_size: tuple[PositiveInt, PositiveInt] = setting(
        (224, 224), "Height and width of the input; one number means a square.", unit="pixels", source="R"
    )
    patch_size: PositiveInt = setting(16, "Side of one patch.", unit="pixels", source="R")
    in_chans: PositiveInt = setting(3, "Channels of the input image.", unit="channels", source="R")
    embed_dim: PositiveInt = setting(768, "Width.", unit="channels", source="R")
    depth: PositiveInt = setting(12, "Blocks.", unit="blocks", source="R")
    num_heads: PositiveInt = setting(12, "Attention heads.", unit="heads", source="R")
    mlp_ratio: float = setting(4.0, "Hidden width of a block's MLP over its width.", unit="ratio", source="R", gt=0)
    layer_scale: float | None = setting(
        0.1, "Initial factor of every residual branch, learnt per channel; null: none.", unit="factor", source="R"
    )
    position_bias: Literal["shared", "per_block"] = setting(
        "shared", "Relative position bias: one table for all blocks (pre-training), or one each (fine-tuning).", source="R"
    )
    drop_path: float = setting(
        0.1, "Stochastic depth: rate of the last block, growing linearly from 0.", unit="probability", source="R", ge=0, lt=1
    )

    _square = field_validator("image_size", mode="before")(SwinBaseConfig._square.__func__)  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _sizes_agree(self) -> "ViTConfig":
        height, width = self.image_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image_size: a multiple of the patch size {self.patch_size}, got {height}x{width}. Change either.")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: a divisor of the width {self.embed_dim}, got {self.num_heads}. Change either.")
        return self

    @property
    def stride(self) -> int:
        """Pixels per token, per side."""
        return self.patch_size


class CustomModelConfig(Section):
    """A backbone of one's own: a function in an importable module that returns a module with embed, encode and stride."""

    name: str = setting(..., "'module:attribute' of a function that builds the backbone.", pattern=r"^[\w.]+:[\w.]+$")
    image_size: tuple[PositiveInt, PositiveInt] = setting((192, 192), "Height and width of the input.", unit="pixels")
    patch_size: PositiveInt = setting(4, "Pixels per token of the embedding, per side.", unit="pixels")
    in_chans: PositiveInt = setting(3, "Channels of the input image.", unit="channels")
    stride: PositiveInt = setting(32, "Pixels per token of the last stage, per side.", unit="pixels")
    options: dict[str, Any] = setting({}, "Keyword arguments of the function, besides those above.")

    _square = field_validator("image_size", mode="before")(SwinBaseConfig._square.__func__)  # type: ignore[attr-defined]


def _model_tag(value: Any) -> str:
    name = value.get("name", "swin_v2") if isinstance(value, dict) else getattr(value, "name", "swin_v2")
    return "custom" if ":" in str(name) else str(name)


ModelConfig = Annotated[
    Annotated[SwinConfig, Tag("swin")]
    | Annotated[SwinV2Config, Tag("swin_v2")]
    | Annotated[ResNetConfig, Tag("resnet")]
    | Annotated[ViTConfig, Tag("vit")]
    | Annotated[CustomModelConfig, Tag("custom")],
    Discriminator(_model_tag),
]
