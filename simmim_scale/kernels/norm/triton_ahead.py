"""Compiles the norm kernels for an architecture that need not be present, and reads what they use."""

from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from simmim_scale.kernels.cubin import read_resources
from simmim_scale.kernels.norm import triton_kernels
from simmim_scale.kernels.norm.triton import tiles

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Pointers to fp32; the others are to the type of the tokens, and so are weight and bias.
STATISTICS = ("scale", "mean", "rstd", "grad_weight", "grad_bias")
NUMBERS = {"rows": "i32", "rows_per_sample": "i32", "groups": "i32", "eps": "fp32"}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs, per thread: registers, and bytes of stack (above 0 it spills)."""

    registers: int
    stack: int


def compile_norm(name: str, capability: tuple[int, int], *, width: int, dtype: torch.dtype, order: int, scaled: bool) -> Usage:
    """Compile "forward_kernel" or "backward_kernel" for a compute capability; takes seconds, needs no GPU.

    Raises:
        RuntimeError: Triton's cuobjdump, which reads the compiled code, fails.
    """
    function = getattr(triton_kernels, name)
    cut = tiles(width)
    warps = cut.pop("num_warps")
    constants = {"ORDER": order, "SCALED": scaled, "C": width, **cut}
    signature = {argument: _type(argument, constants, TYPES[dtype]) for argument in function.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    values = {(function.arg_names.index(argument),): value for argument, value in constants.items()}
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    source = ASTSource(function, signature, constexprs=values, attrs=attributes)
    kernel = compile(source, target=target, options={"num_warps": warps})
    return Usage(*read_resources(kernel.asm["cubin"]))


def _type(argument: str, constants: dict[str, object], tokens: str) -> str:
    if argument in constants:
        return "constexpr"
    return NUMBERS.get(argument) or "*" + ("fp32" if argument in STATISTICS else tokens)
