"""A list of images: CSV or JSONL with a path or URL a row, and optionally label and key. Other columns go to KEY.json."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.download import check_url
from data_tools.sources import UNKNOWN_SIZE, Piece, Source, SourceSample, check_keys, is_safe_name, key_of, local_piece
from simmim_scale.data.shards import NO_LABEL

_FORM = "Give a CSV with a first line of names (path or url, optionally label, key), or JSONL with an object of them a line."
_OWN = ("path", "url", "label", "key")
_MOST_CLASSES = 10_000_000


def list_listing(path: Path, *, root: Path | None = None) -> Source:
    """List the images that a file names.

    Columns: "path" (relative to `root`) or "url" (http, https, s3, gs, hf); "label" (optional: whole numbers from 0 are the
    classes themselves, texts become classes in sorted order; empty: none); "key" (optional; default: the path without its ending,
    or the row's number for URLs and for paths outside `root`).

    Args:
        path: *.csv, *.tsv, *.jsonl or *.ndjson.
        root: What paths are relative to; None: the list's directory.

    Raises:
        ValueError: Another form, missing files, mixed labels, equal keys, no rows.
    """
    rows = list(_read_rows(path))
    odd = next((number for number, row in enumerate(rows) if not isinstance(row, dict) or None in row), None)
    if odd is not None:
        raise ValueError(f"{path}, row {odd + 1}: expected the named columns, got {str(rows[odd])[:120]}. {_FORM}")
    if not rows:
        raise ValueError(f"{path}: lists no images. {_FORM}")
    labels, classes = _labels([row.get("label") for row in rows], path)
    base = root or path.parent
    samples = [_sample(row, number, label, base, path) for number, (row, label) in enumerate(zip(rows, labels, strict=True))]
    check_keys(samples)
    return Source("list", tuple(samples), classes, {})


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        raise ValueError(f"{path}: a list ends in .csv, .tsv, .jsonl or .ndjson. {_FORM}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if ending in (".csv", ".tsv"):
                yield from csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ",", strict=True)
            else:
                yield from (json.loads(line) for line in file if line.strip())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). {_FORM}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not valid {ending[1:].upper()} ({error}). {_FORM}") from error


def _labels(values: list[Any], path: Path) -> tuple[list[int], tuple[str, ...] | None]:
    given = [value for value in values if value not in (None, "")]
    if not given:
        return [NO_LABEL] * len(values), None
    if any(isinstance(value, bool | float | list | dict) for value in given):
        raise ValueError(
            f"{path}: labels are whole numbers or texts, got {next(v for v in given if not isinstance(v, int | str))!r}."
        )
    if all(isinstance(value, int) or (value.isascii() and value.isdigit()) for value in given):
        numbers = [NO_LABEL if value in (None, "") else int(value) for value in values]
        if not 0 <= max(numbers) < _MOST_CLASSES or min(int(value) for value in given) < 0:
            raise ValueError(f"{path}: labels from 0 to {_MOST_CLASSES - 1:,}, got {min(numbers)} to {max(numbers)}.")
        return numbers, tuple(str(number) for number in range(max(numbers) + 1))
    names = sorted({str(value) for value in given})
    places = {name: number for number, name in enumerate(names)}
    return [NO_LABEL if value in (None, "") else places[str(value)] for value in values], tuple(names)


def _sample(row: dict[str, Any], number: int, label: int, base: Path, path: Path) -> SourceSample:
    where = f"{path}, row {number + 1}"
    place, url = row.get("path"), row.get("url")
    if bool(place) == bool(url) or not isinstance(place or url, str):
        raise ValueError(f"{where}: expected a path or a url, got path {place!r} and url {url!r}. {_FORM}")
    if place and "://" in place:
        place, url = None, place
    if url:
        check_url(url)
    piece = Piece(url, UNKNOWN_SIZE) if url else local_piece(base / place, named_by=where)
    key = str(row.get("key") or (key_of(place) if place and is_safe_name(place) else f"{number:09d}"))
    extra = {name: value for name, value in row.items() if name not in _OWN and value not in (None, "")}
    about = json.dumps(extra, ensure_ascii=False, separators=(",", ":")) if extra else ""
    return SourceSample(piece, key, url or place, label, about)
