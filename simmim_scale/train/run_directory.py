"""RUN_DIR: what lies where in it, and which configuration it belongs to.

    config.yaml  environment.json  metrics.jsonl  quarantine/          written while training
    checkpoints/                                                         run state, for resuming
    gallery/  reconstructions.png  report.html                           to look at
    weights/                                                             portable weights, for everything else
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmim_scale.config.load import load_config, resolved_yaml
from simmim_scale.config.schema import Config
from simmim_scale.reports.atomic_write import replace_file

# Settings that may differ between two starts of one run, since they change neither the losses nor what is saved.
CHANGEABLE = (
    "run_dir",
    "init_from",
    "data.train",
    "data.validation",
    "data.train_samples",
    "data.workers",
    "data.prefetch",
    "train.micro_batch",
    "train.max_nonfinite_steps",
    "engine.activation_checkpointing",
    "engine.timeout_minutes",
    "kernels",
    "validation",
    "checkpoint",
    "report",
)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. Creating the object touches nothing."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def gallery(self) -> Path:
        return self.path / "gallery"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def reconstructions(self) -> Path:
        return self.path / "reconstructions.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def check(self, config: Config) -> None:
        """Makes sure that this directory is new or belongs to `config`. Writes nothing.

        Raises:
            ValueError: it belongs to a run with other settings, or holds something that is no run of ours.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir: expected a directory, {self.path} is a file. Choose another run_dir.")
        if not self.config.exists():
            foreign = sorted(entry.name for entry in self.path.iterdir() if entry.name != "logs") if self.path.exists() else []
            if foreign:
                raise ValueError(
                    f"run_dir: {self.path} holds {', '.join(foreign[:5])} but no config.yaml, so it is no run of ours."
                    " Choose a new or empty directory."
                )
            return
        differences = changed_settings(load_config(self.config), config)
        if differences:
            shown = "\n".join(f"  {key}: {was!r} in the run, {now!r} now" for key, was, now in differences)
            raise ValueError(
                f"run_dir: {self.path} belongs to a run with other settings:\n{shown}\n"
                "Give the run its old settings to resume it, or choose another run_dir (with init_from to start from its weights)."
            )

    def claim(self, config: Config) -> None:
        """Creates the directory and records the configuration of this start. Call on one rank, after `check`."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_file(self.config, resolved_yaml(config).encode())


def changed_settings(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """Dotted key, old and new value of every setting that must not change within a run, but did."""
    old, new = _flatten(before.model_dump(mode="json")), _flatten(now.model_dump(mode="json"))
    keys = sorted(key for key in old.keys() | new.keys() if not _changeable(key))
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _changeable(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
