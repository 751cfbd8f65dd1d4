"""Which settings to train with: every way to hold the state with its largest micro-batch and its time, and the best. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from simmim_scale.config.cluster import Device, Link
from simmim_scale.config.memory import GIB, POLICIES, RESERVE, Memory, ModelCost, Sharding, estimate, largest_micro_batch
from simmim_scale.config.plan import split_batch
from simmim_scale.config.step_time import StepTime, step_time

# Offloading comes after everything that stays on the GPU, the disk after memory.
PLACES = (("none", "none"), ("cpu", "none"), ("cpu", "cpu"), ("nvme", "none"), ("nvme", "nvme"))


@dataclass(frozen=True)
class Machine:
    """What to plan for. `memory`: bytes of one GPU that may be used; cpu: bytes of a node's memory, None: not limited."""

    nodes: int
    gpus_per_node: int
    device: Device
    link: Link
    memory: float
    cpu: float | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def room(self) -> float:
        """Bytes to plan with: some is lost to fragments."""
        return self.memory * (1 - RESERVE)


@dataclass(frozen=True)
class Option:
    """One way to train. micro_batch 0: not even one sample fits; memory is then that of one sample, and `time` None."""

    sharding: Sharding
    policy: str
    most: int
    micro_batch: int
    accumulation: int
    memory: Memory
    time: StepTime | None

    @property
    def name(self) -> str:
        """As a person calls it."""
        places = [
            f"{what} on {place}"
            for what, place in (("optimizer", self.sharding.offload_optimizer), ("parameters", self.sharding.offload_parameters))
            if place != "none"
        ]
        return ", ".join([f"ZeRO-{self.sharding.stage}", *places])

    def overrides(self) -> list[str]:
        """Settings that make a configuration this option."""
        sharding = self.sharding
        words = [f"engine.zero_stage={sharding.stage}", f"engine.activation_checkpointing={self.policy}"]
        words += [
            f"engine.offload_optimizer={sharding.offload_optimizer}",
            f"engine.offload_parameters={sharding.offload_parameters}",
        ]
        words += ["engine.nvme_path=DIRECTORY"] if "nvme" in (sharding.offload_optimizer, sharding.offload_parameters) else []
        return [*words, f"train.micro_batch={self.micro_batch}"]


def all_options(model: ModelCost, shardings: Iterable[Sharding], machine: Machine, *, global_batch: int) -> list[Option]:
    """Every way to hold the state with every policy.

    Raises:
        ValueError: the number of GPUs does not divide the global batch.
    """
    split_batch(global_batch, world_size=machine.ranks, at_most=None)  # for its message
    return [
        _option(model, sharding, policy, machine, global_batch)
        for sharding in shardings
        for policy in (POLICIES if model.blocks else ("none",))
    ]


def _option(model: ModelCost, sharding: Sharding, policy: str, machine: Machine, global_batch: int) -> Option:
    per_rank = global_batch // machine.ranks
    most = largest_micro_batch(model, sharding, policy=policy, room=machine.room, at_most=per_rank)
    memory = estimate(model, sharding, policy=policy, micro_batch=max(1, most))
    if most == 0 or _too_much_for_cpu(memory, machine):
        return Option(sharding, policy, 0, 0, 0, memory, None)
    micro_batch, accumulation = split_batch(global_batch, world_size=machine.ranks, at_most=most)
    return Option(
        sharding,
        policy,
        most,
        micro_batch,
        accumulation,
        estimate(model, sharding, policy=policy, micro_batch=micro_batch),
        step_time(
            model,
            sharding,
            policy=policy,
            micro_batch=micro_batch,
            accumulation=accumulation,
            device=machine.device,
            link=machine.link,
            gpus_per_node=machine.gpus_per_node,
        ),
    )


def _too_much_for_cpu(memory: Memory, machine: Machine) -> bool:
    return machine.cpu is not None and memory.cpu * machine.gpus_per_node > machine.cpu


def best(options: Iterable[Option]) -> Option:
    """The fastest of those that fit; among equals (within 2 %) the one that recomputes, shards and offloads least.

    Raises:
        ValueError: none fits; says what the smallest one needs.
    """
    options = list(options)
    timed = [(option.time.seconds, option) for option in options if option.time is not None]
    if not timed:
        smallest = min(options, key=lambda option: option.memory.device)
        raise ValueError(
            f"nothing fits: even {smallest.name} with checkpointing {smallest.policy} and one sample needs"
            f" {smallest.memory.device / GIB:.1f} GiB of the GPU and {smallest.memory.cpu / GIB:.1f} GiB of CPU memory a rank."
            " Use more or larger GPUs, or a smaller model."
        )
    fastest = min(seconds for seconds, _ in timed)
    near = [option for seconds, option in timed if seconds <= 1.02 * fastest]
    return min(near, key=_simplicity)


def _simplicity(option: Option) -> tuple[int, int, int, float]:
    places = (option.sharding.offload_optimizer, option.sharding.offload_parameters)
    return PLACES.index(places), POLICIES.index(option.policy), option.sharding.stage, -option.micro_batch


def reason(chosen: Option, options: Iterable[Option]) -> str:
    """Why this one, in a sentence or two."""
    assert chosen.time is not None
    others = [option for option in options if option.time is not None and option is not chosen]
    parts = [f"{chosen.name} with checkpointing {chosen.policy} takes {chosen.memory.device / GIB:.1f} GiB and the least time"]
    simpler = [option for option in options if _simplicity(option)[:3] < _simplicity(chosen)[:3] and option.time is None]
    if simpler:
        least = min(simpler, key=lambda option: option.memory.device)
        parts.append(
            f"{len(simpler)} simpler ways do not fit (the smallest, {least.name} with {least.policy}, needs"
            f" {least.memory.device / GIB:.1f} GiB for one sample)"
        )
    slower = sorted((option.time.seconds / chosen.time.seconds, option.name, option.policy) for option in others if option.time)
    if slower and slower[0][0] <= 1.02:
        parts.append(f"{slower[0][1]} with {slower[0][2]} is as fast within 2 %, but shards, recomputes or offloads more")
    elif slower:
        parts.append(f"the next one, {slower[0][1]} with {slower[0][2]}, takes {slower[0][0]:.2f} times as long")
    return "; ".join(parts)
