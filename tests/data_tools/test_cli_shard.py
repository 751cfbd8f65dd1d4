"""Every kind of source through the command line, as a person gives it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools import cli
from data_tools.console import parse_bytes
from simmim_scale.data.shards import ShardIndex
from tests.data_tools.layouts import contents, fill, picture, write_ade20k, write_coco, write_imagenet, write_inat


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    write_imagenet(root / "imagenet")
    write_inat(root / "inat2018")
    write_coco(root / "coco")
    write_ade20k(root / "ade20k")
    fill(root / "folder", {f"c{i % 2}/{i}.jpg": picture(i) for i in range(6)} | {"list.csv": b"path\nc0/0.jpg\nc1/1.jpg\n"})
    return root


@pytest.mark.parametrize(
    ("arguments", "samples"),
    [
        (("imagenet", "{0}/imagenet"), 11),
        (("imagenet", "{0}/imagenet", "--split", "val"), 5),
        (("inat2018", "{0}/inat2018"), 6),
        (("coco", "{0}/coco"), 3),
        (("ade20k", "{0}/ade20k/ADEChallengeData2016"), 2),
        (("folder", "{0}/folder", "--labels", "none"), 6),
        (("list", "{0}/folder/list.csv"), 2),
    ],
)
def test_every_kind_is_sharded_verified_and_measured(
    sources: Path, tmp_path: Path, arguments: tuple[str, ...], samples: int
) -> None:
    kind, source, *options = (argument.format(sources) for argument in arguments)
    out = tmp_path / "out"
    said = invoke("shard", kind, source, out, *options, "--samples-per-shard", 4, "--jobs", 1)
    assert f"{samples} images" in said
    assert len(ShardIndex.load(out)) == samples
    assert "as the index says" in invoke("verify", out, "--jobs", 1)
    assert "samples" in invoke("stats", out, "--jobs", 1)


def test_options_reach_the_shards(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--bytes-per-shard", "6kB", "--seed", 7, "--max-side", 10, "--quality", 80, "--check", "full"]
    invoke("shard", "folder", sources / "folder", out, *options, "--undecodable", "error", "--jobs", 1)
    index = ShardIndex.load(out)
    facts = {"bytes_per_shard": 6000, "seed": 7, "max_side": 10, "quality": 80, "check": "full", "undecodable": "error"}
    assert {name: index.options[name] for name in facts} == facts
    assert len(index.shards) > 1


def test_tasks_repair_and_index_on_the_command_line(sources: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    shard = ["shard", "folder", sources / "folder"]
    options = ["--samples-per-shard", 2, "--jobs", 1]
    invoke(*shard, whole, *options)
    assert "1 shards are still to come" in invoke(*shard, out, *options, "--task", "0/2")
    invoke(*shard, out, *options, "--task", "1/2")
    assert contents(out) == contents(whole)
    (out / "shard-000001.tar").write_bytes(b"damaged")
    assert "shard-000001.tar" in invoke(*shard, out, *options, "--repair")
    assert contents(out) == contents(whole)
    (out / "index.npy").unlink()
    assert "repaired" in invoke("verify", out, "--repair", "--jobs", 1)
    assert contents(out) == contents(whole)
    for name in ("index.json", "index.npy", "report.json"):
        (out / name).unlink()
    assert "6 samples, 2 classes, in 3 tars" in invoke("index", out, "--jobs", 1)


def test_what_a_source_lacks_is_said(tmp_path: Path) -> None:
    fill(tmp_path / "pics", {"a/1.jpg": picture(1), "[b]/notes.txt": b"x"})
    said = invoke("shard", "folder", tmp_path / "pics", tmp_path / "out", "--jobs", 1)
    assert "pics: 1 folder holds no image and is no class: [b]\n" in said


@pytest.mark.parametrize(("text", "count"), [("200MB", 200_000_000), ("1GiB", 2**30), ("512", 512), ("1.5k", 1500), (None, None)])
def test_bytes_with_units(text: str | None, count: int | None) -> None:
    assert parse_bytes("--bytes-per-shard", text) == count


def test_bytes_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="--bytes-per-shard: a number of bytes such as 200MB"):
        parse_bytes("--bytes-per-shard", "much")
