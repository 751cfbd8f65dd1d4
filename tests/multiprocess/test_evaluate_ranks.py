"""`simmim evaluate` gives the same figures on 1, 2 and 3 ranks, for a number of samples that nothing divides."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from simmim_scale.config.load import validate
from simmim_scale.config.yaml_source import Source
from simmim_scale.data.decode import decode_image
from simmim_scale.data.shards import ShardIndex
from simmim_scale.data.stream import ShardReader
from simmim_scale.models.initialization import assign, trunc_normal
from simmim_scale.models.weights import save_weights
from simmim_scale.objectives.classifier import build_classifier
from simmim_scale.tasks.classification.task import tested_view as view_of
from simmim_scale.tasks.pretrained import load
from tests.data.conftest import encode, picture, write_shards
from tests.multiprocess.engine_ranks import run_ranks

NUM_IMAGES, NUM_CLASSES, BROKEN = 47, 7, 20
MODEL = {"name": "swin_v2", "image_size": [16, 16], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = validate(Source(tree={"task": "classification", "model": MODEL}))
    module = build_classifier(config.model, num_classes=NUM_CLASSES, mean=config.data.mean, std=config.data.std, seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        assign(parameter, trunc_normal(0.6), generator)
    return save_weights(tmp_path_factory.mktemp("run") / "weights", module.state_dict(), config.model_dump(mode="json"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    files = [encode(picture(sample)) for sample in range(NUM_IMAGES)]
    files[BROKEN] = b"broken"
    return write_shards(
        tmp_path_factory.mktemp("shards") / "set", files, labels=[sample % NUM_CLASSES for sample in range(NUM_IMAGES)]
    )


@pytest.fixture(scope="module")
def evaluations(weights, shards, tmp_path_factory) -> dict[int, dict]:
    found = {}
    for ranks in (1, 2, 3):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        run_ranks("evaluate_worker.py", ranks, str(weights), str(shards.directory), str(out))
        assert (out / "evaluation.html").read_text().count("<svg") >= 4
        found[ranks] = json.loads((out / "evaluation.json").read_text())
    return found


def test_figures_are_the_same_on_any_number_of_ranks(evaluations):
    assert evaluations[2]["results"] == evaluations[1]["results"]
    assert evaluations[3]["results"] == evaluations[1]["results"]
    assert [evaluations[ranks]["evaluated"]["device"].split(", ")[-1] for ranks in (1, 2, 3)] == ["1 rank", "2 ranks", "3 ranks"]


def test_figures_are_those_of_one_image_at_a_time(evaluations, weights, shards):
    module, results = load(weights), evaluations[1]["results"]
    view, reader = view_of(validate(Source(tree={"task": "classification", "model": MODEL}))), ShardReader(shards)
    probabilities, labels = [], []
    for sample in range(NUM_IMAGES):
        if sample == BROKEN:
            continue  # replaced while loading, and no part of any figure
        image = view(decode_image(reader.read_image(sample)))["image"][None]
        with torch.no_grad():
            probabilities.append(module({"image": image})["logits"].softmax(1)[0].numpy())
        labels.append(sample % NUM_CLASSES)
    p, y = np.array(probabilities), np.array(labels)
    predicted = p.argmax(1)
    assert results["samples"] == NUM_IMAGES - 1
    assert results["correct_top1"] == int((predicted == y).sum())
    assert results["correct_top5"] == int((np.argsort(-p, axis=1)[:, :5] == y[:, None]).any(1).sum())
    assert results["loss"] == pytest.approx(float(-np.log(p[np.arange(len(y)), y]).mean()), rel=1e-4)
    for label, entry in enumerate(results["classes"]):
        assert entry["samples"] == int((y == label).sum())
        assert entry["correct_top1"] == int(((predicted == y) & (y == label)).sum())
    pairs = {(entry["label"], entry["predicted"]): entry["count"] for entry in results["confusion"]}
    names = [f"class {label}" for label in range(NUM_CLASSES)]
    for label in range(NUM_CLASSES):
        for other in range(NUM_CLASSES):
            if label != other:
                assert pairs.get((names[label], names[other]), 0) == int(((y == label) & (predicted == other)).sum())
    confidence, right = p.max(1), predicted == y
    error = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        error += abs(right[inside].sum() - confidence[inside].sum()) / len(y)
    assert results["ece"] == pytest.approx(error, abs=1e-5)
    assert sum(item["samples"] for item in results["reliability"]) == len(y)
