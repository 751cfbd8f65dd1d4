"""The masked loss in Triton: in the interpreter against float64, compiled for GPUs that need not be here, and on the device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.masked_loss_cases import CASES, Case, errors, make_inputs, run

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def interpreted():
    """Errors of all cases, by name."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.masked_loss_cases"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {row["name"]: row for row in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_sums_and_gradients_equal_the_published_formula(interpreted, name):
    assert max(interpreted[name]["float32"]) < 2e-6
    assert max(interpreted[name]["float16"]) < 2e-3


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local": True},
        {"stored": False, "tokens": False},
        {"loss": "smooth_l1", "local": True, "dtype": torch.float32},
        {"loss": "l2", "patch": 4, "dtype": torch.float16},
    ],
    ids=str,
)
def test_the_kernel_neither_spills_nor_needs_shared_memory(options, capability):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter replaces the compiler")
    from simmim_scale.kernels.masked_loss.triton_ahead import Problem, compile_kernel

    usage = compile_kernel(Problem(**{"dtype": torch.bfloat16, **options}), capability)
    assert usage.registers <= 80
    assert usage.stack == 0
    assert usage.shared <= 1024


def test_pictures_of_other_sizes_need_no_other_kernel(launches):
    """Where 16 divides all widths."""
    from simmim_scale.kernels.masked_loss import triton

    for case in (
        Case(size=(16, 32), batch=3, channels_last=True),
        Case(size=(128, 16), cell=16, batch=2),
        Case(size=(8, 48), batch=1),
        Case(size=(16, 16), batch=16, cell=16),
    ):
        inputs = make_inputs(case)
        triton.masked_loss(
            inputs.prediction.float(),
            inputs.image,
            inputs.mask,
            layout=inputs.layout,
            tokens=inputs.tokens,
            flip=inputs.flip,
            normalization=inputs.normalization,
            loss=case.loss,
            beta=case.beta,
        )
    assert len(launches["masked_loss_kernel"]) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_device(name):
    assert max(errors(CASES[name], "triton", torch.float32, "cuda")) < 2e-6
    assert max(errors(CASES[name], "triton", torch.bfloat16, "cuda")) < 2e-2
    inputs = make_inputs(CASES[name])
    first, second = (run(CASES[name], inputs, "triton", torch.bfloat16, "cuda") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
