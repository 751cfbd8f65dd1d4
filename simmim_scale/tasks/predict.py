"""A classifier on pictures of one's own: `simmim predict`, and from Python `simmim_scale.load_classifier(DIR)`.

Letters: b pictures, c channels, h w height and width of the model's input, k classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simmim_scale.config.schema import Config
from simmim_scale.data.decode import DecodeError, decode_image
from simmim_scale.objectives.classifier import Classifier
from simmim_scale.tasks.classification.task import tested_view
from simmim_scale.tasks.pretrained import load_pretrained

# A file, an opened picture, or pixels (h, w, c) or (h, w) uint8.
Picture = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Guess:
    """One class that a picture may show: its number, its name ("class 12" where nobody stored names), and its probability."""

    label: int
    name: str
    probability: float


class PictureClassifier:
    """A classifier and all that it takes to use it on pictures: the view it was tested with, and the names of its classes.

    Attributes:
        module: in eval mode; move it to a device with `to`.
        class_names: in the order of the logits; () where the weights do not tell them.
    """

    def __init__(self, module: Classifier, config: Config, class_names: Sequence[str]) -> None:
        self.module, self.config, self.class_names = module.eval(), config, tuple(class_names)
        self._view = tested_view(config)

    def to(self, device: str | torch.device) -> "PictureClassifier":
        """The same classifier, its parameters on a device."""
        self.module.to(device)
        return self

    def prepare(self, pictures: Sequence[Picture]) -> Tensor:
        """(b, c, h, w) uint8: the part of each picture that the model was tested on, in its input size.

        Raises:
            ValueError: a file that is missing or no picture, or pixels of another type or number of channels.
        """
        channels = self.config.model.in_chans
        views = [self._view(read_picture(picture, in_chans=channels))["image"] for picture in pictures]
        return torch.stack([torch.as_tensor(view) for view in views])

    @torch.inference_mode()
    def probabilities(self, pictures: Sequence[Picture], *, batch: int = 16) -> Tensor:
        """(b, k) fp32 on the CPU, each row adding up to 1; `batch` pictures are computed at once."""
        device = next(self.module.parameters()).device
        rows = []
        for start in range(0, len(pictures), batch):
            image = self.prepare(pictures[start : start + batch]).to(device)
            rows.append(self.module({"image": image})["logits"].float().softmax(-1).cpu())
        return torch.cat(rows) if rows else torch.zeros(0, self.module.num_classes)

    def predict(self, pictures: Sequence[Picture], *, top: int = 5, batch: int = 16) -> list[list[Guess]]:
        """For each picture its `top` most probable classes, the best first (all of them where there are fewer).

        Raises:
            ValueError: as `prepare`.
        """
        values, labels = self.probabilities(pictures, batch=batch).topk(min(top, self.module.num_classes))
        return [
            [Guess(label, self.name(label), value) for value, label in zip(row_values, row_labels, strict=True)]
            for row_values, row_labels in zip(values.tolist(), labels.tolist(), strict=True)
        ]

    def name(self, label: int) -> str:
        """The name of a class."""
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"


def load_classifier(directory: str | Path, *, attention: str = "auto") -> PictureClassifier:
    """The classifier in a run directory or a directory of weights, on the CPU.

    Raises:
        ValueError: no weights there, or not those of a classifier.
    """
    pretrained = load_pretrained(directory, attention=attention)
    if not isinstance(pretrained.module, Classifier):
        raise ValueError(
            f"weights: {directory} holds a {pretrained.config.task} model, which names no classes. Fine-tune it first:"
            f" simmim finetune CONFIG init_from={directory}."
        )
    return PictureClassifier(pretrained.module, pretrained.config, pretrained.class_names)


def read_picture(picture: Picture, *, in_chans: int) -> np.ndarray:
    """(h, w, in_chans) uint8. Files are decoded as in training: orientation applied, colours converted.

    Raises:
        ValueError: missing, no picture, or of another type.
    """
    if isinstance(picture, np.ndarray):
        return _checked(picture, in_chans)
    if isinstance(picture, Image.Image):
        if in_chans not in (1, 3):
            raise ValueError(f"picture: the model takes {in_chans} channels. Give pixels as an array (h, w, {in_chans}) uint8.")
        pixels = np.asarray(picture.convert("L" if in_chans == 1 else "RGB"))
        return np.ascontiguousarray(pixels[..., None] if pixels.ndim == 2 else pixels)
    path = Path(picture)
    try:
        return decode_image(path.read_bytes(), in_chans=in_chans)
    except OSError as error:
        raise ValueError(f"picture: cannot read {path} ({error.strerror}). Give an image file.") from error
    except DecodeError as error:
        raise ValueError(f"picture: {path} cannot be decoded: {error}. Give a JPEG, PNG or another common image file.") from error


def _checked(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] != in_chans or pixels.dtype != np.uint8 or pixels.size == 0:
        raise ValueError(
            f"picture: expected pixels (height, width, {in_chans}) uint8, got {pixels.shape} {pixels.dtype}."
            " Put channels last, values 0 to 255."
        )
    return pixels
