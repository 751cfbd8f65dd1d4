"""Killed, split, full, hostile: whatever happens, the shards are those of one undisturbed run, or there is a clear error."""

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.locks import open_locked
from data_tools.plan import ShardOptions, Task
from data_tools.sharding import repair_shards, write_shards
from data_tools.sources import Source
from data_tools.sources.folder import list_folder
from simmim_scale.data.shards import ShardIndex
from tests.data_tools.layouts import contents, fill, picture

OPTIONS = ShardOptions(6, seed=3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {f"c{i % 3}/{i:03d}.png": picture(i, "PNG", size=(150, 150)) for i in range(90)}
    return fill(tmp_path_factory.mktemp("photos"), files)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The set that an undisturbed run makes."""
    directory = tmp_path_factory.mktemp("whole") / "set"
    write_shards(list_folder(photos), directory, OPTIONS)
    return contents(directory)


# Each write to disk is slowed down a little, so that kills hit all stages of the work.
_SLOW = """
import sys, time
from data_tools import packing, tarwriter, sharding
for owner, name in ((tarwriter.ShardWriter, "add"), (tarwriter.ShardWriter, "finish"), (sharding, "_write_index")):
    def slow(*given, _plain=getattr(owner, name), **more):
        time.sleep(0.006)
        result = _plain(*given, **more)
        time.sleep(0.006)
        return result
    setattr(owner, name, slow)
from data_tools.cli import main
sys.stdout.write("ready\\n")
sys.stdout.flush()
main()
"""


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_the_same_bytes(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out, rng = tmp_path / "set", random.Random(0)
    arguments = ["shard", "folder", str(photos), str(out), "--samples-per-shard", "6", "--seed", "3", "--jobs", "1"]
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", _SLOW, *arguments], start_new_session=True, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.12))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was at work
        process.stdout.close()
        assert not (out / "index.json").exists()
    assert subprocess.run([sys.executable, "-m", "data_tools", *arguments], check=False).returncode == 0
    assert contents(out) == whole


@pytest.mark.parametrize(
    ("number", "jobs", "group"),
    [(signal.SIGTERM, 1, False), (signal.SIGTERM, 2, False), (signal.SIGTERM, 2, True), (signal.SIGINT, 2, True)],
    ids=["terminated", "with workers", "with all its group", "ctrl-c"],
)
def test_a_run_that_is_told_to_stop_says_how_to_go_on(tmp_path: Path, number: int, jobs: int, group: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers: the run waits for it
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        rows = ["path,url", "1.jpg,", *(f",{url}/{i}.jpg" for i in range(3))]
        fill(tmp_path, {"1.jpg": picture(1), "list.csv": "\n".join(rows).encode()})
        out = tmp_path / "out"
        arguments = ["shard", "list", str(tmp_path / "list.csv"), str(out), "--samples-per-shard", "1", "--no-shuffle"]
        process = subprocess.Popen(
            [sys.executable, "-m", "data_tools", *arguments, "--jobs", str(jobs)],
            start_new_session=True,
            # Tests that a shell runs in the background ignore Ctrl-C, and what they start would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while not (out / "shard-000000.tar").exists():
                assert process.poll() is None
                time.sleep(0.02)
            (os.killpg if group else os.kill)(process.pid, number)
            said, complained = process.communicate(timeout=25)  # a URL has 30 seconds to answer
        finally:
            process.kill()
    assert (said, complained) == ("", f"{out}: stopped. Finished shards are kept: run the same command again to go on.\n")
    assert process.returncode == 128 + number
    assert (out / "shard-000000.tar").exists()


@pytest.mark.parametrize("jobs", [2, 4])
def test_any_number_of_jobs_gives_the_same_bytes(photos: Path, whole: dict[str, bytes], tmp_path: Path, jobs: int) -> None:
    write_shards(list_folder(photos), tmp_path / "set", OPTIONS, jobs=jobs)
    assert contents(tmp_path / "set") == whole


def test_tasks_in_any_order_give_the_same_bytes(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    source = list_folder(photos)
    for number, missing in ((2, 10), (0, 5), (1, 0)):
        result = write_shards(source, tmp_path / "set", OPTIONS, task=Task(number, 3))
        assert result.missing == missing
        assert (tmp_path / "set" / "index.json").exists() == (missing == 0)
    assert contents(tmp_path / "set") == whole
    assert not write_shards(source, tmp_path / "set", OPTIONS, task=Task(0, 3)).written


@pytest.mark.slow
def test_tasks_at_the_same_time_give_the_same_bytes(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_tools", "shard", "folder", str(photos), str(tmp_path / "set")]
    command += ["--samples-per-shard", "6", "--seed", "3", "--jobs", "1", "--task"]
    # One task is started twice, as a scheduler that requeues does.
    running = [subprocess.Popen([*command, task]) for task in ("0/3", "1/3", "2/3", "1/3")]
    assert [process.wait() for process in running] == [0, 0, 0, 0]
    assert contents(tmp_path / "set") == whole


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/0"])
def test_wrong_tasks_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--task: i/n with i from 0"):
        Task.parse(text)


def test_tasks_do_not_overwrite(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="remove each other's"):
        write_shards(list_folder(photos), tmp_path / "set", OPTIONS, task=Task(0, 2), overwrite=True)


@pytest.mark.slow
def test_ray_gives_the_same_bytes(photos: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed; pip install 'simmim-scale[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_shards(list_folder(photos), tmp_path / "set", OPTIONS, engine="ray", jobs=2)
    assert contents(tmp_path / "set") == whole
    broken = fill(tmp_path / "broken", {"a.jpg": b"no image"})
    with pytest.raises(ValueError, match="Repair or remove it"):  # as it was raised, not wrapped
        write_shards(list_folder(broken), tmp_path / "other", ShardOptions(undecodable="error"), engine="ray", jobs=1)


def test_without_ray_the_package_is_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--engine ray: the package ray is missing.*pip install"):
        write_shards(list_folder(photos), tmp_path / "set", OPTIONS, engine="ray")
    with pytest.raises(ValueError, match="--engine: one of local, ray"):
        write_shards(list_folder(photos), tmp_path / "set", OPTIONS, engine="dask")


@pytest.mark.parametrize("place", ["", "out", "c0/out", "../photos/out"])
def test_a_destination_inside_the_source_is_refused_before_anything_is_written(tmp_path: Path, place: str) -> None:
    source = fill(tmp_path / "photos", {"c0/1.png": picture(1, "PNG")})
    (tmp_path / "link").symlink_to(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"lies in .*photos, the source.*Choose a directory outside"):
        write_shards(list_folder(source), tmp_path / "link" / place, OPTIONS)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_destination_that_cannot_be_made_or_written_is_a_clear_error(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {"afile": b"x"})
    with pytest.raises(ValueError, match=r"afile/x: cannot be written \(Not a directory\)\. Give a directory"):
        write_shards(list_folder(photos), tmp_path / "afile" / "x", OPTIONS)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for place in ("link", "link/x", "x" * 300):
        with pytest.raises(ValueError, match=r"cannot be written \(.*\)\. Give a directory"):
            write_shards(list_folder(photos), tmp_path / place, OPTIONS)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("data_tools.destination.atomic_file", refuse)
    with pytest.raises(ValueError, match=r"set: cannot be written \(Permission denied\)\. Give a directory"):
        write_shards(list_folder(photos), tmp_path / "set", OPTIONS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(photos: Path, small_disk: Path) -> None:
    with pytest.raises(ValueError, match=r"need about .* GB, the disk has"):
        write_shards(list_folder(photos), small_disk / "set", OPTIONS)
    assert not list((small_disk / "set").glob("*.tar"))


def test_a_disk_that_fills_up_keeps_what_is_finished(
    photos: Path, whole: dict[str, bytes], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.sharding.check_space", lambda *_: None)  # as if others filled it meanwhile
    source = list_folder(photos)
    with pytest.raises(ValueError, match=r"the disk is full .*Finished shards are kept: free some space"):
        write_shards(source, small_disk / "set", OPTIONS)
    finished = list((small_disk / "set").glob("*.tar"))
    assert len(finished) >= 2
    assert not list((small_disk / "set").glob(".*.part"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    times = {path: path.stat().st_mtime_ns for path in finished}
    write_shards(source, small_disk / "set", OPTIONS)
    assert contents(small_disk / "set") == whole
    assert {path: path.stat().st_mtime_ns for path in finished} == times


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failing_system_call_is_clear_and_leaves_no_half_shard(
    photos: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The same at the boundary to the system, where a disk cannot be mounted."""
    calls = 0

    def full(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr("data_tools.tarwriter.ShardWriter._write", full)
        else:
            patch.setattr(f"data_tools.tarwriter.os.{failing}", full)
        with pytest.raises(ValueError, match="the disk is full"):
            write_shards(list_folder(photos), tmp_path / "set", OPTIONS)
    assert calls
    assert not list((tmp_path / "set").glob("*.tar"))
    assert not list((tmp_path / "set").glob(".*.part"))
    write_shards(list_folder(photos), tmp_path / "set", OPTIONS)
    assert contents(tmp_path / "set") == whole


def test_an_unreadable_source_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = list_folder(fill(tmp_path / "src", {"a.jpg": picture(0), "b.jpg": picture(1)}))

    def refuse(path: str) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("data_tools.contents._read_file", refuse)
    with pytest.raises(ValueError, match=r"\.jpg: cannot be read \(Input/output error\)\. Repair or remove"):
        write_shards(source, tmp_path / "set", OPTIONS)


def bomb(side: int) -> bytes:
    """A small PNG that unpacks to side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bombs_are_listed_and_left_out(tmp_path: Path) -> None:
    data = bomb(14_000)  # 196 megapixels in 190 kB
    assert len(data) < 300_000
    source = list_folder(fill(tmp_path / "src", {"bomb.png": data, "good.png": picture(1, "PNG")}))
    for check in ("header", "structure", "full"):
        result = write_shards(source, tmp_path / check, ShardOptions(check=check))
        assert [item.name for item in result.left_out] == ["bomb.png"]
        assert "decompression bomb" in result.left_out[0].cause


def broken_source(tmp_path: Path) -> Source:
    whole_image = picture(1, size=(60, 60))
    return list_folder(fill(tmp_path / "src", {"good.jpg": whole_image, "cut.jpg": whole_image[:-200], "text.jpg": b"hello"}))


def test_broken_images_are_kept_when_asked(tmp_path: Path) -> None:
    result = write_shards(broken_source(tmp_path), tmp_path / "set", ShardOptions(undecodable="keep"))
    index = ShardIndex.load(tmp_path / "set")
    assert {index.key(i): index.read_members(i)["jpg"] for i in range(3)}["text"] == b"hello"
    assert sorted((item.name, item.kept) for item in result.left_out) == [("cut.jpg", True), ("text.jpg", True)]
    assert '"kept": true' in (tmp_path / "set" / "report.json").read_text()


def test_broken_images_end_the_run_when_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(cut|text)\.jpg.*--undecodable leave-out"):
        write_shards(broken_source(tmp_path), tmp_path / "set", ShardOptions(undecodable="error"))


def test_damaged_shards_are_made_again_from_their_source(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    source, out = list_folder(photos), tmp_path / "set"
    write_shards(source, out, OPTIONS)
    (out / "shard-000003.tar").unlink()
    data = bytearray((out / "shard-000007.tar").read_bytes())
    data[1000] ^= 1
    (out / "shard-000007.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000003\.tar.*--repair"):
        write_shards(source, out, OPTIONS)
    assert repair_shards(source, out, OPTIONS) == ["shard-000003.tar", "shard-000007.tar"]
    assert contents(out) == whole
    assert repair_shards(source, out, OPTIONS) == []
    with pytest.raises(ValueError, match="options differ: samples_per_shard 6 there, 7 asked for; seed 3 there, 0 asked for"):
        repair_shards(source, out, ShardOptions(7))


def test_repair_from_a_source_whose_content_changed_is_refused(tmp_path: Path) -> None:
    source = list_folder(fill(tmp_path / "src", {"a.png": picture(0, "PNG")}))
    write_shards(source, tmp_path / "set", OPTIONS)
    shard = tmp_path / "set" / "shard-000000.tar"
    shard.unlink()
    size = (tmp_path / "src/a.png").stat().st_size
    (tmp_path / "src/a.png").write_bytes(picture(1, "PNG").ljust(size, b"\0")[:size])
    with pytest.raises(ValueError, match="made again, it is not what the index states"):
        repair_shards(source, tmp_path / "set", OPTIONS)


def test_two_processes_never_write_one_file(tmp_path: Path) -> None:
    held = open_locked(tmp_path / "x")
    with pytest.raises(ValueError, match="another process is writing it"):
        open_locked(tmp_path / "x", patience=0.1)
    os.close(held)
    os.close(open_locked(tmp_path / "x", patience=0))


def test_leftovers_of_a_killed_run_are_removed(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    write_shards(list_folder(photos), tmp_path / "set", OPTIONS, task=Task(0, 2))
    fill(tmp_path / "set", {".shard-000001.tar.part": b"half", ".index.json.0123.part": b"{"})
    write_shards(list_folder(photos), tmp_path / "set", OPTIONS)
    assert contents(tmp_path / "set") == whole


def test_shards_by_bytes_stay_below_them(photos: Path, tmp_path: Path) -> None:
    write_shards(list_folder(photos), tmp_path / "set", ShardOptions(bytes_per_shard=500_000))
    index = ShardIndex.load(tmp_path / "set")
    assert len(index) == 90
    assert all(300_000 < shard.bytes <= 500_000 + 10_240 for shard in index.shards[:-1])
    with pytest.raises(ValueError, match="give one of them"):
        ShardOptions(5, bytes_per_shard=5)
