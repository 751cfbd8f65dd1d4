"""What a classifier said about every sample, and the figures that follow: counts by class, confusion, calibration.

Everything is computed from predictions sorted by sample, so figures do not depend on how many ranks made them.
Letters: n samples, k classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmim_scale.tasks.classification.evaluators import ranks_of_labels

Batch = Mapping[str, Tensor]
CALIBRATION_BINS = 15  # of equal width, as in Guo et al. 2017, arXiv 1706.04599


@dataclass(frozen=True)
class Predictions:
    """Predictions of n samples, by sample number.

    Attributes:
        sample, label, predicted: (n,) int64: number in the set, right class, most probable class.
        rank: (n,) int64: classes that scored higher than the right one; 0: right.
        confidence: (n,) float64: probability of the predicted class.
        loss: (n,) float64: cross-entropy.
        num_classes: k.
    """

    sample: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def right(self) -> np.ndarray:
        """(n,) bool."""
        return self.rank == 0

    @cached_property
    def confusion(self) -> dict[tuple[int, int], int]:
        """How often each (right class, predicted class) came, right ones included; pairs that never came are left out."""
        pairs, counts = np.unique(self.label * self.num_classes + self.predicted, return_counts=True)
        return {divmod(int(pair), self.num_classes): int(count) for pair, count in zip(pairs, counts, strict=True)}

    def class_counts(self) -> np.ndarray:
        """(k, 3) int64: samples of the class, right, right within five."""
        columns = (np.ones(len(self), dtype=bool), self.right, self.rank < 5)
        return np.stack([np.bincount(self.label[chosen], minlength=self.num_classes) for chosen in columns], axis=1)

    def mistakes(self, count: int) -> np.ndarray:
        """Rows of the `count` most confident mistakes, the most confident first; ties by sample number."""
        wrong = np.flatnonzero(~self.right)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count]


class PredictionRecorder:
    """An evaluator that keeps every prediction."""

    def __init__(self) -> None:
        self._columns: list[tuple[np.ndarray, ...]] = []
        self._classes = 0

    def update(self, batch: Batch, outputs: Batch) -> None:
        logits = outputs["logits"].float()
        probabilities = torch.softmax(logits, dim=1)
        confidence, predicted = probabilities.max(dim=1)
        columns = (
            batch["sample"],
            batch["label"],
            predicted,
            ranks_of_labels(logits, batch["label"]),
            confidence,
            outputs["loss_per_sample"],
        )
        valid = batch["valid"].cpu().numpy()
        self._columns.append(tuple(column.cpu().numpy()[valid] for column in columns))
        self._classes = logits.shape[1]

    def state(self) -> tuple[list[np.ndarray], int]:
        if not self._columns:
            return [], 0
        return [np.concatenate(column) for column in zip(*self._columns, strict=True)], self._classes

    def result(self, states: Sequence[tuple[list[np.ndarray], int]]) -> dict[str, Any]:
        """{"predictions": Predictions} of all ranks; {} where no sample was valid."""
        filled = [columns for columns, _ in states if columns and len(columns[0])]
        if not filled:
            return {}
        columns = [np.concatenate(column) for column in zip(*filled, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        sample, label, predicted, rank, confidence, loss = (column[order] for column in columns)
        classes = max(number for _, number in states)
        floats = confidence.astype(np.float64), loss.astype(np.float64)
        return {"predictions": Predictions(sample, label, predicted, rank, *floats, num_classes=classes)}


@dataclass(frozen=True)
class CalibrationBin:
    """Samples whose confidence lies in (low, high]: how many, their mean confidence, and the share that was right."""

    low: float
    high: float
    samples: int
    confidence: float
    accuracy: float


def calibration(predictions: Predictions, bins: int = CALIBRATION_BINS) -> tuple[float, list[CalibrationBin]]:
    """Expected calibration error, and the bins that hold any samples: a curve of accuracy over confidence."""
    index = np.clip(np.ceil(predictions.confidence * bins).astype(int) - 1, 0, bins - 1)
    found, error = [], 0.0
    for number in range(bins):
        inside = index == number
        count = int(inside.sum())
        if not count:
            continue
        confidence, right = float(predictions.confidence[inside].mean()), int(predictions.right[inside].sum())
        found.append(CalibrationBin(number / bins, (number + 1) / bins, count, confidence, right / count))
        error += count / len(predictions) * abs(right / count - confidence)
    return error, found
