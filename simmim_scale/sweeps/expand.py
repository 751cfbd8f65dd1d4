"""From a sweep to its runs: names, directories, and the command line of every stage. Pure, but for reading the files."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmim_scale.config.load import ConfigError, load_config, load_source
from simmim_scale.sweeps.spec import AxisValue, Stage, Sweep


@dataclass(frozen=True)
class StageRun:
    """One training of one run.

    Attributes:
        stage: name of the stage.
        command: of simmim.
        config: configuration file.
        overrides: key=value, the run directory among them.
        run_dir: where it writes.
    """

    stage: str
    command: str
    config: Path
    overrides: tuple[str, ...]
    run_dir: Path

    @property
    def arguments(self) -> list[str]:
        """What follows `simmim`."""
        return [self.command, str(self.config), *self.overrides]


@dataclass(frozen=True)
class Run:
    """One combination of the axes' values: its labels, one per axis, and its trainings in order."""

    labels: tuple[str, ...]
    name: str
    stages: tuple[StageRun, ...]

    @property
    def label(self) -> str:
        return ", ".join(self.labels)


def expand(sweep: Sweep, file: Path, *, overrides: Sequence[str] = (), reduced: bool = False) -> list[Run]:
    """All runs of a sweep, in the order of its axes; the first axis changes slowest.

    Args:
        file: of the sweep; paths in it are relative to its directory.
        overrides: `key=value` for every stage, or `STAGE:key=value` for one; they win over the file.
        reduced: apply the sweep's `reduced` section.

    Raises:
        ConfigError: two runs of one name, or an override for a stage that there is not.
    """
    given = _by_stage(overrides, sweep)
    sweep = sweep.in_small() if reduced else sweep
    small = _small_settings(sweep, file) if reduced else {}
    kept = (sweep.reduced.stages or list(sweep.stages)[:1]) if reduced else list(sweep.stages)
    folder = Path(sweep.runs_dir) / (f"{sweep.sweep}-reduced" if reduced else sweep.sweep)
    runs = []
    for labels in itertools.product(*(axis.values for axis in sweep.axes)):
        if _left_out(sweep, labels):
            continue
        name = "_".join(slug(label) for label in labels)
        varied = [axis.values[label] for axis, label in zip(sweep.axes, labels, strict=True)]
        stages = tuple(_stage_run(sweep, stage, file, folder / name, varied, small, given) for stage in kept)
        runs.append(Run(labels, name, stages))
    doubles = sorted({run.name for run in runs if sum(other.name == run.name for other in runs) > 1})
    if doubles:
        raise ConfigError(
            f"{file}: axes: two runs would be called {', '.join(doubles)}. Give values labels that differ in letters."
        )
    return runs


def check(runs: Sequence[Run]) -> None:
    """Loads the configuration of every training, so that what is wrong shows before the first one starts.

    Raises:
        ConfigError: names the run, the stage and what is wrong.
    """
    for run in runs:
        for stage in run.stages:
            try:
                load_config(stage.config, stage.overrides)
            except ConfigError as error:
                raise ConfigError(f"{run.label} ({stage.stage}): {error}") from error


def slug(label: str) -> str:
    """A label as part of a file name: `8-bin, 48²` -> `8-bin-48`."""
    plain = re.sub(r"[^\w.]+", "-", label.lower(), flags=re.ASCII).strip("-.")
    return plain or "x"


def _small_settings(sweep: Sweep, file: Path) -> dict[str, Any]:
    named = load_source(file.parent / sweep.reduced.config).tree if sweep.reduced.config else {}
    return _dotted(named) | sweep.reduced.settings


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _left_out(sweep: Sweep, labels: Sequence[str]) -> bool:
    combination = dict(zip((axis.name for axis in sweep.axes), labels, strict=True))
    return any(all(combination[axis] == label for axis, label in rule.items()) for rule in sweep.leave_out)


def _stage_run(
    sweep: Sweep,
    name: str,
    file: Path,
    folder: Path,
    varied: Sequence[AxisValue],
    small: Mapping[str, Any],
    given: Mapping[str, Sequence[str]],
) -> StageRun:
    stage: Stage = sweep.stages[name]
    first = name == next(iter(sweep.stages))
    files = [value for value in varied if isinstance(value, str)] if first else []
    config = file.parent / (files[-1] if files else stage.config)
    settings = dict(stage.settings)
    settings |= small if first else {}
    for value in varied:  # last, since it is what the sweep is about
        settings |= _settings_of(value, sweep, name) if isinstance(value, dict) else {}
    run_dir = folder / name
    own = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    if stage.init_from is not None:
        own.append(f"init_from={folder / stage.init_from}")
    # The directory comes last: a sweep whose runs shared one would lose all but the first.
    return StageRun(name, stage.command, config, (*own, *given[name], f"run_dir={run_dir}"), run_dir)


def _settings_of(value: Mapping[str, Any], sweep: Sweep, stage: str) -> dict[str, Any]:
    """What an axis' value sets in one stage: `key` is of the first stage, `STAGE:key` of that one."""
    found = {}
    for name, wanted in value.items():
        prefix, colon, key = name.rpartition(":")
        if colon and prefix not in sweep.stages:
            raise ConfigError(
                f"axes: {name!r}: a stage of the sweep before the colon ({', '.join(sweep.stages)}), got {prefix!r}."
            )
        if (prefix or next(iter(sweep.stages))) == stage:
            found[key] = wanted
    return found


def _by_stage(overrides: Sequence[str], sweep: Sweep) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in sweep.stages}
    for text in overrides:
        prefix, colon, rest = text.partition(":")
        if not colon or "=" in prefix:
            for chosen in found.values():
                chosen.append(text)
        elif prefix in found:
            found[prefix].append(rest)
        else:
            raise ConfigError(f"{text!r}: a stage of the sweep before the colon ({', '.join(found)}), got {prefix!r}.")
    return found
