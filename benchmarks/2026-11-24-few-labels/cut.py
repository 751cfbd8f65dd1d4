"""Cut the objects out of a rendered set, one picture each in a folder of its kind: python cut.py SET OUT [NUMBER_PER_KIND]

The cut is a square about the object's box with some of what is around it, brought to SIDE pixels; what lies beside or before
the object stays in it. Objects smaller than LEAST pixels are left out. The pictures come in the order of the set.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

SIDE = 40  # pixels
LEAST = 20  # pixels of the longer side of the object's box
MARGIN = 1.2  # side of the cut over the longer side of the box


def square(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the cut about a box (x, y, width, height) in a picture of `size` (width, height)."""
    side = min(MARGIN * max(box[2], box[3]), *size)
    left, top = (
        min(max(0.0, start + extent / 2 - side / 2), limit - side)
        for start, extent, limit in zip(box[:2], box[2:], size, strict=True)
    )
    return left, top, left + side, top + side


def cut(source: Path, out: Path, per_kind: int | None) -> Counter[str]:
    """Writes OUT/KIND/NUMBER.png; how many of each kind."""
    document = json.loads((source / "annotations/instances.json").read_text())
    files = {image["id"]: image["file_name"] for image in document["images"]}
    kinds = {category["id"]: category["name"] for category in document["categories"]}
    written: Counter[str] = Counter()
    for item in document["annotations"]:
        kind = kinds[item["category_id"]]
        if max(item["bbox"][2:]) < LEAST or written[kind] == per_kind:
            continue
        with Image.open(source / "images" / files[item["image_id"]]) as picture:
            view = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=square(item["bbox"], picture.size))
        folder = out / kind
        folder.mkdir(parents=True, exist_ok=True)
        view.save(folder / f"{item['id']:06d}.png")
        written[kind] += 1
    return written


def main(source: Path, out: Path, per_kind: int | None = None) -> None:
    found = cut(source, out, per_kind)
    if per_kind is not None and min(found.values()) < per_kind:
        raise SystemExit(f"{source}: {per_kind} objects of each kind were asked for, got {dict(found)}. Render more pictures.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4]))
