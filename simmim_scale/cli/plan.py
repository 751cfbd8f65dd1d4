"""`simmim plan`: whether a recipe fits a machine, what to set, and how long it takes, before a GPU is rented."""

import math
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from simmim_scale.cli.activation_count import count_configured
from simmim_scale.cli.describe import count_samples
from simmim_scale.config.advice import PLACES, Machine, Option, all_options, best, reason
from simmim_scale.config.cluster import find_device, find_link
from simmim_scale.config.memory import GIB, POLICIES, ModelCost, Sharding, estimate
from simmim_scale.config.plan import make_plan
from simmim_scale.config.schema import Config
from simmim_scale.config.step_time import ASSUMPTIONS
from simmim_scale.engine.deepspeed_config import deepspeed_config
from simmim_scale.engine.zero_settings import ModelSizes


@dataclass(frozen=True)
class MachinePlan:
    """Everything that the command prints."""

    config: Config
    model: ModelCost
    machine: Machine
    options: list[Option]
    chosen: Option
    steps: int | None
    samples_from: str

    @property
    def hours(self) -> float | None:
        """Of the whole recipe."""
        return None if self.steps is None or self.chosen.time is None else self.steps * self.chosen.time.seconds / 3600


def plan_for_machine(
    config: Config,
    *,
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    gpu_memory: float | None,
    interconnect: str | None,
    cpu_memory: float | None = None,
) -> MachinePlan:
    """Plans a recipe for a machine: pre-training or classification.

    Args:
        gpu_memory: GiB of one GPU; None: the card's. cpu_memory: GiB of a node, for what is offloaded; None: enough.

    Raises:
        ValueError: a number that is not positive, an unknown GPU or interconnect, another task, or nothing fits.
    """
    numbers = {"nodes": nodes, "gpus-per-node": gpus_per_node, "gpu-memory": gpu_memory, "cpu-memory": cpu_memory}
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name}: {'GiB' if 'memory' in name else 'a number'} of more than 0, got {value:g}.")
    device = find_device(gpu)
    machine = Machine(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        device=device,
        link=find_link(interconnect, device, nodes=nodes),
        memory=(gpu_memory or device.memory) * GIB,
        cpu=None if cpu_memory is None else cpu_memory * GIB,
    )
    model = count_configured(config, on_gpu=True)
    options = all_options(model, shardings(config, model, machine.ranks), machine, global_batch=config.train.global_batch)
    samples, origin = count_samples(config)
    steps = None
    if samples is not None:
        plan = make_plan(config.train, config.optimizer, config.schedule, num_samples=samples, world_size=machine.ranks)
        steps = plan.total_steps
    return MachinePlan(config, model, machine, options, best(options), steps, origin)


def shardings(config: Config, model: ModelCost, ranks: int) -> list[Sharding]:
    """Every way to hold the state that the settings allow: ZeRO 0 to 3, with and without offloading."""
    return [
        make_sharding(config, model, ranks, stage=stage, places=places)
        for places in PLACES
        for stage in range(4)
        if stage >= _least_stage(*places)
    ]


def make_sharding(config: Config, model: ModelCost, ranks: int, *, stage: int, places: tuple[str, str]) -> Sharding:
    """One way, with the buffers of the DeepSpeed dictionary that a run would have."""
    engine = config.engine.model_copy(
        update={
            "zero_stage": stage,
            "offload_optimizer": places[0],
            "offload_parameters": places[1],
            "nvme_path": "DIRECTORY" if "nvme" in places else None,
        }
    )
    section = deepspeed_config(
        engine,
        config.optimizer,
        micro_batch=1,
        accumulation=1,
        global_batch=ranks,
        sizes=ModelSizes(parameters=model.sizes, largest_block=model.largest_block),
        world_size=ranks,
        extra=config.deepspeed,
    )["zero_optimization"]
    keys = {"reduce_bucket": "reduce_bucket_size", "live": "stage3_max_live_parameters"}
    keys |= {"reuse": "stage3_max_reuse_distance", "persistence": "stage3_param_persistence_threshold"}
    numbers = {name: int(section[key]) for name, key in keys.items() if key in section}
    return Sharding(
        stage=stage,
        ranks=ranks,
        half=engine.precision != "fp32",
        offload_optimizer=places[0],
        offload_parameters=places[1],
        buckets=2 if stage in (1, 2) and section.get("overlap_comm", False) else 1,  # stage 3 overlaps with one
        **numbers,
    )


def _least_stage(optimizer: str, parameters: str) -> int:
    if parameters != "none" or optimizer == "nvme":
        return 3
    return 0 if optimizer == "none" else 1


def plan_json(found: MachinePlan) -> dict[str, Any]:
    """What `simmim plan --json` prints: sizes in GiB, times in seconds."""
    model, chosen = found.model, found.chosen
    return {
        "model": {"parameters": model.parameters, "multiply_adds": model.multiply_adds},
        "sequential_attention": found.config.engine.sequential_attention,
        "activations_per_sample_gib": {policy: round(_per_sample(model, policy), 8) for policy in POLICIES},
        "options": [_option_json(option) for option in found.options],
        "recommended": {
            **_option_json(chosen),
            "overrides": chosen.overrides(),
            "reason": reason(chosen, found.options),
            "steps": found.steps,
            "days": None if found.hours is None else round(found.hours / 24, 3),
            "gpu_hours": None if found.hours is None else round(found.hours * found.machine.ranks, 1),
        },
        "assumptions": list(ASSUMPTIONS),
    }


