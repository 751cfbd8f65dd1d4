"""Shards: untouched bytes, rows that point at them, the same set on any number of jobs and after any interruption."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from timm.data import create_dataset

from data_tools import packing, sharding
from data_tools.plan import ShardJob, ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.folder import list_folder
from data_tools.sources.listing import list_listing
from simmim_scale.data.shards import NO_LABEL, ShardIndex


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (20, 16), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", {f"{'cat' if i % 3 else 'dog'}/deep/{i:03d}.jpg": picture(i) for i in range(25)})


OPTIONS = ShardOptions(samples_per_shard=7, seed=3)


def test_every_image_is_there_once_with_its_bytes_and_label(photos: Path, tmp_path: Path) -> None:
    result = write_shards(list_folder(photos), tmp_path / "shards", OPTIONS)
    index = ShardIndex.load(tmp_path / "shards")
    assert (result.samples, result.shards, len(index)) == (25, 4, 25)
    assert index.classes == ("cat", "dog")
    names = []
    for sample in range(25):
        members, where = index.read_members(sample), index.locate(sample)
        about = json.loads(members["json"])
        names.append(about["name"])
        assert members["jpg"] == (photos / about["name"]).read_bytes()
        shard = index.shard_path(where.shard).read_bytes()
        assert shard[where.image_offset : where.image_offset + where.image_bytes] == members["jpg"]
        assert int(members["cls"]) == about["label"] == where.label == index.classes.index(about["name"].split("/")[0])
    assert sorted(names) == sorted(str(path.relative_to(photos)) for path in photos.rglob("*.jpg"))
    assert names != sorted(names)  # shuffled


def test_webdataset_reads_the_shards_as_they_are(photos: Path, tmp_path: Path) -> None:
    write_shards(list_folder(photos), tmp_path / "shards", OPTIONS)
    urls = sorted(str(path) for path in (tmp_path / "shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len({sample["__key__"] for sample in samples}) == 25
    assert all(sample["jpg"].size == (20, 16) and sample["cls"] in (0, 1) for sample in samples)


@pytest.mark.parametrize("training", [False, True])
def test_timms_reader_reads_the_shards_as_they_are(photos: Path, tmp_path: Path, training: bool) -> None:
    write_shards(list_folder(photos), tmp_path / "shards", OPTIONS)
    split = "shard-{000000..000003}.tar|25"
    dataset = create_dataset("wds/", root=str(tmp_path / "shards"), split=split, is_training=training, batch_size=5)
    samples = list(dataset)
    assert len(samples) == len(dataset) == 25
    assert {image.size for image, _ in samples} == {(20, 16)}
    expected = {True: "dog", False: "cat"}
    labels = [ShardIndex.load(tmp_path / "shards").classes.index(expected[i % 3 == 0]) for i in range(25)]
    assert sorted(target for _, target in samples) == sorted(labels)


def open_clip_pipeline(urls: list[str]) -> webdataset.DataPipeline:
    """The stages of open_clip 3.3's loader (open_clip_train/data.py) that meet the tars."""
    return webdataset.DataPipeline(
        webdataset.SimpleShardList(urls),
        webdataset.tarfile_to_samples(),
        webdataset.select(lambda sample: "txt" in sample and bool({"png", "jpg", "jpeg", "webp"} & set(sample))),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.to_tuple("image", "text"),
    )


def test_open_clip_gets_images_and_captions(photos: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, captions=True)
    write_shards(list_folder(photos), tmp_path / "classes", options)
    pairs = list(open_clip_pipeline(sorted(map(str, (tmp_path / "classes").glob("*.tar")))))
    assert sorted(text for _, text in pairs) == ["cat"] * 16 + ["dog"] * 9
    assert all(image.size == (20, 16) for image, _ in pairs)
    rows = ["path,caption", "cat/deep/001.jpg,a cat in a garden", 'dog/deep/000.jpg,"a dog, running"']
    (photos / "list.csv").write_text("\n".join(rows))
    write_shards(list_listing(photos / "list.csv"), tmp_path / "list", options)
    pairs = list(open_clip_pipeline(sorted(map(str, (tmp_path / "list").glob("*.tar")))))
    assert sorted(text for _, text in pairs) == ["a cat in a garden", "a dog, running"]
    with pytest.raises(ValueError, match="has neither a caption nor a class"):
        write_shards(list_folder(photos, labels="none"), tmp_path / "none", options)


def test_a_set_without_captions_is_that_of_before(photos: Path, tmp_path: Path) -> None:
    write_shards(list_folder(photos), tmp_path / "shards", OPTIONS)
    assert "captions" not in json.loads((tmp_path / "shards" / "index.json").read_text())["options"]
    with pytest.raises(ValueError, match="options differ"):  # other bytes: it is another set
        write_shards(list_folder(photos), tmp_path / "shards", replace(OPTIONS, captions=True))


