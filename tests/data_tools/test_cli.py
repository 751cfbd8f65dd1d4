"""The command line end to end, and what it says about wrong input: one message, exit code 2, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools import cli
from data_tools.plan import ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.folder import list_folder
from simmim_scale.data.shards import ShardIndex
from tests.data_tools.layouts import fill, picture


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


@pytest.mark.parametrize("names", [["index.npy"], ["index.json"], ["index.npy", "index.json"]])
@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_damaged_index_is_exit_code_one_and_its_advice_works(tmp_path: Path, names: list[str], damage: str) -> None:
    write_shards(
        list_folder(fill(tmp_path / "src", {f"c{i}/{i}.jpg": picture(i) for i in range(3)})), tmp_path / "set", ShardOptions()
    )
    for path in (tmp_path / "set" / name for name in names):
        data = bytearray(path.read_bytes())
        data[40] ^= 4
        path.unlink()
        if damage == "changed":
            path.write_bytes(data)
    verify = ["verify", str(tmp_path / "set"), "--jobs", "1"]
    found = CliRunner().invoke(cli.app, verify)
    assert found.exit_code == 1
    assert f"python -m data_tools verify {tmp_path / 'set'} --repair" in found.output
    assert CliRunner().invoke(cli.app, [*verify, "--repair"]).exit_code == 0
    assert CliRunner().invoke(cli.app, verify).exit_code == 0


def test_what_cannot_be_repaired_is_damage_too(tmp_path: Path) -> None:
    write_shards(list_folder(fill(tmp_path / "src", {"a.jpg": picture(0)})), tmp_path / "set", ShardOptions())
    (tmp_path / "set" / "index.json").unlink()
    (tmp_path / "set" / "shard-000000.tar").write_bytes(b"no tar" * 200)
    result = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "set"), "--jobs", "1", "--repair"])
    assert result.exit_code == 1
    assert "index.json: lost or damaged, and it cannot be made again from the tars" in result.output
    assert "shard-000000.tar: has no tar header" in result.output
    assert "Copy the set again" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shard", "folder", "{tmp}/nowhere", "{tmp}/out"), "no such directory"),
        (("verify", "{tmp}"), "no index.json"),
        (("verify", "{tmp}/nowhere", "--repair"), "no such directory"),
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
