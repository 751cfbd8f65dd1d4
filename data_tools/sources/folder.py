"""A folder of images: the top folder is the class, deeper nesting is free; images without folders have no labels."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.sources import MOST_LISTED, Piece, Source, SourceSample, check_keys, key_of
from data_tools.synth.dataset import read_description
from simmim_scale.data.shards import INDEX_NAME, NO_LABEL

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".jfif", ".npy", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
LABELS = ("auto", "folder", "none")


def list_folder(directory: Path, *, labels: str = "auto") -> Source:
    """List the images under `directory`, following links; hidden files and folders are skipped.

    Args:
        directory: Any folder, or a set rendered by `data_tools synth` (its pictures are taken, not its masks).
        labels: "folder": the class of an image is the top folder it lies in; "none": no labels; "auto": "folder" if
            there are folders with images, else "none".

    Raises:
        ValueError: No such directory, no images in it, images both beside and in class folders, or two with one name.
    """
    if labels not in LABELS:
        raise ValueError(f"--labels: one of {', '.join(LABELS)}, got {labels!r}.")
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "no such directory"
        raise ValueError(f"{directory}: {what}. Give the directory that holds the images.")
    if (directory / INDEX_NAME).is_file():
        raise ValueError(f"{directory}: holds shards already (it has an {INDEX_NAME}). Give the directory that holds the images.")
    rendered = read_description(directory)
    root = directory / rendered["images"] if rendered else directory
    files, ignored = split_by_name(root)
    if not files:
        raise ValueError(
            f"{root}: no images: {ignored} files, none with one of the endings {' '.join(sorted(EXTENSIONS))}."
            " Give the directory that holds the images."
        )
    names = sorted(files)
    classes = _class_names(root, names, labels)
    numbers = {name: number for number, name in enumerate(classes or ())}
    samples = [folder_sample(root, name, files[name], numbers[name.split("/")[0]] if classes else NO_LABEL) for name in names]
    check_keys(samples)
    names_of_classes = None if classes is None else tuple(printable(name) for name in classes)
    notes = () if classes is None else _empty_folders(root, classes)
    options = {"labels": "none" if classes is None else "folder"}
    return Source("folder", tuple(samples), names_of_classes, options, ignored, notes, (directory,))


def _empty_folders(root: Path, classes: list[str]) -> tuple[str, ...]:
    """A sentence about the top folders without an image, if there are any."""
    folders = (entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    empty = [printable(name) for name in sorted(set(folders) - set(classes))]
    if not empty:
        return ()
    listed = ", ".join(empty[:MOST_LISTED]) + (f" and {len(empty) - MOST_LISTED:,} more" if len(empty) > MOST_LISTED else "")
    what = "folder holds no image and is no class" if len(empty) == 1 else "folders hold no image and are no classes"
    return (f"{root}: {len(empty):,} {what}: {listed}",)


def folder_sample(root: Path, name: str, size: int, label: int) -> SourceSample:
    """The sample of an image file, by its name relative to `root`."""
    return SourceSample(Piece(os.path.join(root, name), size), key_of(printable(name)), printable(name), label)


def split_by_name(root: Path) -> tuple[dict[str, int], int]:
    """Relative name -> bytes of what looks like an image by its ending, and the number of other files."""
    images, others = {}, 0
    for name, entry in _walk(root):
        if os.path.splitext(name)[1].lower() in EXTENSIONS:
            images[name] = _size(entry)
        else:
            others += 1
    return images, others


def _size(entry: Any) -> int:
    status = _status(entry)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{entry.path}: is no file that can be read to an end (a pipe or device). Remove it.")
    return status.st_size


def _status(entry: Any) -> os.stat_result:
    try:
        return entry.stat()
    except OSError as error:
        fix = "Repair or remove the link, or its permissions."
        raise ValueError(f"{entry.path}: cannot be looked at ({error.strerror}). {fix}") from error


def _walk(root: Path) -> Iterator[tuple[str, Any]]:
    """(name relative to root with forward slashes, directory entry) of every visible file."""
    pending, visited = [("", str(root))], set[str]()
    while pending:
        prefix, directory = pending.pop()
        real = os.path.realpath(directory)
        if real in visited:
            raise ValueError(f"{directory}: is reached twice, through a link. Remove the link.")
        visited.add(real)
        try:
            entries = list(os.scandir(directory))
        except PermissionError as error:
            raise ValueError(f"{directory}: not readable. Give yourself permission or remove the folder.") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if stat.S_ISDIR(_status(entry).st_mode):  # a link that leads nowhere may have been a folder
                pending.append((f"{prefix}{entry.name}/", entry.path))
            else:
                yield prefix + entry.name, entry


def _class_names(root: Path, names: list[str], labels: str) -> list[str] | None:
    """Sorted top folders, or None without labels."""
    loose = [name for name in names if "/" not in name]
    if labels == "none" or (labels == "auto" and len(loose) == len(names)):
        return None
    if loose:
        raise ValueError(
            f"{root}: {len(loose)} images, such as {printable(loose[0])}, lie beside the class folders and so have no class."
            " Move them into one, or add --labels none."
        )
    return sorted({name.split("/")[0] for name in names})


def printable(name: str) -> str:
    """The name with bytes that are no UTF-8 written out, so that it fits into JSON and tar."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
