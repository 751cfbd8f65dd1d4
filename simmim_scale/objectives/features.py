"""Features of whole images for probes: the mean over each stage's map, from the same forward pass as everything else.

Letters: b batch, c channels, h w height and width, d channels of a stage.
"""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

PROBE = "probe"  # the key of a batch that asks for features in eval mode


def wants_features(batch: Mapping[str, Tensor]) -> bool:
    """Whether a batch is for a probe."""
    return PROBE in batch


def pooled_features(backbone: nn.Module, image: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b d"]]:
    """{"features_0": (b, d0), ...}: the mean of each stage's map in fp32, the last one after the final norm.

    A backbone without `features` has one stage, its encoded tokens.

    Args:
        image: normalised, in the type of the weights.
    """
    if hasattr(backbone, "features"):
        return {f"features_{stage}": map_.float().mean((2, 3)) for stage, map_ in enumerate(backbone.features(image))}
    return {"features_0": backbone.encode(backbone.embed(image)).float().mean((1, 2))}
