"""`simmim bench ...`: measurements of parts of the system on this machine."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from simmim_scale.cli.exit_codes import user_errors

bench_app = typer.Typer(help="Measure parts of the system on this machine.", no_args_is_help=True)


@bench_app.callback()
def _bench() -> None:
    """Measure parts of the system on this machine."""


@bench_app.command()
def loader(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; data.train names the shards to measure on.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Different images to measure on.")] = 1024,
    workers: Annotated[int, typer.Option(min=0, help="Processes of the whole loaders.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Images of a batch of the whole loaders.")] = 128,
    batches: Annotated[int, typer.Option(min=1, help="Batches taken from each of the whole loaders, in three turns.")] = 16,
    gpu: Annotated[str, typer.Option(help="GPU to compute the demand for.")] = "H100",
    gpu_images_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Images per second of one GPU from a run, instead of an estimate.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Images per second and core of reading, decoding, views, batching and transfer, against ImageFolder and PIL."""
    import torch

    from simmim_scale.bench.demand import estimate_demand
    from simmim_scale.bench.loader import BenchOptions, bench_loader
    from simmim_scale.config.load import load_config

    console = Console(highlight=False, soft_wrap=True)
    with user_errors():
        settings = load_config(config, overrides or [])
        demand = estimate_demand(settings, gpu=gpu, measured=gpu_images_per_second)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options = BenchOptions(images=images, workers=workers, batch=batch, batches=batches)
        result = bench_loader(settings, options, device=device)
    result["demand"] = demand.as_json(images_per_core_second=result["per_core"]["images_per_second"])
    if as_json:
        console.print(json.dumps(result, indent=2), markup=False)
        return
    for table in loader_tables(result):
        console.print(table)


@bench_app.command()
def kernels(
    op: Annotated[
        list[str] | None, typer.Option(help="window_attention, norm or masked_loss; several times. Default: all.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="swin_b, swin_l or swinv2_h; several times. Default: all.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images; several times. Default: 32 and 128 on a GPU, 1 else.")
    ] = None,
    stage: Annotated[list[int] | None, typer.Option(help="Stage of the models, 1 to 4; several times. Default: all.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32. Default: bf16 on a GPU, fp32 else.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of every implementation; the median counts.")] = 5,
    comparisons: Annotated[
        bool, typer.Option(help="Also torch.compile on the references, and FlexAttention: up to half a minute a layer on a CPU.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Directory for kernels.json and kernels.png.")] = None,
) -> None:
    """Time of each kernel at every stage against what this device's copies and matrix products allow."""
    from simmim_scale.bench.kernel_cases import MODELS, OPS, make_cases
    from simmim_scale.bench.kernels import bench_kernels, choose_settings
    from simmim_scale.bench.kernels_report import kernel_tables, left_out_lines, write_results

    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 130)  # a narrow terminal wraps the tables; no figure is cut short
    with user_errors():
        settings = choose_settings(dtype, turns=turns, comparisons=comparisons)
        batches = batch or ([32, 128] if settings.device.type == "cuda" else [1])
        all_cases = make_cases(op or OPS, model or MODELS, batches, stage or (1, 2, 3, 4))
        result = bench_kernels(all_cases, settings, progress=lambda text: console.print(text, style="dim"))
    for table in kernel_tables(result):
        console.print(table)
    for line in left_out_lines(result):
        console.print(line, markup=False)
    if out is not None:
        for path in write_results(result, out):
            console.print(str(path))


