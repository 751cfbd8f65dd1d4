"""Memory of a training step by category, from what the model keeps and how DeepSpeed 0.19.8 holds it. Pure; in bytes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

GIB = 2**30
EARLY_STAGES = 2  # of the policy "stage" (engine/activation_checkpointing.py)
POLICIES = ("none", "selective", "stage", "block", "offload")  # least computed again first
CONTEXT = 1.5 * GIB  # CUDA context, libraries' workspaces and NCCL's buffers of one process: an assumption
RESERVE = 0.05  # share of the device that the allocator loses to fragments: an assumption

# ZeRO-Infinity's buffers in CPU memory, in elements. A parameter on its way from the disk needs one as large as a rank's part of
# it, for as long as it stays gathered: three blocks of four matrices each, of SwinV2-G's largest (67M). DeepSpeed's five fail.
PARAMETER_BUFFERS = 12
LARGEST_PARAMETER = 10**8
# Masters and moments move by sub-groups, in four buffers; the default of 1e9 would hold all of them.
SUB_GROUP = 10**8
OPTIMIZER_BUFFERS = 4


@dataclass(frozen=True)
class Linear:
    """Bytes (or a count) as a function of the micro-batch."""

    fixed: float
    per_sample: float

    def at(self, samples: int) -> float:
        return self.fixed + self.per_sample * samples


@dataclass(frozen=True)
class BlockCost:
    """One block: bytes of its input, of all it saves for backward, and of the results that `selective` keeps.

    Attributes:
        again: multiply-adds that its own backward repeats: those of attention in turn.
        in_turn: bytes that attention of whole images would save beyond `saved`. turn: images' worth of it that exist at once.
    """

    stage: int
    input: Linear
    saved: Linear
    kept: Linear
    multiply_adds: int
    again: int = 0
    in_turn: Linear = Linear(0, 0)
    turn: float = 0.0

    def at_once(self, samples: int) -> float:
        """Bytes of attention's turn in backward."""
        return self.in_turn.at(1) * min(self.turn, samples)


@dataclass(frozen=True)
class ModelCost:
    """What a model costs in a training step.

    Attributes:
        sizes: elements of each parameter. largest_block: of the largest block, or of a larger parameter outside of blocks.
        blocks: in their order. outside: bytes saved outside of blocks. largest_tensor: bytes of the largest saved one.
        multiply_adds: of one sample's forward pass.
    """

    sizes: tuple[int, ...]
    largest_block: int
    blocks: tuple[BlockCost, ...]
    outside: Linear
    largest_tensor: Linear
    multiply_adds: int

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(self.sizes)

    def recomputed(self, policy: str) -> float:
        """Share of the forward pass's multiply-adds that backward does again."""
        again = [block.again for block in self.blocks]
        if policy == "selective":
            again += again  # attention in turn is computed once more, as a whole
        elif policy != "none":
            again += [block.multiply_adds for block in self.blocks if policy != "stage" or block.stage < EARLY_STAGES]
        return sum(again) / max(1, self.multiply_adds)

    def kept_by_forward(self, policy: str, samples: int) -> float:
        """Bytes of activations on the device when the forward pass ends."""
        return self.outside.at(samples) + sum(_kept(block, policy, samples) for block in self.blocks)

    def activations(self, policy: str, samples: int) -> float:
        """Most bytes of activations at any time: at the end of forward, or while backward computes a block again."""
        peak = held = self.outside.at(samples)
        for block in self.blocks:
            held += _kept(block, policy, samples)
            # Backward of this block: what the blocks before it keep, and all of its own.
            again = max(0.0, block.saved.at(samples) - _kept(block, policy, samples))
            peak = max(peak, held + again + block.at_once(samples))
        return peak

    def offloaded_activations(self, samples: int) -> float:
        """Bytes in CPU memory under the policy offload."""
        return sum(block.input.at(samples) for block in self.blocks)


def _kept(block: BlockCost, policy: str, samples: int) -> float:
    checkpointed = policy in ("block", "selective", "offload") or (policy == "stage" and block.stage < EARLY_STAGES)
    if not checkpointed:
        return block.saved.at(samples)
    if policy == "offload":
        return 0.0
    kept = block.kept.at(samples) if policy == "selective" else 0.0
    # Keeping results that autograd would not save is possible, and then costs more than it spares.
    return block.input.at(samples) + kept


