"""SimMIM: embed -> swap hidden tokens for the mask token -> encode -> head -> masked l1 against the target.

Letters: b batch, c channels, h w image height and width, gh gw mask grid, th tw token grid, d token width, n residual branches.
Source: "SimMIM: A Simple Framework for Masked Image Modeling" (arXiv 2111.09886) and its released code for the formulas.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from simmim_scale.config.schema import ModelConfig, ObjectiveConfig
from simmim_scale.models import build_backbone
from simmim_scale.models.drop_path import sample_drop_path
from simmim_scale.models.initialization import assign, trunc_normal
from simmim_scale.models.layers import fill_nan
from simmim_scale.objectives.heads import HEADS
from simmim_scale.objectives.lookup import lookup
from simmim_scale.objectives.masked_loss import masked_l1_sums
from simmim_scale.objectives.pixels import PixelNorm, check_image, flip_where, mask_to_tokens, tokens_to_pixels
from simmim_scale.objectives.targets import TARGETS

MASK_TOKEN_STD = 0.02  # R
BACKBONE_API = ("embed", "encode", "stride", "patch_size", "embed_dim", "num_features")


class MaskToken(nn.Module):
    """The learnt vector that stands for a hidden token. A module of its own, so that ZeRO-3 gathers it when it is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))
        fill_nan(self)

    def init_weights(self, generator: torch.Generator) -> None:
        assign(self.token, trunc_normal(MASK_TOKEN_STD), generator)

    def forward(self, tokens: Float[Tensor, "b th tw d"], mask: Bool[Tensor, "b th tw"]) -> Float[Tensor, "b th tw d"]:
        """Put the mask token where the mask is True."""
        return torch.where(mask[..., None], self.token.to(tokens.dtype), tokens)


class SimMIM(nn.Module):
    """Masked image modeling around any backbone with `embed`, `encode`, `stride`, `patch_size`, `embed_dim` and `num_features`.

    Args:
        backbone: see `models/__init__.py`.
        head: features (b, th, tw, d) -> (b, target.channels, >= h, >= w).
        target: see `objectives/targets.py`.
        mean, std: of the channels, as shares of 255.
        seed: of the drop-path draws, which depend on it and on the sample's position in the stream.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        head: nn.Module,
        target: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.mask_token = MaskToken(backbone.embed_dim)
        self.head = head
        self.target = target
        self.pixel_norm = PixelNorm(tuple(mean), tuple(std))
        self.in_chans = len(tuple(mean))
        self.seed = seed

    def init_weights(self, generator: torch.Generator) -> None:
        """Set every parameter from `generator` (a CPU generator): the same seed gives the same weights under any engine."""
        if hasattr(self.backbone, "init_weights"):  # a backbone of one's own may initialise itself when it is built
            self.backbone.init_weights(generator)
        self.mask_token.init_weights(generator)
        if hasattr(self.head, "init_weights"):
            self.head.init_weights(generator)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch, and in eval mode the prediction.

        Args:
            batch: "image" (b, c, h, w), uint8, or floating and normalised; "mask" (b, gh, gw) bool, True = hidden, any grid
                that divides the image into cells of whole patches, in the coordinates of the (flipped) picture; optional
                "flip" (b,) bool, "position" (b,) int64 (seeds drop path in training), "valid" (b,) bool
                (False: padding, no part of the loss).

        Returns:
            "loss" (), fp32. In eval mode also "loss_per_sample" (b,), the published loss of each sample by itself (0 where not
            valid), and "prediction" (b, c, h, w) in the target's space.
        """
        image, mask = self.prepare(batch)
        size = (image.shape[2], image.shape[3])
        prediction = self.predict(image, mask, drop_path=self._drop_path(batch))
        hidden = tokens_to_pixels(mask, image_size=size, patch_size=self.backbone.patch_size)
        sums = masked_l1_sums(prediction, self.target(image), hidden)
        valid = batch.get("valid")
        if self.training:
            return {"loss": sums.mean(valid)}
        return {"loss": sums.mean(valid), "loss_per_sample": sums.per_sample(valid), "prediction": prediction}

    def prepare(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, "b th tw"]]:
        """Check a batch; its normalised fp32 image, flipped where asked, and its mask on the grid of tokens."""
        for key in ("image", "mask"):
            if key not in batch:
                raise ValueError(f"batch: expected the keys 'image' and 'mask', got {sorted(batch)}. Add {key!r}.")
        image, mask = batch["image"], batch["mask"]
        check_image(image, self.in_chans)
        if mask.ndim != 3 or mask.shape[0] != image.shape[0]:
            raise ValueError(
                f"mask: expected (batch, rows, columns) with the image's batch of {image.shape[0]}, got {tuple(mask.shape)}."
                " Give one grid of cells per image."
            )
        if "flip" in batch:
            image = flip_where(image, batch["flip"])
        size = (image.shape[2], image.shape[3])
        return self.pixel_norm(image), mask_to_tokens(mask.bool(), image_size=size, patch_size=self.backbone.patch_size)

    def predict(
        self,
        image: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b th tw"],
        *,
        drop_path: Float[Tensor, "n b"] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """Prediction for a normalised image and a mask of tokens, cut to the image where tokens overhang it."""
        tokens = self.backbone.embed(image.to(self._compute_dtype()))
        tokens = self.mask_token(tokens, mask)
        features = self.backbone.encode(tokens, drop_path)
        return self.head(features)[:, :, : image.shape[2], : image.shape[3]]

    def _compute_dtype(self) -> torch.dtype:
        # The dtype of a parameter is right under ZeRO-3 too, where its shape is not. Autocast casts by itself.
        return self.mask_token.token.dtype

    def _drop_path(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        rates = getattr(self.backbone, "drop_path_rates", ())
        if not self.training or "position" not in batch or not any(rate > 0 for rate in rates):
            return None
        return sample_drop_path(rates, self.seed, batch["position"])


def build_simmim(
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    attention: str = "auto",
    initialise: bool = True,
) -> SimMIM:
    """Build SimMIM from its sections and initialise every parameter from `seed`.

    Args:
        model: the backbone.
        objective: head and target.
        mean, std: one value per channel, as shares of 255.
        seed: of the weights and of drop path.
        attention: implementation of the backbone's window attention.
        initialise: False leaves every parameter as constructed: to count it on the meta device, or to load weights.

    Raises:
        ValueError: an unknown head or target, a mean of the wrong length, or a backbone that lacks what SimMIM needs.
    """
    if not len(mean) == len(std) == model.in_chans:
        raise ValueError(
            f"data.mean and data.std: one value per input channel ({model.in_chans}), got {len(mean)} and {len(std)}."
        )
    with torch.random.fork_rng(devices=[]):  # a backbone of one's own may draw its weights from the global generator
        torch.manual_seed(seed)
        backbone = build_backbone(model, attention=attention, seed=None)
    missing = [name for name in BACKBONE_API if not hasattr(backbone, name)]
    if missing:
        raise ValueError(f"model.name: {model.name} builds a backbone without {', '.join(missing)}. Add what SimMIM calls.")
    target = lookup(TARGETS, objective.target, setting="objective.target")(
        in_chans=model.in_chans, norm_window=objective.norm_target_window
    )
    head = lookup(HEADS, objective.head, setting="objective.head")(
        num_features=backbone.num_features, stride=backbone.stride, channels=target.channels
    )
    module = SimMIM(backbone=backbone, head=head, target=target, mean=mean, std=std, seed=seed)
    if initialise:
        module.init_weights(torch.Generator().manual_seed(seed))
    return module
