"""iNaturalist 2018: images and their classes as its JSON lists them (train2018.json, val2018.json, test2018.json)."""

from pathlib import Path, PurePosixPath
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
from simmim_scale.data.shards import NO_LABEL

_WANTED = "the JSON of the iNaturalist 2018 competition with --annotations, such as train2018.json"


def list_inat(source: Path, *, annotations: Path | None = None, split: str = "train", categories: Path | None = None) -> Source:
    """List the images of iNaturalist 2018.

    Args:
        source: Directory that holds train_val2018/ (or test2018/), as the archives unpack.
        annotations: The JSON; None: SOURCE/<split>2018.json. That of the split test has no "annotations": no labels.
        split: "train", "val" or "test".
        categories: categories.json, published after the competition, which has the species' names; None: names of the JSON.

    Raises:
        ValueError: Files missing, a JSON of another form, images without or with two classes, ids or names that occur twice.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory. Give the one that holds train_val2018 and train2018.json.")
    path = annotations or source / f"{split}2018.json"
    document = read_json(path, what=_WANTED)
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise ValueError(f"{path}: expected an object with a list of images. Give {_WANTED}.")
    if not document["images"]:
        raise ValueError(f"{path}: lists no images. Give {_WANTED}.")
    try:
        ids = (whole_number(image["id"], what="image id", path=path) for image in document["images"])
        check_unique(ids, what="image id", path=path, wanted=_WANTED)
        labels, classes = _labels(document, path, categories, split)
        samples = [_sample(image, source, path, labels) for image in document["images"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the form of iNaturalist 2018 ({error!r}). Give {_WANTED}.") from error
    samples.sort(key=lambda sample: sample.name)
    check_keys(samples)
    return Source("inat2018", tuple(samples), classes, {})


def _labels(
    document: dict[str, Any], path: Path, categories: Path | None, split: str
) -> tuple[dict[Any, int] | None, tuple[str, ...] | None]:
    """(label by image id, names of the classes in the order of their ids); None without annotations."""
    if not document.get("annotations"):
        if split != "test":
            raise ValueError(f"{path}: has no annotations, so no image has a class. Give {_WANTED}, or add --split test.")
        return None, None
    names = _names(document, path, categories)
    numbers = {number: label for label, number in enumerate(sorted(names))}
    listed = {image["id"] for image in document["images"]}
    labels: dict[Any, int] = {}
    for annotation in document["annotations"]:
        label = numbers.get(annotation["category_id"])
        if label is None:
            raise ValueError(
                f"{path}: annotation {annotation.get('id')} has category {annotation['category_id']}, which is not listed."
            )
        if annotation["image_id"] not in listed:
            raise ValueError(
                f"{path}: annotation {annotation.get('id')} belongs to image {annotation['image_id']}, which is not listed."
                f" Give {_WANTED}."
            )
        if labels.setdefault(annotation["image_id"], label) != label:
            raise ValueError(f"{path}: image {annotation['image_id']} has two classes. Give {_WANTED}.")
    return labels, tuple(names[number] for number in sorted(names))


def _names(document: dict[str, Any], path: Path, categories: Path | None) -> dict[Any, str]:
    """Name of each category by its id. In categories.json a plant and an animal may share theirs."""
    listed = read_json(categories, what="categories.json of iNaturalist 2018") if categories else document["categories"]
    place = categories or path
    check_unique((category["id"] for category in listed), what="category id", path=place, wanted=_WANTED)
    nameless = next((category["id"] for category in listed if category["name"] is None), None)
    if nameless is not None:
        raise ValueError(f"{place}: category {nameless} has no name. Give {_WANTED}.")
    names = (f"{category['name']} ({category.get('supercategory')})" if categories else category["name"] for category in listed)
    check_unique(names, what="category name", path=place, wanted=_WANTED)
    return {category["id"]: str(category["name"]) for category in listed}


def _sample(image: dict[str, Any], source: Path, path: Path, labels: dict[Any, int] | None) -> SourceSample:
    name = str(PurePosixPath(image["file_name"]))
    if not is_safe_name(name):
        raise ValueError(f"{path}: the file name {name!r} leaves the directory of images. Give {_WANTED}.")
    label = NO_LABEL if labels is None else labels.get(image["id"])
    if label is None:
        raise ValueError(f"{path}: image {name} (id {image['id']}) has no annotation, though others have. Give {_WANTED}.")
    return SourceSample(
        local_piece(source / name, named_by=str(path)), key_of(name), name, label, f'{{"image_id": {int(image["id"])}}}'
    )
