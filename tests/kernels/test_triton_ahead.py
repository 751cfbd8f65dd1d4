"""The Triton kernels compiled for GPUs that need not be here: no spills, shared memory within the limit, tensor cores used.

A sample of what `simmim bench compile` compiles; the report of the whole sweep is in benchmarks/.
"""

import math
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from simmim_scale.kernels.window_attention import triton, triton_partition
from simmim_scale.kernels.window_attention.triton_ahead import Problem, Usage, compile_kernel, kernel_source, source_digest

HALF, FULL = torch.bfloat16, torch.float32
SAMPLE = [
    # SwinV2-H at 192 px, the configuration that all this is for
    (Problem((12, 12), 32, HALF, cosine=True, shifted=True), (8, 0)),
    (Problem((12, 12), 32, HALF, cosine=True, shifted=True), (8, 9)),
    (Problem((12, 12), 32, HALF, cosine=True, shifted=True), (9, 0)),
    (Problem((6, 6), 32, HALF, cosine=True, shifted=False), (9, 0)),
    # the other published windows
    (Problem((7, 7), 32, HALF, cosine=False, shifted=True), (8, 0)),
    (Problem((8, 8), 32, torch.float16, cosine=True, shifted=True), (8, 9)),
    (Problem((14, 14), 32, HALF, cosine=True, shifted=True), (9, 0)),
    (Problem((16, 16), 32, HALF, cosine=True, shifted=True), (8, 9)),
    (Problem((20, 20), 32, HALF, cosine=False, shifted=True), (8, 0)),
    (Problem((24, 24), 32, HALF, cosine=True, shifted=True), (9, 0)),
    (Problem((7, 12), 32, HALF, cosine=True, shifted=True), (9, 0)),
    # found by the sweep: a few bytes of stack with the usual cut
    (Problem((6, 6), 32, torch.float16, cosine=False, shifted=False), (8, 0)),
    (Problem((7, 7), 32, torch.float16, cosine=False, shifted=False), (8, 6)),
    (Problem((14, 14), 32, FULL, cosine=True, shifted=False), (12, 0)),
    (Problem((7, 7), 32, HALF, cosine=True, shifted=True), (9, 0)),
    (Problem((6, 6), 16, FULL, cosine=True, shifted=True), (8, 0)),
    (Problem((6, 6), 16, FULL, cosine=True, shifted=True), (8, 6)),
    (Problem((6, 6), 16, FULL, cosine=True, shifted=True), (8, 9)),
    (Problem((6, 6), 96, FULL, cosine=True, shifted=True), (9, 0)),
    (Problem((8, 8), 128, FULL, cosine=True, shifted=True), (10, 0)),
    (Problem((8, 8), 96, FULL, cosine=True, shifted=True), (10, 0)),
    (Problem((8, 8), 96, FULL, cosine=True, shifted=True), (12, 0)),
    (Problem((20, 20), 64, FULL, cosine=True, shifted=True), (10, 0)),
    (Problem((20, 20), 64, FULL, cosine=True, shifted=True), (12, 0)),
    (Problem((7, 24), 32, HALF, cosine=True, shifted=True), (12, 0)),
    (Problem((20, 20), 32, FULL, cosine=False, shifted=True), (9, 0)),
    (Problem((24, 24), 32, FULL, cosine=False, shifted=True), (8, 9)),
    # the widest heads, and fp32
    (Problem((12, 12), 128, HALF, cosine=True, shifted=True), (8, 9)),
    (Problem((12, 12), 44, HALF, cosine=True, shifted=True), (9, 0)),
    (Problem((12, 12), 32, FULL, cosine=True, shifted=True), (8, 0)),
    (Problem((7, 7), 88, FULL, cosine=True, shifted=True), (9, 0)),
    # those that spilled before their tiles, or the limit of their registers, were found
    (Problem((7, 7), 96, torch.float16, cosine=True, shifted=True), (9, 0)),
    (Problem((12, 12), 88, HALF, cosine=True, shifted=True), (10, 0)),
    (Problem((12, 12), 96, FULL, cosine=True, shifted=True), (8, 6)),
    (Problem((14, 14), 16, HALF, cosine=True, shifted=True), (10, 0)),
    (Problem((14, 14), 16, FULL, cosine=True, shifted=True), (8, 6)),
    (Problem((14, 14), 44, torch.float16, cosine=True, shifted=True), (9, 0)),
    (Problem((14, 14), 64, HALF, cosine=True, shifted=True), (12, 0)),
    (Problem((14, 14), 88, HALF, cosine=True, shifted=True), (8, 9)),
    (Problem((14, 14), 128, FULL, cosine=True, shifted=True), (8, 6)),
    (Problem((24, 24), 16, HALF, cosine=True, shifted=True), (8, 6)),
    (Problem((24, 24), 44, HALF, cosine=True, shifted=True), (12, 0)),
    (Problem((24, 24), 88, FULL, cosine=True, shifted=True), (12, 0)),
    (Problem((6, 6), 32, FULL, cosine=False, shifted=True), (12, 0)),
    (Problem((7, 7), 64, FULL, cosine=True, shifted=True), (12, 0)),
    (Problem((12, 12), 16, FULL, cosine=True, shifted=True), (10, 0)),
    (Problem((14, 14), 32, HALF, cosine=False, shifted=True), (12, 0)),
    # the newest GPUs
    (Problem((12, 12), 32, HALF, cosine=True, shifted=True), (10, 0)),
    (Problem((12, 12), 32, HALF, cosine=True, shifted=True), (12, 0)),
]


