"""A list of images: CSV or JSONL with a path or URL a row, and optionally label and key. Other columns go to KEY.json."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_tools.download import check_url
from data_tools.sources import (
    UNKNOWN_SIZE,
    Piece,
    Source,
    SourceSample,
    check_keys,
    is_safe_name,
    key_of,
    key_problem,
    local_piece,
)
from simmim_scale.data.shards import NO_LABEL

_FORM = "Give a CSV with a first line of names (path or url, optionally label, key), or JSONL with an object of them a line."
_OWN = ("path", "url", "label", "key")
_MOST_CLASSES = 10_000_000
_NUMBER = re.compile(r"-?\d+(\.\d*)?|nan", re.ASCII | re.IGNORECASE)


def list_listing(path: Path, *, root: Path | None = None) -> Source:
    """List the images that a file names.

    Columns: "path" (relative to `root`) or "url" (http, https, s3, gs, hf); "label" (optional: whole numbers from 0, 2.0
    too, are the classes themselves, texts become classes in sorted order; empty: none); "key" (optional; default: the path
    without its ending, or the row's number for URLs and for paths outside `root`).

    Args:
        path: *.csv, *.tsv, *.jsonl or *.ndjson.
        root: What paths are relative to; None: the list's directory.

    Raises:
        ValueError: Another form, missing files, labels that are no classes, equal keys, no rows.
    """
    rows = list(_read_rows(path))
    for line, row in rows:
        if not isinstance(row, dict) or None in row:
            raise ValueError(f"{path}, line {line}: expected the named columns, got {str(row)[:120]}. {_FORM}")
    if not rows:
        raise ValueError(f"{path}: lists no images. {_FORM}")
    labels, classes = _labels([(line, row.get("label")) for line, row in rows], path)
    base = root or path.parent
    samples = [
        _sample(row, number, label, base, f"{path}, line {line}")
        for number, ((line, row), label) in enumerate(zip(rows, labels, strict=True))
    ]
    check_keys(samples)
    return Source("list", tuple(samples), classes, {})


def _read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line of the file, row)."""
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        raise ValueError(f"{path}: a list ends in .csv, .tsv, .jsonl or .ndjson. {_FORM}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if ending in (".csv", ".tsv"):
                yield from _csv_rows(file, path, "\t" if ending == ".tsv" else ",")
            else:
                yield from _json_rows(file, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). {_FORM}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid {ending[1:].upper()} ({error}). {_FORM}") from error


def _csv_rows(file: IO[str], path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error}). {_FORM}") from error


def _json_rows(file: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            yield line, json.loads(text)
        except json.JSONDecodeError as error:
            cause = f"{error.msg}: column {error.colno}"
            raise ValueError(f"{path}, line {line}: not valid JSONL ({cause}). {_FORM}") from error


def _labels(rows: list[tuple[int, Any]], path: Path) -> tuple[list[int], tuple[str, ...] | None]:
    """(label of each row, names of the classes) from (line, label as the list has it); a column of numbers, or of texts."""
    given = [(line, value) for line, value in rows if value not in (None, "")]
    if not given:
        return [NO_LABEL] * len(rows), None
    odd = next(((line, value) for line, value in given if isinstance(value, bool | list | dict)), None)
    if odd is not None:
        raise ValueError(f"{path}, line {odd[0]}: labels are whole numbers or texts, got {odd[1]!r}.")
    if all(not isinstance(value, str) or _NUMBER.fullmatch(value) for _, value in given):
        numbers = [NO_LABEL if value in (None, "") else _class_number(value, f"{path}, line {line}") for line, value in rows]
        return numbers, tuple(str(number) for number in range(max(numbers) + 1))
    odd = next(((line, value) for line, value in given if isinstance(value, float)), None)
    if odd is not None:
        raise ValueError(f"{path}, line {odd[0]}: labels are whole numbers or texts, got {odd[1]!r} among texts.")
    names = sorted({str(value) for _, value in given})
    places = {name: number for number, name in enumerate(names)}
    return [NO_LABEL if value in (None, "") else places[str(value)] for _, value in rows], tuple(names)


def _class_number(value: Any, where: str) -> int:
    number = float(value)  # 2.0 too: so pandas writes a column in which one is missing
    if not (number.is_integer() and 0 <= number < _MOST_CLASSES):
        raise ValueError(
            f"{where}: labels that are numbers must be whole, from 0 to {_MOST_CLASSES - 1:,}, got {value!r}. Leave the label"
            " empty where there is none; to use such numbers as names of classes, put a letter before them all."
        )
    return int(number)


def _sample(row: dict[str, Any], number: int, label: int, base: Path, where: str) -> SourceSample:
    place, url = row.get("path"), row.get("url")
    if bool(place) == bool(url) or not isinstance(place or url, str):
        raise ValueError(f"{where}: expected a path or a url, got path {place!r} and url {url!r}. {_FORM}")
    if place and "://" in place:
        place, url = None, place
    if url:
        check_url(url)
    piece = Piece(url, UNKNOWN_SIZE) if url else local_piece(base / place, named_by=where)
    own = row.get("key")
    problem = key_problem(str(own)) if own else None
    if problem:
        raise ValueError(
            f"{where}: the key {own!r} {problem}. Change the column key, or leave it empty: the path is the key then."
        )
    key = str(own or (key_of(place) if place and is_safe_name(place) else f"{number:09d}"))
    extra = {name: value for name, value in row.items() if name not in _OWN and value not in (None, "")}
    about = json.dumps(extra, ensure_ascii=False, separators=(",", ":")) if extra else ""
    return SourceSample(piece, key, url or place, label, about)
