"""Compiles the kernels of window attention for an architecture that need not be present, and reads what they use.

`triton.compile` succeeds even when a kernel spills or cannot be launched, so whoever compiles has to look: `Usage.faults`.
"""

import ast
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
import triton.language
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from simmim_scale.kernels.cubin import read_resources
from simmim_scale.kernels.window_attention import triton_kernels, triton_split, triton_wide
from simmim_scale.kernels.window_attention.triton import kernel_constants, tile_constants
from simmim_scale.kernels.window_attention.triton_tiles import SHARED_MEMORY, Tiles, choose_tiles

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
IN_DTYPE = ("QKV", "OUT", "GRAD_OUT", "GRAD_QKV")  # pointers to the type of the projection; the other pointers are to fp32
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of the compiler, among the arguments of a launch


@dataclass(frozen=True)
class Problem:
    """One configuration of window attention, as far as the kernels depend on it."""

    window: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    cosine: bool
    shifted: bool

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    def tiles(self, capability: tuple[int, int]) -> Tiles:
        """How the windows are cut on a GPU of this compute capability."""
        return choose_tiles(self.tokens, self.head_dim, self.dtype.itemsize, capability)

    def kernels(self, capability: tuple[int, int]) -> tuple[str, ...]:
        """Names of the kernels that run for this problem, forward and backward."""
        return tuple(tile_constants(self.tiles(capability)))


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread: above 0 the kernel spills.
        shared: bytes of shared memory of one program.
        shared_limit: what the device gives one program.
        tensor_core: instructions that multiply on tensor cores, in the code of the kernel.
    """

    kernel: str
    capability: tuple[int, int]
    warps: int
    registers: int
    stack: int
    shared: int
    shared_limit: int
    tensor_core: int

    @property
    def faults(self) -> list[str]:
        """Why the kernel must not be used; empty: it may."""
        faults = []
        if self.stack:
            faults.append(f"{self.stack} bytes of stack per thread")
        if self.shared > self.shared_limit:
            faults.append(f"{self.shared} bytes of shared memory of {self.shared_limit}")
        if not self.tensor_core:
            faults.append("no tensor cores")
        return faults


def compile_kernel(name: str, problem: Problem, capability: tuple[int, int], tiles: Tiles | None = None) -> Usage:
    """Compile the kernel `name` for a compute capability and report its resources; takes seconds, needs no GPU.

    Args:
        name: one of `problem.kernels(capability)`.
        tiles: another cut than that of `choose_tiles`.

    Raises:
        RuntimeError: Triton's cuobjdump, which reads the compiled code, fails.
    """
    source, options = kernel_source(name, problem, tiles or problem.tiles(capability))
    kernel = compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options)
    registers, stack = read_resources(kernel.asm["cubin"])
    products = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", kernel.asm["ptx"]))
    return Usage(
        name, capability, options["num_warps"], registers, stack, kernel.metadata.shared, SHARED_MEMORY[capability], products
    )


def source_digest(name: str) -> str:
    """Changes with the code of the kernel `name` and of all that it calls, but not with comments and docstrings."""
    parts: dict[str, str] = {}
    waiting = [_function(name)]
    while waiting:
        function = waiting.pop()
        parts[function.fn.__name__] = _code(function)
        used = [(key, function.fn.__globals__.get(key)) for key in function.fn.__code__.co_names]
        parts |= {key: repr(value.value) for key, value in used if isinstance(value, triton.language.constexpr)}
        waiting += [value for key, value in used if isinstance(value, JITFunction) and key not in parts]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _code(function: JITFunction) -> str:
    tree = ast.parse(function.src)
    definition = tree.body[0]
    if isinstance(definition, ast.FunctionDef) and ast.get_docstring(definition) is not None:
        del definition.body[0]
    return ast.dump(tree)


def _function(name: str) -> JITFunction:
    return next(getattr(module, name) for module in (triton_kernels, triton_split, triton_wide) if hasattr(module, name))


def kernel_source(name: str, problem: Problem, tiles: Tiles) -> tuple[ASTSource, dict[str, int]]:
    """The kernel `name` as a launch on aligned tensors has it compiled, and the compiler's options."""
    function = _function(name)
    constants = kernel_constants(problem.window, problem.head_dim, cosine=problem.cosine, shifted=problem.shifted)
    constants |= tile_constants(tiles)[name]
    options = {option: constants.pop(option) for option in OPTIONS if option in constants}
    signature = {argument: _type(argument, constants, problem.dtype) for argument in function.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    values = {(function.arg_names.index(argument),): value for argument, value in constants.items()}
    return ASTSource(function, signature, constexprs=values, attrs=attributes), options


def _type(argument: str, constants: dict[str, Any], dtype: torch.dtype) -> str:
    if argument in constants:
        return "constexpr"
    if argument.islower():
        return "i32"
    return "*" + (TYPES[dtype] if argument in IN_DTYPE else "fp32")
