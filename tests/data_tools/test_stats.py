"""Statistics are those that numpy finds on the same images; pictures are drawn."""

import errno
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_tools import cli
from data_tools.plan import ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.folder import list_folder
from data_tools.stats import Channels, choose, measure
from simmim_scale.data.shards import ShardIndex
from tests.data_tools.layouts import fill, picture

FILES = {f"{'cat' if i % 3 else 'dog'}/{i}.png": picture(i, "PNG", size=(10 + i, 20)) for i in range(12)}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(list_folder(fill(tmp_path / "src", FILES)), tmp_path / "set", ShardOptions(5))
    return tmp_path / "set"


@pytest.mark.parametrize("jobs", [1, 2])
def test_numbers_are_those_of_all_images(shards: Path, jobs: int) -> None:
    stats = measure(ShardIndex.load(shards), images=0, jobs=jobs).as_json()
    pixels = np.concatenate([np.asarray(Image.open(io.BytesIO(data))).reshape(-1, 3) for data in FILES.values()]) / 255
    np.testing.assert_allclose(stats["mean"], pixels.mean(0), atol=1e-5)
    np.testing.assert_allclose(stats["std"], pixels.std(0), atol=1e-5)
    assert stats["classes"] == {"cat": 8, "dog": 4}
    assert (stats["samples"], stats["shards"], stats["measured_images"], stats["broken_images"]) == (12, 3, 12, 0)
    assert (stats["width"]["least"], stats["width"]["largest"], stats["height"]["median"]) == (10, 21, 20)
    assert stats["image_bytes"]["largest"] == max(map(len, FILES.values()))


def test_the_command_prints_and_draws(shards: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["stats", str(shards), "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert "smallest dog with 4, largest cat with 8" in result.output.replace("\n", " ")
    out = tmp_path / "set_stats"
    assert json.loads((out / "stats.json").read_text())["samples"] == 12
    for name in ("stats.png", "samples.png"):
        with Image.open(out / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert not list(shards.glob("*stats*"))


def test_broken_images_are_counted(tmp_path: Path) -> None:
    files = {"a.jpg": picture(0), "b.jpg": b"bad"}
    write_shards(list_folder(fill(tmp_path / "src", files)), tmp_path / "set", ShardOptions(undecodable="keep"))
    stats = measure(ShardIndex.load(tmp_path / "set")).as_json()
    assert (stats["measured_images"], stats["broken_images"], stats["classes"]) == (1, 1, None)
    assert stats["broken_causes"] == {"the content is of no known image format": 1}


def bands(count: int) -> dict[str, np.ndarray]:
    return {f"{i}.npy": np.random.default_rng(i).integers(0, 3000, (9, 8, count), dtype=np.uint16) for i in range(5)}


def write_arrays(directory: Path, arrays: dict[str, np.ndarray]) -> Path:
    files = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        files[name] = buffer.getvalue()
    write_shards(list_folder(fill(directory / "src", files)), directory / "set", ShardOptions())
    return directory / "set"


@pytest.mark.parametrize("count", [1, 2, 6])
def test_any_number_of_bands_is_measured_and_drawn(tmp_path: Path, count: int) -> None:
    arrays = bands(count)
    directory = write_arrays(tmp_path, arrays)
    arguments = ["stats", str(directory), "--jobs", "1", "--in-chans", str(count), "--band-range", "-100", "2900"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    stats = json.loads((tmp_path / "set_stats" / "stats.json").read_text())
    values = np.concatenate([array.reshape(-1, count) for array in arrays.values()])
    pixels = ((values + 100) / 3000).clip(0, 1)
    np.testing.assert_allclose(stats["mean"], pixels.mean(0), atol=1 / 255)
    np.testing.assert_allclose(stats["std"], pixels.std(0), atol=1 / 255)
    with Image.open(tmp_path / "set_stats" / "samples.png") as sheet:
        assert len(np.unique(np.asarray(sheet.convert("L")))) > 10


def test_where_nothing_can_be_measured_the_causes_are_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["stats", str(write_arrays(tmp_path, bands(6))), "--jobs", "1"])
    assert result.exit_code == 1
    assert "none of the 5 images looked at decodes to 3 channels: 5 times" in result.output
    assert "shape (9, 8, 6)" in result.output
    assert "--in-chans" in result.output
    assert "0.0000" not in result.output
    assert not (tmp_path / "set_stats" / "stats.json").exists()


@pytest.mark.parametrize("damage", ["removed", "directory", "cut", "unreadable"])
def test_a_shard_that_cannot_be_read_is_an_error_that_names_it(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = shards / "shard-000001.tar"
    if damage == "unreadable":

        def refuse(name, *arguments):
            if Path(name) == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(name))
            return open(name, *arguments)

        monkeypatch.setattr("data_tools.stats.open", refuse, raising=False)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-512])
    else:
        path.unlink()
        if damage == "directory":
            path.mkdir()
    monkeypatch.setattr("sys.argv", ["data_tools", "stats", str(shards), "--jobs", "1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    cause = {"cut": "but it has", "unreadable": r"cannot be read (Permission denied)"}.get(damage, "missing")
    assert f"{path}: " in (message := capsys.readouterr().err)
    assert cause in message


@pytest.mark.parametrize("command", [["stats", "{set}", "--out", "{file}/x"], ["synth", "{file}/x", "--images", "2"]])
def test_a_place_that_cannot_be_written_is_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = [argument.format(set=shards, file=tmp_path / "file") for argument in command]
    monkeypatch.setattr("sys.argv", ["data_tools", *arguments, "--jobs", "1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "x: cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_place(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_tools.stats_drawing.draw_stats", fail)
    result = CliRunner().invoke(cli.app, ["stats", str(shards), "--jobs", "1"])
    assert f"{shards}_stats: cannot be written (No space left on device)" in str(result.exception)


@pytest.mark.parametrize(("values", "message"), [((0, None), "at least 1 channel"), ((2, (5, 5)), "LOW < HIGH")])
def test_wrong_channels_name_themselves(values: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Channels(*values)


def test_the_choice_is_seeded_and_has_no_repeats() -> None:
    assert (choose(100, 20, 1) == choose(100, 20, 1)).all()
    assert len(set(choose(100, 20, 1).tolist())) == 20
    assert choose(5, 20, 1).tolist() == [0, 1, 2, 3, 4]
