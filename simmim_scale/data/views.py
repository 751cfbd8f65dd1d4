"""What one sample of a batch is made of: the views of pre-training and of its validation.

A view is picklable and works in two steps: `draw` does all that is random, and calling the view with pixels and these draws gives
the arrays that `data/dataset.py` stacks to a batch. Draws belong to the sample that was ordered, whatever image replaces it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from simmim_scale.config.schema import DataConfig, MaskConfig
from simmim_scale.data.masks import sample_mask
from simmim_scale.data.random import DrawnAhead, Stream, sample_rng
from simmim_scale.data.transforms import CROP_DRAWS, Crop, centre_crop, resize_crop, sample_crop

Arrays = Mapping[str, Tensor | np.ndarray | bool | int]


@runtime_checkable
class View(Protocol):
    """Turns the pixels of a sample into the entries of a batch: "image" (c, h, w) uint8, and whatever the task needs."""

    def draw(self, *, epoch: int, sample: int) -> Any:
        """All that is random about the view of a sample."""

    def __call__(self, image: UInt8[np.ndarray, "h w c"], draws: Any) -> Arrays: ...


class CropView:
    """A view that is a crop of the image and entries that do not depend on its pixels. With a `second_size` there is "view", the
    same crop at that size."""

    data: DataConfig
    image_size: tuple[int, int]
    second_size: tuple[int, int] | None

    def place(self, height: int, width: int, draws: Any) -> tuple[Crop, dict[str, np.ndarray | bool]]:
        """The crop of an image of this size, and the entries of the batch besides "image"."""
        raise NotImplementedError

    def __call__(self, image: UInt8[np.ndarray, "h w c"], draws: Any) -> Arrays:
        crop, entries = self.place(*image.shape[:2], draws)
        views = {"image": resize_crop(image, crop, size=self.image_size, interpolation=self.data.interpolation)}
        if self.second_size is not None:  # the same crop, for targets that look at it at a size of their own
            views["view"] = resize_crop(image, crop, size=self.second_size, interpolation=self.data.interpolation)
        return {**views, **entries}


class PretrainingDraws(NamedTuple):
    """Numbers for the crop and the flip, and the mask."""

    numbers: DrawnAhead
    mask: np.ndarray


@dataclass(frozen=True)
class PretrainingView(CropView):
    """Random crop, flip and mask, drawn from (seed, epoch, sample).

    The flip is a flag: the device applies it to the image. The mask belongs to the image as the model sees it, after the flip.
    """

    data: DataConfig
    mask: MaskConfig
    image_size: tuple[int, int]
    seed: int
    second_size: tuple[int, int] | None = None

    def draw(self, *, epoch: int, sample: int) -> PretrainingDraws:
        mask = draw_mask(sample_rng(self.seed, epoch, sample, Stream.MASK), self.mask, self.image_size)
        return PretrainingDraws(draw_crop_and_flip(self.seed, epoch, sample), mask)

    def place(self, height: int, width: int, draws: PretrainingDraws) -> tuple[Crop, dict[str, np.ndarray | bool]]:
        crop = sample_crop(draws.numbers, height, width, scale=self.data.crop_scale, ratio=self.data.crop_ratio)
        return crop, {"mask": draws.mask, "flip": draws.numbers.random() < self.data.flip}


@dataclass(frozen=True)
class ValidationView(CropView):
    """The centre of the image under a mask drawn from (seed, sample): the same at every validation, so that losses compare."""

    data: DataConfig
    mask: MaskConfig
    image_size: tuple[int, int]
    seed: int
    second_size: tuple[int, int] | None = None

    def draw(self, *, epoch: int, sample: int) -> np.ndarray:
        """The mask."""
        return draw_mask(sample_rng(self.seed, 0, sample, Stream.VALIDATION_MASK), self.mask, self.image_size)

    def place(self, height: int, width: int, draws: np.ndarray) -> tuple[Crop, dict[str, np.ndarray | bool]]:
        return centre_crop(height, width, aspect=self.image_size[1] / self.image_size[0]), {"mask": draws, "flip": False}


def draw_crop_and_flip(seed: int, epoch: int, sample: int) -> DrawnAhead:
    """Numbers for `sample_crop` and one more, which decides the flip."""
    return DrawnAhead(sample_rng(seed, epoch, sample, Stream.VIEW), CROP_DRAWS + 1)


def draw_mask(rng: np.random.Generator, mask: MaskConfig, image_size: tuple[int, int]) -> np.ndarray:
    """(h / cell, w / cell) bool, True where hidden."""
    grid = (image_size[0] // mask.cell, image_size[1] // mask.cell)
    return sample_mask(rng, grid=grid, ratio=mask.ratio, sampler=mask.sampler)
