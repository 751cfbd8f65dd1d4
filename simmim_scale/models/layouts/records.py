"""What goes into a layout and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class CheckpointFile:
    """A file's tensors by its own names, and the settings that some programs store beside them ({} where there are none)."""

    path: Path
    state: dict[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, dotted: str) -> Any:
        """A stored setting such as "DATA.IMG_SIZE", or None."""
        node: Any = self.settings
        for part in dotted.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return None
            node = node[part]
        return node


@dataclass(frozen=True)
class Hints:
    """What the caller knows about a checkpoint; None: to be found out. `norm_target_window` 0 means plain pixels."""

    window_size: int | None = None
    pretrained_window_sizes: tuple[int, ...] | None = None
    image_size: tuple[int, int] | None = None
    norm_target_window: int | None = None


def merge_hints(asked: Hints, told: Hints) -> Hints:
    """What the caller says, then what a configuration beside the file says.

    Raises:
        ValueError: they contradict each other.
    """
    merged = {}
    for item in fields(Hints):
        wanted, known = getattr(asked, item.name), getattr(told, item.name)
        if None not in (wanted, known) and wanted != known:
            raise ValueError(f"{item.name}: {wanted} was asked for, but the checkpoint's config.json says {known}. Leave it out.")
        merged[item.name] = known if wanted is None else wanted
    return Hints(**merged)


@dataclass(frozen=True)
class Imported:
    """A checkpoint in our names.

    Attributes:
        task: "pretrain", "classification" or "backbone": which module the state is for.
        state: tensors by our names.
        origins: our name -> the file's name, for messages.
        sections: configuration sections that follow from the checkpoint, as plain values.
        notes: one line per fact, with where it is from.
        class_names: of the classes, in order; () where nothing tells them.
    """

    task: Literal["pretrain", "classification", "backbone"]
    state: dict[str, Tensor]
    origins: dict[str, str]
    sections: dict[str, dict[str, Any]]
    notes: list[str]
    class_names: tuple[str, ...] = ()
