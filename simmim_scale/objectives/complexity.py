"""How large head and target are: parameters, and what they compute for one image."""

from dataclasses import dataclass

from simmim_scale.models.complexity import count_parameters
from simmim_scale.objectives.simmim import SimMIM


@dataclass(frozen=True)
class ObjectiveSizes:
    """Of the part that is not the backbone.

    Attributes:
        head_parameters: of the head.
        target_multiply_adds: of what a target runs on an image itself (a tokenizer); 0: elementwise work only.
        predicted: (numbers for a predicted pixel, predicted rows, predicted columns).
        patch: predicted pixels per token of the last stage and side.
    """

    head_parameters: int
    target_multiply_adds: int
    predicted: tuple[int, int, int]
    patch: int


def objective_sizes(module: SimMIM, image_size: tuple[int, int]) -> ObjectiveSizes:
    """Sizes for one image of `image_size`; the module may be on the meta device."""
    target = module.target
    grid = target.grid or tuple(-(-side // target.scale) for side in image_size)
    return ObjectiveSizes(
        head_parameters=count_parameters(module.head),
        target_multiply_adds=target.multiply_adds(),
        predicted=(target.channels, *grid),
        patch=module.meeting.patch,
    )
