"""The norm's Triton kernels: run in the interpreter, compiled for GPUs that need not be here, traced by torch.compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.norm_cases import ORDERS, WITHIN

ROOT = Path(__file__).resolve().parents[2]
# (order, shape, type, drop path, tensors that are not contiguous)
CASES = {
    f"{order}, {kind}": (order, *rest)
    for order in ORDERS
    for kind, rest in {
        "several rows a program, more than all programs hold": ((3, 90, 44), "float32", order != "plain", False),
        "no drop path, fp16": ((2, 9, 352), "float16", False, False),
        "bf16": ((2, 3, 3, 96), "bfloat16", order != "plain", False),
        "the widest merging norm, not contiguous": ((2, 3, 2816), "float32", order != "plain", True),
        "one row": ((1, 1, 1), "float32", False, False),
    }.items()
}
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))


@pytest.fixture(scope="module")
def interpreted():
    """Errors of all cases, by name."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_norm", json.dumps(list(CASES.values()))],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(CASES, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_are_within_their_precision_of_float64(interpreted, name):
    if CASES[name][1][-1] == 1:
        return  # a row of one channel is all bias, and its gradient zero: nothing to be relative to; the digits are checked below
    within = WITHIN[getattr(torch, CASES[name][2])]
    assert max(interpreted[name]["errors"].values()) <= within, interpreted[name]


def test_interpreted_kernels_give_the_same_digits_every_time(interpreted):
    assert all(result["same"] for result in interpreted.values())


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_kernels_compile_without_spilling(capability):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter replaces the compiler")
    from simmim_scale.kernels.norm.triton_ahead import compile_norm

    spilling = {}
    for width, dtype, order in (
        (96, torch.bfloat16, 2),
        (352, torch.bfloat16, 1),
        (2816, torch.bfloat16, 1),
        (4096, torch.float32, 2),
    ):
        for kernel in ("forward_kernel", "backward_kernel"):
            usage = compile_norm(kernel, capability, width=width, dtype=dtype, order=order, scaled=True)
            assert usage.registers > 0
            if usage.stack:
                spilling[kernel, width, str(dtype), order] = usage
    assert not spilling


def test_other_numbers_of_rows_need_no_other_kernel(launches):
    from simmim_scale.kernels.norm import triton

    weight = torch.ones(96)
    for shape in ((1, 1, 96), (16, 1, 96), (2, 16, 96), (3, 5, 96)):
        x = torch.zeros(shape)
        *_, mean, rstd = triton._forward(x, x, None, weight, weight, 1e-5, triton.POST)
        triton._backward(x, None, weight, mean, rstd, x, None, triton.POST)
    assert {kernel: len(compiled) for kernel, compiled in launches.items()} == {"forward_kernel": 1, "backward_kernel": 1}


def test_the_operators_keep_their_promises_to_torch_compile():
    """Fake results have the shapes of real ones, and a graph that is traced with fake tensors holds one operator each way."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from simmim_scale.kernels.norm import triton

    with FakeTensorMode():
        branch, residual = (torch.empty(2, 5, 96, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        weight, bias = (torch.empty(96, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        total, normed = triton.pre_norm(branch, residual, torch.empty(2), weight, bias, eps=1e-5)
        assert total.shape == normed.shape == branch.shape
        (total.sum() + normed.sum()).backward()
        assert all(tensor.grad.shape == tensor.shape for tensor in (branch, residual, weight, bias))
