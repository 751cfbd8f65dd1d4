"""RUN_DIR: what lies where in it, and which configuration it belongs to.

config.yaml  environment.json  metrics.jsonl  quarantine/          written while training
checkpoints/                                                         run state, for resuming
gallery/  reconstructions.png  report.html                           to look at
weights/  weights_ema/                                              portable weights, for everything else
"""

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from simmim_scale.config.load import load_config, resolved_yaml
from simmim_scale.config.schema import Config
from simmim_scale.reports.atomic_write import replace_file

LOCK = ".lock"
BEFORE_A_RUN = {"logs", LOCK}  # what may lie in a directory before its first start: the launcher's logs and our lock

# Settings that may differ between two starts of one run, since they change neither what is saved nor the losses, but for the
# order in which numbers are added.
CHANGEABLE = (
    "run_dir",
    "init_from",
    "init_resize",
    "data.train",
    "data.validation",
    "data.train_samples",
    "data.workers",
    "data.prefetch",
    "data.remote",
    "train.micro_batch",
    "train.max_nonfinite_steps",
    "train.recovery",
    "engine.zero_stage",
    "engine.activation_checkpointing",
    "engine.checkpointing_backend",
    "engine.offload_optimizer",
    "engine.offload_parameters",
    "engine.nvme_path",
    "engine.timeout_minutes",
    "kernels",
    "validation",
    "probe",
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
    def averaged_weights(self) -> Path:
        return self.path / "weights_ema"

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
            present = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
            foreign = sorted(present - BEFORE_A_RUN)
            if foreign:
                raise ValueError(
                    f"run_dir: {self.path} holds {', '.join(foreign[:5])} but no config.yaml, so it is no run of ours."
                    " Choose a new or empty directory."
                )
            return
        if not self.has_trained():
            return  # an earlier start failed before its first step, for instance over its settings
        differences = changed_settings(load_config(self.config), config)
        if differences:
            shown = "\n".join(f"  {key}: {was!r} in the run, {now!r} now" for key, was, now in differences)
            raise ValueError(
                f"run_dir: {self.path} belongs to a run with other settings:\n{shown}\n"
                "Give the run its old settings to resume it, or choose another run_dir (init_from takes its weights)."
            )

    def claim(self, config: Config) -> IO[str]:
        """Creates the directory, locks it and records the configuration of this start. Call on one rank, after `check`.

        Returns:
            The lock, held until it is closed or the process ends, however it ends.

        Raises:
            ValueError: it cannot be written to, or another process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise ValueError(
                f"run_dir: cannot write to {self.path} ({error.strerror}). Choose a directory of your own."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(
                f"run_dir: another process is training in {self.path}. Wait for it, stop it, or choose another run_dir."
            ) from None
        replace_file(self.config, resolved_yaml(config).encode())
        return lock

    def has_trained(self) -> bool:
        """Whether a step was taken here, so that another start is a resume."""
        return self.checkpoints.exists() or (self.metrics.exists() and self.metrics.stat().st_size > 0)


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
