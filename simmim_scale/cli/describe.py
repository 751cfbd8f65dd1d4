"""`simmim describe`: what a configuration amounts to, without training: model size, batch arithmetic, learning rates."""

from pathlib import Path
from typing import Any

from rich.table import Table

from simmim_scale.config.plan import Plan, make_plan
from simmim_scale.config.schema import Config
from simmim_scale.data.remote import is_remote
from simmim_scale.data.remote_index import open_index
from simmim_scale.data.shards import ShardIndex
from simmim_scale.tasks.model_facts import describe_model


def describe_config(config: Config, *, world_size: int) -> dict[str, Any]:
    """Everything that `simmim describe --json` prints.

    `parameters` and `multiply_adds` are of the backbone alone; multiply-adds are those of one image's forward pass.

    Without shards and without data.train_samples there is nothing to plan with: the model alone is described, and `plan` says so.

    Raises:
        ValueError: a plan that does not work out.
    """
    samples, origin = count_samples(config)
    if samples is None:
        return {**describe_model(config), "plan": f"none: {origin}, and data.train_samples is not set"}
    plan = make_plan(config.train, config.optimizer, config.schedule, num_samples=samples, world_size=world_size)
    return {**describe_model(config), **plan.as_json(), "samples_from": origin}


def count_samples(config: Config) -> tuple[int | None, str]:
    """Samples to plan with, and where the number is from: a mistyped directory must not look like a count.

    They are those of the shards, or `data.train_samples` while there are none (and for shards at a URL, to plan without network);
    None: neither.
    """
    place, stated = config.data.train, config.data.train_samples
    if is_remote(place) and stated is None:
        return len(open_index(place, config.data.remote)), f"counted at {place}"
    if place and not is_remote(place) and Path(place, "index.json").exists():
        return len(ShardIndex.load(Path(place))), f"counted in {place}"
    missing = f"no shards were counted at {place!r}"
    return stated, f"data.train_samples; {missing}" if stated else missing


def plan_rows(plan: Plan) -> dict[str, str]:
    """The plan in a few words, for the run header."""
    return {
        "samples": f"{plan.num_samples:,}",
        "global batch": f"{plan.global_batch} = {plan.world_size} ranks x {plan.micro_batch} x {plan.accumulation} rounds",
        "steps": f"{plan.total_steps:,} ({plan.steps_per_epoch:.2f} an epoch, {plan.epochs:.2f} epochs)",
        "learning rate": ", ".join(f"{plan.lr(step):.3g} at step {step + 1}" for step, _ in plan.learning_rate.key_steps()),
    }


def description_tables(description: dict[str, Any]) -> list[Table]:
    """The same for a person: model, batches, learning rate."""
    d = description
    model = _pairs("Model")
    model.add_row("backbone", f"{d['backbone']}, {d['image_size'][0]}x{d['image_size'][1]} pixels, {d['tokens']:,} tokens")
    model.add_row(
        "parameters", f"{d['parameters']:,} ({d['parameters'] / 1e6:.1f}M), with head {d['parameters_with_head'] / 1e6:.1f}M"
    )
    model.add_row("multiply-adds", f"{d['multiply_adds'] / 1e9:.2f}G of the backbone, forward, one image")
    if "num_classes" in d:
        model.add_row("classes", f"{d['num_classes']:,}; learning rate x{d['layer_decay']} from each layer to the one below it")
    else:
        for row in _objective_rows(d):
            model.add_row(*row)
        model.add_row("mask", f"{d['hidden_cells']} of {d['mask_cells']} cells hidden, AvgDist {d['avg_dist']:.1f} pixels")
    model.add_row("engine", f"ZeRO-{d['zero_stage']}, {d['precision']}")
    if "plan" in d:
        model.add_row("plan", d["plan"])
        return [model]
    batch = _pairs("Batches and steps")
    batch.add_row("samples", f"{d['num_samples']:,} ({d['samples_from']})")
    batch.add_row(
        "global batch",
        f"{d['global_batch']:,} = {d['world_size']} ranks x {d['micro_batch']} x {d['accumulation']} rounds of accumulation",
    )
    batch.add_row("steps", f"{d['steps']:,} ({d['epochs']:.2f} epochs)")
    batch.add_row("steps an epoch", f"{d['steps_per_epoch']:.2f} (batches run on over the end of an epoch; no sample is dropped)")
    rates = Table(title="Learning rate", title_justify="left", box=None, header_style="dim")
    for column in ("step", "epoch", "learning rate", ""):
        rates.add_column(column, justify="left" if not column else "right")
    for row in d["learning_rate"]:
        rates.add_row(f"{row['step']:,}", f"{row['epoch']:.2f}", f"{row['lr']:.3g}", row["what"])
    return [model, batch, rates]


def _objective_rows(d: dict[str, Any]) -> list[tuple[str, str]]:
    channels, rows, columns = d["predicted"]
    _, *patch = d["predicted_per_token"]
    work = (
        f"{d['head_parameters'] / 1e6:.1f}M parameters, {d['head_multiply_adds'] / 1e9:.2f}G multiply-adds an image in training"
    )
    extra = f"; its network {d['target_multiply_adds'] / 1e9:.2f}G multiply-adds" if d["target_multiply_adds"] else ""
    return [
        ("head", f"{d['head']}: {work}"),
        ("target", f"{d['target']}: {channels:,} numbers at {rows}x{columns}, {patch[0]}x{patch[1]} of them a token{extra}"),
    ]


def _pairs(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    return table
