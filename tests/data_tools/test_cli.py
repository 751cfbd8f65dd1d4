"""The command line end to end, and what it says about wrong input: one message, exit code 2, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools import cli
from simmim_scale.data.shards import ShardIndex


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "data_tools", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_from_nothing_to_verified_shards(tmp_path: Path) -> None:
    runner = CliRunner()
    synth = ["synth", str(tmp_path / "set"), "--images", "12", "--side", "64-80", "--jobs", "1"]
    shard = ["shard", "folder", str(tmp_path / "set"), str(tmp_path / "shards"), "--samples-per-shard", "5", "--jobs", "1"]
    for command in (synth, shard, ["verify", str(tmp_path / "shards"), "--jobs", "1"]):
        result = runner.invoke(cli.app, command)
        assert result.exit_code == 0, result.output
    assert "12 samples in 3 shards" in result.output
    assert "there already" in runner.invoke(cli.app, synth).output
    assert "there already" in runner.invoke(cli.app, shard).output
    index = ShardIndex.load(tmp_path / "shards")
    assert len(index) == 12
    assert len(index.classes or ()) == 10


def test_damage_is_exit_code_one(tmp_path: Path) -> None:
    runner = CliRunner()
    runner.invoke(cli.app, ["synth", str(tmp_path / "set"), "--images", "2", "--side", "64", "--jobs", "1"])
    runner.invoke(cli.app, ["shard", "folder", str(tmp_path / "set"), str(tmp_path / "out"), "--jobs", "1"])
    tar = tmp_path / "out" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    result = runner.invoke(cli.app, ["verify", str(tmp_path / "out"), "--jobs", "1"])
    assert result.exit_code == 1
    assert "expected sha256" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shard", "folder", "{tmp}/nowhere", "{tmp}/out"), "no such directory"),
        (("verify", "{tmp}"), "no index.json"),
        (("synth", "{tmp}/set", "--side", "big"), "--side: a range LOW-HIGH"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_two(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
