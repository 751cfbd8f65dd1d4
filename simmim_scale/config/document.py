"""`simmim config`: the resolved configuration with the meaning, unit and source of every value beside it."""

import json
from typing import Any

from pydantic import BaseModel

from simmim_scale.config.schema import Config
from simmim_scale.config.yaml_source import Source

# Values start in this column at the latest, comments in the next; wide enough for the longest published lists.
_COMMENT_COLUMN = 46
_HEADER = (
    "# Every setting of this run. After #: meaning [unit] (source of the default) <- where this value was set.",
    "# Sources: S = supplement of the SimMIM paper; R = released configurations of microsoft/SimMIM and Swin-Transformer;",
    "# V2 = the SwinV2 paper (arXiv 2111.09883); choice = published nowhere, ours.",
    "",
)


def documented_yaml(config: Config, source: Source | None = None) -> str:
    """The whole configuration as YAML whose comments say what each value means and where it was set."""
    lines = list(_HEADER)
    _write_section(config, (), source or Source(), lines)
    return "\n".join(lines) + "\n"


def _write_section(section: BaseModel, path: tuple[str, ...], source: Source, lines: list[str]) -> None:
    fields = type(section).model_fields
    for name in sorted(fields, key=lambda field: field != "name"):  # the kind of a section comes first
        value, field = getattr(section, name), fields[name]
        indent = "  " * len(path)
        if isinstance(value, BaseModel):
            lines.append(f"{'' if path else chr(10)}{indent}{name}:  # {field.description}".rstrip())
            _write_section(value, (*path, name), source, lines)
            continue
        text = f"{indent}{name}: {_as_yaml(value)}"
        lines.append(f"{text.ljust(_COMMENT_COLUMN)}  # {_comment(field, source.places.get((*path, name)))}")


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return json.dumps(value)  # JSON is YAML, and quotes what needs quoting


def _comment(field: Any, place: Any) -> str:
    extra = field.json_schema_extra or {}
    unit = f" [{extra['unit']}]" if extra.get("unit") else ""
    origin = f" ({extra['source']})" if extra.get("source") else ""
    return f"{field.description}{unit}{origin}" + (f"  <- {place}" if place else "")