def _option_json(option: Option) -> dict[str, Any]:
    return {
        "zero_stage": option.sharding.stage,
        "offload_optimizer": option.sharding.offload_optimizer,
        "offload_parameters": option.sharding.offload_parameters,
        "activation_checkpointing": option.policy,
        "fits": option.time is not None,
        "largest_micro_batch": option.most,
        "micro_batch": option.micro_batch,
        "accumulation": option.accumulation,
        "memory_gib": option.memory.as_json(),
        "step": None if option.time is None else option.time.as_json(),
    }


def _per_sample(model: ModelCost, policy: str) -> float:
    """GiB of activations that one more sample takes, at many."""
    return (model.activations(policy, 65) - model.activations(policy, 64)) / GIB


def plan_tables(found: MachinePlan) -> list[Table | str]:
    """The same for a person."""
    machine, model, chosen = found.machine, found.model, found.chosen
    title = (
        f"{found.config.model.name}, {model.parameters / 1e6:.1f}M parameters with head, {model.multiply_adds / 1e9:.1f}G"
        f" multiply-adds, {found.config.engine.precision}; {machine.nodes} x {machine.gpus_per_node} {machine.device.name} of"
        f" {machine.memory / GIB:g} GiB, {machine.link.name}: {machine.link.per_gpu(machine.gpus_per_node) / 1e9:.1f} GB/s a GPU"
    )
    per_sample = ", ".join(f"{policy} {_per_sample(model, policy) * 1024:.0f}" for policy in POLICIES)
    return [
        title,
        _state_table(found),
        f"Activations, MiB a sample: {per_sample}.{_turns(found.config.engine.sequential_attention)}",
        _choice_table(chosen, found),
        f"Why: {reason(chosen, found.options)}.",
        "Set: " + " ".join(chosen.overrides()),
        "Assumed: " + "; ".join(ASSUMPTIONS) + ".",
    ]


def _turns(rows: int) -> str:
    unit = "row" if rows == 1 else "rows"
    return f" Attention of the first two stages: {rows} {unit} of windows at once (engine.sequential_attention)." if rows else ""


def _state_table(found: MachinePlan) -> Table:
    """A row for each way to hold the state."""
    table = Table(
        title="GiB a GPU (and of CPU memory); most samples at once by checkpointing policy; best step time\n"
        "cpu/nvme: the optimizer is offloaded to the CPU, the parameters to the disk",
        title_justify="left",
        box=None,
        header_style="dim",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    names = ("ZeRO", "param", "grad", "optim", "buffer", "CPU", "none", "select", "stage", "block", "offl", "s/step")
    for column in names:
        table.add_column(column, justify="left" if column == "ZeRO" else "right", no_wrap=True)
    rows: dict[str, list[Option]] = {}
    for option in found.options:
        rows.setdefault(option.name, []).append(option)
    for options in rows.values():
        memory = replace(estimate(found.model, options[0].sharding, policy="none", micro_batch=1), activations=0.0)
        times = [option.time.seconds for option in options if option.time is not None]
        table.add_row(
            _short_name(options[0].sharding),
            *(
                f"{value / GIB:.2f}"
                for value in (memory.parameters, memory.gradients, memory.optimizer, memory.buffers, memory.cpu)
            ),
            *(str(option.most) if option.most else "-" for option in options),
            *([""] * (len(POLICIES) - len(options))),
            f"{min(times):.3f}" if times else "-",
        )
    return table


def _short_name(sharding: Sharding) -> str:
    places = (sharding.offload_optimizer, sharding.offload_parameters)
    return f"{sharding.stage}" if places == ("none", "none") else f"{sharding.stage} {'/'.join(places).replace('none', '-')}"


def _choice_table(chosen: Option, found: MachinePlan) -> Table:
    assert chosen.time is not None
    table = Table(title="Recommended", title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    memory, time = chosen.memory, chosen.time
    table.add_row("settings", f"{chosen.name}, checkpointing {chosen.policy}")
    table.add_row("batch", f"{found.machine.ranks} ranks x {chosen.micro_batch} x {chosen.accumulation} rounds of accumulation")
    parts = ("parameters", "gradients", "optimizer", "activations", "buffers", "context")
    listed = ", ".join(f"{name} {getattr(memory, name) / GIB:.2f}" for name in parts)
    table.add_row("memory", f"{memory.device / GIB:.1f} of {found.machine.memory / GIB:g} GiB: {listed}")
    times = ("matrix", "elementwise", "optimizer", "communication", "offloading")
    table.add_row("step", f"{time.seconds:.3f} s: " + ", ".join(f"{name} {getattr(time, name):.3f}" for name in times))
    table.add_row("speed", f"{found.config.train.global_batch / time.seconds:,.0f} images a second")
    if found.hours is None:
        table.add_row("recipe", f"unknown: {found.samples_from}, and data.train_samples is not set")
    else:
        table.add_row(
            "recipe", f"{found.steps:,} steps: {found.hours / 24:.1f} days, {found.hours * found.machine.ranks:,.0f} GPU-hours"
        )
    return table