@dataclass(frozen=True)
class Sharding:
    """How the state is held.

    Attributes:
        stage: of ZeRO. ranks: over which it is cut. half: bf16 or fp16, else fp32.
        offload_optimizer, offload_parameters: "none", "cpu" or "nvme".
        reduce_bucket, live, reuse, persistence: elements, from DeepSpeed's section zero_optimization: what a reduction holds,
            what may be gathered at once, how far ahead a use keeps a parameter gathered, and up to which size one stays whole.
        buckets: buffers of the reduction: two where communication overlaps.
    """

    stage: int
    ranks: int
    half: bool
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    reduce_bucket: int = 500_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    persistence: int = 100_000
    buckets: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by category; `cpu`: in this rank's share of the node's memory."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    context: float
    cpu: float

    @property
    def device(self) -> float:
        """Bytes on the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers + self.context

    def as_json(self) -> dict[str, float]:
        return {**{name: round(value / GIB, 3) for name, value in asdict(self).items()}, "device": round(self.device / GIB, 3)}


def state_bytes(elements: int, sharding: Sharding) -> Mapping[str, float]:
    """Bytes that one rank holds of parameters, gradients and optimizer between steps, wherever they lie. Per element:

    16 bits: parameters 2, master and two moments 12, gradients 2 in stage 0, else 4 (summed in fp32). Stage 1 in bf16 sums them
    whole, stages 2 and 3 a rank's part. fp32: parameters 4, moments 8; stages 1 to 3 hold a master beside the parameters.
    """
    share = elements / sharding.ranks
    stage = sharding.stage
    width = 2 if sharding.half else 4
    parameters = width * (share if stage == 3 else elements)
    summed = width if stage == 0 else 4
    gradients = summed * (elements if stage <= 1 else share)
    master = 4 if sharding.half or stage > 0 else 0  # measured: in fp32 too every stage but 0 holds a copy
    optimizer = (master + 8) * (elements if stage == 0 else share)
    return {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}


def estimate(model: ModelCost, sharding: Sharding, *, policy: str, micro_batch: int, context: float = CONTEXT) -> Memory:
    """Memory of one rank at its peak, with so many samples at once."""
    state = dict(state_bytes(model.parameters, sharding))
    cpu = 0.0
    if sharding.offload_optimizer != "none":
        moved = state["optimizer"] + (state["gradients"] if sharding.stage >= 2 else 0.0)
        state["optimizer"] = 0.0
        state["gradients"] = state["gradients"] if sharding.stage < 2 else 0.0
        buffers = 4 * OPTIMIZER_BUFFERS * min(SUB_GROUP, model.parameters / sharding.ranks)
        cpu += moved if sharding.offload_optimizer == "cpu" else buffers
    if sharding.offload_parameters != "none":
        buffers = (2 if sharding.half else 4) * PARAMETER_BUFFERS * LARGEST_PARAMETER / sharding.ranks
        cpu += state["parameters"] if sharding.offload_parameters == "cpu" else buffers
        state["parameters"] = 0.0
    if policy == "offload":
        cpu += model.offloaded_activations(micro_batch)
    return Memory(
        **state,
        activations=model.activations(policy, micro_batch) + 2 * model.largest_tensor.at(micro_batch),
        buffers=buffer_bytes(model, sharding),
        context=context,
        cpu=cpu,
    )


def buffer_bytes(model: ModelCost, sharding: Sharding) -> float:
    """Buffers of reductions and gathers: what ZeRO holds whole for a while, or for good."""
    width = 2 if sharding.half else 4
    if sharding.stage == 0:
        # Masters' gradients, made anew at each step, next to those of the parameters.
        return 4.0 * model.parameters if sharding.half else 0.0
    if sharding.stage < 3:
        return sharding.buckets * min(sharding.reduce_bucket, model.parameters) * width
    # Stage 3 allocates its bucket at the start, larger than the model or not.
    return width * (sharding.reduce_bucket + gathered_elements(model, sharding))


def gathered_elements(model: ModelCost, sharding: Sharding) -> int:
    """Most elements that ZeRO-3 holds whole at once: all that it may where a use keeps a parameter until the next one, else this
    block, the next one and one that is not yet released; and the small parameters that always stay whole."""
    whole = sum(size for size in model.sizes if size <= sharding.persistence)
    kept = sharding.reuse >= model.parameters
    return min(model.parameters, whole + (sharding.live if kept else min(sharding.live, 3 * model.largest_block)))


def largest_micro_batch(model: ModelCost, sharding: Sharding, *, policy: str, room: float, at_most: int) -> int:
    """Most samples at once whose memory is within `room` bytes, up to `at_most`; 0 when not even one is."""

    def fits(samples: int) -> bool:
        return estimate(model, sharding, policy=policy, micro_batch=samples).device <= room

    if not fits(1):
        return 0
    low, high = 1, at_most
    while low < high:  # memory grows with the micro-batch
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
