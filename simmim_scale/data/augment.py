"""timm's RandAugment and random erasing as pure functions of a generator: they draw from global generators, which are set for the
time of a call and put back.

Letters: h, w = height and width in pixels, c = channels.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

RAND_AUGMENT = re.compile(r"rand(-(m|n|w|p|mstd|mmax|inc)(\d+(\.\d+)?|inf))+")
TRANSLATION = 0.45  # most that RandAugment moves an image, as a share of its shorter side (timm)


@contextmanager
def seeded_globally(rng: np.random.Generator) -> Iterator[None]:
    """The global generators of Python, numpy and torch (CPU) start from a draw of `rng` inside the block, and go on after it as
    if nothing had been drawn."""
    seed = int(rng.integers(2**32))
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.random.default_generator.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


@dataclass(frozen=True)
class Augment:
    """RandAugment, then random erasing.

    Args:
        rand_augment: timm's description, such as "rand-m9-mstd0.5-inc1"; None: none.
        random_erasing: probability that a rectangle is filled with noise, normal in normalised pixels. Pixels are bytes here, so
            the noise is rounded and cut at black and white (about 2 standard deviations).
        image_size: of the images, height and width.
        mean, std: of the channels, as shares of 255.
        interpolation: "bilinear" or "bicubic", of RandAugment's rotations, shears and shifts.
    """

    rand_augment: str | None
    random_erasing: float
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def check(self) -> None:
        """Raise ValueError for a description that timm does not understand, or channels that it cannot augment."""
        if self.rand_augment is None:
            return
        if len(self.mean) not in (1, 3):
            raise ValueError(
                f"classification.rand_augment: works on images of 1 or 3 channels, got {len(self.mean)}."
                " Set classification.rand_augment to null."
            )
        if not RAND_AUGMENT.fullmatch(self.rand_augment):  # timm itself skips over what it does not know
            raise ValueError(
                f"classification.rand_augment: expected RandAugment in timm's notation, got {self.rand_augment!r}."
                " The published one is rand-m9-mstd0.5-inc1; null turns it off."
            )

    def __call__(self, image: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> UInt8[Tensor, "c h w"]:
        if self.rand_augment is None and not self.random_erasing:
            return image
        with seeded_globally(rng):
            if self.rand_augment is not None:
                image = _from_picture(self._rand_augment(_as_picture(image)))
            return self._erase(image) if self.random_erasing else image

    @cached_property
    def _rand_augment(self) -> Any:
        from timm.data.auto_augment import rand_augment_transform

        fill = tuple(min(255, round(255 * value)) for value in self.mean)
        resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[self.interpolation]
        hints = {
            "translate_const": int(min(self.image_size) * TRANSLATION),
            "img_mean": fill if len(fill) == 3 else fill[0],
            "interpolation": resample,
        }
        return rand_augment_transform(self.rand_augment, hints)

    @cached_property
    def _erasing(self) -> Any:
        from timm.data.random_erasing import RandomErasing

        return RandomErasing(probability=self.random_erasing, mode="pixel", max_count=1, num_splits=0, device="cpu")

    def _erase(self, image: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "c h w"]:
        # NaN is no normal draw: what is none afterwards was erased. Normalising the whole image for it would cost more.
        noise = self._erasing(torch.full(image.shape, torch.nan))
        kept = noise.isnan()
        if bool(kept.all()):
            return image
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = ((noise * std + mean) * 255).round().clamp(0, 255).nan_to_num(0).to(torch.uint8)
        return torch.where(kept, image, pixels)


def _as_picture(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _from_picture(picture: Image.Image) -> UInt8[Tensor, "c h w"]:
    pixels = np.array(picture)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
