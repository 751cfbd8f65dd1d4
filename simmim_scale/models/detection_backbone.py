"""A backbone with a feature pyramid, for torchvision's detectors: `MaskRCNN(load_detection_backbone(DIR), num_classes=91)`.

Letters: b batch, c channels, h w image height and width.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from simmim_scale.config.schema import ModelConfig
from simmim_scale.models import build_backbone
from simmim_scale.models.features import FeaturePyramid
from simmim_scale.models.resizing import parse_model
from simmim_scale.models.weights import load_into, load_weights

PYRAMID_CHANNELS = 256  # of torchvision's own detectors


class DetectionBackbone(nn.Module):
    """Maps of strides 4, 8, 16, 32 through a feature pyramid, and one more of stride 64, pooled. Any image size.

    Args:
        body: maps of the stages, normalised.
        out_channels: of every map; torchvision reads the attribute of this name.
    """

    def __init__(self, body: FeaturePyramid, *, out_channels: int = PYRAMID_CHANNELS) -> None:
        super().__init__()
        self.body = body
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(list(body.channels), out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, image: Float[Tensor, "b c h w"]) -> "OrderedDict[str, Tensor]":
        """Normalised images -> {"0": stride 4, ..., "3": stride 32, "pool": stride 64}, each (b, out_channels, ., .)."""
        return self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(self.body(image))))


def load_detection_backbone(
    directory: str | Path, *, out_channels: int = PYRAMID_CHANNELS, attention: str = "auto"
) -> DetectionBackbone:
    """What `simmim export --to torchvision-detection-backbone` wrote, with a new pyramid (torchvision's initialisation) on top.

    Images have to come normalised by the mean and std that the model card names: `MaskRCNN(..., image_mean=, image_std=)`.

    Raises:
        ValueError: no such export there.
    """
    weights = load_weights(directory)
    body = build_pyramid(parse_model(weights.config["model"]), attention=attention)
    load_into(body, weights.state, source=str(directory))
    return DetectionBackbone(body, out_channels=out_channels)


def build_pyramid(model: ModelConfig, *, attention: str = "auto") -> FeaturePyramid:
    """Every stage's map with a norm of its own, which is the identity's; the backbone's parameters are not set yet."""
    backbone = build_backbone(model, attention=attention, seed=None)
    body = FeaturePyramid(backbone, stages=range(len(backbone.layers)))
    body.init_norms(torch.Generator())
    return body
