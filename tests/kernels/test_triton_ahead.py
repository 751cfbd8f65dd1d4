"""The Triton kernels compiled for GPUs that need not be here: no spills, shared memory within the limit, tensor cores used.

A sample of what `simmim bench compile` compiles; the report of the whole sweep is in benchmarks/.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from simmim_scale.kernels.window_attention.triton_ahead import Problem, Usage, compile_kernel

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
    # the widest heads, and fp32
    (Problem((12, 12), 128, HALF, cosine=True, shifted=True), (8, 9)),
    (Problem((12, 12), 44, HALF, cosine=True, shifted=True), (9, 0)),
    (Problem((12, 12), 32, FULL, cosine=True, shifted=True), (8, 0)),
    (Problem((7, 7), 88, FULL, cosine=True, shifted=True), (9, 0)),
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
