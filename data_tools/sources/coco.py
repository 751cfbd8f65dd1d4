"""COCO: images and their instances. Boxes, crowd flags, polygon and RLE masks go to KEY.json as the dataset has them."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from data_tools.sources import (
    Source,
    SourceSample,
    check_keys,
    check_unique,
    is_safe_name,
    key_of,
    local_piece,
    read_json,
    whole_number,
)
from data_tools.synth.rle import unpack

_WANTED = "an instances JSON of COCO with --annotations, such as annotations/instances_train2017.json"
_KEPT = ("id", "category_id", "iscrowd", "bbox", "area", "segmentation")


def list_coco(source: Path, *, split: str = "train2017", annotations: Path | None = None, images: Path | None = None) -> Source:
    """List a COCO split. Images without instances are kept; the classes of the index are the categories, by their ids.

    KEY.json gets "image_id", "width", "height" and "annotations": each with "id", "category_id" (COCO's), "label" (index into
    the classes), "iscrowd", "bbox" [x, y, width, height], "area" and "segmentation" (polygons, RLE or compressed RLE),
    all in pixels of "width" x "height" (also if `--max-side` made the stored image smaller).

    Args:
        source: Directory that holds train2017/ and annotations/, as the archives unpack.
        split: Name of the split.
        annotations: The JSON; None: SOURCE/annotations/instances_<split>.json.
        images: Directory of the images; None: SOURCE/<split>.

    Raises:
        ValueError: Files missing, a JSON of another form, instances of unknown images or classes, masks that make no sense.
    """
    path = annotations or source / "annotations" / f"instances_{split}.json"
    root = images or source / split
    if not root.is_dir():
        hint = f" Unpack {split}.zip there first." if (source / f"{split}.zip").exists() else ""
        raise ValueError(f"{root}: no such directory of images.{hint} Give it with --images, or another --split.")
    document = read_json(path, what=_WANTED)
    try:
        categories = {number: str(category["name"]) for number, category in _by_id(document["categories"], "category", path)}
        images_by_id = dict(_by_id(document["images"], "image", path))
        sizes = {number: _size(image, number, path) for number, image in images_by_id.items()}
        instances = _instances(document["annotations"], sizes, {number: i for i, number in enumerate(sorted(categories))}, path)
        samples = [
            _sample(image, number, sizes[number], instances.get(number, []), root, path) for number, image in images_by_id.items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the form of COCO instances ({error!r}). Give {_WANTED}.") from error
    if not samples:
        raise ValueError(f"{path}: lists no images. Give {_WANTED}.")
    samples.sort(key=lambda sample: sample.name)
    check_keys(samples)
    return Source("coco", tuple(samples), tuple(categories[number] for number in sorted(categories)), {})


def _by_id(entries: list[dict[str, Any]], what: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(id, entry) of images or categories, whose ids must differ."""
    found = [(whole_number(entry["id"], what=f"{what} id", path=path), entry) for entry in entries]
    check_unique((number for number, _ in found), what=f"{what} id", path=path, wanted=_WANTED)
    return found


def _size(image: dict[str, Any], number: int, path: Path) -> tuple[int, int]:
    """(height, width) of an image, pixels."""
    height, width = (whole_number(image[name], what=f"{name} of image {number}", path=path) for name in ("height", "width"))
    return height, width


def _instances(
    annotations: list[dict[str, Any]], sizes: dict[int, tuple[int, int]], labels: dict[int, int], path: Path
) -> dict[int, list[dict[str, Any]]]:
    """What is kept of the instances, by image, in the order of their ids."""
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    seen: set[int] = set()
    for annotation in annotations:
        number = whole_number(annotation["id"], what="annotation id", path=path)
        problem = _problem(annotation, sizes.get(annotation["image_id"]), labels)
        if number in seen:
            problem = "its id is there twice"
        if problem:
            raise ValueError(f"{path}: annotation {number}: {problem}. Give {_WANTED}.")
        seen.add(number)
        kept = {name: annotation[name] for name in _KEPT if name in annotation}
        by_image[annotation["image_id"]].append(kept | {"label": labels[annotation["category_id"]]})
    return {image: sorted(found, key=lambda instance: instance["id"]) for image, found in by_image.items()}


def _problem(annotation: dict[str, Any], size: tuple[int, int] | None, labels: dict[int, int]) -> str | None:
    if size is None:
        return f"belongs to image {annotation['image_id']}, which is not listed"
    if annotation["category_id"] not in labels:
        return f"has category {annotation['category_id']}, which is not listed"
    box = annotation["bbox"]
    if len(box) != 4 or not all(_is_number(value) for value in box):
        return f"expected a box [x, y, width, height], got {box!r}"
    if min(box[2:]) < 0:
        return f"expected a box [x, y, width, height] with sides of 0 or more, got {box!r}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"expected iscrowd 0 or 1, got {annotation['iscrowd']!r}"
    return _mask_problem(annotation.get("segmentation"), *size)


def _mask_problem(mask: Any, height: int, width: int) -> str | None:
    if mask is None or mask == []:
        return None
    if isinstance(mask, list):
        bad = next((p for p in mask if not isinstance(p, list) or len(p) < 6 or len(p) % 2 or not all(map(_is_number, p))), None)
        return None if bad is None else f"expected polygons [x1, y1, x2, y2, x3, y3, ...], got {str(bad)[:80]}"
    if list(mask["size"]) != [height, width]:
        return f"expected an RLE of size [{height}, {width}], that of the image, got {mask['size']}"
    counts = mask["counts"]
    if isinstance(counts, str):
        try:
            counts = unpack(counts)
        except ValueError as error:
            return f"expected a compressed RLE, got {counts[:40]!r}: {error}"
    if any(count < 0 for count in counts):
        return f"expected run lengths of 0 or more, got {min(counts)}"
    return None if sum(counts) == height * width else f"expected run lengths with the sum {height * width}, got {sum(counts)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _sample(
    image: dict[str, Any], number: int, size: tuple[int, int], instances: list[dict[str, Any]], root: Path, path: Path
) -> SourceSample:
    name = str(image["file_name"])
    if not is_safe_name(name):
        raise ValueError(f"{path}: the file name {name!r} leaves the directory of images. Give {_WANTED}.")
    about = {"image_id": number, "width": size[1], "height": size[0], "annotations": instances}
    text = json.dumps(about, ensure_ascii=False, separators=(",", ":"))
    return SourceSample(local_piece(root / name, named_by=str(path)), key_of(name), name, about=text)
