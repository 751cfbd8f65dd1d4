"""Probes on frozen features: against independent computations, and exact however the samples were dealt to ranks."""

import numpy as np
import pytest
import torch

from simmim_scale.config.schema import ProbeConfig
from simmim_scale.objectives.features import PROBE
from simmim_scale.tasks.classification.probes import Features, ProbeEvaluator, knn_accuracy, linear_accuracy, stage_name


def clusters(samples: int, seed: int, *, spread: float, width: int = 6, classes: int = 4) -> Features:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(samples) % classes
    return Features(centres[label] + spread * torch.randn(samples, width, generator=generator), label)


def test_neighbours_vote_as_written_out():
    fit, test = clusters(60, 1, spread=1.0), clusters(25, 2, spread=1.0)
    right = 0
    for query, label in zip(test.values.numpy().astype(float), test.labels.tolist(), strict=True):
        keys = fit.values.numpy().astype(float)
        cosine = keys @ query / np.linalg.norm(keys, axis=1) / np.linalg.norm(query)
        votes = np.zeros(4)
        for index in np.argsort(-cosine)[:7]:
            votes[int(fit.labels[index])] += np.exp(cosine[index] / 0.1)
        right += int(votes.argmax() == label)
    assert knn_accuracy(fit, test, neighbours=7, temperature=0.1) == pytest.approx(100 * right / 25)
    assert 40 < 100 * right / 25 < 100, "neither trivial nor chance"
    assert knn_accuracy(fit, fit, neighbours=1, temperature=0.1) == 100


def test_the_linear_probe_is_the_optimum_of_its_loss():
    """Against gradient descent, written out, on the same standardised features and penalty."""
    from simmim_scale.tasks.classification.probes import _fit_linear

    data = clusters(80, 1, spread=1.5)
    x = (data.values - data.values.mean(0)) / data.values.std(0, correction=0)
    weight, bias = _fit_linear(x, data.labels, 0.05, classes=4)
    w, b = torch.zeros(6, 4), torch.zeros(4)
    for _ in range(4000):
        error = (torch.softmax(x @ w + b, 1) - torch.nn.functional.one_hot(data.labels, 4)) / 80
        w -= 0.3 * (x.T @ error + 0.05 * w)
        b -= 0.3 * error.sum(0)
    assert torch.allclose(weight, w, atol=2e-3)
    assert torch.allclose(bias - bias.mean(), b - b.mean(), atol=2e-3)


def test_separable_classes_are_separated_and_noise_is_not():
    assert linear_accuracy(clusters(100, 1, spread=0.05), clusters(40, 2, spread=0.05)) == 100
    noise = Features(torch.randn(200, 6, generator=torch.Generator().manual_seed(5)), torch.arange(200) % 4)
    other = Features(torch.randn(200, 6, generator=torch.Generator().manual_seed(6)), torch.arange(200) % 4)
    assert linear_accuracy(noise, other) < 40


def rows(features: Features, part: int, which: list[int], padding: int = 0) -> tuple[dict, dict]:
    valid = torch.tensor([True] * len(which) + [False] * padding)
    chosen = torch.tensor([*which, *([0] * padding)])
    batch = {PROBE: torch.full((len(chosen),), part), "sample": chosen, "label": features.labels[chosen], "valid": valid}
    return batch, {"features_0": torch.zeros(len(chosen), 2), "features_1": features.values[chosen]}


def test_figures_do_not_depend_on_how_samples_were_dealt():
    fit, test = clusters(30, 1, spread=1.0), clusters(11, 2, spread=1.0)

    def result(parts: list[list[tuple[dict, dict]]]) -> dict[str, float]:
        states = []
        for part in parts:
            evaluator = ProbeEvaluator(ProbeConfig(neighbours=5))
            for batch, outputs in part:
                evaluator.update(batch, outputs)
            states.append(evaluator.state())
        return ProbeEvaluator(ProbeConfig(neighbours=5)).result(states)

    alone = result([[rows(fit, 0, list(range(30))), rows(test, 1, list(range(11)))]])
    assert set(alone) == {"val_knn", "val_linear"}
    assert alone["val_knn"] == pytest.approx(knn_accuracy(fit, test, neighbours=5, temperature=0.07))
    dealt = [
        [rows(fit, 0, list(range(1, 30, 2))), rows(test, 1, list(range(1, 11, 2)), padding=1)],
        [rows(fit, 0, list(range(0, 30, 2))), rows(test, 1, list(range(0, 11, 2)))],
        [],
    ]
    assert result(dealt) == alone


def test_a_stage_that_is_not_there():
    assert stage_name({"features_0": 0, "features_10": 0, "features_2": 0}, -1) == "features_10"
    with pytest.raises(ValueError, match=r"probe\.stage: the backbone has stages 0 to 1, got 3"):
        stage_name({"features_0": 0, "features_1": 0}, 3)
