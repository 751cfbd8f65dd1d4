"""What a training step of the configured model keeps in memory, counted on tensors that have shapes and no content.

The real forward pass runs once for one sample and once for two, with hooks on every tensor that autograd saves: what grows is per
sample, what stays (position bias tables) is fixed. No memory is used, whatever the size of the model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from simmim_scale.config.memory import BlockCost, Linear, ModelCost
from simmim_scale.config.schema import Config, SwinBaseConfig
from simmim_scale.engine.activation_checkpointing import KEPT_BY_SELECTIVE
from simmim_scale.engine.precision import DTYPES
from simmim_scale.engine.sequential_attention import apply_sequential_attention
from simmim_scale.models.complexity import count_parameters
from simmim_scale.models.windows import stage_sides
from simmim_scale.objectives.classifier import build_classifier
from simmim_scale.objectives.simmim import build_simmim

ASSUMED_CLASSES = 1000  # where only the shards know: ImageNet's


def count_configured(config: Config, *, on_gpu: bool) -> ModelCost:
    """Counts the model of a configuration for pre-training or classification.

    Args:
        on_gpu: attention as PyTorch's memory-efficient kernel saves it, else as our form for CPUs does.
    Raises:
        ValueError: another task.
    """
    if config.task not in ("pretrain", "classification"):
        raise ValueError(f"task: simmim plan knows pretrain and classification, got {config.task!r}.")
    device = "meta" if on_gpu else "cpu"

    def build() -> nn.Module:
        attention = "sdpa" if on_gpu else config.kernels.window_attention
        common: dict[str, Any] = {"mean": config.data.mean, "std": config.data.std, "seed": config.seed, "attention": attention}
        if config.task == "classification":
            classes = config.classification.num_classes or ASSUMED_CLASSES
            return build_classifier(config.model, num_classes=classes, initialise=False, **common)
        return build_simmim(config.model, config.objective, initialise=False, **common)

    def batch(samples: int) -> dict[str, Tensor]:
        return _batch(config, samples)

    mode = contextlib.nullcontext() if on_gpu else FakeTensorMode(allow_non_fake_inputs=True)  # drop path draws on the CPU
    dtype, rows = DTYPES[config.engine.precision], config.engine.sequential_attention
    with mode, torch.device(device):
        whole = count_module(build(), batch, dtype=dtype)
        if rows == 0:
            return whole
        module = build()
        apply_sequential_attention(module, rows)
        return _with_turns(count_module(module, batch, dtype=dtype), whole, rows, _rows_of_windows(config))


def _batch(config: Config, samples: int) -> dict[str, Tensor]:
    height, width = config.model.image_size
    shared = {
        "image": torch.zeros(samples, config.model.in_chans, height, width, dtype=torch.uint8),
        "position": torch.zeros(samples, dtype=torch.long),
    }
    if config.task == "classification":
        return {**shared, "label": torch.zeros(samples, dtype=torch.long)}
    cells = (height // config.mask.cell, width // config.mask.cell)
    return {
        **shared,
        "mask": torch.zeros(samples, *cells, dtype=torch.bool),
        "flip": torch.zeros(samples, dtype=torch.bool),
    }


def _rows_of_windows(config: Config) -> list[int]:
    """Of one image, by stage, as the backbone pads it."""
    assert isinstance(config.model, SwinBaseConfig)
    sides = stage_sides(config.model.image_size, config.model.patch_size, len(config.model.depths))
    return [-(-height // min(height, config.model.window_size)) for height, _ in sides]


def _with_turns(counted: ModelCost, whole: ModelCost, rows: int, in_image: list[int]) -> ModelCost:
    """Adds what one turn of attention holds: its share of what all of an image's windows would save."""

    def block(turns: BlockCost, plain: BlockCost) -> BlockCost:
        spared = Linear(plain.saved.fixed - turns.saved.fixed, plain.saved.per_sample - turns.saved.per_sample)
        return replace(turns, in_turn=spared, turn=min(1.0, rows / in_image[turns.stage]) if turns.again else 0.0)

    return replace(counted, blocks=tuple(map(block, counted.blocks, whole.blocks)))


