"""ImageNet as it is downloaded, or unpacked: archives are read in place, so that nothing has to be unpacked first.

Both give the same samples: key and name are CLASS/FILE, classes are sorted wnids, the usual numbering. ImageNet-22K's tar of
class tars is read the same way.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data_tools.sources import Piece, Source, SourceSample, check_keys, is_safe_name, key_of
from data_tools.sources.devkit import FIX, Devkit, read_devkit
from data_tools.sources.folder import EXTENSIONS, folder_sample, split_by_name
from data_tools.tarscan import ArchiveError, Kind, TarMember, scan_tar

SPLITS = ("train", "val")
NUM_CLASSES = 1000
_WNID = re.compile(r"n\d{8}")
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.")
_DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar", "ILSVRC2012_devkit_t12")


def list_imagenet(source: Path, *, split: str = "train", devkit: Path | None = None) -> Source:
    """List ImageNet.

    Args:
        source: ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar, a directory that holds them, a directory of class tars or
            of class folders (or with such a one called as the split), or the flat directory of validation images.
        split: "train" or "val".
        devkit: ILSVRC2012_devkit_t12.tar.gz or what it unpacks to; None: looked for beside the images. Only for val.

    Raises:
        ValueError: Nothing of all this is there, damaged archives, or images without a class.
    """
    if split not in SPLITS:
        raise ValueError(f"--split: one of {', '.join(SPLITS)}, got {split!r}.")
    place = _locate(source, split)
    from_tars = split == "train" and _holds_tars(place)
    samples, ignored = _list_tars(place) if from_tars else _list_images(place)
    if not samples:
        raise ValueError(f"{place}: no images of ImageNet. Give the official archive or the directory with the class folders.")
    wnids = sorted({name.split("/")[0] for name in (sample.name for sample in samples) if "/" in name})
    if len(wnids) == 0 and split == "val":
        kit = read_devkit(devkit or _find_devkit(source))
        samples, wnids = _with_truth(samples, kit, place), list(kit.wnids)
    _check_classes(samples, wnids, place, split)
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    labelled = [SourceSample(s.image, s.key, s.name, numbers[s.name.split("/")[0]]) for s in samples]
    labelled.sort(key=lambda sample: sample.name)
    check_keys(labelled)
    notes = (f"{place}: holds {len(wnids):,} class tars, ILSVRC2012 has {NUM_CLASSES:,}",)
    return Source(
        "imagenet",
        tuple(labelled),
        tuple(wnids),
        {"split": split},
        ignored,
        notes if from_tars and len(wnids) != NUM_CLASSES else (),
        (place,) if place.is_dir() else (),
    )


def _locate(source: Path, split: str) -> Path:
    """The archive or directory that holds the split."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise ValueError(f"{source}: no such file or directory. Give the official archive or the directory that holds it.")
    tries = (
        f"ILSVRC2012_img_{split}.tar",
        f"ILSVRC2012_img_{split}",
        split,
        f"ILSVRC/Data/CLS-LOC/{split}",
        f"Data/CLS-LOC/{split}",
    )
    return next((source / name for name in tries if (source / name).exists()), source)


def _holds_tars(place: Path) -> bool:
    """Whether a place is an archive, or a directory of class tars."""
    return place.is_file() or any(_WNID.fullmatch(path.stem) for path in place.glob("n*.tar"))


def _list_tars(place: Path) -> tuple[list[SourceSample], int]:
    """Samples of a tar of class tars, or of a directory of class tars."""
    samples: list[SourceSample] = []
    ignored = 0
    if place.is_dir():
        tars = [(path.stem, path, 0, None) for path in sorted(place.glob("n*.tar"))]
    else:
        tars = [(_wnid(member, place), place, member.data, member.data + member.size) for member in _files(place)]
    for wnid, path, start, end in tars:
        if wnid is None:
            ignored += 1
            continue
        samples += [
            SourceSample(Piece(str(path), member.size, member.data), key_of(f"{wnid}/{name}"), f"{wnid}/{name}")
            for member in _files(path, start, end)
            if (name := _plain_name(member, path))
        ]
    return samples, ignored


