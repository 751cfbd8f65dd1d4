"""What is hidden of an image, and what is predicted."""

from typing import Literal

from pydantic import PositiveInt, field_validator

from simmim_scale.config.section import Section, setting


class ObjectiveConfig(Section):
    """What SimMIM predicts from the encoded tokens."""

    head: str = setting("linear", "Prediction head: a name of `objectives/heads.py`, or 'module:attribute'.", source="S table 3")
    target: str = setting(
        "pixels", "Prediction target: a name of `objectives/targets.py`, or 'module:attribute'.", source="S table 4"
    )
    norm_target_window: int | None = setting(
        None,
        "Normalise the target by mean and variance of a sliding window of this odd side; null: plain pixels. 47 in SwinV2.",
        unit="pixels",
        source="R",
    )

    loss: Literal["l1", "smooth_l1", "l2"] = setting("l1", "Error of a predicted pixel.", source="R")
    smooth_l1_beta: float = setting(
        1.0, "smooth_l1: where the error turns from a parabola into a line.", unit="of the target", source="choice", gt=0
    )
    downsample: PositiveInt = setting(
        1,
        "Pixels of the image per predicted pixel and side: at 192 px, 1 predicts 192^2, 4 48^2 and 32 6^2.",
        unit="pixels",
        source="S table 6",
    )

    @field_validator("norm_target_window")
    @classmethod
    def _odd(cls, value: int | None) -> int | None:
        if value is not None and (value < 3 or value % 2 == 0):
            raise ValueError(
                f"norm_target_window: an odd number of at least 3, got {value}. The published value is 47; null turns it off."
            )
        return value


class MaskConfig(Section):
    """Which part of an image is hidden. The unit is a square cell of pixels."""

    sampler: Literal["random", "block", "square"] = setting(
        "random", "random: cells drawn independently; block: rectangles as in BEiT; square: one square.", source="S figure 1"
    )
    cell: PositiveInt = setting(32, "Side of a cell.", unit="pixels", source="R")
    ratio: float = setting(
        0.6, "Share of cells that are hidden, rounded up to whole cells.", unit="share", source="R", gt=0, lt=1
    )
