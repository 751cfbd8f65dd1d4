"""Plug-ins by name: an entry of a literal table, or 'module:attribute' of one's own, imported when it is asked for."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any


def lookup(table: Mapping[str, str], name: str, *, setting: str) -> Callable[..., Any]:
    """The function that `name` stands for. `setting` is the configuration key, for the message.

    Raises:
        ValueError: the name is neither in the table nor importable; says which names are known.
    """
    target = table.get(name, name)
    if ":" not in target:
        close = get_close_matches(name, table, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{setting}: unknown name {name!r}.{hint} Known: {', '.join(table)}; or give 'module:attribute' of your own."
        )
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # the module is there and fails by itself: its own message is the useful one
        raise ValueError(f"{setting}: cannot import {module!r} for {name!r}. Install it, or correct the name.") from error
    except AttributeError as error:
        raise ValueError(f"{setting}: module {module!r} has no {attribute!r}. Correct the part after the colon.") from error
