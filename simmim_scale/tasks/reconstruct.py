"""`simmim reconstruct`: hide parts of a picture of one's own and let a pre-trained model fill them in. No loader, no shards.

Letters: b = 1 picture, c channels, h w height and width, gh gw mask grid.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simmim_scale.config.load import validate
from simmim_scale.config.schema import Config, MaskConfig
from simmim_scale.config.yaml_source import Source
from simmim_scale.data.decode import DecodeError, decode_image
from simmim_scale.data.masks import sample_mask
from simmim_scale.data.random import Stream, sample_rng
from simmim_scale.data.transforms import centre_crop, resize_crop
from simmim_scale.objectives.simmim import SimMIM
from simmim_scale.reports.reconstructions import draw_reconstructions, fill_hidden, hide, save_picture
from simmim_scale.tasks.pretrained import load_pretrained

DRAWN_CHANNELS = (1, 3)


@dataclass(frozen=True)
class Reconstruction:
    """What was drawn: the PNG, the loss on hidden pixels (in the target's units), hidden cells of all, and whether the
    prediction was mapped back with the local mean and variance of the true picture (models with a normalised target)."""

    path: Path
    loss: float
    hidden: int
    cells: int
    local_statistics: bool


def reconstruct(
    directory: str | Path,
    photo: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    ratio: float | None = None,
    cell: int | None = None,
    sampler: str | None = None,
) -> Reconstruction:
    """Draw original | masked | prediction of one picture, which may have any size: its centre is cut out and resized.

    A model with a normalised target predicts only detail relative to its surroundings; its prediction is drawn with the local
    mean and variance of the true picture, also inside hidden cells. The result says so.

    Args:
        directory: run directory or portable weights of a pre-training.
        photo: image file.
        out: PNG to write.
        seed: of the mask.
        ratio, cell, sampler: of the mask; None: as in training.

    Raises:
        ValueError: weights or picture cannot be read, the weights are no pre-training, or the mask does not fit the image.
    """
    pretrained = load_pretrained(directory)
    module = pretrained.module
    if not isinstance(module, SimMIM):
        raise ValueError(f"weights: {directory} holds a {pretrained.config.task} model. Give the weights of a pre-training.")
    if module.in_chans not in DRAWN_CHANNELS:
        raise ValueError(f"model.in_chans: pictures of 1 or 3 channels can be drawn, this model takes {module.in_chans}.")
    config = with_mask(pretrained.config, {"ratio": ratio, "cell": cell, "sampler": sampler})
    size, second = config.model.image_size, config.objective.second_size(config.model.image_size)
    views = {"image": read_photo(Path(photo), config, size=size)}
    if second is not None:
        views["view"] = read_photo(Path(photo), config, size=second)
    mask = draw_mask(config.mask, config.model.image_size, seed)
    with torch.inference_mode():
        batch = {"mask": torch.from_numpy(mask)[None], **{name: view[None] for name, view in views.items()}}
        parts = module(batch)
        rows = reconstruction_rows(module, batch, parts["prediction"])
    save_picture(draw_reconstructions(rows), Path(out))
    return Reconstruction(
        path=Path(out),
        loss=parts["loss"].item(),
        hidden=int(mask.sum()),
        cells=mask.size,
        local_statistics=config.objective.norm_target_window is not None,
    )


def with_mask(config: Config, changes: dict[str, object]) -> Config:
    """The configuration with some mask settings replaced (None: kept), checked as a whole. Raises ValueError if they do not
    fit."""
    tree = config.model_dump(mode="json")
    tree["mask"].update({key: value for key, value in changes.items() if value is not None})
    return validate(Source(tree=tree))


def read_photo(path: Path, config: Config, *, size: tuple[int, int]) -> Tensor:
    """(c, h, w) uint8: the picture's centre in the shape of the model's input, at `size`."""
    try:
        pixels = decode_image(path.read_bytes(), in_chans=config.model.in_chans)
    except OSError as error:
        raise ValueError(f"photo: cannot read {path} ({error.strerror}). Give an image file.") from error
    except DecodeError as error:
        raise ValueError(f"photo: {path} cannot be decoded: {error}. Give a JPEG, PNG or another common image file.") from error
    height, width = config.model.image_size
    crop = centre_crop(*pixels.shape[:2], aspect=width / height)
    return resize_crop(pixels, crop, size=size, interpolation=config.data.interpolation)


def draw_mask(mask: MaskConfig, image_size: tuple[int, int], seed: int) -> np.ndarray:
    """(gh, gw) bool, True = hidden; a function of the seed alone."""
    grid = (image_size[0] // mask.cell, image_size[1] // mask.cell)
    rng = sample_rng(seed, 0, 0, Stream.VALIDATION_MASK)
    return sample_mask(rng, grid=grid, ratio=mask.ratio, sampler=mask.sampler)


def reconstruction_rows(
    module: SimMIM, batch: dict[str, Tensor], prediction: Tensor
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(original, masked, prediction in hidden cells) of every picture of a batch, each (h, w, c) uint8.

    Args:
        prediction: (b, o, rh, rw), the target's summary, as the module returns it.
    """
    pictures, mask = module.prepare(batch)
    predicted = module.target.to_pixels(prediction, pictures)
    originals, predictions = (_to_uint8(module, pixels) for pixels in (pictures.image, predicted))
    return [
        (original, hide(original, hidden), fill_hidden(original, guess, hidden))
        for original, guess, hidden in zip(originals, predictions, mask.cpu().numpy(), strict=True)
    ]


def _to_uint8(module: SimMIM, pixels: Tensor) -> np.ndarray:
    images = module.pixel_norm.invert(pixels).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    # Of other numbers of bands the first three are drawn in colour, or the first one in grey.
    return images if images.shape[-1] in DRAWN_CHANNELS else images[..., : 3 if images.shape[-1] > 3 else 1]
