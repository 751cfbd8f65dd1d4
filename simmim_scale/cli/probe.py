"""`simmim probe`: k nearest neighbours and a linear classifier on the frozen features of any weights, on any number of ranks.

Features of all stages are kept beside the weights, so that another stage or another number of neighbours costs no forward pass.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from simmim_scale.cli.exit_codes import user_errors
from simmim_scale.cli.together import data_errors, on_every_rank, on_main
from simmim_scale.config.schema import Config, ProbeConfig
from simmim_scale.data.dataset import LOAD_ERRORS
from simmim_scale.engine.inference import InferenceEngine
from simmim_scale.engine.precision import DTYPES
from simmim_scale.engine.runtime import Runtime, start_runtime
from simmim_scale.models.weights import TENSORS
from simmim_scale.reports.atomic_write import replace_file
from simmim_scale.reports.terminal import Terminal, configure_logging
from simmim_scale.tasks.classification.probes import FeatureRecorder, probe, stage_names
from simmim_scale.tasks.classification.probing import ProbeSets, Probing, open_probe_sets
from simmim_scale.tasks.pretrained import Pretrained, find_weights, load_pretrained
from simmim_scale.train.evaluate import evaluate

log = logging.getLogger(__name__)

RESULTS_FILE = "probe.json"
Found = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class ProbeOptions:
    """What the command line says besides weights and sets. `stage` None: every stage; `out` None: `probe` beside the weights."""

    stage: int | None = None
    out: Path | None = None
    neighbours: int = 20
    linear: bool = True
    fit_samples: int | None = None
    test_samples: int | None = None
    micro_batch: int = 64
    workers: int = 4
    precision: str = "fp32"

    def check(self) -> None:
        """Raise ValueError for values that mean nothing."""
        if self.precision not in DTYPES:
            raise ValueError(f"--precision: one of {', '.join(DTYPES)}, got {self.precision!r}.")


def probe_command(weights: str, fit: str, test: str, options: ProbeOptions) -> None:
    """Runs the whole command on this rank."""
    with user_errors():
        options.check()
        runtime = start_runtime()
    try:
        configure_logging(Terminal(), level=logging.INFO if runtime.is_main else logging.WARNING)
        with user_errors(quiet=not runtime.is_main), data_errors(runtime):
            directory = find_weights(weights)
            model, sets, config = on_every_rank(runtime, lambda: _open(directory, fit, test, options))
            out = options.out or directory.parent / "probe"
            cache = out / f"features_{_digest(directory, sets, config, options.precision)}.safetensors"
            found = on_main(runtime, lambda: _cached(cache))
            if not runtime.broadcast_object(found is not None):
                found = _extract(model, sets, config, options, runtime)
                on_main(runtime, lambda: _keep(cache, found))
            if runtime.is_main and found is not None:
                _write(out, found, config.probe, options)
    finally:
        runtime.close()


def _open(directory: Path, fit: str, test: str, options: ProbeOptions) -> tuple[Pretrained, ProbeSets, Config]:
    model = load_pretrained(directory)
    section = ProbeConfig(
        fit=fit,
        test=test,
        fit_samples=options.fit_samples,
        test_samples=options.test_samples,
        neighbours=options.neighbours,
        linear=options.linear,
    )
    data = model.config.data.model_copy(update={"workers": options.workers})
    config = model.config.model_copy(update={"probe": section, "data": data})
    sets = open_probe_sets(config)
    assert sets is not None, "both sets were named"
    return model, sets, config


def _extract(model: Pretrained, sets: ProbeSets, config: Config, options: ProbeOptions, runtime: Runtime) -> Found | None:
    """Features of both sets on the main rank, None elsewhere. Collective."""
    engine = on_every_rank(runtime, lambda: InferenceEngine(model.module, runtime, precision=options.precision))
    probing = Probing(config=config, sets=sets, micro_batch=options.micro_batch, rank=runtime.rank, world_size=runtime.world_size)
    features = evaluate(engine, probing.batches(), [FeatureRecorder()], runtime, load_errors=LOAD_ERRORS)
    return features or None  # type: ignore[return-value]


def _digest(directory: Path, sets: ProbeSets, config: Config, precision: str) -> str:
    """What the features depend on, in 16 hex digits."""
    digest = hashlib.sha256()
    with (directory / TENSORS).open("rb") as file:
        for piece in iter(lambda: file.read(1 << 24), b""):
            digest.update(piece)
    for index in (sets.fit, sets.test):
        digest.update(np.ascontiguousarray(index.table).tobytes())
        digest.update(json.dumps([shard.sha256 for shard in index.shards]).encode())
    view = config.classification.model_dump(include={"test_crop", "test_resize"})
    digest.update(
        json.dumps([view, config.data.interpolation, config.probe.fit_samples, config.probe.test_samples, precision]).encode()
    )
    return digest.hexdigest()[:16]


def _cached(path: Path) -> Found | None:
    if not path.is_file():
        return None
    log.info("features of %s", path)
    found: dict[str, dict[str, np.ndarray]] = {"fit": {}, "test": {}}
    for name, value in load_file(path).items():
        part, _, column = name.partition(".")
        found[part][column] = value
    return found


def _keep(path: Path, found: Found | None) -> None:
    if found is None:
        raise ValueError("data: not one image of the two sets decodes. Check them with `python -m data_tools verify`.")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    columns = {f"{part}.{name}": np.ascontiguousarray(value) for part, values in found.items() for name, value in values.items()}
    save_file(columns, aside)
    aside.replace(path)


def _write(out: Path, found: Found, section: ProbeConfig, options: ProbeOptions) -> None:
    stages = range(len(stage_names(found["fit"]))) if options.stage is None else [options.stage]
    results: dict[str, Any] = {"fit_samples": len(found["fit"]["label"]), "test_samples": len(found["test"]["label"])}
    results["stages"] = {}
    for stage in stages:
        figures = probe(found, section.model_copy(update={"stage": stage}))
        results["stages"][str(stage)] = figures
        log.info("stage %d: %s", stage, ", ".join(f"{name} top-1 {value:.2f} %" for name, value in figures.items()))
    replace_file(out / RESULTS_FILE, json.dumps(results, indent=1).encode() + b"\n")
    log.info("  %s", out / RESULTS_FILE)