def _list_images(place: Path) -> tuple[list[SourceSample], int]:
    """Samples of a directory of images or of a tar of images; with class folders or flat, labels still missing."""
    if place.is_dir():
        files, ignored = split_by_name(place)
        return [folder_sample(place, name, size, -1) for name, size in sorted(files.items())], ignored
    members = [member for member in _files(place) if _has_image_name(member.name)]
    names = [member.name.removeprefix("./").removeprefix("val/") for member in members]
    pieces = [Piece(str(place), member.size, member.data) for member in members]
    return [SourceSample(piece, key_of(name), name) for piece, name in zip(pieces, names, strict=True)], 0


def _files(path: Path, start: int = 0, end: int | None = None) -> Iterator[TarMember]:
    """The files of a tar; what could trick whoever unpacks it is refused."""
    for member in scan_tar(path, start=start, end=end):
        if member.kind is Kind.DIRECTORY:
            continue
        if member.kind is not Kind.FILE:
            raise ArchiveError(f"{path}: {member.name!r} is a {member.kind.value}; ImageNet has none. {_FOREIGN}")
        if not is_safe_name(member.name.removeprefix("./")):
            raise ArchiveError(f"{path}: {member.name!r} would leave the directory it is unpacked to. {_FOREIGN}")
        yield member


_FOREIGN = "This is not the official archive: compare its checksum, download it again."


def _wnid(member: TarMember, path: Path) -> str | None:
    name = member.name.rpartition("/")[2]
    if name.endswith(".tar") and _WNID.fullmatch(name[:-4]):
        return name[:-4]
    if _has_image_name(name):
        raise ArchiveError(
            f"{path}: holds images, such as {member.name!r}, where class tars (n01440764.tar) are expected. For the archive of"
            " validation images add --split val."
        )
    return None


def _plain_name(member: TarMember, path: Path) -> str:
    """File name of an image in a class tar."""
    name = member.name.rpartition("/")[2]
    if not _has_image_name(name):
        raise ArchiveError(f"{path}: {member.name!r} in a class tar is no image by its name. {_FOREIGN}")
    return name


def _has_image_name(name: str) -> bool:
    return "." + name.rpartition(".")[2].lower() in EXTENSIONS


def _find_devkit(source: Path) -> Path:
    for directory in (source, source.parent) if source.is_dir() else (source.parent,):
        for name in _DEVKITS:
            if (directory / name).exists():
                return directory / name
    raise ValueError(f"{source}: the classes of the validation images are in the devkit, which is not beside them. {FIX}")


def _with_truth(samples: list[SourceSample], kit: Devkit, place: Path) -> list[SourceSample]:
    """Validation images named CLASS/FILE by the ground truth, as class folders would have them."""
    if len(samples) != len(kit.truth):
        raise ValueError(
            f"{place}: holds {len(samples):,} images, but the ground truth has {len(kit.truth):,} lines. The images or the"
            " devkit are not complete: compare their checksums."
        )
    named = []
    for sample in samples:
        match = _VAL_NUMBER.match(sample.name.rpartition("/")[2])
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(kit.truth):
            raise ValueError(
                f"{place}: {sample.name}: expected names from ILSVRC2012_val_00000001.JPEG to"
                f" ILSVRC2012_val_{len(kit.truth):08d}.JPEG, whose number is the line of the ground truth."
            )
        name = f"{kit.truth[number - 1]}/{sample.name}"
        named.append(SourceSample(sample.image, key_of(name), name))
    return named


def _check_classes(samples: list[SourceSample], wnids: list[str], place: Path, split: str) -> None:
    loose = next((sample.name for sample in samples if "/" not in sample.name), None)
    odd = next((wnid for wnid in wnids if not _WNID.fullmatch(wnid)), None)
    if loose is not None or odd is not None:
        hint = " For the validation images add --split val." if split == "train" else ""
        raise ValueError(
            f"{place}: expected images in class folders such as n01440764, got {loose or odd!r}.{hint} For classes with other"
            " names use `shard folder`."
        )
    missing = {sample.name.split("/")[0] for sample in samples} - set(wnids)
    if missing:
        raise ValueError(f"{place}: the ground truth names {sorted(missing)[0]}, which is no class of the devkit. {FIX}")
