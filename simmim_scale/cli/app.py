"""The commands, each a few lines: read the arguments, call what does the work, print.

Heavy imports happen inside the commands, so that `simmim --help` answers at once.
"""

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from simmim_scale.cli.bench import bench_app
from simmim_scale.cli.exit_codes import user_errors

app = typer.Typer(
    name="simmim",
    help="Pre-train vision models by masked image modeling, from a folder of images to SwinV2-H.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/pretrain/swinv2_h_800ep.yaml.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file: train.steps=100.")
]


def _out() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _train(config: Path, overrides: list[str], *, tasks: tuple[str, ...]) -> NoReturn:
    from simmim_scale.train.stop import StopRequest

    with StopRequest() as stop:  # before the imports, which take seconds: a signal must not meet an unprepared process
        from simmim_scale.cli.train import train
        from simmim_scale.engine.runtime import leave

        leave(train(config, overrides, tasks=tasks, stop=stop))


@app.command()
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Pre-train by masked image modeling. The same command again resumes; `python -m launch` runs it on many ranks."""
    _train(config, overrides or [], tasks=("pretrain",))


@app.command()
def finetune(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fine-tune for classification: init_from=RUN takes a pre-trained backbone. Resumes and runs on many ranks as `pretrain`."""
    _train(config, overrides or [], tasks=("classification",))