@pytest.mark.parametrize(("problem", "capability"), SAMPLE, ids=str)
def test_kernels_neither_spill_nor_exceed_shared_memory(problem, capability):
    faults = {}
    for kernel in problem.kernels(capability):
        usage = compile_kernel(kernel, problem, capability)
        assert usage.registers > 0
        if usage.faults:
            faults[kernel] = usage.faults
    assert not faults


def test_faults_are_named():
    usage = Usage("forward_kernel", (8, 6), 4, registers=255, stack=16, shared=200_000, shared_limit=101_376, tensor_core=0)
    assert usage.faults == ["16 bytes of stack per thread", "200000 bytes of shared memory of 101376", "no tensor cores"]


def test_a_kernel_is_another_one_with_other_code_and_not_with_other_words(monkeypatch):
    def digest(old, new):
        """Of forward_kernel, whose helper reads otherwise."""
        helper = triton_partition.locate_window
        source = helper.src
        assert old in source
        with monkeypatch.context() as patch:
            patch.setattr(helper, "_src", source.replace(old, new))
            return source_digest("forward_kernel")

    before = source_digest("forward_kernel")
    assert digest("# 32 bits", "# Thirty-two bits") == digest("-th window", "-th one") == before
    assert digest("heads + head", "heads - head") != before


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize(
    ("grid", "window", "heads", "head_dim", "dtype"),
    [
        ((1, 1), (12, 12), 16, 32, HALF),
        ((4, 1), (8, 4), 1, 32, torch.float16),
        ((2, 4), (7, 7), 3, 88, HALF),
        ((1, 2), (4, 4), 2, 128, FULL),
    ],
    ids=str,
)
def test_what_a_launch_compiles_is_what_was_compiled_ahead_of_time(launches, cosine, grid, window, heads, head_dim, dtype):
    """No variant of its own for a size of 1, for a multiple of 16, or for a view that begins anywhere."""
    shift = tuple(side // 2 if count > 1 else 0 for side, count in zip(window, grid, strict=True))
    tokens, channels = window[0] * window[1], heads * head_dim
    shape = (2, grid[0] * window[0], grid[1] * window[1])
    qkv, grad = (
        (torch.zeros(math.prod(shape) * size + 1, dtype=dtype)[1:].view(*shape, size)) for size in (3 * channels, channels)
    )
    bias, scale = torch.zeros(heads, tokens, tokens), torch.zeros(heads + 1)[1:] if cosine else None
    sizes = (heads, window, shift)
    out, lse = triton._forward(qkv, bias, scale, *sizes)
    triton._backward(grad, qkv, bias, scale, out, lse, *sizes)
    problem = Problem(window, head_dim, dtype, cosine=cosine, shifted=any(shift))
    assert set(launches) == set(problem.kernels((9, 0)))
    for name, [(signature, constants, options, attributes)] in launches.items():
        source, chosen = kernel_source(name, problem, problem.tiles((9, 0)))
        aligned = {place: facts for place, facts in attributes.items() if facts}
        assert (signature, constants, aligned) == (source.signature, source.constants, source.attrs), name
        assert {key: getattr(options, key) for key in chosen} == chosen, name
