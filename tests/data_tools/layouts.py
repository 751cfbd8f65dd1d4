"""Small copies of published data sets, in exactly their layouts: archives, JSONs, folders."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

WNIDS = ("n01440764", "n01443537", "n02085620")


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


def tar_bytes(files: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar as GNU tar writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname = len(data), 1339000000, "deng"
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def cut_after_members(tar: bytes) -> bytes:
    """A tar without the empty blocks at its end, as a copy that stopped between two members leaves it."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        file.getmembers()
        return tar[: file.offset]


def imagenet_train() -> dict[str, bytes]:
    """CLASS/FILE -> image; with the PNG and a CMYK file that the original has under names of JPEGs."""
    files = {f"{wnid}/{wnid}_{i}.JPEG": picture(10 * c + i) for c, wnid in enumerate(WNIDS) for i in (3, 18, 107)}
    files["n02085620/n02085620_2933.JPEG"] = picture(99, "PNG")
    files["n02085620/n02085620_4.JPEG"] = picture(98, mode="CMYK")
    return files


# Validation images 1 to 5, by ILSVRC2012_ID: IDs do not follow the wnids, and 4 is an inner node without images.
SYNSETS = {1: ("n02085620", 0), 2: ("n01440764", 0), 3: ("n01443537", 0), 4: ("n00001740", 3)}
TRUTH = (3, 1, 2, 2, 1)


def write_imagenet(root: Path) -> Path:
    """The three official archives."""
    by_class: dict[str, dict[str, bytes]] = {}
    for name, data in imagenet_train().items():
        by_class.setdefault(name.split("/")[0], {})[name.split("/")[1]] = data
    train = tar_bytes({f"{wnid}.tar": tar_bytes(files) for wnid, files in by_class.items()})
    val = tar_bytes({f"ILSVRC2012_val_{i:08d}.JPEG": picture(200 + i) for i in range(1, 6)})
    return fill(
        root,
        {
            "ILSVRC2012_img_train.tar": train,
            "ILSVRC2012_img_val.tar": val,
            "ILSVRC2012_devkit_t12.tar.gz": devkit(),
        },
    )


def devkit() -> bytes:
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(np.uint8(number), wnid, "words", "gloss", np.uint8(children)) for number, (wnid, children) in SYNSETS.items()]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    folder = "ILSVRC2012_devkit_t12"
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    files = {
        f"{folder}/readme.txt": b"...",
        f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": truth,
        f"{folder}/data/meta.mat": meta.getvalue(),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_inat(root: Path) -> dict[str, Any]:
    """train2018.json and its images; returns the document."""
    names = [
        f"train_val2018/{group}/{number}/{i:032x}.jpg" for i, (group, number) in enumerate([("Aves", 7), ("Plantae", 2)] * 3)
    ]
    document = {
        "info": {"year": 2018},
        "images": [
            {"id": 40 + i, "file_name": name, "width": 20, "height": 16, "license": 3, "rights_holder": "X"}
            for i, name in enumerate(names)
        ],
        "categories": [
            {"id": 2, "name": "0", "supercategory": "Plantae"},
            {"id": 7, "name": "1", "supercategory": "Aves"},
        ],
        "annotations": [{"id": i, "image_id": 40 + i, "category_id": 7 if "Aves" in name else 2} for i, name in enumerate(names)],
        "licenses": [],
    }
    fill(root, {name: picture(i) for i, name in enumerate(names)} | {"train2018.json": json.dumps(document).encode()})
    return document


def write_coco(root: Path) -> dict[str, Any]:
    """train2017 with polygons, a crowd as RLE, a compressed RLE, and an image without instances; returns the document."""
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 20, "height": 16, "license": 1} for n in (9, 25, 30)]
    annotations = [
        {
            "id": 501,
            "image_id": 25,
            "category_id": 90,
            "iscrowd": 1,
            "area": 20,
            "bbox": [0, 0, 5, 4],
            "segmentation": {"size": [16, 20], "counts": [10, 20, 290]},
        },
        {
            "id": 500,
            "image_id": 25,
            "category_id": 1,
            "iscrowd": 0,
            "area": 12.5,
            "bbox": [1.5, 2.25, 5, 5],
            "segmentation": [[1.5, 2.25, 6.5, 2.25, 6.5, 7.25], [8, 8, 9, 8, 9, 9, 8, 9]],
        },
        {
            "id": 502,
            "image_id": 9,
            "category_id": 1,
            "iscrowd": 0,
            "area": 6,
            "bbox": [1, 1, 3, 2],
            "segmentation": {"size": [16, 20], "counts": "a06Y9"},
        },
    ]
    categories = [
        {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        {"id": 1, "name": "person", "supercategory": "person"},
    ]
    document = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    files = {f"train2017/{image['file_name']}": picture(int(image["id"])) for image in images}
    fill(root, files | {"annotations/instances_train2017.json": json.dumps(document).encode()})
    return document


def write_ade20k(root: Path) -> Path:
    """ADEChallengeData2016 with two training images."""
    rng = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    for number in (1, 2):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 151, (16, 20), dtype=np.uint8)).save(buffer, "PNG")
        files[f"images/training/ADE_train_{number:08d}.jpg"] = picture(number)
        files[f"annotations/training/ADE_train_{number:08d}.png"] = buffer.getvalue()
    rows = [f"{n}\t0.1\t100\t10\t0\tclass {n}, other word" for n in range(1, 151)]
    files["objectInfo150.txt"] = "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]).encode()
    files["sceneCategories.txt"] = b"ADE_train_00000001 airport_terminal\nADE_train_00000002 attic\n"
    return fill(root / "ADEChallengeData2016", files)
