"""A backbone by itself: what is left of a checkpoint that came without a head. It can be used and fine-tuned, not trained on.

Letters: b batch, c channels, h w image height and width, th tw token grid of the last stage, d its width.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from simmim_scale.config.schema import ModelConfig
from simmim_scale.models import build_backbone
from simmim_scale.objectives.pixels import PixelNorm, check_image


class FeatureExtractor(nn.Module):
    """A backbone and the normalisation of its images.

    Args:
        backbone: called as backbone(image) -> (b, th, tw, d), normed.
        mean, std: of the channels, as shares of 255.
    """

    def __init__(self, *, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_norm = PixelNorm(tuple(mean), tuple(std))
        self.in_chans = len(tuple(mean))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"image": (b, c, h, w) uint8, or floating and normalised} -> {"tokens": (b, th, tw, d)}."""
        check_image(batch["image"], self.in_chans)
        return {"tokens": self.backbone(self.pixel_norm(batch["image"]))}


def build_feature_extractor(
    model: ModelConfig, *, mean: Sequence[float], std: Sequence[float], attention: str = "auto"
) -> FeatureExtractor:
    """Build one whose parameters are not set yet, to load weights into."""
    return FeatureExtractor(backbone=build_backbone(model, attention=attention, seed=None), mean=mean, std=std)
