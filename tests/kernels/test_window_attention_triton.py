"""The Triton kernels against the reference in float64: in the interpreter here, on the device where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simmim_scale.kernels.window_attention import window_attention
from simmim_scale.kernels.window_attention.triton_tiles import choose_tiles

ROOT = Path(__file__).resolve().parents[2]


def case(size, window, shift, *, heads=1, dim=32, cosine=True, dtype="float32", batch=1, seed=0, **options):
    return {
        "size": size,
        "window": window,
        "shift": shift,
        "heads": heads,
        "dim": dim,
        "cosine": cosine,
        "dtype": dtype,
        "batch": batch,
        "seed": seed,
        **options,
    }


CASES = {
    "shifted both ways, 2 images, 2 heads": case((8, 8), (4, 4), (2, 2), heads=2, batch=2, twice=True),
    "V1": case((8, 8), (4, 4), (2, 2), heads=2, batch=2, cosine=False, seed=1),
    "padded tokens, head dim 44, fp16": case((6, 9), (3, 3), (1, 1), heads=2, dim=44, dtype="float16", seed=2),
    "rectangular, shifted one way": case((4, 12), (4, 6), (0, 3), heads=2, seed=3),
    "rectangular the other way, V1": case((12, 3), (6, 3), (3, 0), cosine=False, seed=4, dim=16),
    "one token": case((2, 2), (1, 1), (0, 0), seed=5),
    "window 6": case((12, 6), (6, 6), (3, 0), dim=32, seed=6),
    "window 7, fp16": case((14, 14), (7, 7), (3, 3), dim=32, dtype="float16", seed=7),
    "window 12: two tiles of keys": case((12, 12), (12, 12), (0, 0), dim=32, seed=8),
    "window 12x10, shifted, fp16, V1": case((24, 10), (12, 10), (6, 0), dim=32, cosine=False, dtype="float16", seed=9),
    "window 14: three tiles of keys": case((14, 14), (14, 14), (0, 0), dim=32, seed=10),
    "window 16, fp16, head dim 64": case((16, 16), (16, 16), (0, 0), dim=64, dtype="float16", seed=11),
    "576 tokens": case((18, 32), (18, 32), (0, 0), dim=32, cosine=False, seed=13),
    "gradients of q and bias apart": case((14, 14), (14, 14), (0, 0), dim=32, heads=2, batch=2, seed=22),
    "apart, shifted, fp16, V1": case((10, 16), (5, 16), (2, 0), dim=96, cosine=False, dtype="float16", seed=23),
    "apart, padded tokens, head dim 128": case((14, 7), (7, 7), (3, 0), dim=128, dtype="float16", seed=24, twice=True),
    "wide heads, fp32": case((10, 6), (5, 3), (2, 1), dim=88, seed=25, twice=True),
    "wide heads, fp32, V1, two tiles of keys": case((6, 14), (6, 7), (0, 3), heads=2, dim=128, cosine=False, seed=26),
    "wide heads, fp32, zero tokens": case((8, 4), (4, 4), (2, 0), dim=96, zeros=True, seed=27),
    "wide heads, fp32, extreme logits": case((4, 4), (4, 4), (0, 0), dim=128, extreme=True, seed=28),
    "head dim 88": case((8, 8), (4, 4), (2, 2), dim=88, dtype="float16", seed=14),
    "head dim 96, fp16": case((8, 8), (4, 4), (2, 2), dim=96, dtype="float16", seed=15),
    "head dim 128": case((8, 8), (4, 4), (2, 2), dim=128, cosine=False, dtype="float16", seed=16),
    "zero tokens": case((8, 8), (4, 4), (2, 2), heads=2, zeros=True, seed=17),
    "zero tokens, V1, fp16": case((8, 8), (4, 4), (2, 2), heads=2, zeros=True, cosine=False, dtype="float16", seed=18),
    "extreme logits": case((8, 8), (4, 4), (2, 2), heads=2, extreme=True, cosine=False, seed=19, dim=16),
    "extreme logits, V2, fp16": case((8, 8), (4, 4), (2, 2), heads=2, extreme=True, dtype="float16", seed=20),
    "in a compiled graph": case((4, 4), (2, 4), (1, 0), heads=2, compiled=True, seed=29),
    "not contiguous": case((8, 12), (4, 4), (2, 2), heads=2, strided=True, seed=21),
}
# The scale's gradient is a sum over all tokens in which most cancels: rounding weighs more there.
TOLERANCES = {"float32": (1e-5, 1e-4), "float16": (5e-3, 1e-1)}


@pytest.fixture(scope="module")
def interpreted():
    """Results of all cases, by name."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_attention", json.dumps(list(CASES.values()))],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(CASES, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference_in_the_interpreter(interpreted, name):
    result = interpreted[name]
    usual, scale = TOLERANCES[CASES[name]["dtype"]]
    assert result["finite"]
    # A factor of 10 on extreme inputs: there the logits themselves are large, and their rounding is what is seen.
    room = 10 if CASES[name].get("extreme") else 1
    for part, error in result["errors"].items():
        assert error <= room * (scale if part == "scale" else usual), (part, result)


def test_the_same_input_gives_the_same_bits(interpreted):
    assert all(interpreted[name]["same"] for name in CASES if CASES[name].get("twice"))


def test_cases_reach_both_forms_of_the_gradients():
    apart = [
        choose_tiles(given["window"][0] * given["window"][1], given["dim"], 2 if given["dtype"] == "float16" else 4, (9, 0)).query
        is None
        for given in CASES.values()
    ]
    assert sum(apart) >= 3
    assert len(apart) - sum(apart) >= 3


def test_zero_tokens_have_small_gradients(interpreted):
    result = interpreted["zero tokens"]
    assert result["zero_rows"] == pytest.approx(result["zero_rows_exact"], rel=1e-4)


def test_the_operators_keep_their_promises_to_torch_compile():
    """Fake results have the shapes of real ones, both ways, with and without a scale: no graph breaks at the kernels."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from simmim_scale.kernels.window_attention import triton

    with FakeTensorMode():
        qkv = torch.empty(2, 12, 24, 3 * 2 * 32, dtype=torch.bfloat16, requires_grad=True)
        bias, scale = (torch.empty(*shape, requires_grad=True) for shape in ((2, 72, 72), (2,)))
        for given in (scale, None):
            arguments = {"num_heads": 2, "window": (6, 12), "shift": (3, 6), "logit_scale": given}
            out = triton.window_attention(qkv, bias, **arguments)
            assert (out.shape, out.dtype) == ((2, 12, 24, 64), torch.bfloat16)
            out.sum().backward()
        assert all(tensor.grad.shape == tensor.shape for tensor in (qkv, bias, scale))


def test_an_image_of_too_many_elements_is_refused():
    from simmim_scale.kernels.window_attention import triton

    qkv = torch.empty(1, 8192, 8192, 96, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=r"fewer than 2\^31 elements of qkv per image, got \(8192, 8192, 96\)"):
        triton.Launch(1, (8, 8), (0, 0)).check(qkv)


def test_a_cpu_is_refused_without_the_interpreter():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="triton cannot run here: it runs on an NVIDIA GPU, got cpu"):
        window_attention(
            torch.zeros(1, 4, 4, 96),
            torch.zeros(1, 16, 16),
            num_heads=1,
            window=(4, 4),
            shift=(0, 0),
            implementation="triton",
        )


# ----------------------------------------------------------------------------------------------------- on the device

WINDOWS = [(6, 6), (7, 7), (8, 8), (12, 12), (14, 14), (16, 16), (20, 20), (24, 24), (7, 12)]
HALF = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def on_device(window, shift, dim, dtype, cosine, name):
    generator = torch.Generator().manual_seed(window[0] + dim)
    heads, tokens = 3, window[0] * window[1]
    qkv = torch.randn(2, 2 * window[0], 2 * window[1], 3 * heads * dim, generator=generator).to(dtype)
    bias = torch.randn(heads, tokens, tokens, generator=generator)
    scale = torch.linspace(1.0, 5.0, heads) if cosine else None
    grad = torch.randn(*qkv.shape[:3], heads * dim, generator=generator).to(dtype)
    if name == "exact":
        qkv, bias, grad = qkv.double(), bias.double(), grad.double()
        scale = None if scale is None else scale.double()
    leaves = [None if tensor is None else tensor.cuda().requires_grad_() for tensor in (qkv, bias, scale)]
    implementation = "reference" if name == "exact" else name
    output = window_attention(
        *leaves[:2], num_heads=heads, window=window, shift=shift, logit_scale=leaves[2], implementation=implementation
    )
    return [output, *torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad.cuda())]


def assert_near(ours, exact, tolerance):
    for number, (got, wanted) in enumerate(zip(ours, exact, strict=True)):
        assert got.isfinite().all()
        allowed = tolerance * (10 if number == 3 else 1)
        assert (got.double() - wanted).norm() <= allowed * wanted.norm(), number


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "sdpa"])
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("dtype", list(HALF))
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_every_window_on_the_device(name, cosine, dtype, shifted, window):
    shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
    ours = on_device(window, shift, 32, dtype, cosine, name)
    assert_near(ours, on_device(window, shift, 32, dtype, cosine, "exact"), HALF[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(HALF))
@pytest.mark.parametrize("dim", [16, 44, 64, 88, 96, 128])
def test_every_head_dim_on_the_device(dim, dtype):
    ours = on_device((12, 12), (6, 6), dim, dtype, True, "triton")
    assert_near(ours, on_device((12, 12), (6, 6), dim, dtype, True, "exact"), HALF[dtype])


@pytest.mark.gpu
def test_the_device_gives_the_same_bits_every_time():
    first = on_device((12, 12), (6, 6), 32, torch.bfloat16, True, "triton")
    for _ in range(3):
        for got, wanted in zip(on_device((12, 12), (6, 6), 32, torch.bfloat16, True, "triton"), first, strict=True):
            assert torch.equal(got, wanted)
