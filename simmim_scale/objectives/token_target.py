"""BEiT's target: the codes that a frozen discrete VAE gives a second view of the same crop, at its own size.

How the codes meet the tokens of the last stage: an image of 192 px and a view of 96 px make 12x12 codes of 16 image pixels, two
by two in a token of stride 32, and every token predicts its own four ("split"). A view of 112 px, BEiT's own, makes 14x14 codes,
which 6x6 tokens do not divide into: features are resampled bilinearly to 14x14, and a code is hidden where its centre is
("resample").
Letters: b batch, h w image height and width, th tw codes per side.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simmim_scale.models.dvae import COLOURS, STRIDE, Tokenizer, encode, shapes
from simmim_scale.objectives.class_target import ClassTarget
from simmim_scale.objectives.pixels import PixelNorm
from simmim_scale.objectives.prediction import Pictures
from simmim_scale.objectives.targets import TargetContext


def build(context: TargetContext) -> "Tokens":
    """As the configuration says. Raises ValueError where tokenizer, second view and image do not fit each other."""
    settings = context.settings
    if settings.tokenizer is None:
        raise ValueError(
            "objective.tokenizer: the target 'tokens' needs the weights of a discrete VAE. Give a file of DALL-E's encoder, or"
            " train one with `simmim fit-tokenizer SHARDS --out tokenizer.safetensors`."
        )
    view = settings.second_size(context.image_size)
    if settings.second_view is None or view is None:
        raise ValueError("objective.second_view: the target 'tokens' needs a second view. Set its height in pixels: 112 in BEiT.")
    if context.in_chans != COLOURS:
        raise ValueError(f"objective.target: 'tokens' needs RGB pictures, model.in_chans is {context.in_chans}.")
    if view[0] % STRIDE or view[1] % STRIDE:
        raise ValueError(
            f"objective.second_view: a code stands for {STRIDE}x{STRIDE} pixels, which {view[0]}x{view[1]} do not divide into."
            f" Choose a multiple of {STRIDE}."
        )
    grid = (view[0] // STRIDE, view[1] // STRIDE)
    scale = None if settings.token_grid == "resample" else _split_scale(grid, context.image_size, context.stride)
    return Tokens(
        tokenizer=Tokenizer(Path(settings.tokenizer)), grid=grid, scale=scale, norm=context.norm, logits_mib=settings.logits_mib
    )


def _split_scale(grid: tuple[int, int], image_size: tuple[int, int], stride: int) -> int:
    """Image pixels per code, where whole codes lie in every token or whole tokens in every code."""
    scale = image_size[0] // grid[0]
    fits = all(side == count * scale for side, count in zip(image_size, grid, strict=True))
    if fits and (stride % scale == 0 or scale % stride == 0):
        return scale
    tokens = tuple(-(-side // stride) for side in image_size)
    raise ValueError(
        f"objective.second_view: {grid[0]}x{grid[1]} codes do not divide evenly among the {tokens[0]}x{tokens[1]} tokens of the"
        f" last stage. Choose a second view of a multiple of {STRIDE * tokens[0]} pixels"
        f" ({2 * STRIDE * tokens[0]}: 2x2 codes a token), or set objective.token_grid=resample."
    )


class Tokens(ClassTarget):
    """Codes of a frozen tokenizer.

    Args:
        tokenizer: frozen.
        grid: codes per side.
        scale: image pixels per code and side; None: features are resampled to the grid.
    """

    def __init__(
        self, *, tokenizer: Tokenizer, grid: tuple[int, int], scale: int | None, norm: PixelNorm, logits_mib: int
    ) -> None:
        super().__init__(groups=1, classes=tokenizer.sizes.codes, logits_mib=logits_mib)
        self.tokenizer, self.norm, self.codes_per_side = tokenizer, norm, grid
        self.grid = grid if scale is None else None
        self.scale = 1 if scale is None else scale

    def labels(self, pictures: Pictures) -> Int[Tensor, "b 1 th tw"]:
        """Codes of the second view."""
        wanted = tuple(STRIDE * side for side in self.codes_per_side)
        found = None if pictures.view is None else tuple(pictures.view.shape[2:])
        if found != wanted:
            raise ValueError(
                f"batch: the target 'tokens' needs 'view' of {wanted[0]}x{wanted[1]} pixels, got {found}."
                " The loader makes it for objective.second_view."
            )
        return self.tokenizer.codes(pictures.view)[:, None].short()

    def multiply_adds(self) -> int:
        """Of the encoder on one second view."""
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes(self.tokenizer.sizes).items()}
        with FlopCounterMode(display=False) as counter:
            encode(state, torch.empty(1, COLOURS, *(STRIDE * side for side in self.codes_per_side), device="meta"))
        return counter.get_total_flops() // 2  # the counter counts a multiply-add as two

    def to_pixels(self, summary: Int[Tensor, "b 1 th tw"], pictures: Pictures) -> Float[Tensor, "b 3 h w"]:
        """What the tokenizer's decoder makes of the codes. Without a decoder: the true picture where the code is right, else the
        mean colour."""
        mean, std = self.norm.constants(summary.device)
        if self.tokenizer.has_decoder:
            drawn = F.interpolate(self.tokenizer.pictures(summary[:, 0]), pictures.size, mode="bilinear", align_corners=False)
            return (drawn - mean) / std
        right = F.interpolate((summary == self.labels(pictures)).float(), pictures.size, mode="nearest-exact")
        return torch.where(right > 0, pictures.image, torch.zeros_like(pictures.image))
