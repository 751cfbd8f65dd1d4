"""How long a training step takes: multiply-adds over the matrix peak, bytes over the memory's and the links' bandwidth. Pure.

An estimate to compare settings with and to order machines by; `simmim bench` measures. What is assumed is listed in ASSUMPTIONS.
"""

from dataclasses import asdict, dataclass

from simmim_scale.config.cluster import GB, Device, Link
from simmim_scale.config.memory import ModelCost, Sharding

MATRIX_EFFICIENCY = 0.6  # of the peak, that matrix products of this size reach
MEMORY_EFFICIENCY = 0.8  # of the memory bandwidth, that elementwise work reaches
PASSES = 6  # times that each saved byte goes over the memory: written, read, again in backward, its gradient written and read
LINK_EFFICIENCY = 0.8  # of a link's bandwidth, that a ring reaches with large buckets
HIDDEN = 0.5  # share of the computing time behind which communication can hide
HOST_LINK = 25 * GB  # PCIe between a GPU and CPU memory, each direction
HOST_MEMORY = 150 * GB  # bandwidth of a node's CPU memory, shared by its ranks
NVME = 6 * GB  # of a node's disks, shared by its ranks

ASSUMPTIONS = (
    f"matrix products at {MATRIX_EFFICIENCY:.0%} of the peak, elementwise work at {MEMORY_EFFICIENCY:.0%} of the memory's,"
    f" each saved activation moved {PASSES} times",
    "backward costs two forwards; checkpointing adds the forward of what it computes again",
    f"collectives as rings at {LINK_EFFICIENCY:.0%} of the link; behind {HIDDEN:.0%} of the computing they cost nothing",
    f"offloading: {HOST_LINK / GB:g} GB/s between host and GPU, {HOST_MEMORY / GB:g} GB/s of CPU memory and {NVME / GB:g} GB/s of"
    " NVMe a node",
    "data loading keeps up (simmim bench loader measures it)",
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. `communication` is what is not hidden; `seconds` the sum."""

    matrix: float
    elementwise: float
    optimizer: float
    communication: float
    offloading: float

    @property
    def seconds(self) -> float:
        return self.matrix + self.elementwise + self.optimizer + self.communication + self.offloading

    def as_json(self) -> dict[str, float]:
        return {**{name: round(value, 6) for name, value in asdict(self).items()}, "seconds": round(self.seconds, 6)}


def communication_bytes(elements: int, sharding: Sharding, *, accumulation: int) -> float:
    """Bytes that each rank sends in a step. A ring sends (n - 1) / n of the whole for a gather or a scatter, twice for both."""
    width = 2 if sharding.half else 4
    whole = width * elements * (sharding.ranks - 1) / sharding.ranks
    if sharding.stage == 0:
        return 2 * whole  # gradients summed once, at the end of the accumulation
    if sharding.stage == 1:
        return 3 * whole  # the same, and the updated parameters gathered
    if sharding.stage == 2:
        return (accumulation + 1) * whole  # every micro-batch's gradients scattered, the updated parameters gathered
    return 3 * accumulation * whole  # parameters gathered for forward and for backward, gradients scattered


def step_time(
    model: ModelCost,
    sharding: Sharding,
    *,
    policy: str,
    micro_batch: int,
    accumulation: int,
    device: Device,
    link: Link,
    gpus_per_node: int,
) -> StepTime:
    """The estimate for one optimizer step of `accumulation` micro-batches on every rank."""
    samples = micro_batch * accumulation
    peak = device.half if sharding.half else device.single
    flops = 2 * model.multiply_adds * samples * (3 + model.recomputed(policy))
    matrix = flops / (peak * MATRIX_EFFICIENCY)
    memory = device.bandwidth * MEMORY_EFFICIENCY
    saved = model.kept_by_forward("none", micro_batch) * accumulation
    again = 1 if policy == "none" else 4 / 3  # what is cheap is computed again by every policy
    elementwise = PASSES * again * saved / memory
    share = model.parameters / (1 if sharding.stage == 0 else sharding.ranks)
    on_device = sharding.offload_optimizer == "none"
    optimizer = 28 * share / memory if on_device else 0.0  # gradient, master and moments read; master and moments written
    sent = communication_bytes(model.parameters, sharding, accumulation=accumulation)
    sending = sent / (link.per_gpu(gpus_per_node) * LINK_EFFICIENCY)
    exposed = max(0.0, sending - HIDDEN * (matrix + elementwise))
    offloading = _offloading(model, sharding, policy, micro_batch, accumulation, gpus_per_node)
    return StepTime(matrix, elementwise, optimizer, exposed, offloading)


def _offloading(
    model: ModelCost, sharding: Sharding, policy: str, micro_batch: int, accumulation: int, gpus_per_node: int
) -> float:
    """Seconds for what lies in CPU memory or on a disk: nothing of it is hidden."""
    share = model.parameters / (1 if sharding.stage == 0 else sharding.ranks)
    width = 2 if sharding.half else 4
    seconds = 0.0
    if sharding.offload_optimizer != "none":
        seconds += (4 * accumulation + width) * share / HOST_LINK  # gradients down, parameters up
        seconds += 28 * share * gpus_per_node / HOST_MEMORY
    if sharding.offload_optimizer == "nvme":
        seconds += 24 * share * gpus_per_node / NVME  # masters and moments, both ways
    if sharding.offload_parameters != "none":
        seconds += 2 * width * accumulation * share / HOST_LINK
    if sharding.offload_parameters == "nvme":
        seconds += 2 * width * accumulation * share * gpus_per_node / NVME
    if policy == "offload":
        seconds += HIDDEN * 2 * model.offloaded_activations(micro_batch) * accumulation / HOST_LINK
    return seconds
