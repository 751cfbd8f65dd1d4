"""What ZeRO-3 should know about a model's blocks: each is gathered whole, and how large they are."""

from torch import nn

from simmim_scale.config.schema import EngineConfig
from simmim_scale.engine.zero_settings import ModelSizes


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The backbone's blocks, as it lists them for activation checkpointing; none for a backbone that lists none."""
    listed = getattr(getattr(module, "backbone", None), "checkpointable_blocks", None)
    return [] if listed is None else list(listed())


def mark_leaves(module: nn.Module, engine: EngineConfig) -> int:
    """Make each block one leaf for ZeRO-3's hooks; returns how many.

    A Swin block has about 14 parameters in 8 modules. With hooks on every one, forward and backward gather and release them piece
    by piece, and `torch.compile` breaks at each hook; as a leaf the block costs one gather and one release, and no break inside.

    A leaf's gradients are reduced by its full backward hook. PyTorch fires that hook before the gradients exist when no input of
    the module needs one, so a block that nothing trainable comes before (in the order of registration) stays as it is.
    """
    if engine.zero_stage != 3:
        return 0
    from deepspeed.utils import set_z3_leaf_module

    order = {id(parameter): number for number, parameter in enumerate(module.parameters())}
    first_trained = min(
        (order[id(parameter)] for parameter in module.parameters() if parameter.requires_grad), default=len(order)
    )
    marked = 0
    for block in blocks_of(module):
        if min((order[id(parameter)] for parameter in block.parameters()), default=0) > first_trained:
            set_z3_leaf_module(block, True)
            marked += 1
    return marked


def model_sizes(module: nn.Module) -> ModelSizes:
    """Elements of the parameters and of the blocks, whole also where ZeRO-3 holds only a piece here."""
    blocks = [sum(map(_elements, block.parameters())) for block in blocks_of(module)]
    parameters = tuple(_elements(parameter) for parameter in module.parameters())
    return ModelSizes(parameters=parameters, largest_block=max([*blocks, *parameters]))


def _elements(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