@app.command()
def evaluate(
    weights: Annotated[str, typer.Argument(help="Fine-tuned run, or a directory of portable weights of a classifier.")],
    data: Annotated[str, typer.Argument(help="Labelled shards to evaluate on: a directory, or a URL.")],
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights of the run.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory of the results. Default: `evaluation` beside the weights.")] = None,
    crop: Annotated[float | None, typer.Option(help="Side of the tested centre over the shorter side; 1: all of it.")] = None,
    resize: Annotated[str | None, typer.Option(help="cover: keep the shape and cut; squash: the whole image.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bilinear or bicubic.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Evaluate a random choice of so many. Default: all.")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples that one rank computes at once.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode, per rank.")] = 4,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Top-1, top-5, classes, confusion and calibration of a classifier: JSON and a page. Exact on any number of ranks."""
    from simmim_scale.cli.evaluate import EvaluationOptions, evaluate_command

    options = EvaluationOptions(
        averaged=ema,
        out=out,
        crop=crop,
        resize=resize,
        interpolation=interpolation,
        samples=samples,
        micro_batch=micro_batch,
        workers=workers,
        precision=precision,
    )
    evaluate_command(weights, data, options)


@app.command()
def probe(
    weights: Annotated[str, typer.Argument(help="A run, or a directory of portable weights, pre-trained or fine-tuned.")],
    fit: Annotated[str, typer.Argument(help="Labelled shards to fit the probes to: a directory, or a URL.")],
    test: Annotated[str, typer.Argument(help="Labelled shards of the same classes to test them on.")],
    stage: Annotated[int | None, typer.Option(help="Stage whose features are used; -1: the last. Default: every stage.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the results. Default: `probe` beside the weights.")] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 20,
    linear: Annotated[bool, typer.Option(help="Also fit a linear classifier.")] = True,
    fit_samples: Annotated[int | None, typer.Option(min=1, help="Fit to a random choice of so many. Default: all.")] = None,
    test_samples: Annotated[int | None, typer.Option(min=1, help="Test on a random choice of so many. Default: all.")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples that one rank computes at once.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode, per rank.")] = 4,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """k nearest neighbours and a linear classifier on frozen features, of every stage. Features are computed once and kept."""
    from simmim_scale.cli.probe import ProbeOptions, probe_command

    options = ProbeOptions(
        stage=stage,
        out=out,
        neighbours=neighbours,
        linear=linear,
        fit_samples=fit_samples,
        test_samples=test_samples,
        micro_batch=micro_batch,
        workers=workers,
        precision=precision,
    )
    probe_command(weights, fit, test, options)


@app.command("config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the whole resolved configuration, with the meaning, unit and source of every value."""
    from simmim_scale.config.document import documented_yaml
    from simmim_scale.config.load import load_source, validate

    with user_errors():
        source = load_source(config, overrides or [])
        _out().print(documented_yaml(validate(source), source), end="", markup=False)


@app.command()
def describe(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    world_size: Annotated[int, typer.Option(min=1, help="Number of ranks to plan for.")] = 1,
) -> None:
    """Print parameters, multiply-adds, tokens, batch arithmetic, steps and learning rates; trains nothing."""
    from simmim_scale.cli.describe import describe_config, description_tables
    from simmim_scale.config.load import load_config

    with user_errors():
        description = describe_config(load_config(config, overrides or []), world_size=world_size)
    if as_json:
        _out().print(json.dumps(description, indent=2), markup=False)
    else:
        for table in description_tables(description):
            _out().print(table)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each node.")] = 8,
    gpu: Annotated[str, typer.Option(help="B200, H200, H100, A100, L40S, A40, A10 or V100.")] = "H100",
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of one GPU in GiB; default: the card's.")] = None,
    interconnect: Annotated[
        str | None,
        typer.Option(help="nvlink, pcie, ib-400, ethernet-100 ... or GB/s a GPU; default: nvlink, between nodes ib-400."),
    ] = None,
    cpu_memory: Annotated[float | None, typer.Option(help="Memory of one node in GiB, for offloading; default: enough.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say whether a recipe fits a machine, with which settings, and how long it takes; needs no GPU and trains nothing."""
    from simmim_scale.cli.plan import plan_for_machine, plan_json, plan_tables
    from simmim_scale.config.load import load_config

    with user_errors():
        found = plan_for_machine(
            load_config(config, overrides or []),
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            gpu=gpu,
            gpu_memory=gpu_memory,
            interconnect=interconnect,
            cpu_memory=cpu_memory,
        )
    if as_json:
        _out().print(json.dumps(plan_json(found), indent=2), markup=False)
    else:
        for part in plan_tables(found):
            _out().print(part)


@app.command("import-weights")
def import_weights(
    file: Annotated[
        Path, typer.Argument(help="Checkpoint: a .pth of microsoft/SimMIM, a file or directory of timm or transformers.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write portable weights to.")],
    layout: Annotated[str, typer.Option(help="Whose names the file uses: microsoft, timm or huggingface.")] = "microsoft",
    window: Annotated[int | None, typer.Option(min=1, help="Window size in tokens, where the file does not tell it.")] = None,
    pretrained_windows: Annotated[
        str | None, typer.Option(help="Windows of pre-training, one per stage: 12,12,12,6. Where the file does not tell them.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the input in pixels, where the file does not tell it.")
    ] = None,
    norm_target_window: Annotated[
        int | None, typer.Option(help="Window of the normalised target; 0: plain pixels. Where the file does not tell it.")
    ] = None,
) -> None:
    """Turn a published checkpoint into portable weights (safetensors + configuration)."""
    from simmim_scale.cli.weights import import_and_report, make_hints

    with user_errors():
        hints = make_hints(window, pretrained_windows, image_size, norm_target_window)
        import_and_report(file, out, layout=layout, hints=hints, console=_out())


@app.command("fit-tokenizer")
def fit_tokenizer(
    shards: Annotated[str, typer.Argument(help="Directory of shards to train on.")],
    out: Annotated[Path, typer.Option(help="File to write, *.safetensors.")],
    codes: Annotated[int, typer.Option(help="Number of codes.", min=2, max=32767)] = 512,
    hidden: Annotated[int, typer.Option(help="Width of the first group; 256 in DALL-E.", min=4)] = 64,
    blocks: Annotated[int, typer.Option(help="Blocks of each group; 2 in DALL-E.", min=1)] = 1,
    size: Annotated[int, typer.Option(help="Side of the crops in pixels; 8 pixels make a code.", min=8)] = 64,
    steps: Annotated[int, typer.Option(help="Updates.", min=1)] = 2000,
    batch: Annotated[int, typer.Option(help="Crops of an update.", min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of Adam; falls to 0 by a cosine.", min=0)] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights, crops and noise.", min=0)] = 0,
) -> None:
    """Train a small discrete VAE (DALL-E's layout) whose codes objective.target=tokens predicts."""
    from simmim_scale.cli.tokenizer import fit_and_report
    from simmim_scale.tasks.fit_tokenizer import TokenizerOptions

    with user_errors():
        options = TokenizerOptions(codes, hidden, blocks, size, steps, batch, learning_rate, seed)
        fit_and_report(shards, out, options, console=_out())


@app.command()
def export(
    weights: Annotated[Path, typer.Argument(help="Run directory, finished or still going, or a directory of portable weights.")],
    to: Annotated[str, typer.Option(help="timm, microsoft, huggingface, torchvision-detection-backbone or onnx.")],
    out: Annotated[Path, typer.Option(help="New directory to write to.")],
) -> None:
    """Write weights for another program, load them with it and compare outputs, with a model card beside them."""
    from simmim_scale.cli.export import export_and_report

    with user_errors():
        export_and_report(weights, out, to=to, console=_out())


@app.command()
def predict(
    weights: Annotated[Path, typer.Argument(help="Run directory of a fine-tuning, or a directory of a classifier's weights.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures of your own, of any size.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each picture.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Pictures that are computed at once.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Name the most probable classes of pictures, with a classifier."""
    from simmim_scale.cli.weights import predict_and_report

    with user_errors():
        predict_and_report(weights, images, top=top, batch=batch, as_json=as_json, console=_out())


@app.command()
def reconstruct(
    weights: Annotated[Path, typer.Argument(help="Run directory, or a directory of portable weights.")],
    photo: Annotated[Path, typer.Argument(help="A picture of your own.")],
    out: Annotated[Path, typer.Option(help="PNG to write: original | masked | prediction.")] = Path("reconstruction.png"),
    seed: Annotated[int, typer.Option(help="Seed of the mask.", min=0)] = 0,
    ratio: Annotated[float | None, typer.Option(help="Share of cells to hide; default: as in training.")] = None,
    cell: Annotated[int | None, typer.Option(help="Side of a mask cell in pixels; default: as in training.")] = None,
    sampler: Annotated[str | None, typer.Option(help="random, block or square; default: as in training.")] = None,
) -> None:
    """Hide parts of a picture and let a pre-trained model fill them in."""
    from simmim_scale.cli.weights import reconstruct_and_report

    with user_errors():
        reconstruct_and_report(weights, photo, out, seed=seed, ratio=ratio, cell=cell, sampler=sampler, console=_out())


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Directory of a run, finished or still going.")]) -> None:
    """Write RUN_DIR/report.html again: curves, pictures, configuration, environment."""
    from simmim_scale.reports.page import write_report

    with user_errors():
        _out().print(str(write_report(run_dir)))


@app.command()
def masks(
    sampler: Annotated[str, typer.Option(help="random, block or square.")] = "random",
    cell: Annotated[int, typer.Option(min=1, help="Side of a mask cell in pixels.")] = 32,
    ratio: Annotated[float, typer.Option(help="Share of the cells to hide.")] = 0.6,
    image_size: Annotated[int, typer.Option(min=1, help="Side of the input in pixels.")] = 192,
    patch_size: Annotated[int, typer.Option(min=1, help="Side of a patch in pixels; cells are multiples of it.")] = 4,
    photo: Annotated[Path | None, typer.Option(help="A picture of your own to lay masks over.")] = None,
    out: Annotated[Path, typer.Option(help="PNG of the picture under masks.")] = Path("masks.png"),
    solve: Annotated[float | None, typer.Option(help="Find the settings with this AvgDist, in pixels: 15, for example.")] = None,
    axis: Annotated[Path | None, typer.Option(help="PNG to draw the axis of the supplement's figure 1 into.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the masks.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Preview a masking, print its AvgDist, and find the maskings that have a wanted AvgDist."""
    from simmim_scale.cli.masks import explore

    with user_errors():
        setting = {"sampler": sampler, "cell": cell, "ratio": ratio}
        explore(
            {"seed": seed, "mask": setting, "model": {"image_size": image_size, "patch_size": patch_size}},
            photo=photo,
            out=out,
            wanted=solve,
            axis=axis,
            console=_out(),
            as_json=as_json,
        )


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Look only: run no kernel and train nothing. A few seconds.")] = False,
    gpus: Annotated[int, typer.Option(min=0, help="Fail when fewer GPUs are visible.")] = 0,
    apex: Annotated[bool, typer.Option("--apex", help="Fail when NVIDIA Apex cannot be used.")] = False,
    nodes: Annotated[bool, typer.Option("--nodes", help="Fail without ssh or its server, which a hostfile needs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Check this machine or container: packages, devices, compilers, limits; try kernels and ten steps of training."""
    from simmim_scale.cli.doctor import Wanted, as_json_object, doctor_table, examine, exit_code

    rows = examine(Wanted(gpus=gpus, apex=apex, nodes=nodes), quick=quick)
    if as_json:
        _out().print(json.dumps(as_json_object(rows), indent=2), markup=False)
    else:
        _out().print(doctor_table(rows))
    if quick:
        raise typer.Exit(exit_code(rows))
    from simmim_scale.engine.runtime import leave

    leave(exit_code(rows))  # it has trained: threads of the communication library can abort a teardown


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML file, for example configs/ablation/table4.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[[STAGE:]KEY=VALUE]...", help="Settings of every training, or of one stage.")
    ] = None,
    only: Annotated[str, typer.Option(help="Shell pattern of the names of the runs: 'random-32*'.")] = "*",
    reduced: Annotated[bool, typer.Option("--reduced", help="The small form, for two cores and synthetic pictures.")] = False,
    ranks: Annotated[str, typer.Option(help="Processes of every training here: a number, or auto.")] = "auto",
    list_only: Annotated[bool, typer.Option("--list", help="Print the runs and their commands; train nothing.")] = False,
    collect_only: Annotated[bool, typer.Option("--collect", help="Collect what there is; train nothing.")] = False,
    slurm: Annotated[Path | None, typer.Option(help="Write a Slurm array into this file; train nothing here.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of each task of the Slurm array.")] = 1,
    at_once: Annotated[int, typer.Option(min=1, help="Tasks of the Slurm array that run together.")] = 4,
    jobs: Annotated[Path | None, typer.Option(help="Write a job list for --hostfile into this file; train nothing here.")] = None,
    hostfile: Annotated[str | None, typer.Option(help="Hostfile of the nodes that the job list uses.")] = None,
) -> None:
    """Run every combination of a sweep, skip what is finished, resume what was interrupted, and collect a table."""
    from simmim_scale.cli.sweep import SweepOptions, sweep_command

    options = SweepOptions(
        only=only,
        reduced=reduced,
        ranks=ranks,
        list_only=list_only,
        collect_only=collect_only,
        slurm=slurm,
        nodes=nodes,
        at_once=at_once,
        jobs=jobs,
        hostfile=hostfile,
    )
    with user_errors():
        code = sweep_command(file, overrides or [], options, _out())
    raise typer.Exit(code)
