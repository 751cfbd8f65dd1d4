"""Few labels: fine-tuning after SimMIM pre-training against the same network from scratch, both tuned on the same grid.

    python benchmarks/2026-11-24-few-labels/run.py DATA RUNS      (DATA: made by data.sh beside this file)

Every run is a directory under RUNS and is skipped when it has finished, so the script can be interrupted. It writes results.json
and curves.png beside itself. Learning rates are chosen on the split `tune` with a seed of their own; the reported seeds are
tested on `test`, which no choice has seen.
"""

import json
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from matplotlib.figure import Figure  # noqa: E402

from simmim_scale.cli.train import train  # noqa: E402
from simmim_scale.engine.runtime import Runtime  # noqa: E402
from simmim_scale.reports.sinks import read_metrics  # noqa: E402
from simmim_scale.train.stop import StopRequest  # noqa: E402

BATCH = 25
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # absolute, at this batch
SEEDS = (1, 2, 3)
TUNING_SEED = 0
LONGER = 120  # epochs of one more training from scratch, on `tune`
EVERY = {"tune": 100000, "test": 160}  # steps between validations; there is always one at the end
ARMS = ("pretrained", "scratch")
COLOURS = {"pretrained": "#2f6fdf", "scratch": "#d9680f"}


def fit(run_dir: Path, config: str, task: str, settings: list[str]) -> list[dict]:
    """Train, unless it has been done; the records of the run."""
    if not (run_dir / "weights/model.safetensors").exists():
        code = train(HERE / config, [f"run_dir={run_dir}", *settings], tasks=(task,), stop=StopRequest())
        if code:
            raise SystemExit(code)
    return read_metrics(run_dir / "metrics.jsonl")


def finetune(data: Path, runs: Path, arm: str, *, rate: float, seed: int, split: str, epochs: int | None = None) -> list[dict]:
    name = f"{arm}_{split}_lr{rate:g}_seed{seed}" + (f"_{epochs}epochs" if epochs else "")
    settings = [
        f"seed={seed}",
        f"train.global_batch={BATCH}",
        f"optimizer.base_lr={rate * 512 / BATCH!r}",
        f"data.train={data / 'few'}",
        f"data.validation={data / split}",
        f"validation.every_steps={EVERY[split]}",
    ]
    if arm == "pretrained":
        settings.append(f"init_from={runs / 'pretrain'}")
    if epochs:
        settings.append(f"train.epochs={epochs}")
    return fit(runs / name, "finetune.yaml", "classification", settings)


def top1(records: list[dict]) -> list[tuple[float, float]]:
    """(epoch, top-1) at every validation."""
    return [(round(record["epoch"], 2), record["val_top1"]) for record in records if "val_top1" in record]


def pretrain(data: Path, runs: Path) -> list[dict]:
    """Probed as it goes, to watch it: no choice is made by that."""
    settings = [
        f"data.train={data / 'unlabelled'}",
        f"data.validation={data / 'tune'}",
        f"probe.fit={data / 'probed'}",
        f"probe.test={data / 'tune'}",
    ]
    return fit(runs / "pretrain", "pretrain.yaml", "pretrain", settings)


def tune(data: Path, runs: Path, arm: str) -> dict:
    """Top-1 on `tune` at the end, for every rate, and the best rate."""
    tuned = {rate: top1(finetune(data, runs, arm, rate=rate, seed=TUNING_SEED, split="tune"))[-1][1] for rate in RATES}
    return {"tuning": {f"{rate:g}": value for rate, value in tuned.items()}, "rate": max(tuned, key=tuned.__getitem__)}


def main(data: Path, runs: Path) -> None:
    Runtime.close = lambda self: None  # one process group serves all runs of this process
    watched = ("step", "epoch", "val_loss", "val_baseline", "val_knn", "val_linear")
    checks = [record for record in pretrain(data, runs) if "val_loss" in record]
    results = {"pretraining": [{name: record[name] for name in watched if name in record} for record in checks]}
    for arm in ARMS:
        results[arm] = tune(data, runs, arm)
        write(results)
    for seed in SEEDS:  # arms in turn, so that an interrupted comparison is still one
        for arm in ARMS:
            curve = top1(finetune(data, runs, arm, rate=results[arm]["rate"], seed=seed, split="test"))
            results[arm].setdefault("curves", {})[str(seed)] = curve
            results[arm]["top1"] = [points[-1][1] for points in results[arm]["curves"].values()]
            write(results)
    draw(results)
    rate = results["scratch"]["rate"]
    longer = finetune(data, runs, "scratch", rate=rate, seed=TUNING_SEED, split="tune", epochs=LONGER)
    results["scratch"]["longer"] = top1(longer)[-1]
    write(results)


def write(results: dict) -> None:
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def draw(results: dict) -> None:
    """Mean over seeds, the range as a band, and each seed's last point."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for arm in ARMS:
        curves = list(results[arm]["curves"].values())
        epochs = [point[0] for point in curves[0]]
        columns = [[curve[index][1] for curve in curves] for index in range(len(epochs))]
        mean = [statistics.fmean(column) for column in columns]
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(epochs, low, high, color=COLOURS[arm], alpha=0.18, linewidth=0)
        name = "after SimMIM pre-training" if arm == "pretrained" else "from scratch"
        label = f"{name}: {mean[-1]:.1f} % ({low[-1]:.1f} to {high[-1]:.1f})"
        axes.plot(epochs, mean, "o-", color=COLOURS[arm], markersize=4, label=label)
        axes.plot([epochs[-1]] * len(curves), columns[-1], "_", color=COLOURS[arm], markersize=12)
    axes.axhline(10, color="#8a93a0", linewidth=1, linestyle=(0, (5, 4)), label="guessing")
    axes.set(
        xlabel="epochs of fine-tuning on 500 labelled objects",
        ylabel="top-1 on held-out objects, %",
        ylim=(0, 1.4 * axes.dataLim.ymax),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(HERE / "curves.png", dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
