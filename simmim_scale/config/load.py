"""From YAML files, `base:` and dotted overrides to a frozen `Config`, with errors that name file and line.

`load_config` is the entry; `resolved_yaml` prints a configuration back as a file that loads to the same thing.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from simmim_scale.config.schema import Config
from simmim_scale.config.yaml_source import ConfigError, Place, Source, parse_value, read_yaml

__all__ = ["ConfigError", "Place", "config_digest", "load_config", "load_source", "resolved_yaml", "validate"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path`, the files it is based on, and `key.key=value` overrides into one frozen configuration.

    Raises:
        ConfigError: with the file and line of what is wrong, and what to write instead.
    """
    return validate(load_source(path, overrides))


def load_source(path: str | Path, overrides: Sequence[str] = ()) -> Source:
    """The merged tree before validation, with the place where each value was written."""
    source = _read_with_bases(Path(path), seen=())
    return _merge(source, _parse_overrides(overrides))


def validate(source: Source) -> Config:
    """Checks a tree against the schema; every problem is reported at once, one line each."""
    try:
        # Through JSON, since pydantic's strict mode then rejects "0.6" and true as numbers but still takes lists as tuples.
        return Config.model_validate_json(json.dumps(source.tree), strict=True)
    except TypeError as error:
        raise ConfigError(f"configuration holds a value that is no number, string, list or mapping: {error}.") from error
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, source) for problem in error.errors())) from None


def resolved_yaml(config: Config) -> str:
    """The whole configuration as YAML that loads back to an equal one."""
    return yaml.safe_dump(_name_first(config.model_dump(mode="json")), sort_keys=False, width=120, default_flow_style=None)


def _name_first(tree: dict[str, Any]) -> dict[str, Any]:
    ordered = sorted(tree.items(), key=lambda item: item[0] != "name")
    return {key: _name_first(value) if isinstance(value, dict) else value for key, value in ordered}


def config_digest(config: Config, *, ignore: Iterable[str] = ()) -> str:
    """A short hash of the configuration without the top-level sections in `ignore`."""
    tree = {key: value for key, value in config.model_dump(mode="json").items() if key not in set(ignore)}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------- merging


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> Source:
    real = path.resolve()
    if real in seen:
        chain = " -> ".join(str(step) for step in (*seen, real))
        raise ConfigError(f"{path}: base files form a circle: {chain}. Remove one 'base:'.")
    source = read_yaml(path)
    bases = source.tree.pop("base", None)
    place = source.places.pop(("base",), Place(str(path)))
    if bases is None:
        return source
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{place}: base: expected a path or a list of paths, got {bases!r}.")
    merged = Source()
    for name in names:
        merged = _merge(merged, _read_with_bases(path.parent / name, (*seen, real)))
    return _merge(merged, source)


def _parse_overrides(overrides: Sequence[str]) -> Source:
    source = Source()
    for text in overrides:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"override {text!r}: expected key=value with a dotted key, for example train.steps=100.")
        node = source.tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {text!r}: {part} was already set to a single value by another override.")
        node[path[-1]] = parse_value(value)
        source.places[path] = Place(f"override {text!r}")
    return source


def _merge(below: Source, above: Source) -> Source:
    """`above` laid over `below`: mappings merge key by key, everything else replaces.

    Where `above` names another kind of model or schedule, inherited settings that it does not have are dropped.
    """
    below = _without_foreign_settings(below, above)
    return Source(tree=_merge_trees(below.tree, above.tree), places={**below.places, **above.places})


def _without_foreign_settings(below: Source, above: Source) -> Source:
    tree, places = dict(below.tree), dict(below.places)
    for section, inherited in below.tree.items():
        changes = above.tree.get(section)
        if not (isinstance(inherited, dict) and isinstance(changes, dict) and "name" in changes):
            continue
        known = _keys_of_kind(section, changes["name"])
        if known:
            tree[section] = {key: value for key, value in inherited.items() if key in known}
            places = {path: place for path, place in places.items() if path[:1] != (section,) or set(path[1:2]) <= known}
    return Source(tree, places)


def _keys_of_kind(section: str, name: Any) -> set[str]:
    """Settings of the kind of `section` that `name` names; empty where there is no such kind (an error comes later)."""
    field = Config.model_fields.get(section)
    for model in _models_of(field.annotation) if field else ():
        named = model.model_fields.get("name")
        if named is not None and (named.default == name or (named.is_required() and ":" in str(name))):
            return set(model.model_fields)
    return set()


def _merge_trees(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    if "epochs" in above and above["epochs"] is not None and "steps" not in above:
        below = {**below, "steps": None}  # giving one length of a run replaces the other
    if "steps" in above and above["steps"] is not None and "epochs" not in above:
        below = {**below, "epochs": None}
    merged = dict(below)
    for key, value in above.items():
        inherited = below.get(key)
        merged[key] = _merge_trees(inherited, value) if isinstance(value, dict) and isinstance(inherited, dict) else value
    return merged


# -------------------------------------------------------------------------------------------------------------- errors


def _explain(problem: Any, source: Source) -> str:
    path = _written_path(problem["loc"], source.tree)
    where = _place(path, source)
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{where}{name}: unknown key.{_suggestion(path)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        subject = message.partition(":")[0]
        deeper = _place((*path, *subject.split(".")), source) or where
        return f"{deeper}{message}" if not name or "." in subject else f"{deeper}{name}.{message}"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_tag(problem, path, source)
    if problem["type"] == "missing":
        return f"{where}{name}: missing. Give it a value."
    return f"{where}{name}: {message[0].lower()}{message[1:]}, got {problem['input']!r}."


def _explain_tag(problem: Any, path: tuple[str, ...], source: Source) -> str:
    context = problem.get("ctx", {})
    known = [tag.strip(" '") for tag in str(context.get("expected_tags", "")).split(",")]
    if "custom" in known:
        known[known.index("custom")] = "'module:attribute' of your own"
    got = context.get("tag")
    close = difflib.get_close_matches(str(got), known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    where = _place((*path, "name"), source)
    return f"{where}{'.'.join(path)}.name: expected one of {', '.join(known)}; got {got!r}.{hint}"


def _written_path(loc: Sequence[Any], tree: Any) -> tuple[str, ...]:
    """A pydantic location without the tags of unions, that is, the keys as a person wrote them."""
    path: list[str] = []
    for index, part in enumerate(loc):
        is_tag = isinstance(part, str) and index > 0 and isinstance(tree, dict) and part not in tree and index < len(loc) - 1
        if is_tag:
            continue
        path.append(str(part))
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
    return tuple(path)


def _place(path: tuple[str, ...], source: Source) -> str:
    """`file:line: ` of a key, or of the nearest section above it; empty where nothing was written."""
    for length in range(len(path), 0, -1):
        if path[:length] in source.places:
            return f"{source.places[path[:length]]}: "
    return ""


def _suggestion(path: tuple[str, ...]) -> str:
    *section, key = path
    names = _known_keys(tuple(section))
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    elsewhere = [dotted for dotted in _all_keys(Config) if dotted.split(".")[-1] == key]
    if elsewhere:
        return f" Did you mean '{elsewhere[0]}'?"
    return f" Known keys here: {', '.join(sorted(names))}." if names else ""


def _known_keys(section: tuple[str, ...]) -> set[str]:
    return {key.split(".")[-1] for key in _all_keys(Config) if tuple(key.split(".")[:-1]) == section}


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for child in _models_of(field.annotation):
            keys.extend(_all_keys(child, f"{prefix}{name}."))
    return keys


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_of(part)]
