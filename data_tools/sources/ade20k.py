"""ADE20K as in the scene parsing challenge: an image and its map of 150 classes, KEY.jpg and KEY.seg.png, both untouched."""

import json
from pathlib import Path

from data_tools.sources import Piece, Source, SourceSample, check_keys, key_of, local_piece
from data_tools.sources.folder import folder_sample, split_by_name

SPLITS = ("training", "validation")
MAP = "seg.png"
_WHOLE = "Unpack ADEChallengeData2016.zip again."
NUM_CLASSES = 150  # map value v from 1 to 150 is class v - 1 of the index; 0 is none of them


def list_ade20k(source: Path, *, split: str = "training") -> Source:
    """List a split of ADEChallengeData2016.

    Args:
        source: ADEChallengeData2016, or the directory that holds it.
        split: "training" or "validation".

    Raises:
        ValueError: Not that layout, an image without a map, a map without an image, or class names that are not 150.
    """
    if split not in SPLITS:
        raise ValueError(f"--split: one of {', '.join(SPLITS)}, got {split!r}.")
    root = source / "ADEChallengeData2016" if (source / "ADEChallengeData2016").is_dir() else source
    images, maps = root / "images" / split, root / "annotations" / split
    for directory in (images, maps):
        if not directory.is_dir():
            raise ValueError(f"{directory}: no such directory. Give ADEChallengeData2016 as ADEChallengeData2016.zip unpacks.")
    files, ignored = split_by_name(images)
    if not files:
        raise ValueError(f"{images}: no images. Give ADEChallengeData2016 as ADEChallengeData2016.zip unpacks.")
    scenes, no_scenes = _read_scenes(root / "sceneCategories.txt", sorted(files))
    samples = []
    for name, size in sorted(files.items()):
        sample = folder_sample(images, name, size, -1)
        piece = _find_map(maps, name)
        about = json.dumps({"scene": scenes[name]}) if name in scenes else ""
        samples.append(SourceSample(sample.image, sample.key, sample.name, about=about, companions=((MAP, piece),)))
    _check_maps(maps, files)
    check_keys(samples)
    classes, no_classes = _read_classes(root / "objectInfo150.txt")
    return Source(
        "ade20k",
        tuple(samples),
        classes,
        {"split": split},
        ignored,
        notes=no_classes + no_scenes,
        folders=(images, maps),
        largest_map_value=NUM_CLASSES,
    )


def _find_map(maps: Path, image: str) -> Piece:
    return local_piece(maps / (image.rpartition(".")[0] + ".png"), named_by=f"the image {image}, as its map of classes")


def _check_maps(maps: Path, images: dict[str, int]) -> None:
    stems = {name.rpartition(".")[0] for name in images}
    alone = sorted(name for name in split_by_name(maps)[0] if name.rpartition(".")[0] not in stems)
    if alone:
        raise ValueError(f"{maps / alone[0]}: has no image. {_WHOLE}")


def _read_scenes(path: Path, images: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """(scene by file of the image, what is to be said about those without)."""
    if not path.is_file():
        return {}, (f"{path}: is not there, so KEY.json has no scenes. {_WHOLE}",)
    pairs = (line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    named = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    scenes = {image: named[key_of(image)] for image in images if key_of(image) in named}
    missing = [image for image in images if image not in scenes]
    what = f"names no scene for {len(missing):,} of {len(images):,} images, such as {missing[0]}" if missing else ""
    return scenes, (f"{path}: {what}. {_WHOLE}",) if missing else ()


def _read_classes(path: Path) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """(names of the 150 classes, in the order of their map values, what is to be said without the file)."""
    if not path.is_file():
        return None, (f"{path}: is not there, so the index has no names of classes. {_WHOLE}",)
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    names = {int(row[0]): row[-1].strip() for row in rows if row[0].strip().isdigit()}
    if sorted(names) != list(range(1, NUM_CLASSES + 1)):
        raise ValueError(f"{path}: expected the classes 1 to {NUM_CLASSES}, got {len(names)}. {_WHOLE}")
    return tuple(names[number] for number in range(1, NUM_CLASSES + 1)), ()
