"""The commands that train nothing, as a person calls them."""

import json

import pytest
from typer.testing import CliRunner

from simmim_scale.cli.app import app

# Supplement, table 1, less the 1000-class head that it counts (1.025M, 1.537M, 2.817M): millions of parameters of the backbone,
# billions of multiply-adds.
PUBLISHED = {
    "swin_b_100ep": (86.7, 11.3),
    "swin_l_800ep": (195.2, 26.0),
    "swinv2_h_800ep": (655.2, 86.2),
}


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("name", PUBLISHED)
def test_describe_prints_the_published_sizes(name):
    described = json.loads(call("describe", f"configs/pretrain/{name}.yaml", "--json", "--world-size", "16"))
    parameters, multiply_adds = PUBLISHED[name]
    assert round(described["parameters"] / 1e6, 1) == pytest.approx(parameters, abs=0.05)
    assert described["multiply_adds"] / 1e9 == pytest.approx(multiply_adds, rel=0.005)
    assert described["micro_batch"] * described["accumulation"] * 16 == described["global_batch"] == 2048
    assert described["learning_rate"][0]["step"] == 1
    assert described["learning_rate"][-1]["step"] == described["steps"]
    assert (described["mask_cells"], described["hidden_cells"]) == (36, 22)


def test_describe_for_a_person():
    text = call("describe", "configs/pretrain/swinv2_h_800ep.yaml", "--world-size", "32")
    for word in (
        "655.2M",
        "85.99G",
        "2,304 tokens",
        "500,456",
        "32 ranks x 64 x 1",
        "drop 2",
        "data.train_samples; no shards were counted",
    ):
        assert word in text


def test_describe_without_any_samples_still_describes_the_model():
    overrides = ("data.train=nowhere", "data.train_samples=null")
    described = json.loads(call("describe", "configs/debug/demo.yaml", *overrides, "--json"))
    assert described["parameters"] > 1e6
    assert "nowhere" in described["plan"]
    assert "nowhere" in call("describe", "configs/debug/demo.yaml", *overrides)


def test_describe_refuses_a_world_size_that_does_not_divide():
    text = call("describe", "configs/pretrain/swinv2_h_800ep.yaml", "--world-size", "48", code=2)
    assert "2048 for 48 ranks" in text


def test_config_prints_every_value_with_unit_source_and_place():
    text = call("config", "configs/pretrain/swin_b_100ep.yaml", "mask.ratio=0.5")
    line = next(line for line in text.splitlines() if line.strip().startswith("ratio:"))
    assert "0.5" in line
    assert "[share]" in line
    assert "(R)" in line
    assert "override 'mask.ratio=0.5'" in line
    assert "swin_b_100ep.yaml:" in text


@pytest.mark.parametrize("command", ["config", "describe", "pretrain"])
def test_a_missing_file_is_a_clear_error(command):
    assert "configs/debug/demo.yaml" in call(command, "configs/debug/dmo.yaml", code=2)


def test_import_weights_of_nothing(tmp_path):
    text = call("import-weights", str(tmp_path / "none.pth"), "--out", str(tmp_path / "out"), code=2)
    assert "none.pth" in text
    assert not (tmp_path / "out").exists()


def test_reconstruct_of_nothing(tmp_path):
    assert str(tmp_path) in call("reconstruct", str(tmp_path), "photo.jpg", code=2)
