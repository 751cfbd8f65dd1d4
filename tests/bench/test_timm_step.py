"""`simmim bench timm`: both sides compute the same, and the command says how long they took."""

import json

import pytest
from typer.testing import CliRunner

from simmim_scale.cli.app import app


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "timm", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_compares_before_it_times(tmp_path):
    out = tmp_path / "step.json"
    text = call("--size", "toy", "--image-size", "48", "--window", "6", "--batch", "2", "--turns", "2", "--out", str(out))
    written = json.loads(out.read_text())
    assert [row["dtype"] for row in written["rows"]] == ["fp32", "bf16"]
    for row, tolerance in zip(written["rows"], (1e-5, 3e-2), strict=True):
        assert row["difference"]["loss"] < tolerance
        assert row["difference"]["gradients"] < 10 * tolerance
        assert min(row["ours"], row["timm"], row["factor"]) > 0
        assert len(row["factors"]) == 2
    assert written["environment"]["window_attention"] == "cpu"
    assert "fp32" in text
    assert "bf16" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "huge"), "unknown size 'huge'. Known: tiny, toy"),
        (("--dtype", "int8"), "unknown type 'int8'. Known: fp32, bf16"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    assert message in call(*arguments, code=2)
