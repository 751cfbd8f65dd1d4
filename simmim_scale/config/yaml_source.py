"""YAML files as nested dictionaries that remember the file and line of every key.

Differences from plain YAML 1.1, both because people got burnt: `3e-4` is a number, and a key given twice is an error.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what, got, expected and fix, with file and line."""


@dataclass(frozen=True)
class Place:
    """Where a value was written: a file and a line (from 1), or the command line (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass
class Source:
    """A tree of plain values and, for each dotted path in it, where that path was written."""

    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple[str, ...], Place] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats; built once, changed nowhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Source:
    """Reads one YAML file.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, or a document that is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read this configuration ({_reason(error)}). {_similar_files(path)}") from error
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{path}: the file is empty; expected a mapping such as 'task: pretrain'.")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: expected a mapping of settings, got a {node.id}.")
        source = Source()
        _collect(node, (), str(path), source.places)
        source.tree = loader.construct_document(node)
        return source
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}.") from error
    finally:
        loader.dispose()


def parse_value(text: str) -> Any:
    """The value of a `key=value` override, read as YAML, so that lists, numbers and null work as in a file."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"override value {text!r}: not valid YAML ({error}). Quote it, or write a list as '[1, 2]'.") from error
    finally:
        loader.dispose()


def _collect(node: yaml.MappingNode, prefix: tuple[str, ...], file: str, places: dict[tuple[str, ...], Place]) -> None:
    for key_node, value_node in node.value:
        path = (*prefix, str(key_node.value))
        place = Place(file, key_node.start_mark.line + 1)
        if path in places:
            raise ConfigError(f"{place}: {'.'.join(path)} is given twice (first at {places[path]}). Remove one of them.")
        places[path] = place
        if isinstance(value_node, yaml.MappingNode):
            _collect(value_node, path, file, places)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _similar_files(path: Path) -> str:
    """A hint for a mistyped path: the YAML files nearest to it in the same folder or below configs/."""
    import difflib

    roots = [folder for folder in (path.parent, Path("configs")) if folder.is_dir()]
    names = sorted({str(found) for root in roots for found in root.rglob("*.yaml")})
    close = difflib.get_close_matches(str(path), names, n=3, cutoff=0.5) or [n for n in names if Path(n).name == path.name][:3]
    return f"Did you mean {', '.join(close)}?" if close else "Give the path of a YAML file, for example one below configs/."