@bench_app.command("timm")
def timm_step(
    size: Annotated[str, typer.Option(help="tiny (SwinV2-T), or toy.")] = "tiny",
    image_size: Annotated[int, typer.Option(min=32, help="Pixels.")] = 192,
    window: Annotated[int, typer.Option(min=1, help="Tokens per axis of a window.")] = 12,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 8,
    turns: Annotated[int, typer.Option(min=1, help="Steps that each side takes, in turns.")] = 7,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; may be given several times. Default: both.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Forward and backward of SwinV2 against timm's on the same weights, in turns."""
    from simmim_scale.bench.timm_step import DTYPES, StepSettings, bench_timm

    console = Console(highlight=False, soft_wrap=True)
    with user_errors():
        unknown = [name for name in dtype or () if name not in DTYPES]
        if unknown:
            raise ValueError(f"unknown type {unknown[0]!r}. Known: {', '.join(DTYPES)}.")
        settings = StepSettings(size, image_size, window, batch, turns)
        chosen = {name: DTYPES[name] for name in dtype or DTYPES}
        result = bench_timm(settings, chosen, progress=lambda text: console.print(text, style="dim"))
    table = Table("type", "ours, s", "timm, s", "factor", "loss apart", "gradients apart", title="A step, in turns")
    for row in result["rows"]:
        apart = [f"{row['difference'][name]:.1e}" for name in ("loss", "gradients")]
        table.add_row(row["dtype"], f"{row['ours']:.3f}", f"{row['timm']:.3f}", f"{row['factor']:.2f}", *apart)
    console.print(table)
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")


@bench_app.command("compile")
def compile_kernels(
    out: Annotated[Path, typer.Option(help="Directory of the record and the report; a sweep that was interrupted goes on.")],
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16 or fp32; may be given several times. Default: all.")] = None,
    capability: Annotated[
        list[str] | None, typer.Option(help="Compute capability, for example 9.0; may be given several times. Default: all.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compile, about 0.6 s a kernel each.")] = 1,
) -> None:
    """Compile every Triton kernel that may be picked, for GPUs that need not be here; exit code 1 if one has faults."""
    from simmim_scale.bench.compile import DTYPES, parse_capabilities, sweep

    console = Console(highlight=False, soft_wrap=True)
    with user_errors():
        faults = sweep(
            out, dtypes=dtype or list(DTYPES), capabilities=parse_capabilities(capability), jobs=jobs, progress=console.print
        )
    console.print(f"{faults} kernels with faults; report: {out / 'README.md'}")
    raise typer.Exit(1 if faults else 0)


@bench_app.command()
def step(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a pre-training run; no data is read.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images of a step. Default: train.micro_batch, or global_batch.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Measurements of each side, in turn; the median counts.")] = 7,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of one measurement. Default: 5 on a GPU, 1 else.")] = None,
    warmup: Annotated[int, typer.Option(min=2, help="Steps before the first measurement.")] = 3,
    against: Annotated[
        str | None, typer.Option(help="'reference': also the published formulation, eager, in the same process.")
    ] = None,
    reference_checkpointing: Annotated[
        bool, typer.Option(help="Let the reference recompute its blocks in backward, where it does not fit otherwise.")
    ] = False,
    processor_time: Annotated[
        bool, typer.Option(help="On a busy CPU: seconds of processor instead of seconds that passed; with OMP_NUM_THREADS=1.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory; on a CPU in processes of their own.")] = True,
    out: Annotated[Path | None, typer.Option(help="Directory for step.json and step.png.")] = None,
) -> None:
    """Images per second, MFU, memory and time by category of one training step, on random images."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library talks on stderr; read when torch is imported
    import torch

    from simmim_scale.bench.step import StepOptions, bench_step
    from simmim_scale.bench.step_report import step_tables, write_step_results
    from simmim_scale.config.load import load_config

    console = Console(highlight=False, soft_wrap=True)
    options = StepOptions(
        batch=batch,
        turns=turns,
        steps=steps or (5 if torch.cuda.is_available() else 1),
        warmup=warmup,
        against=against,
        checkpointed=reference_checkpointing,
        processor_time=processor_time,
        memory=memory,
    )
    with user_errors():
        result = bench_step(load_config(config, overrides or []), options, progress=lambda text: console.print(text, style="dim"))
    wide = Console(highlight=False, width=max(console.width, 130))
    for table in step_tables(result):
        wide.print(table)
    for path in write_step_results(result, out) if out is not None else []:
        console.print(str(path))


def loader_tables(result: dict[str, Any]) -> list[Table]:
    """The result for a person: stages, comparison, demand."""
    stages = Table(
        title=f"One core, {result['images']} images of {result['mean_bytes'] / 1e3:.0f} kB and"
        f" {result['mean_pixels'] / 1e6:.2f} megapixels -> {'x'.join(map(str, result['image_size']))}",
        title_justify="left",
        box=None,
        header_style="dim",
    )
    for column in ("stage", "us/image", "images/s", "share"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for name, stage in result["stages"].items():
        stages.add_row(
            name, f"{stage['microseconds']:,.1f}", f"{stage['images_per_second']:,.0f}", f"{100 * stage['share']:.1f} %"
        )
    if "transfer" not in result["stages"]:
        stages.add_row("transfer", "", "", "none: no GPU")
    return [stages, _comparison(result), _demand(result["demand"])]


def _comparison(result: dict[str, Any]) -> Table:
    table = Table(title="Against torchvision and PIL on the same files", title_justify="left", box=None, header_style="dim")
    for column in ("", "ours, images/s", "theirs, images/s", "times as fast"):
        table.add_column(column, justify="right" if column else "left")
    core, whole = result["per_core"], result["whole_loader"]
    for name, what in (("float32", "decode + views, one core"), ("uint8", "the same, bytes on both sides")):
        table.add_row(
            what, f"{core['decode_and_views']:,.0f}", f"{core['torchvision'][name]:,.0f}", f"{core['speedup'][name]:.2f}"
        )
    table.add_row(
        f"whole loaders, {whole['workers']} workers",
        f"{whole['images_per_second']:,.0f}",
        f"{whole['torchvision_images_per_second']:,.0f}",
        f"{whole['speedup']:.2f}",
    )
    return table


def _demand(demand: dict[str, Any]) -> Table:
    table = Table(title="Cores that one GPU needs", title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("GPU consumes", f"{demand['gpu_images_per_second']:,.0f} images/s ({demand['source']})")
    table.add_row("cores per GPU", f"{demand['cores_per_gpu']:.1f}")
    return table
