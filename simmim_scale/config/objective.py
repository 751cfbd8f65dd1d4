"""What is hidden of an image, and what is predicted."""

import difflib
import re
from typing import Any, Literal

from pydantic import PositiveInt, field_validator, model_validator

from simmim_scale.config.section import Section, setting

CLASS_TARGETS = ("bins", "clusters", "tokens")
MASK_SAMPLERS = ("random", "block", "square")  # of data/masks.py


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

    bins: int = setting(8, "Target bins: classes of each channel.", unit="classes", source="S table 4", ge=2, le=256)
    centres: str | None = setting(
        None, "Target clusters: .npy file of RGB centres, (n, 3) in [-1, 1], of `data_tools fit-clusters` or iGPT.", source="S"
    )
    tokenizer: str | None = setting(
        None,
        "Target tokens: weights of a discrete VAE (DALL-E's names), of `simmim fit-tokenizer` or the released ones.",
        source="S",
    )
    second_view: PositiveInt | None = setting(
        None, "Height of a second view of every crop, which tokens are read from; null: none. 112 in BEiT.", unit="pixels"
    )
    token_grid: Literal["split", "resample"] = setting(
        "split",
        "Target tokens: split: each token of the last stage predicts the whole codes that lie in it; resample: features are"
        " resampled to the grid of codes, which may be any.",
        source="choice",
    )
    logits_mib: PositiveInt = setting(
        256, "Targets of classes: most memory of logits that exist at once.", unit="MiB", source="choice"
    )
    head_options: dict[str, Any] = setting({}, "Keyword arguments of the head, for instance {window: 7} of an inverse Swin.")

    @model_validator(mode="after")
    def _used(self) -> "ObjectiveConfig":
        errors = {"norm_target_window": self.norm_target_window is not None, "loss": self.loss != "l1"}
        if self.target in CLASS_TARGETS and any(errors.values()):
            given = ", ".join(name for name, is_given in errors.items() if is_given)
            raise ValueError(
                f"{given}: the target {self.target!r} has the cross-entropy of its classes. Leave {given} at the default."
            )
        if self.target == "tokens" and self.downsample != 1:
            raise ValueError("downsample: the target 'tokens' has the resolution of second_view. Leave downsample at 1.")
        return self

    def second_size(self, image_size: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width of the second view: the image's shape at the height `second_view`; None: there is none."""
        if self.second_view is None:
            return None
        return self.second_view, round(self.second_view * image_size[1] / image_size[0])

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

    sampler: str = setting(
        "random",
        "random: cells drawn independently; block: rectangles as in BEiT; square: one square; or 'module:attribute'.",
        source="S figure 1",
    )
    cell: PositiveInt = setting(32, "Side of a cell.", unit="pixels", source="R")
    ratio: float = setting(
        0.6, "Share of cells that are hidden, rounded up to whole cells.", unit="share", source="R", gt=0, lt=1
    )

    @field_validator("sampler")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in MASK_SAMPLERS and not re.fullmatch(r"[\w.]+:[\w.]+", value):
            close = difflib.get_close_matches(value, MASK_SAMPLERS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"sampler: one of {', '.join(MASK_SAMPLERS)}, or 'module:attribute', got {value!r}.{hint}")
        return value
