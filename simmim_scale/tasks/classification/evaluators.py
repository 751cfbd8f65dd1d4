"""Evaluators of classification while training: integer counts, and a mean in the order of samples, the same on any world size.

Letters: b batch, k classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Batch = Mapping[str, Tensor]


def ranks_of_labels(logits: Float[Tensor, "b k"], label: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """How many classes score higher than the right one, ties going to the lower class number as in argmax; 0: right.

    A NaN among the logits counts as wrong.
    """
    own = logits.gather(1, label[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < label[:, None]
    higher = (logits > own) | ((logits == own) & before)
    rank = higher.sum(1)
    return torch.where(logits.isnan().any(1), logits.shape[1], rank)


class TopK:
    """Top-1 and top-5 accuracy in percent: `val_top1`, `val_top5` (the latter with at least 6 classes)."""

    def __init__(self) -> None:
        self._counts = np.zeros(3, dtype=np.int64)  # samples, right, right within five
        self._classes = 0

    def update(self, batch: Batch, outputs: Batch) -> None:
        rank = ranks_of_labels(outputs["logits"].float(), batch["label"])[batch["valid"]]
        self._counts += np.array([len(rank), int((rank < 1).sum()), int((rank < 5).sum())])
        self._classes = outputs["logits"].shape[1]

    def state(self) -> tuple[np.ndarray, int]:
        return self._counts, self._classes

    def result(self, states: Sequence[tuple[np.ndarray, int]]) -> dict[str, float]:
        samples, first, five = (int(value) for value in sum(counts for counts, _ in states))
        if not samples:
            return {}
        figures = {"val_top1": 100.0 * first / samples}
        if max(classes for _, classes in states) > 5:
            figures["val_top5"] = 100.0 * five / samples
        return figures


class CrossEntropy:
    """Mean cross-entropy: `val_loss`. Summed in the order of sample numbers, so that every world size gives the same digits."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def update(self, batch: Batch, outputs: Batch) -> None:
        valid = batch["valid"].cpu().numpy()
        self._ids.append(batch["sample"].cpu().numpy()[valid])
        self._values.append(outputs["loss_per_sample"].double().cpu().numpy()[valid])

    def state(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._ids:
            return np.empty(0, np.int64), np.empty(0, np.float64)
        return np.concatenate(self._ids), np.concatenate(self._values)

    def result(self, states: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        ids, values = (np.concatenate([state[part] for state in states]) for part in (0, 1))
        return {"val_loss": float(values[np.argsort(ids, kind="stable")].mean())} if len(ids) else {}
