"""What a folder of images is taken for: classes, keys, and clear errors where it is ambiguous."""

import os
from pathlib import Path

import pytest

from data_tools.sources import Piece, SourceSample, check_keys
from data_tools.sources.folder import list_folder
from data_tools.synth.dataset import SynthOptions, write_dataset
from simmim_scale.data.shards import NO_LABEL


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_top_folder_is_the_class_at_any_depth(tmp_path: Path) -> None:
    source = list_folder(touch(tmp_path, "b/1.jpg", "a/x/y/2.PNG", "a/3.jpeg", "a/readme.md", ".hidden/4.jpg", "a/.5.jpg"))
    assert source.classes == ("a", "b")
    assert [(sample.name, sample.key, sample.label) for sample in source.samples] == [
        ("a/3.jpeg", "a/3", 0),
        ("a/x/y/2.PNG", "a/x/y/2", 0),
        ("b/1.jpg", "b/1", 1),
    ]
    assert source.ignored == 1


def test_images_without_folders_have_no_labels(tmp_path: Path) -> None:
    source = list_folder(touch(tmp_path, "1.jpg", "2.jpg"))
    assert source.classes is None
    assert {sample.label for sample in source.samples} == {NO_LABEL}


def test_nested_folders_can_be_taken_without_labels(tmp_path: Path) -> None:
    source = list_folder(touch(tmp_path, "2021/05/1.jpg", "2.jpg"), labels="none")
    assert source.classes is None
    assert [sample.key for sample in source.samples] == ["2", "2021/05/1"]


def test_rendered_set_is_taken_without_its_masks(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", SynthOptions(images=3, side=(64, 64)))
    source = list_folder(tmp_path / "set")
    assert [sample.name for sample in source.samples] == ["ball/000000.jpg", "bottle/000001.jpg", "box/000002.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "disk", "1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "disk")
    assert [sample.name for sample in list_folder(tmp_path / "set").samples] == ["cat/1.jpg"]
    (tmp_path / "disk" / "again").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match="reached twice"):
        list_folder(tmp_path / "set")


def test_description_depends_on_files_not_on_their_place(tmp_path: Path) -> None:
    first, second = touch(tmp_path / "a", "c/1.jpg"), touch(tmp_path / "b", "c/1.jpg")
    assert list_folder(first).describe() == list_folder(second).describe()
    (second / "c/1.jpg").write_bytes(b"longer")
    assert list_folder(first).describe() != list_folder(second).describe()


def test_name_that_is_no_text_still_gets_a_key(tmp_path: Path) -> None:
    Path(str(tmp_path) + "/\udcff\udcfe.jpg").write_bytes(b"x")
    (sample,) = list_folder(tmp_path).samples
    assert sample.key.encode()
    assert Path(sample.image.place).read_bytes() == b"x"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no images: 0 files"),
        (["a/notes.txt"], "no images: 1 files"),
        (["1.jpg", "a/2.jpg"], "lie beside the class folders"),
        (["a/1.jpg", "a/1.png"], "names must differ"),
        (["a/1.b.jpg", "a/1_b.jpg"], "names must differ"),
        (["index.json", "a/1.jpg"], "holds shards already"),
    ],
)
def test_unusable_folders_are_clear_errors(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_folder(touch(tmp_path, *names))


def test_all_files_that_collide_are_named_at_once(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a/{i:02d}.{extension}" for i in range(25) for extension in ("jpg", "png")), "a/other.jpg")
    with pytest.raises(ValueError, match="25 pairs of files would be one sample each; names must differ") as caught:
        list_folder(tmp_path)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 21
    assert all(f"{i:02d}.jpg" in line and f"{i:02d}.png" in line for i, line in enumerate(lines[:20]))
    assert lines[-1].strip() == "and 5 more"


def test_missing_folder_file_and_wrong_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        list_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        list_folder(touch(tmp_path, "f.jpg") / "f.jpg")
    with pytest.raises(ValueError, match="--labels: one of auto, folder, none, got 'yes'"):
        list_folder(tmp_path, labels="yes")


@pytest.mark.parametrize("key", ["/etc/passwd", "a/../../b", "a.b"])
def test_keys_that_leave_the_directory_or_split_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="cannot name a sample"):
        check_keys([SourceSample(Piece("x", 1), key, "x")])


def test_class_folders_without_an_image_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/notes.txt", "c/d/2.jpg", ".hidden/x")
    (tmp_path / "e").mkdir()
    assert list_folder(tmp_path).classes == ("a", "c")
    (note,) = list_folder(tmp_path).notes
    assert note == f"{tmp_path}: 2 folders hold no image and are no classes: b, e"
    assert list_folder(tmp_path, labels="none").notes == ()


@pytest.mark.parametrize("target", ["nowhere", "b"])
def test_a_link_to_a_class_folder_that_leads_nowhere_is_a_clear_error(tmp_path: Path, target: str) -> None:
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "b").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"/b: cannot be looked at .*Repair or remove the link"):
        list_folder(tmp_path)


def test_dangling_links_and_pipes_are_clear_errors(tmp_path: Path) -> None:
    touch(tmp_path / "links", "1.jpg")
    (tmp_path / "links" / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match=r"2\.jpg: cannot be looked at"):
        list_folder(tmp_path / "links")
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "1.jpg")
    with pytest.raises(ValueError, match="a pipe or device"):
        list_folder(tmp_path / "pipes")
