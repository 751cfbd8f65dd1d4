"""`simmim probe` from its command line: every stage's features, kept once, and what it says of wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simmim_scale.config.load import validate
from simmim_scale.config.yaml_source import Source
from simmim_scale.models.weights import save_weights
from simmim_scale.objectives.simmim import build_simmim
from tests.data.conftest import encode, picture, write_shards

MODEL = {"name": "swin_v2", "image_size": [16, 16], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with weights and two labelled sets whose images are the same."""
    root = tmp_path_factory.mktemp("probe")
    config = validate(Source(tree={"model": MODEL, "mask": {"cell": 8}}))
    module = build_simmim(config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=0)
    save_weights(root / "run/weights", module.state_dict(), config.model_dump(mode="json"))
    images = [encode(picture(sample)) for sample in range(12)]
    for name in ("fit", "test"):
        write_shards(root / name, images, labels=[sample % 3 for sample in range(12)])
    return root


def probe(place: Path, *options: str) -> subprocess.CompletedProcess:
    sets = [str(place / name) for name in ("run", "fit", "test")]
    return subprocess.run(
        [sys.executable, "-m", "simmim_scale", "probe", *sets, "--workers", "0", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_features_of_every_stage_are_computed_once_and_kept(place):
    first = probe(place, "--neighbours", "1")
    assert first.returncode == 0, first.stderr
    results = json.loads((place / "run/probe/probe.json").read_text())
    assert (results["fit_samples"], results["test_samples"]) == (12, 12)
    assert set(results["stages"]) == {"0", "1"}
    # The nearest neighbour of an image is the image itself.
    assert [figures["knn"] for figures in results["stages"].values()] == [100.0, 100.0]
    (kept,) = (place / "run/probe").glob("features_*.safetensors")
    written = kept.stat().st_mtime_ns
    again = probe(place, "--neighbours", "1", "--stage", "-1", "--no-linear")
    assert again.returncode == 0, again.stderr
    assert "features of" in again.stderr + again.stdout
    assert kept.stat().st_mtime_ns == written
    assert json.loads((place / "run/probe/probe.json").read_text())["stages"] == {"-1": {"knn": 100.0}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stage", "5"), "probe.stage: the backbone has stages 0 to 1, got 5"),
        (("--precision", "int8"), "--precision: one of fp32, bf16, fp16, got 'int8'"),
    ],
)
def test_wrong_input(place, options, message):
    found = probe(place, "--out", str(place / "elsewhere"), *options)
    assert found.returncode == 2
    assert message in found.stderr
    assert not (place / "elsewhere/probe.json").exists()
