"""What `simmim evaluate` says of wrong input; its figures are tested in tests/multiprocess/test_evaluate_ranks.py."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from simmim_scale.cli.app import app
from simmim_scale.cli.evaluate import EvaluationOptions, find_averaged
from simmim_scale.config.load import validate
from simmim_scale.config.yaml_source import Source
from simmim_scale.models.weights import save_weights
from simmim_scale.objectives.simmim import build_simmim
from tests.data.conftest import encode, picture, write_shards

MODEL = {"name": "swin_v2", "image_size": [16, 16], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 1.5}, "--crop: a share of the shorter side above 0 and up to 1, got 1.5"),
        ({"resize": "stretch"}, "--resize: one of cover, squash, got 'stretch'"),
        ({"interpolation": "nearest"}, "--interpolation: one of bilinear, bicubic, got 'nearest'"),
        ({"precision": "int8"}, "--precision: one of fp32, bf16, fp16, got 'int8'"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationOptions(**options).check()


def test_a_run_without_averaged_weights(tmp_path: Path):
    with pytest.raises(ValueError, match=r"Train with optimizer\.ema_decay"):
        find_averaged(tmp_path)


def test_pretrained_weights_have_no_classes(tmp_path: Path):
    config = validate(Source(tree={"model": MODEL, "mask": {"cell": 8}}))
    module = build_simmim(config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=0)
    save_weights(tmp_path / "weights", module.state_dict(), config.model_dump(mode="json"))
    shards = write_shards(tmp_path / "shards", [encode(picture(sample)) for sample in range(6)], labels=[0, 1] * 3)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), str(shards.directory)])
    assert result.exit_code == 2
    assert "was trained for pretrain, which has no classes to evaluate" in result.stderr
