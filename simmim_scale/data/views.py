"""What one sample of a batch is made of: the views of pre-training and of its validation.

A view is a picklable callable (pixels, epoch, sample) -> named arrays; `data/dataset.py` stacks them to a batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from simmim_scale.config.schema import DataConfig, MaskConfig
from simmim_scale.data.masks import sample_mask
from simmim_scale.data.random import Stream, sample_rng
from simmim_scale.data.transforms import Crop, centre_crop, resize_crop, sample_crop

Arrays = Mapping[str, Tensor | np.ndarray | bool | int]


@runtime_checkable
class View(Protocol):
    """Turns the pixels of a sample into the entries of a batch: "image" (c, h, w) uint8, and whatever the task needs."""

    def __call__(self, image: UInt8[np.ndarray, "h w c"], *, epoch: int, sample: int) -> Arrays: ...


class CropView:
    """A view that is a crop of the image and entries that do not depend on its pixels. With a `second_size` there is "view", the
    same crop at that size."""

    data: DataConfig
    image_size: tuple[int, int]
    second_size: tuple[int, int] | None

    def draw(self, height: int, width: int, *, epoch: int, sample: int) -> tuple[Crop, dict[str, np.ndarray | bool]]:
        """The crop of an image of this size, and the entries of the batch besides "image"."""
        raise NotImplementedError

    def __call__(self, image: UInt8[np.ndarray, "h w c"], *, epoch: int, sample: int) -> Arrays:
        crop, entries = self.draw(*image.shape[:2], epoch=epoch, sample=sample)
        views = {"image": resize_crop(image, crop, size=self.image_size, interpolation=self.data.interpolation)}
        if self.second_size is not None:  # the same crop, for targets that look at it at a size of their own
            views["view"] = resize_crop(image, crop, size=self.second_size, interpolation=self.data.interpolation)
        return {**views, **entries}


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

    def draw(self, height: int, width: int, *, epoch: int, sample: int) -> tuple[Crop, dict[str, np.ndarray | bool]]:
        rng = sample_rng(self.seed, epoch, sample, Stream.VIEW)
        crop = sample_crop(rng, height, width, scale=self.data.crop_scale, ratio=self.data.crop_ratio)
        mask = draw_mask(sample_rng(self.seed, epoch, sample, Stream.MASK), self.mask, self.image_size)
        return crop, {"mask": mask, "flip": bool(rng.random() < self.data.flip)}


@dataclass(frozen=True)
class ValidationView(CropView):
    """The centre of the image under a mask drawn from (seed, sample): the same at every validation, so that losses compare."""

    data: DataConfig
    mask: MaskConfig
    image_size: tuple[int, int]
    seed: int
    second_size: tuple[int, int] | None = None

    def draw(self, height: int, width: int, *, epoch: int, sample: int) -> tuple[Crop, dict[str, np.ndarray | bool]]:
        crop = centre_crop(height, width, aspect=self.image_size[1] / self.image_size[0])
        mask = draw_mask(sample_rng(self.seed, 0, sample, Stream.VALIDATION_MASK), self.mask, self.image_size)
        return crop, {"mask": mask, "flip": False}


def draw_mask(rng: np.random.Generator, mask: MaskConfig, image_size: tuple[int, int]) -> np.ndarray:
    """(h / cell, w / cell) bool, True where hidden."""
    grid = (image_size[0] // mask.cell, image_size[1] // mask.cell)
    return sample_mask(rng, grid=grid, ratio=mask.ratio, sampler=mask.sampler)
