"""k nearest neighbours and a linear classifier on frozen features.

Both are functions of features sorted by sample number, so results do not depend on how many ranks made them.
Letters: n samples to fit to, m samples to test, d width, k classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from simmim_scale.config.schema import ProbeConfig
from simmim_scale.objectives.features import PROBE

Batch = Mapping[str, Tensor]
CHUNK = 1024  # tested samples whose similarities are held at once
# Weight decays of the linear classifier, on standardised features; the best on a held-out fifth of the samples is taken.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
LBFGS_STEPS = 60
FIT, TEST = 0, 1


@dataclass(frozen=True)
class Features:
    """Features and labels of a set, by sample number."""

    values: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]


def knn_accuracy(fit: Features, test: Features, *, neighbours: int, temperature: float) -> float:
    """Top-1 in percent of a weighted vote among the nearest samples by cosine."""
    keys, classes = normalize(fit.values.double(), dim=1), int(max(fit.labels.max(), test.labels.max())) + 1
    right = 0
    for start in range(0, len(test.labels), CHUNK):
        queries = normalize(test.values[start : start + CHUNK].double(), dim=1)
        similarity, index = (queries @ keys.T).topk(min(neighbours, len(fit.labels)), dim=1)
        votes = one_hot(fit.labels[index], classes) * (similarity / temperature).exp()[..., None]
        right += int((votes.sum(1).argmax(1) == test.labels[start : start + CHUNK]).sum())
    return 100.0 * right / len(test.labels)


def linear_accuracy(fit: Features, test: Features) -> float:
    """Top-1 in percent of multinomial logistic regression on standardised features, weight decay chosen on a held-out fifth."""
    held_out = torch.arange(len(fit.labels)) % 5 == 4
    best = max(PENALTIES, key=lambda penalty: _accuracy(_select(fit, ~held_out), _select(fit, held_out), penalty))
    return _accuracy(fit, test, best)


def _select(features: Features, rows: Tensor) -> Features:
    return Features(features.values[rows], features.labels[rows])


def _accuracy(fit: Features, test: Features, penalty: float) -> float:
    if not len(fit.labels) or not len(test.labels):
        return 0.0
    mean, std = fit.values.mean(0), fit.values.std(0, correction=0).clamp(min=1e-6)
    weight, bias = _fit_linear((fit.values - mean) / std, fit.labels, penalty, classes=_classes(fit, test))
    scores = (test.values - mean) / std @ weight + bias
    return 100.0 * float((scores.argmax(1) == test.labels).double().mean())


def _classes(fit: Features, test: Features) -> int:
    return int(max(fit.labels.max(), test.labels.max())) + 1


def _fit_linear(x: Float[Tensor, "n d"], label: Int[Tensor, " n"], penalty: float, *, classes: int) -> tuple[Tensor, Tensor]:
    """Weights (d, k) and biases (k,) by L-BFGS from zero: the problem is convex, so nothing is random."""
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = cross_entropy(x @ weight + bias, label) + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return weight.detach(), bias.detach()


class FeatureRecorder:
    """An evaluator that keeps the features of batches that carry "probe" (0: to fit to, 1: to test on).

    Args:
        stages: which to keep, as in `probe.stage`; None: all of them.
    """

    def __init__(self, stages: Sequence[int] | None = None) -> None:
        self.stages = stages
        self._parts: list[dict[str, np.ndarray]] = []

    def update(self, batch: Batch, outputs: Batch) -> None:
        valid = batch["valid"].cpu().numpy()
        names = stage_names(outputs) if self.stages is None else [stage_name(outputs, stage) for stage in self.stages]
        kept = {**{name: batch[name] for name in (PROBE, "sample", "label")}, **{name: outputs[name] for name in names}}
        self._parts.append({name: value.cpu().numpy()[valid] for name, value in kept.items()})

    def state(self) -> dict[str, np.ndarray]:
        return _joined(self._parts)

    def result(self, states: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        """{"fit": columns, "test": columns}: "sample", "label" and every kept stage, of all ranks, by sample number."""
        columns = _joined([state for state in states if state])
        if not columns:
            return {}
        order = np.argsort(columns["sample"], kind="stable")
        parts = {name: order[columns[PROBE][order] == part] for name, part in (("fit", FIT), ("test", TEST))}
        return {part: {name: value[rows] for name, value in columns.items() if name != PROBE} for part, rows in parts.items()}


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


class ProbeEvaluator(FeatureRecorder):
    """The probes on the features of one stage: `val_knn` and `val_linear` in percent."""

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__([config.stage])
        self.config = config

    def result(self, states: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
        found = super().result(states)
        return {f"val_{name}": value for name, value in probe(found, self.config).items()} if found else {}


def probe(found: Mapping[str, Mapping[str, np.ndarray]], config: ProbeConfig) -> dict[str, float]:
    """Top-1 in percent, "knn" and, if wanted, "linear", from what a `FeatureRecorder` found; {} where a set is empty.

    Raises:
        ValueError: a stage that the backbone lacks.
    """
    stage = stage_name(found["fit"], config.stage)
    fit, test = (
        Features(torch.from_numpy(found[part][stage]), torch.from_numpy(found[part]["label"])) for part in ("fit", "test")
    )
    if not len(fit.labels) or not len(test.labels):
        return {}
    figures = {"knn": knn_accuracy(fit, test, neighbours=config.neighbours, temperature=config.temperature)}
    if config.linear:
        figures["linear"] = linear_accuracy(fit, test)
    return figures


def stage_names(outputs: Mapping[str, Any]) -> list[str]:
    """Names of the stages' features among the outputs of a module, in order."""
    return sorted((name for name in outputs if name.startswith("features_")), key=lambda name: int(name.rpartition("_")[2]))


def stage_name(outputs: Mapping[str, Any], stage: int) -> str:
    """Name of one stage's features. Raises ValueError for a stage that the backbone lacks."""
    names = stage_names(outputs)
    if not -len(names) <= stage < len(names):
        raise ValueError(f"probe.stage: the backbone has stages 0 to {len(names) - 1}, got {stage}.")
    return names[stage]
