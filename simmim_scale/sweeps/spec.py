"""The file of a sweep: stages that every run goes through, axes whose values are combined, and the published figures.

sweep: table4                           name, also of the directory of its runs
stages:
  pretrain: {command: pretrain, config: ../pretrain/swin_b_100ep.yaml, metric: val_loss, title: Validation loss}
  imagenet: {command: finetune, config: ../finetune/..., init_from: pretrain, metric: val_top1, title: ImageNet, digits: 1}
axes:
  - {name: target, values: {8-bin: {objective.target: ...}, l1: table4/l1.yaml}}
"""

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, field_validator, model_validator

from simmim_scale.config.load import ConfigError
from simmim_scale.config.section import Section, setting
from simmim_scale.config.yaml_source import read_yaml

# The value of an axis: settings, or a file whose settings replace the first stage's configuration.
AxisValue = dict[str, Any] | str


class Stage(Section):
    """One training that every run of the sweep goes through."""

    command: Literal["pretrain", "finetune"] = setting("pretrain", "Command of simmim.")
    config: str = setting(..., "Configuration file, relative to the sweep's.")
    settings: dict[str, Any] = setting({}, "Settings that replace those of the file, by dotted key.")
    init_from: str | None = setting(None, "Stage whose weights this one starts from; null: none.")
    metric: str = setting("val_loss", "Value of metrics.jsonl that the table shows: the last one.")
    title: str = setting("", "Column of the table; empty: the metric's name.")
    digits: int = setting(4, "Digits after the point that the table shows.", ge=0, le=8)


class Axis(Section):
    """One thing that is varied."""

    name: str = setting(..., "What is varied, as a heading.")
    values: dict[str, AxisValue] = setting(
        ...,
        "Label -> settings of the first stage by dotted key (of another: STAGE:key), or a configuration file of the first stage.",
    )

    @field_validator("values")
    @classmethod
    def _some(cls, value: dict[str, AxisValue]) -> dict[str, AxisValue]:
        if not value:
            raise ValueError("values: at least one, got none. Give labels with their settings.")
        return value


class Published(Section):
    """The figures that the table puts beside ours."""

    source: str = setting("", "Where they were published.")
    columns: list[str] = setting([], "Headings of the figures.")
    values: dict[str, list[float | str | None]] = setting({}, "Run's label -> one figure per column; null: none was published.")


class Reduced(Section):
    """What `--reduced` changes, so that every run can be tried on two cores."""

    config: str | None = setting(None, "Configuration file whose settings replace those of the first stage; null: none.")
    settings: dict[str, Any] = setting({}, "Settings of the first stage besides, by dotted key.")
    axes: dict[str, dict[str, AxisValue]] = setting({}, "Axis name -> the values it has instead.")
    stages: list[str] = setting([], "Stages that are kept; empty: the first alone.")


class Sweep(Section):
    """A whole sweep."""

    sweep: str = setting(..., "Name.", pattern=r"^[\w-]+$")
    title: str = setting("", "Heading of the table.")
    runs_dir: str = setting("runs/sweeps", "Directory of the directories of sweeps.")
    stages: dict[str, Stage] = setting(..., "Trainings in their order.")
    axes: list[Axis] = setting(..., "What is varied; all combinations are run.")
    leave_out: list[dict[str, str]] = setting([], "Combinations that are not run: axis name -> label.")
    layout: Literal["list", "grid"] = setting("list", "list: a row per run; grid: the first axis down, the second across.")
    published: Published = setting(Published(), "Figures to compare with.")
    reduced: Reduced = setting(Reduced(), "What --reduced changes.")

    @model_validator(mode="after")
    def _parts_agree(self) -> "Sweep":
        if not self.stages or not self.axes:
            raise ValueError("stages and axes: at least one of each. A sweep without axes is a run: use its command.")
        known: list[str] = []
        for name, stage in self.stages.items():
            if stage.init_from is not None and stage.init_from not in known:
                raise ValueError(
                    f"stages.{name}.init_from: an earlier stage ({', '.join(known) or 'none'}), got {stage.init_from!r}."
                )
            known.append(name)
        if self.layout == "grid" and len(self.axes) != 2:
            raise ValueError(f"layout: a grid has two axes, got {len(self.axes)}. Use list, or two axes.")
        self._check_left_out()
        unknown = [name for name in self.reduced.stages if name not in self.stages]
        if unknown:
            raise ValueError(f"reduced.stages: stages of this sweep ({', '.join(self.stages)}), got {', '.join(unknown)}.")
        strange = sorted(set(self.reduced.axes) - {axis.name for axis in self.axes})
        if strange:
            raise ValueError(
                f"reduced.axes: axes of this sweep ({', '.join(axis.name for axis in self.axes)}), got {', '.join(strange)}."
            )
        wrong = [label for label, row in self.published.values.items() if len(row) != len(self.published.columns)]
        if wrong:
            raise ValueError(
                f"published.values: one figure per column ({len(self.published.columns)}), not so for {', '.join(wrong)}."
            )
        return self

    def in_small(self) -> "Sweep":
        """The sweep with the axes of its reduced form."""
        axes = [Axis(name=axis.name, values=self.reduced.axes.get(axis.name, axis.values)) for axis in self.axes]
        return self.model_copy(update={"axes": axes})

    def _check_left_out(self) -> None:
        labels = {axis.name: list(axis.values) for axis in self.axes}
        for combination in self.leave_out:
            for axis, label in combination.items():
                if axis not in labels:
                    raise ValueError(f"leave_out: an axis ({', '.join(labels)}), got {axis!r}.")
                if label not in labels[axis]:
                    close = difflib.get_close_matches(label, labels[axis], n=1)
                    hint = f" Did you mean {close[0]!r}?" if close else ""
                    raise ValueError(f"leave_out: a value of {axis} ({', '.join(labels[axis])}), got {label!r}.{hint}")


def load_sweep(path: Path) -> Sweep:
    """Reads the file of a sweep.

    Raises:
        ConfigError: no such file, no YAML, or no sweep; names the line where it can.
    """
    source = read_yaml(path)
    if "sweep" not in source.tree:
        raise ConfigError(f"{path}: no sweep: its first key is `sweep: NAME`. A configuration of one run is for simmim pretrain.")
    try:
        return Sweep.model_validate(source.tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, source.places, problem) for problem in error.errors())) from None


def _explain(path: Path, places: dict[tuple[str, ...], Any], problem: Any) -> str:
    location = tuple(str(part) for part in problem["loc"])
    key = ".".join(location)
    where = next((places[location[:length]] for length in range(len(location), 0, -1) if location[:length] in places), path)
    if problem["type"] == "extra_forbidden":
        known = {"stages": Stage, "axes": Axis, "published": Published, "reduced": Reduced}.get(location[0], Sweep)
        fields = list((known if len(location) > 1 else Sweep).model_fields)
        close = difflib.get_close_matches(location[-1], fields, n=1)
        return f"{where}: {key}: unknown key. " + (f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(fields)}.")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {f'{key}: ' if key else ''}{message}"
