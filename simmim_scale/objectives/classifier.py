"""Classification: mean over the last stage's tokens, one linear map to classes. Names follow the published checkpoints.

Letters: b batch, c channels, h w image height and width, k classes.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.config.schema import ModelConfig
from simmim_scale.models import build_backbone
from simmim_scale.models.initialization import assign, constant, trunc_normal
from simmim_scale.models.layers import Linear
from simmim_scale.objectives.pixels import PixelNorm, check_image


class Classifier(nn.Module):
    """A backbone, mean pooling and a linear head.

    Args:
        backbone: called as backbone(image) -> (b, th, tw, num_features), normed.
        num_classes: k.
        mean, std: of the channels, as shares of 255.
    """

    def __init__(self, *, backbone: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Linear(backbone.num_features, num_classes)
        self.pixel_norm = PixelNorm(tuple(mean), tuple(std))
        self.in_chans = len(tuple(mean))

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def init_weights(self, generator: torch.Generator) -> None:
        """Set every parameter from a CPU generator; the head as published: N(0, .02) and biases 0."""
        self.backbone.init_weights(generator)
        assign(self.head.weight, trunc_normal(), generator)
        assign(self.head.bias, constant(0.0), generator)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"image": (b, c, h, w) uint8, or floating and normalised} -> {"logits": (b, k)}."""
        check_image(batch["image"], self.in_chans)
        return {"logits": self.head(self.pool(self.pixel_norm(batch["image"])))}

    def pool(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Mean of the normed tokens of a normalised image."""
        return self.backbone(image.to(self.head.weight.dtype)).mean((1, 2))


def build_classifier(
    model: ModelConfig,
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    attention: str = "auto",
    initialise: bool = True,
) -> Classifier:
    """Build a classifier; `initialise=False` leaves its parameters as constructed, to load weights into them."""
    backbone = build_backbone(model, attention=attention, seed=None)
    module = Classifier(backbone=backbone, num_classes=num_classes, mean=mean, std=std)
    if initialise:
        module.init_weights(torch.Generator().manual_seed(seed))
    return module
