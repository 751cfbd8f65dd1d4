"""What goes into a layout and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Imported:
    """A checkpoint in our names.

    Attributes:
        task: "pretrain" or "classification": which module the state is for.
        state: tensors by our names.
        origins: our name -> the file's name, for messages.
        sections: configuration sections that follow from the checkpoint, as plain values.
        notes: one line per fact, with where it is from.
    """

    task: Literal["pretrain", "classification"]
    state: dict[str, Tensor]
    origins: dict[str, str]
    sections: dict[str, dict[str, Any]]
    notes: list[str]