def test_order_follows_the_seed(photos: Path, tmp_path: Path) -> None:
    keys = {}
    for name, options in {"a": OPTIONS, "b": ShardOptions(7, seed=4), "c": ShardOptions(7, shuffle=False)}.items():
        write_shards(list_folder(photos), tmp_path / name, options)
        index = ShardIndex.load(tmp_path / name)
        keys[name] = [index.key(sample) for sample in range(len(index))]
    assert keys["a"] != keys["b"]
    assert keys["c"] == sorted(keys["a"]) == sorted(keys["b"])


def test_two_jobs_and_another_place_give_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    write_shards(list_folder(photos), tmp_path / "one", OPTIONS, jobs=1)
    shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    write_shards(list_folder(tmp_path / "elsewhere" / "photos"), tmp_path / "two", OPTIONS, jobs=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_run_that_stopped_is_continued(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(list_folder(photos), tmp_path / "whole", OPTIONS)
    done, add = [], packing._add

    def stop_midway(writer: object, reader: object, sample: object, job: ShardJob) -> object:
        done.append(job.number)
        if len(done) == 18:
            raise KeyboardInterrupt
        return add(writer, reader, sample, job)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "_add", stop_midway)
    with pytest.raises(KeyboardInterrupt):
        write_shards(list_folder(photos), tmp_path / "shards", OPTIONS)
    assert not (tmp_path / "shards" / "index.json").exists()
    done.clear()
    monkeypatch.setattr(packing, "_add", lambda *given: (done.append(given[3].number), add(*given))[1])
    write_shards(list_folder(photos), tmp_path / "shards", OPTIONS)
    assert set(done) == {2, 3}  # the two that were finished are not written again
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_killed_at_any_moment_it_finishes_with_the_same_bytes(tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos", {f"a/{i:04d}.png": picture(i, "PNG", size=(200, 200)) for i in range(120)})
    options = ShardOptions(samples_per_shard=6, seed=3)
    write_shards(list_folder(photos), tmp_path / "whole", options)
    command = [sys.executable, "-m", "data_tools", "shard", "folder", str(photos), str(tmp_path / "shards")]
    command += ["--samples-per-shard", "6", "--seed", "3", "--jobs", "1"]
    for killed in range(2):
        process = subprocess.Popen(command, start_new_session=True)
        notes = tmp_path / "shards" / ".shards"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(list(notes.glob("*.tar.json"))) < 1 + 6 * killed and process.poll() is None:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, check=True).returncode == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_images_that_do_not_decode_are_left_out_and_listed(photos: Path, tmp_path: Path) -> None:
    whole = picture(99, size=(80, 80))
    fill(
        photos,
        {"cat/cut.jpg": whole[: len(whole) // 2], "cat/empty.jpg": b"", "dog/text.png": b"not an image", "dog/notes.txt": b"x"},
    )
    result = write_shards(list_folder(photos), tmp_path / "shards", OPTIONS)
    assert sorted(item.name for item in result.left_out) == ["cat/cut.jpg", "cat/empty.jpg", "dog/text.png"]
    assert len(ShardIndex.load(tmp_path / "shards")) == result.samples == 25
    report = json.loads((tmp_path / "shards" / "report.json").read_text())
    assert (report["listed"], report["taken"], report["ignored_files"]) == (28, 25, 1)
    causes = {item["name"]: item["cause"] for item in report["left_out"]}
    assert "empty" in causes["cat/empty.jpg"]
    assert "no known image format" in causes["dog/text.png"]


def test_a_slice_without_any_image_makes_no_shard(tmp_path: Path) -> None:
    files = {f"{i}.jpg": b"bad" if i < 3 else picture(i) for i in range(6)}
    result = write_shards(list_folder(fill(tmp_path / "src", files)), tmp_path / "out", ShardOptions(3, shuffle=False))
    assert (result.samples, result.shards) == (3, 1)
    assert len(ShardIndex.load(tmp_path / "out")) == 3


def test_nothing_usable_is_an_error_without_an_index(tmp_path: Path) -> None:
    source = list_folder(fill(tmp_path / "src", {"a.jpg": b"bad"}))
    with pytest.raises(ValueError, match=r"none of the 1 images can be used.*a\.jpg: no known image format"):
        write_shards(source, tmp_path / "out", OPTIONS)
    with pytest.raises(ValueError, match="no index"):
        ShardIndex.load(tmp_path / "out")


def test_odd_images_keep_their_bytes_and_get_their_real_extension(tmp_path: Path) -> None:
    files = {
        "png_named.jpeg": picture(0, "PNG"),
        "grey.jpg": picture(1, mode="L"),
        "cmyk.JPG": picture(2, mode="CMYK"),
        "palette.png": picture(3, "PNG", mode="P"),
        "web.webp": picture(4, "WEBP"),
        "tall.tiff": picture(5, "TIFF"),
        "two.dots.jpg": picture(6),
        "ünïcode-" + "x" * 150 + ".jpg": picture(7),
    }
    result = write_shards(list_folder(fill(tmp_path / "src", files)), tmp_path / "out", ShardOptions(100, shuffle=False))
    index = ShardIndex.load(tmp_path / "out")
    assert result.samples == len(files)
    assert index.classes is None
    for sample in range(len(index)):
        members, where = index.read_members(sample), index.locate(sample)
        name = json.loads(members.pop("json"))["name"]
        ((extension, data),) = members.items()
        assert data == files[name]
        assert extension == {"png_named.jpeg": "png", "palette.png": "png", "web.webp": "webp", "tall.tiff": "tif"}.get(
            name, "jpg"
        )
        shard = index.shard_path(0).read_bytes()
        assert shard[where.image_offset : where.image_offset + where.image_bytes] == data
        assert where.label == NO_LABEL


def test_the_same_set_again_is_no_work(photos: Path, tmp_path: Path) -> None:
    assert write_shards(list_folder(photos), tmp_path / "out", OPTIONS).written
    again = write_shards(list_folder(photos), tmp_path / "out", OPTIONS)
    assert not again.written
    assert again.samples == 25


def test_another_set_needs_overwrite(photos: Path, tmp_path: Path) -> None:
    write_shards(list_folder(photos), tmp_path / "out", OPTIONS)
    other = ShardOptions(samples_per_shard=25)
    with pytest.raises(ValueError, match=r"options differ.*--overwrite"):
        write_shards(list_folder(photos), tmp_path / "out", other)
    fill(photos, {"dog/new.jpg": picture(77)})
    with pytest.raises(ValueError, match="source differ"):
        write_shards(list_folder(photos), tmp_path / "out", OPTIONS)
    write_shards(list_folder(photos), tmp_path / "out", other, overwrite=True)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    assert len(ShardIndex.load(tmp_path / "out")) == 26


def test_a_damaged_set_says_so(photos: Path, tmp_path: Path) -> None:
    write_shards(list_folder(photos), tmp_path / "out", OPTIONS)
    (tmp_path / "out" / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar.*missing.*--overwrite"):
        write_shards(list_folder(photos), tmp_path / "out", OPTIONS)
    write_shards(list_folder(photos), tmp_path / "out", OPTIONS, overwrite=True)
    assert len(ShardIndex.load(tmp_path / "out")) == 25


def test_a_set_whose_index_is_lost_is_left_alone_and_says_how_to_get_it_back(photos: Path, tmp_path: Path) -> None:
    write_shards(list_folder(photos), tmp_path / "out", OPTIONS)
    (tmp_path / "out" / "index.json").unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"index\.json is lost.*data_tools verify .* --repair"):
        write_shards(list_folder(photos), tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["thesis.txt", "index.json", "shard-000000.tar"])
def test_a_directory_of_others_is_left_alone(photos: Path, tmp_path: Path, name: str) -> None:
    fill(tmp_path / "out", {name: b"{}"})
    with pytest.raises(ValueError, match="other files"):
        write_shards(list_folder(photos), tmp_path / "out", OPTIONS, overwrite=True)
    assert contents(tmp_path / "out") == {name: b"{}"}


def test_an_unfinished_set_of_other_options_is_not_mixed_in(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "_write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_shards(list_folder(photos), tmp_path / "out", OPTIONS)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unfinished"):
        write_shards(list_folder(photos), tmp_path / "out", ShardOptions(5))
    write_shards(list_folder(photos), tmp_path / "out", ShardOptions(5), overwrite=True)
    assert len(ShardIndex.load(tmp_path / "out")) == 25


@pytest.mark.parametrize("arguments", [{"samples_per_shard": 0}, {"seed": -1}, {"check": "maybe"}])
def test_wrong_options_name_themselves(arguments: dict) -> None:
    with pytest.raises(ValueError, match="--" + next(iter(arguments)).replace("_", "-")):
        ShardOptions(**arguments)


def test_a_source_that_changes_meanwhile_is_an_error(photos: Path, tmp_path: Path) -> None:
    source = list_folder(photos)
    (photos / "cat/deep/001.jpg").write_bytes(picture(1, size=(60, 60)))
    with pytest.raises(ValueError, match=r"001\.jpg: has .* when the source was listed"):
        write_shards(source, tmp_path / "out", OPTIONS)
