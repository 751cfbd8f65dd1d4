"""The directory that shards are written to: what of it is ours, whether it can be gone on with, and what is in the way."""

import json
import shutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from simmim_scale.data.shards import FORMAT, INDEX_NAME, NOTES, TABLE_NAME, ShardIndex, atomic_file

REPORT_NAME = "report.json"


class State(Enum):
    """What a destination holds."""

    READY = "nothing, or an unfinished set of the same plan"
    COMPLETE = "the set that was asked for"


def prepare(destination: Path, facts: dict[str, Any], plan: str, *, overwrite: bool) -> State:
    """Make the destination ready.

    Raises:
        ValueError: It holds something else.
    """
    _check_foreign(destination)
    note = destination / NOTES / "plan"
    if (destination / INDEX_NAME).exists() and not overwrite:
        check_same_set(destination, facts)
        return State.COMPLETE
    found = _read_text(note)
    if found == plan and not (destination / INDEX_NAME).exists():
        return State.READY
    if found is not None and not overwrite:
        raise ValueError(
            f"{destination}: holds an unfinished set of another source or with other options. Run the command that began it"
            " again, choose another directory, or add --overwrite."
        )
    if overwrite:
        remove_set(destination)
    note.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(note) as file:
        file.write(plan.encode())
    return State.READY


def check_same_set(destination: Path, facts: dict[str, Any]) -> None:
    """The complete set at the destination must be the one asked for; whether it is whole is not looked at.

    Raises:
        ValueError: Another set.
    """
    index = ShardIndex.load(destination, check=False)
    found = {"kind": index.kind, "source": index.source, "options": index.options}
    differing = [name for name, value in facts.items() if found[name] != value]
    if differing:
        verbs = {name: "differ" if name == "options" else "differs" for name in differing}
        what = "; ".join(f"{name} {verb}: {_difference(found[name], facts[name])}" for name, verb in verbs.items())
        raise ValueError(f"{destination}: holds shards whose {what}. Choose another directory or add --overwrite.")


def _difference(found: Any, asked: Any) -> str:
    """What differs in a part of the facts: "seed 3 there, 0 asked for; ..."."""
    if not (isinstance(found, dict) and isinstance(asked, dict)):
        return f"{json.dumps(found)} there, {json.dumps(asked)} asked for"
    names = [key for key in {**found, **asked} if found.get(key) != asked.get(key)]
    return "; ".join(f"{key} {json.dumps(found.get(key))} there, {json.dumps(asked.get(key))} asked for" for key in names)


def check_outside(destination: Path, folders: tuple[Path, ...]) -> None:
    """Raises ValueError if the destination lies in a folder of the source, which would then hold the shards as well."""
    for folder in folders:
        if destination.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{destination}: lies in {folder}, the source of the images, which would not be the same any more. Choose a"
                " directory outside it for the shards."
            )


def check_space(destination: Path, needed: int) -> None:
    """Raises ValueError if the disk has less than `needed` bytes left: better now than after hours."""
    free = shutil.disk_usage(destination).free
    if free < needed:
        raise ValueError(
            f"{destination}: the shards need about {needed / 1e9:,.3f} GB, the disk has {free / 1e9:,.3f} GB left. Free some"
            " space, choose another disk, or make the images smaller with --max-side."
        )


def remove_leftovers(destination: Path) -> None:
    """Remove notes and files that a killed run left, once the set is complete."""
    for path in _own_files(destination):
        if path.name.endswith(".part"):
            path.unlink(missing_ok=True)
    shutil.rmtree(destination / NOTES, ignore_errors=True)


def remove_set(destination: Path) -> None:
    """Remove what an earlier run wrote, the index first, so that no incomplete set ever looks complete."""
    (destination / INDEX_NAME).unlink(missing_ok=True)
    for path in list(_own_files(destination)):
        path.unlink(missing_ok=True)
    shutil.rmtree(destination / NOTES, ignore_errors=True)


def _own_files(destination: Path) -> Iterator[Path]:
    for pattern in ("shard-*.tar", ".shard-*.tar.part", INDEX_NAME, TABLE_NAME, REPORT_NAME):
        yield from destination.glob(pattern)
    for name in (INDEX_NAME, TABLE_NAME, REPORT_NAME):
        yield from destination.glob(f".{name}.*.part")


def _check_foreign(destination: Path) -> None:
    """Refuse a destination with anything that this program did not write."""
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination}: is a file. Give a directory for the shards.")
    if not destination.is_dir():
        return
    present = sorted(path.name for path in destination.iterdir())
    own = {path.name for path in _own_files(destination)}
    # Looked at after the files: another task may have begun in between, and it makes its notes first.
    ours = (destination / NOTES).is_dir() or _is_own_index(destination / INDEX_NAME)
    foreign = [name for name in present if name != NOTES and not (ours and name in own) and (destination / name).exists()]
    if TABLE_NAME in foreign and not (destination / INDEX_NAME).exists():
        raise ValueError(
            f"{destination}: holds shards whose {INDEX_NAME} is lost. Make it again from them with"
            f" `python -m data_tools verify {destination} --repair`, or choose another directory."
        )
    if foreign:
        raise ValueError(
            f"{destination}: holds other files, such as {foreign[0]}. Choose an empty or new directory for the shards."
        )


def _is_own_index(path: Path) -> bool:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT and document.get("kind") != "tars"


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
