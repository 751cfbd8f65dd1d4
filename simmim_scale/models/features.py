"""Feature maps for detection and segmentation: a backbone's stages, each with a LayerNorm of its own.

Letters: b batch, c channels, h w tokens per axis.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.models.hierarchy import HierarchicalBackbone
from simmim_scale.models.initialization import assign, constant
from simmim_scale.models.norms import TokenNorm


class FeaturePyramid(nn.Module):
    """Normalised maps of chosen stages (Swin detection and segmentation code: norm0 ... norm3).

    Args:
        backbone: its final norm is not used; the last stage gets its own norm like the others.
        stages: indices of the maps to return; stage i has stride `backbone.stage_strides[i]`.
    """

    def __init__(self, backbone: HierarchicalBackbone, stages: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        unknown = [stage for stage in stages if stage not in range(len(backbone.layers))]
        if unknown:
            raise ValueError(f"stages: the backbone has stages 0 to {len(backbone.layers) - 1}, got {unknown}.")
        self.stages = tuple(stages)
        self.backbone = backbone
        self.channels = tuple(backbone.stage_dims[stage] for stage in self.stages)
        self.strides = tuple(backbone.stage_strides[stage] for stage in self.stages)
        self.norms = nn.ModuleDict({str(stage): TokenNorm(backbone.stage_dims[stage]) for stage in self.stages})

    def init_norms(self, generator: torch.Generator) -> None:
        """Set the new norms to the identity; the backbone keeps its weights."""
        for norm in self.norms.values():
            assign(norm.weight, constant(1.0), generator)
            assign(norm.bias, constant(0.0), generator)

    def forward(self, image: Float[Tensor, "b chans height width"]) -> list[Float[Tensor, "b c h w"]]:
        """One map per chosen stage, channels first in shape and channels last in memory."""
        maps = self.backbone.features(image, final_norm=False)
        return [self.norms[str(stage)](maps[stage].permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for stage in self.stages]