def count_module(module: nn.Module, batch: Callable[[int], Mapping[str, Any]], *, dtype: torch.dtype) -> ModelCost:
    """Counts a module whose tensors have no content.

    Args:
        module: `module(batch)` returns {"loss": scalar}; blocks are known if its backbone lists `checkpointable_stages`.
        batch: a batch of so many samples, on the module's device.
        dtype: of the parameters while training.
    """
    _convert(module, dtype)
    module.train()
    one, two = (_pass(module, batch(samples)) for samples in (1, 2))
    blocks = tuple(
        BlockCost(
            stage=first.stage,
            input=_line(first.input, second.input),
            saved=_line(first.saved, second.saved),
            kept=_line(first.kept, second.kept),
            multiply_adds=second.multiply_adds - first.multiply_adds,
            again=second.again - first.again,
        )
        for first, second in zip(one.blocks, two.blocks, strict=True)
    )
    sizes = [parameter.numel() for parameter in module.parameters()]
    return ModelCost(
        sizes=tuple(sizes),
        largest_block=max([*sizes, *(count_parameters(block) for block in _blocks(module))]),
        blocks=blocks,
        outside=_line(one.outside, two.outside),
        largest_tensor=_line(one.largest, two.largest),
        multiply_adds=two.multiply_adds - one.multiply_adds,
    )


@dataclass
class _Block:
    """Bytes of a block in one pass."""

    stage: int
    input: int = 0
    saved: int = 0
    kept: int = 0
    multiply_adds: int = 0
    again: int = 0  # multiply-adds without gradients: their op computes them again in its backward


@dataclass
class _Pass:
    """What one forward pass kept. `outside`: of no block. `largest`: of all tensors that were saved."""

    blocks: list[_Block] = field(default_factory=list)
    outside: int = 0
    largest: int = 0
    multiply_adds: int = 0
    now: _Block | None = None
    seen: dict[int, Any] = field(default_factory=dict)

    def save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage  # held, so that no other storage gets its address
            self.largest = max(self.largest, storage.nbytes())
            if self.now is None:
                self.outside += storage.nbytes()
            else:
                self.now.saved += storage.nbytes()
        return tensor


def _pass(module: nn.Module, batch: Mapping[str, Any]) -> _Pass:
    found = _Pass()
    for tensor in [*module.parameters(), *module.buffers()]:  # held anyway
        found.seen[tensor.untyped_storage()._cdata] = tensor
    with contextlib.ExitStack() as stack:
        counter = stack.enter_context(FlopCounterMode(display=False))
        for stage, blocks in enumerate(_stages(module)):
            for block in blocks:
                stack.enter_context(_watched(block, found, _Block(stage), counter))
        stack.enter_context(_Kept(found, counter))
        stack.enter_context(_EfficientAttention())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(found.save, lambda tensor: tensor))
        module(batch)
        found.multiply_adds = counter.get_total_flops() // 2
    return found


@contextlib.contextmanager
def _watched(block: nn.Module, found: _Pass, record: _Block, counter: FlopCounterMode) -> Iterator[None]:
    """Attribute to `record` what is saved while the block runs."""
    found.blocks.append(record)

    def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        record.input = inputs[0].numel() * inputs[0].element_size()
        record.multiply_adds = -counter.get_total_flops() // 2
        found.now = record

    def leave(*_: Any) -> None:
        record.multiply_adds += counter.get_total_flops() // 2
        found.now = None

    handles = [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Kept(TorchDispatchMode):
    """Adds up the results that the policy `selective` keeps, and the work of ops that compute themselves again in backward."""

    def __init__(self, found: _Pass, counter: FlopCounterMode) -> None:
        super().__init__()
        self.found, self.counter = found, counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        if self.found.now is not None and not torch.is_grad_enabled():
            self.found.now.again += (self.counter.get_total_flops() - before) // 2
        if func in KEPT_BY_SELECTIVE and self.found.now is not None and torch.is_grad_enabled():
            tensors = result if isinstance(result, tuple | list) else [result]
            self.found.now.kept += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        return result


class _EfficientAttention(TorchFunctionMode):
    """On the meta device PyTorch would take the plain form of attention, which keeps every probability; a GPU takes this one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].device.type == "meta":
            q, k, v = args[:3]
            bias = kwargs.get("attn_mask")
            bias = None if bias is None else bias.expand(*q.shape[:2], q.shape[2], k.shape[2])
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            return efficient(q, k, v, bias, True, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """The parameters as DeepSpeed casts them; buffers stay. (`module.to` cannot exchange parameters without content.)"""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
                child._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _stages(module: nn.Module) -> list[list[nn.Module]]:
    backbone = getattr(module, "backbone", None)
    if hasattr(backbone, "checkpointable_stages"):
        return backbone.checkpointable_stages()
    return [list(backbone.checkpointable_blocks())] if hasattr(backbone, "checkpointable_blocks") else []


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [block for stage in _stages(module) for block in stage]


def _line(one: int, two: int) -> Linear:
    """The line through what one and two samples take."""
    return Linear(fixed=2 * one - two, per_sample=two - one)
