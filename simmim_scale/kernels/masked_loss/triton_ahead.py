"""Compiles the kernel of the masked loss for an architecture that need not be present, and reads what it uses."""

from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from simmim_scale.kernels.cubin import read_resources
from simmim_scale.kernels.masked_loss import Normalization
from simmim_scale.kernels.masked_loss.triton import kernel_constants
from simmim_scale.kernels.masked_loss.triton_kernel import masked_loss_kernel

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
IN_TYPE = ("PREDICTION", "GRADIENT")  # pointers to the type of the prediction
POINTERS = {"MASK": "*u8", "TOKENS": "*i64", "FLIP": "*u8", "LOCAL_MEAN": "*fp64", "LOCAL_STD": "*fp64"}  # others: fp32


@dataclass(frozen=True)
class Problem:
    """One configuration of the masked loss, as far as the kernel depends on it."""

    dtype: torch.dtype
    patch: int = 32
    channels: int = 3
    loss: str = "l1"
    stored: bool = True
    local: bool = False
    tokens: bool = True


@dataclass(frozen=True)
class Usage:
    """Per thread: registers, and bytes of stack (above 0 the kernel spills); per program: bytes of shared memory."""

    registers: int
    stack: int
    shared: int


def compile_kernel(problem: Problem, capability: tuple[int, int]) -> Usage:
    """Compile for a compute capability; takes seconds, needs no GPU. Raises RuntimeError where the result cannot be read."""
    one = torch.ones(1)
    normalization = Normalization(
        mean=one if problem.stored else None, local_mean=one.view(1, 1, 1, 1) if problem.local else None
    )
    constants = kernel_constants(
        channels=problem.channels,
        patch=problem.patch,
        loss=problem.loss,
        normalization=normalization,
        TOKENS_GIVEN=problem.tokens,
        FLIPPED=True,
        KEEP=True,
    )
    warps = constants.pop("num_warps")
    names = masked_loss_kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type(name, problem) for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(masked_loss_kernel, signature, constexprs=values, attrs=attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    kernel = compile(source, target=target, options={"num_warps": warps})
    return Usage(*read_resources(kernel.asm["cubin"]), kernel.metadata.shared)


def _type(name: str, problem: Problem) -> str:
    if name.islower():
        return "fp32" if name == "beta" else "i32"
    if name in IN_TYPE:
        return TYPES[problem.dtype]
    if name == "IMAGE":
        return "*u8" if problem.stored else "*fp32"
    return POINTERS.get(name, "*fp32")
