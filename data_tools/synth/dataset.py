"""A rendered data set on disk: pictures in one folder a class, boxes and masks beside them.

DST/images/CLASS/000123.jpg       the picture; CLASS is the kind of its main object
DST/masks/CLASS/000123.png        8-bit map of categories: numbers of `semantic_categories` in dataset.json
DST/annotations/instances.json    COCO style: images, categories, and per object its box, area and run-length mask
DST/dataset.json                  what the set is: options, classes, categories; written last
"""

import functools
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.jobs import run_jobs
from data_tools.synth.rle import box, encode
from data_tools.synth.scene import CATEGORIES, KINDS, draw_picture

FORMAT = "simmim-synth"
VERSION = 1
DESCRIPTION_NAME = "dataset.json"
IMAGES_NAME = "images"

_CHUNK = 16  # pictures a job
_ASPECTS = (4 / 3, 4 / 3, 3 / 2, 1.0, 3 / 4)  # width over height, as photographs have it
_LEAST_SIDE, _GREATEST_SIDE = 64, 2048


@dataclass(frozen=True)
class SynthOptions:
    """What determines every byte of the set.

    Args:
        images: Number of pictures.
        seed: Another seed gives other pictures of the same classes: use one for training and one for validation.
        side: Range of the shorter side, in pixels.
        quality: Range of the JPEG quality.
    """

    images: int
    seed: int = 0
    side: tuple[int, int] = (192, 256)
    quality: tuple[int, int] = (82, 95)

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"--images: at least 1, got {self.images}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed: 0 to {2**32 - 1}, got {self.seed}.")
        if not _LEAST_SIDE <= self.side[0] <= self.side[1] <= _GREATEST_SIDE:
            raise ValueError(
                f"--side: a range LOW-HIGH of pixels with {_LEAST_SIDE} <= LOW <= HIGH <= {_GREATEST_SIDE}, got"
                f" {self.side[0]}-{self.side[1]}. Try 192-256."
            )
        if not 1 <= self.quality[0] <= self.quality[1] <= 95:
            raise ValueError(f"--quality: a range LOW-HIGH with 1 <= LOW <= HIGH <= 95, got {self.quality[0]}-{self.quality[1]}.")


def write_dataset(
    destination: Path,
    options: SynthOptions,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Render the set into `destination`; equal options give equal bytes for any number of jobs.

    The set is rendered beside its destination and moved there when complete, so what is there is complete.

    Args:
        destination: A directory that does not exist yet, is empty, or (with `overwrite`) holds such a set.
        options: What to render.
        jobs: Processes.
        overwrite: Replace a set that is there. A directory that is no such set is never touched.
        progress: Called with the number of pictures rendered since the last call.

    Returns:
        False if the very same set was there already and nothing was done.

    Raises:
        ValueError: The destination is in use.
    """
    if _already_there(destination, options, overwrite=overwrite):
        return False
    aside = destination.with_name(f".{destination.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    for folder in (IMAGES_NAME, "masks"):
        for kind in KINDS:
            (aside / folder / kind).mkdir(parents=True)
    starts = range(0, options.images, _CHUNK)
    entries: list[dict[str, Any]] = []
    for chunk in run_jobs(functools.partial(_render_chunk, aside, options), starts, jobs):
        entries += chunk
        if progress:
            progress(len(chunk))
    _write_json(aside / "annotations" / "instances.json", _annotations(entries))
    _write_json(aside / DESCRIPTION_NAME, _description(options), indent=1)
    if destination.exists():
        shutil.rmtree(destination)
    aside.rename(destination)
    return True


def read_description(directory: Path) -> dict[str, Any] | None:
    """dataset.json of a rendered set, or None if `directory` is none."""
    file = directory / DESCRIPTION_NAME
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return document if isinstance(document, dict) and document.get("format") == FORMAT else None


def picture_size(options: SynthOptions, index: int) -> tuple[int, int]:
    """(height, width) of picture `index`."""
    rng = np.random.default_rng([options.seed, index, 1])
    short, aspect = int(rng.integers(options.side[0], options.side[1] + 1)), float(rng.choice(_ASPECTS))
    return (short, round(short * aspect)) if aspect >= 1 else (round(short / aspect), short)


def _already_there(destination: Path, options: SynthOptions, *, overwrite: bool) -> bool:
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    found = read_description(destination)
    if found is None:
        raise ValueError(f"{destination}: is there and is no rendered data set, so it is left alone. Choose another destination.")
    if found == _description(options):
        return True
    if not overwrite:
        raise ValueError(
            f"{destination}: holds a rendered data set with other options ({json.dumps(found.get('options'))})."
            " Choose another destination or add --overwrite."
        )
    return False


def _render_chunk(directory: Path, options: SynthOptions, start: int) -> list[dict[str, Any]]:
    return [_render(directory, options, index) for index in range(start, min(start + _CHUNK, options.images))]


def _render(directory: Path, options: SynthOptions, index: int) -> dict[str, Any]:
    """Draw and write picture `index`; returns its image and annotation entries, without their numbers."""
    kind = KINDS[index % len(KINDS)]
    height, width = picture_size(options, index)
    picture = draw_picture(options.seed, index, kind, height, width)
    quality = int(np.random.default_rng([options.seed, index, 2]).integers(options.quality[0], options.quality[1] + 1))
    name = f"{kind}/{index:06d}"
    encoded = io.BytesIO()
    Image.fromarray(picture.image).save(encoded, "JPEG", quality=quality, subsampling="4:2:0")
    (directory / IMAGES_NAME / f"{name}.jpg").write_bytes(encoded.getvalue())
    Image.fromarray(picture.semantic).save(directory / "masks" / f"{name}.png", compress_level=3)
    objects = [
        {
            "category_id": KINDS.index(instance.kind) + 1,
            "bbox": box(instance.mask),
            "area": int(instance.mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": [height, width], "counts": encode(instance.mask)},
            "pattern": instance.pattern,
        }
        for instance in picture.instances
    ]
    return {"image": {"file_name": f"{name}.jpg", "height": height, "width": width, "place": picture.place}, "objects": objects}


def _annotations(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The COCO document of entries in the order of the pictures."""
    images, annotations = [], []
    for image_id, entry in enumerate(entries, start=1):
        images.append({"id": image_id, **entry["image"]})
        for item in entry["objects"]:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **item})
    return {
        "info": {"description": "Rendered pictures of textured objects", "version": str(VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": kind, "supercategory": "object"} for number, kind in enumerate(KINDS, start=1)],
    }


def _description(options: SynthOptions) -> dict[str, Any]:
    document = {
        "format": FORMAT,
        "version": VERSION,
        "options": asdict(options),
        "images": IMAGES_NAME,
        "masks": "masks",
        "annotations": "annotations/instances.json",
        "classes": list(KINDS),
        "semantic_categories": {str(number): name for number, name in enumerate(CATEGORIES, start=1)},
    }
    return json.loads(json.dumps(document))  # tuples become lists, as they will be when read back


def _write_json(path: Path, document: dict[str, Any], *, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=indent) + "\n", encoding="utf-8")
