"""The figures of an evaluation as JSON values: whole, per class, confusion, calibration."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from simmim_scale.tasks.classification.predictions import Predictions, calibration

SHOWN_CONFUSIONS = 3  # of each class, most frequent first


def summarise(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Everything that `evaluation.json` says of the results.

    Args:
        classes: names by label; a model may know more classes than there are names, which are then numbers.

    Returns:
        "samples", "correct_top1", "correct_top5" as counts, "top1", "top5" in percent ("top5" is None below 6 classes),
        "mean_class_top1" in percent over the classes that have samples, "loss", "ece" (share), "reliability" (bins),
        "classes" (one object each) and "confusion" (every wrong pair that came, most frequent first).
    """
    names = class_names_for(predictions, classes)
    counts = predictions.class_counts()
    total, first, five = (int(value) for value in counts.sum(0))
    present = counts[:, 0] > 0
    error, bins = calibration(predictions)
    return {
        "samples": total,
        "correct_top1": first,
        "correct_top5": five if predictions.num_classes > 5 else None,
        "top1": 100.0 * first / total,
        "top5": 100.0 * five / total if predictions.num_classes > 5 else None,
        "mean_class_top1": 100.0 * float(np.mean(counts[present, 1] / counts[present, 0])),
        "loss": float(predictions.loss.mean()),
        "ece": error,
        "mean_confidence": float(predictions.confidence.mean()),
        "reliability": [asdict(item) for item in bins],
        "classes": _by_class(predictions, counts, names),
        "confusion": [
            {"label": names[label], "predicted": names[predicted], "count": count}
            for (label, predicted), count in _wrong_pairs(predictions)
        ],
    }


def class_names_for(predictions: Predictions, classes: Sequence[str]) -> list[str]:
    """A name for every class that the model knows."""
    return [*classes, *(str(number) for number in range(len(classes), predictions.num_classes))]


def _wrong_pairs(predictions: Predictions) -> list[tuple[tuple[int, int], int]]:
    wrong = [(pair, count) for pair, count in predictions.confusion.items() if pair[0] != pair[1]]
    return sorted(wrong, key=lambda item: (-item[1], item[0]))


def _by_class(predictions: Predictions, counts: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    confused: dict[int, list[dict[str, Any]]] = {}
    for (label, predicted), count in _wrong_pairs(predictions):
        if len(confused.setdefault(label, [])) < SHOWN_CONFUSIONS:
            confused[label].append({"as": names[predicted], "count": count})
    return [
        {
            "name": names[label],
            "samples": int(samples),
            "correct_top1": int(first),
            "correct_top5": int(five),
            "top1": 100.0 * int(first) / int(samples) if samples else None,
            "confused_with": confused.get(label, []),
        }
        for label, (samples, first, five) in enumerate(counts)
    ]
