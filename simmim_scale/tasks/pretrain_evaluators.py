"""Evaluators of pre-training: the masked loss, the loss of a constant colour to compare it with, and pictures.

Their states name samples by id, so results do not depend on how many ranks there were.
Letters: b batch, c channels, h w height and width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from simmim_scale.objectives.simmim import SimMIM
from simmim_scale.reports.reconstructions import draw_reconstructions, save_picture
from simmim_scale.tasks.reconstruct import reconstruction_rows

Batch = Mapping[str, Tensor]
PerSample = tuple[np.ndarray, np.ndarray]  # ids (n,), values (n,)


class _MeanPerSample:
    """Mean of one value per sample. Summed in the order of ids, so that every world size gives the same digits."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ids: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, batch: Batch, values: Tensor) -> None:
        valid = batch["valid"].cpu().numpy()
        self._ids.append(batch["sample"].cpu().numpy()[valid])
        self._values.append(values.double().cpu().numpy()[valid])

    def state(self) -> PerSample:
        if not self._ids:
            return np.empty(0, np.int64), np.empty(0, np.float64)
        return np.concatenate(self._ids), np.concatenate(self._values)

    def result(self, states: Sequence[PerSample]) -> dict[str, float]:
        ids, values = (np.concatenate([state[part] for state in states]) for part in (0, 1))
        if not len(ids):
            return {}
        return {self.name: float(values[np.argsort(ids, kind="stable")].mean())}


class MaskedLoss(_MeanPerSample):
    """Mean over samples of the masked loss: `val_loss`."""

    def __init__(self) -> None:
        super().__init__("val_loss")

    def update(self, batch: Batch, outputs: Batch) -> None:
        self.add(batch, outputs["loss_per_sample"])


class MaskDistance:
    """AvgDist of the run's masking in pixels, which no batch changes: `avg_dist` of every validation, to compare runs by."""

    def __init__(self, distance: float) -> None:
        self._distance = distance

    def update(self, batch: Batch, outputs: Batch) -> None:
        """Nothing to add up."""

    def state(self) -> float:
        return self._distance

    def result(self, states: Sequence[float]) -> dict[str, float]:
        return {"avg_dist": states[0]}


class MeanColourLoss(_MeanPerSample):
    """The same loss for a guess from the visible pixels at large (of pixels: their mean colour): `val_baseline`. A model must do
    much better."""

    def __init__(self, module: SimMIM) -> None:
        super().__init__("val_baseline")
        self.module = module

    def update(self, batch: Batch, outputs: Batch) -> None:
        pictures, mask = self.module.prepare(batch)
        sums = self.module.target.baseline(pictures, self.module.hidden(pictures, mask))
        if sums is not None:
            self.add(batch, sums.per_sample())


class Gallery:
    """Draws original, masked image and prediction of the first rows of the validation into one picture.

    Their order is a random choice of the seed, so they come from all classes and are the same at every validation.

    Args:
        module: the trained module, for its mapping back to pixels.
        count: how many rows to draw.
        path: PNG to write.
    """

    def __init__(self, module: SimMIM, *, count: int, path: Path) -> None:
        self.module, self.count, self.path = module, count, path
        self._rows: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def update(self, batch: Batch, outputs: Batch) -> None:
        positions, valid = batch["position"].tolist(), batch["valid"].tolist()
        wanted = [row for row, position in enumerate(positions) if valid[row] and position < self.count]
        if not wanted:
            return
        chosen = {name: value[wanted] for name, value in batch.items()}
        rows = reconstruction_rows(self.module, chosen, outputs["prediction"][wanted])
        self._rows.update(zip((positions[row] for row in wanted), rows, strict=True))

    def state(self) -> dict[int, Any]:
        return self._rows

    def result(self, states: Sequence[dict[int, Any]]) -> dict[str, float]:
        rows = {position: row for state in states for position, row in state.items()}
        if rows:
            save_picture(draw_reconstructions([rows[position] for position in sorted(rows)]), self.path)
        return {}
