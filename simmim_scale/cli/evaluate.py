"""`simmim evaluate`: a classifier on labelled shards, on any number of ranks, into evaluation.json and a page to look at."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simmim_scale.cli.exit_codes import user_errors
from simmim_scale.cli.together import data_errors, on_every_rank
from simmim_scale.config.schema import Config
from simmim_scale.data.classification import TestedView, build_labelled_validation_loader, class_names
from simmim_scale.data.dataset import LOAD_ERRORS
from simmim_scale.data.decode import decode_image
from simmim_scale.data.loader import ValidationLoader
from simmim_scale.data.remote_index import open_index
from simmim_scale.data.shards import ShardIndex
from simmim_scale.data.stream import ShardReader
from simmim_scale.engine.inference import InferenceEngine
from simmim_scale.engine.precision import DTYPES
from simmim_scale.engine.runtime import Runtime, start_runtime
from simmim_scale.reports.atomic_write import replace_file
from simmim_scale.reports.environment import describe_device, git_version, package_versions
from simmim_scale.reports.evaluation import Mistake, write_evaluation_page
from simmim_scale.reports.evaluation_charts import MOST_CLASSES_IN_A_MATRIX
from simmim_scale.reports.terminal import Terminal, configure_logging
from simmim_scale.tasks.classification.predictions import PredictionRecorder, Predictions
from simmim_scale.tasks.classification.summary import class_names_for, summarise
from simmim_scale.tasks.classification.task import check_same_classes, tested_view
from simmim_scale.tasks.pretrained import Pretrained, find_weights, load_pretrained
from simmim_scale.train.evaluate import evaluate

log = logging.getLogger(__name__)

RESULTS_FILE, PAGE_FILE = "evaluation.json", "evaluation.html"
SHOWN_MISTAKES = 30


@dataclass(frozen=True)
class EvaluationOptions:
    """What the command line says beyond weights and data.

    Attributes:
        averaged: take RUN/weights_ema.
        out: directory of the results; None: `evaluation` (or `evaluation_ema`) beside the weights.
        crop, resize, interpolation: of the tested view; None: as in the weights' configuration.
        samples: evaluate a random choice of so many; None: all.
        micro_batch: samples that a rank computes at once.
        workers: processes that decode, per rank.
        precision: fp32, bf16 or fp16.
    """

    averaged: bool = False
    out: Path | None = None
    crop: float | None = None
    resize: str | None = None
    interpolation: str | None = None
    samples: int | None = None
    micro_batch: int = 64
    workers: int = 4
    precision: str = "fp32"

    def check(self) -> None:
        """Raise ValueError for values that mean nothing."""
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"--crop: a share of the shorter side above 0 and up to 1, got {self.crop}. Published: 0.875.")
        for name, value, choices in (
            ("--resize", self.resize, ("cover", "squash")),
            ("--interpolation", self.interpolation, ("bilinear", "bicubic")),
            ("--precision", self.precision, tuple(DTYPES)),
        ):
            if value is not None and value not in choices:
                raise ValueError(f"{name}: one of {', '.join(choices)}, got {value!r}.")


@dataclass(frozen=True)
class Evaluation:
    """An opened evaluation: nothing has been computed yet."""

    model: Pretrained
    weights: Path
    index: ShardIndex
    classes: tuple[str, ...]
    view: TestedView
    out: Path


def evaluate_command(weights: str, data: str, options: EvaluationOptions) -> None:
    """Runs the whole command on this rank."""
    with user_errors():
        options.check()
        runtime = start_runtime()
    try:
        configure_logging(Terminal(), level=logging.INFO if runtime.is_main else logging.WARNING)
        with user_errors(quiet=not runtime.is_main), data_errors(runtime):
            opened = on_every_rank(runtime, lambda: _open(weights, data, options))
            engine = on_every_rank(runtime, lambda: InferenceEngine(opened.model.module, runtime, precision=options.precision))
            batches = _batches(opened, options, runtime)
            figures = evaluate(engine, batches, [PredictionRecorder()], runtime, load_errors=LOAD_ERRORS)
            if runtime.is_main:
                _write(opened, options, runtime, _predictions(figures, opened))
    finally:
        runtime.close()


def _open(weights: str, data: str, options: EvaluationOptions) -> Evaluation:
    directory = find_averaged(weights) if options.averaged else find_weights(weights)
    model = load_pretrained(directory)
    config = model.config
    if config.task != "classification":
        raise ValueError(
            f"weights: {directory} was trained for {config.task}, which has no classes to evaluate."
            " Fine-tune it with `simmim finetune CONFIG init_from=...` first."
        )
    index = open_index(data, config.data.remote)
    classes = class_names(index, "data")
    trained = _trained_classes(config)
    if trained is not None:
        check_same_classes(trained, classes, where=f"data: {data}")
    if len(classes) > model.module.num_classes:
        raise ValueError(f"data: {data} has {len(classes)} classes, the model {model.module.num_classes}. Give the set it knows.")
    name = "evaluation_ema" if options.averaged else "evaluation"
    return Evaluation(model, directory, index, classes, _view(config, options), options.out or directory.parent / name)


def find_averaged(run: str | Path) -> Path:
    """The averaged weights of a run. Raises ValueError where it kept none."""
    directory = Path(run) / "weights_ema"
    if not directory.is_dir():
        raise ValueError(f"--ema: {run} has no weights_ema. Train with optimizer.ema_decay, or leave --ema out.")
    return directory


def _trained_classes(config: Config) -> tuple[str, ...] | None:
    """Classes of the training shards, where these still are at their place."""
    place = Path(config.data.train)
    return ShardIndex.load(place, check=False).classes if config.data.train and (place / "index.json").is_file() else None


def _view(config: Config, options: EvaluationOptions) -> TestedView:
    default = tested_view(config)
    return TestedView(
        image_size=default.image_size,
        interpolation=options.interpolation or default.interpolation,
        crop=options.crop or default.crop,
        resize=options.resize or default.resize,
    )


def _batches(opened: Evaluation, options: EvaluationOptions, runtime: Runtime) -> ValidationLoader:
    config = opened.model.config
    return build_labelled_validation_loader(
        opened.index,
        data=config.data.model_copy(update={"workers": options.workers}),
        view=opened.view,
        in_chans=config.model.in_chans,
        seed=config.seed,
        micro_batch=options.micro_batch,
        rank=runtime.rank,
        world_size=runtime.world_size,
        samples=options.samples,
        pin_memory=runtime.device.type == "cuda",
    )


def _predictions(figures: dict[str, Any], opened: Evaluation) -> Predictions:
    if "predictions" not in figures:
        raise ValueError(f"data: not one image of {opened.index.directory} decodes. Check it with `python -m data_tools verify`.")
    return figures["predictions"]


def _write(opened: Evaluation, options: EvaluationOptions, runtime: Runtime, predictions: Predictions) -> None:
    results = summarise(predictions, opened.classes)
    facts = _facts(opened, options, runtime)
    try:
        opened.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: cannot write to {opened.out} ({error.strerror}). Choose a directory of your own.") from error
    document = {"evaluated": facts, "results": results, "versions": package_versions()}
    replace_file(opened.out / RESULTS_FILE, json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")
    right = predictions.right
    write_evaluation_page(
        opened.out / PAGE_FILE,
        title=opened.weights.parent.resolve().name,
        facts=facts,
        results=results,
        confidence=(predictions.confidence[right], predictions.confidence[~right]),
        confusion=_matrix(predictions),
        mistakes=_mistakes(opened, predictions),
    )
    five = "" if results["top5"] is None else f", top-5 {results['top5']:.2f} %"
    log.info("top-1 %.2f %%%s, %d images, calibration error %.3f", results["top1"], five, results["samples"], results["ece"])
    for name in (RESULTS_FILE, PAGE_FILE):
        log.info("  %s", opened.out / name)


def _facts(opened: Evaluation, options: EvaluationOptions, runtime: Runtime) -> dict[str, str]:
    view, config = opened.view, opened.model.config
    return {
        "weights": str(opened.weights),
        "trained steps": opened.model.extra.get("step", "unknown"),
        "averaged weights": "yes" if options.averaged else "no",
        "model": f"{config.model.name}, {config.model.image_size[0]}x{config.model.image_size[1]} pixels",
        "data": f"{opened.index.directory}, {len(opened.index):,} images, {len(opened.classes):,} classes",
        "view": f"{view.resize}, crop {view.crop:g}, {view.interpolation}",
        "precision": options.precision,
        "device": f"{describe_device(runtime.device)}, {runtime.world_size} rank{'' if runtime.world_size == 1 else 's'}",
        "code": git_version() or "not a git checkout",
    }


def _matrix(predictions: Predictions) -> np.ndarray | None:
    size = predictions.num_classes
    if size > MOST_CLASSES_IN_A_MATRIX:
        return None
    matrix = np.zeros((size, size), dtype=np.int64)
    for pair, count in predictions.confusion.items():
        matrix[pair] = count
    return matrix


def _mistakes(opened: Evaluation, predictions: Predictions) -> list[Mistake]:
    names, config = class_names_for(predictions, opened.classes), opened.model.config
    reader, found = ShardReader(opened.index), []
    for row in predictions.mistakes(SHOWN_MISTAKES):
        sample = int(predictions.sample[row])
        pixels = decode_image(reader.read_image(sample), in_chans=config.model.in_chans, band_range=config.data.band_range)
        image = opened.view(pixels)["image"]
        found.append(
            Mistake(
                image=image.permute(1, 2, 0).numpy(),
                label=names[int(predictions.label[row])],
                predicted=names[int(predictions.predicted[row])],
                confidence=float(predictions.confidence[row]),
                source=opened.index.describe(sample),
            )
        )
    return found
