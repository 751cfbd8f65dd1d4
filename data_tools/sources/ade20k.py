"""ADE20K as in the scene parsing challenge: an image and its map of 150 classes, KEY.jpg and KEY.seg.png, both untouched."""

import json
from pathlib import Path

from data_tools.sources import Piece, Source, SourceSample, check_keys, local_piece
from data_tools.sources.folder import folder_sample, split_by_name

SPLITS = ("training", "validation")
MAP = "seg.png"
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
    scenes = _read_scenes(root / "sceneCategories.txt")
    samples = []
    for name, size in sorted(files.items()):
        sample = folder_sample(images, name, size, -1)
        piece = _find_map(maps, name)
        about = json.dumps({"scene": scenes[sample.key]}) if sample.key in scenes else ""
        samples.append(SourceSample(sample.image, sample.key, sample.name, about=about, companions=((MAP, piece),)))
    _check_maps(maps, files)
    check_keys(samples)
    return Source("ade20k", tuple(samples), _read_classes(root / "objectInfo150.txt"), {"split": split}, ignored)


def _find_map(maps: Path, image: str) -> Piece:
    return local_piece(maps / (image.rpartition(".")[0] + ".png"), named_by=f"the image {image}, as its map of classes")


def _check_maps(maps: Path, images: dict[str, int]) -> None:
    stems = {name.rpartition(".")[0] for name in images}
    alone = sorted(name for name in split_by_name(maps)[0] if name.rpartition(".")[0] not in stems)
    if alone:
        raise ValueError(f"{maps / alone[0]}: has no image. Complete the images: unpack ADEChallengeData2016.zip again.")


def _read_scenes(path: Path) -> dict[str, str]:
    """Scene by name of the image; empty without the file."""
    if not path.is_file():
        return {}
    pairs = (line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _read_classes(path: Path) -> tuple[str, ...] | None:
    """Names of the 150 classes, in the order of their map values; None without the file."""
    if not path.is_file():
        return None
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    names = {int(row[0]): row[-1].strip() for row in rows if row[0].strip().isdigit()}
    if sorted(names) != list(range(1, NUM_CLASSES + 1)):
        raise ValueError(
            f"{path}: expected the classes 1 to {NUM_CLASSES}, got {len(names)}. Unpack ADEChallengeData2016.zip again."
        )
    return tuple(names[number] for number in range(1, NUM_CLASSES + 1))
