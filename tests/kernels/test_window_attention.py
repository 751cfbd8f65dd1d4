"""Every implementation that runs here against a token-by-token computation in float64, forward and backward."""

import itertools
import math

import pytest
import torch

from simmim_scale.kernels.dispatch import choose, implementations
from simmim_scale.kernels.window_attention import window_attention

# (height, width, window, shift, heads, head dim)
SHAPES = [
    (4, 4, (4, 4), (0, 0), 2, 8),
    (8, 8, (4, 4), (2, 2), 2, 8),
    (6, 9, (3, 3), (1, 1), 3, 4),
    (4, 12, (4, 6), (0, 3), 2, 16),
    (9, 3, (3, 3), (1, 0), 1, 44),
    (14, 14, (7, 7), (3, 3), 2, 32),
]


def here(name: str, dtype: torch.dtype = torch.float64) -> bool:
    try:
        choose("window_attention", name, device=torch.device("cpu"), dtype=dtype, head_dim=32, tokens=16)
    except ValueError:
        return False
    return True


NAMES = [name for name in implementations("window_attention") if here(name, torch.float32)]


def token_by_token(qkv, bias, num_heads, window, shift, logit_scale):
    """One query at a time: find its window in rolled coordinates, its companions and their regions, attend."""
    batch, height, width, channels = qkv.shape
    dim = channels // 3 // num_heads
    q, k, v = qkv.reshape(batch, height, width, 3, num_heads, dim).unbind(3)
    output = torch.zeros(batch, height, width, num_heads, dim, dtype=qkv.dtype)

    def region(coordinate, side, size, moved):
        if moved == 0 or coordinate < side - size:
            return 0
        return 1 if coordinate < side - moved else 2

    for row in range(height):
        for column in range(width):
            top, left = row // window[0] * window[0], column // window[1] * window[1]  # of the window, rolled coordinates
            members = [(top + i, left + j) for i in range(window[0]) for j in range(window[1])]
            places = [((r + shift[0]) % height, (c + shift[1]) % width) for r, c in members]
            query = (row - top) * window[1] + column - left
            y, x = places[query]
            keys = torch.stack([k[:, r, c] for r, c in places], dim=2)  # b heads n d
            values = torch.stack([v[:, r, c] for r, c in places], dim=2)
            if logit_scale is None:
                logits = torch.einsum("bhd,bhnd->bhn", q[:, y, x], keys) / math.sqrt(dim)
            else:
                cosine = torch.nn.functional.cosine_similarity(q[:, y, x][:, :, None], keys, dim=-1, eps=1e-24)
                logits = cosine * logit_scale.clamp(max=math.log(100)).exp()[None, :, None]
            logits = logits + bias[None, :, query]
            own = (region(row, height, window[0], shift[0]), region(column, width, window[1], shift[1]))
            theirs = [(region(r, height, window[0], shift[0]), region(c, width, window[1], shift[1])) for r, c in members]
            logits = logits + torch.tensor([0.0 if other == own else -100.0 for other in theirs], dtype=qkv.dtype)
            output[:, y, x] = torch.einsum("bhn,bhnd->bhd", logits.softmax(-1), values)
    return output.flatten(3)


def random_arguments(shape, cosine, dtype=torch.float64, seed=0):
    height, width, window, _, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    tokens = window[0] * window[1]
    qkv = torch.randn(2, height, width, 3 * heads * dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64).requires_grad_()
    scale = torch.linspace(1.0, 5.0, heads, dtype=torch.float64).requires_grad_() if cosine else None  # 5 > ln 100: clamped
    return qkv, bias, scale


def gradients(output, inputs, seed=1):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((output.double() * weights).sum(), [tensor for tensor in inputs if tensor is not None])


@pytest.mark.parametrize("name", [name for name in NAMES if here(name)])
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_token_by_token_in_float64(name, cosine, shape):
    _, _, window, shift, heads, _ = shape
    inputs = random_arguments(shape, cosine)
    qkv, bias, scale = inputs
    ours = window_attention(qkv, bias, num_heads=heads, window=window, shift=shift, logit_scale=scale, implementation=name)
    expected = token_by_token(qkv, bias, heads, window, shift, scale)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for got, wanted in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cosine", [True, False])
def test_precision_of_each_type(name, dtype, cosine):
    shape = SHAPES[-1]
    qkv, bias, scale = random_arguments(shape, cosine)
    rounded = qkv.detach().to(dtype).requires_grad_()
    small_bias, small_scale = (
        bias.detach().float().requires_grad_(),
        None if scale is None else scale.detach().float().requires_grad_(),
    )
    arguments = {"num_heads": 2, "window": shape[2], "shift": shape[3]}
    ours = window_attention(rounded, small_bias, logit_scale=small_scale, implementation=name, **arguments)
    exact_in = rounded.detach().double().requires_grad_()
    exact = window_attention(exact_in, bias, logit_scale=scale, implementation="reference", **arguments)
    assert ours.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
    pairs = zip(
        (ours, *gradients(ours, (rounded, small_bias, small_scale))),
        (exact, *gradients(exact, (exact_in, bias, scale))),
        strict=True,
    )
    for number, (got, wanted) in enumerate(pairs):
        # The scale's gradient is a sum over all tokens in which most cancels: rounding weighs more there.
        allowed = tolerance * (3 if number == 3 else 1)
        assert (got.double() - wanted).norm() <= allowed * wanted.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_and_huge_tokens_stay_finite(name, dtype):
    shape = SHAPES[1]
    qkv, bias, scale = random_arguments(shape, cosine=True, dtype=dtype)
    with torch.no_grad():
        qkv[0, :2] = 0  # rows of zero vectors, as padding and dead tokens give
        qkv[1, :, :, :32] *= 1000.0  # in fp16 the sum of squares of such a q would overflow
        bias *= 10.0
    output = window_attention(
        qkv, bias.float(), num_heads=2, window=shape[2], shift=shape[3], logit_scale=scale.float(), implementation=name
    )
    assert output.isfinite().all()
    for gradient in gradients(output, (qkv, bias, scale)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if here(name)])
@pytest.mark.parametrize("cosine", [True, False])
def test_gradcheck(name, cosine):
    shape = (4, 4, (2, 2), (1, 1), 2, 3)
    qkv, bias, scale = random_arguments(shape, cosine)
    if cosine:
        scale = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def attend(*tensors):
        return window_attention(
            tensors[0],
            tensors[1],
            num_heads=2,
            window=(2, 2),
            shift=(1, 1),
            logit_scale=tensors[2] if cosine else None,
            implementation=name,
        )

    assert torch.autograd.gradcheck(attend, (qkv, bias, scale) if cosine else (qkv, bias), fast_mode=False)


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_input_and_frozen_parts(name):
    shape = SHAPES[1]
    qkv, bias, scale = random_arguments(shape, cosine=True, dtype=torch.float32)
    bias, scale = bias.detach().float(), scale.detach().float()
    arguments = {"num_heads": 2, "window": shape[2], "shift": shape[3], "implementation": name}
    strided = qkv.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    plain = window_attention(qkv, bias, logit_scale=scale, **arguments)
    other = window_attention(strided, bias, logit_scale=scale, **arguments)
    torch.testing.assert_close(other, plain)
    torch.testing.assert_close(gradients(other, [strided])[0], gradients(plain, [qkv])[0])
    with torch.no_grad():
        torch.testing.assert_close(window_attention(qkv, bias, logit_scale=scale, **arguments), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": (3, 4), "bias": torch.zeros(2, 12, 12)}, "the window must divide the tokens"),
        ({"num_heads": 5}, "channels"),
        ({"bias": torch.zeros(2, 9, 9)}, "bias must be"),
        ({"shift": (4, 0)}, "shift must lie"),
        ({"implementation": "quick"}, "Known: auto"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "qkv": torch.zeros(1, 8, 8, 48),
        "bias": torch.zeros(2, 16, 16),
        "num_heads": 2,
        "window": (4, 4),
        "shift": (0, 0),
    }
    with pytest.raises(ValueError, match=message):
        window_attention(**(arguments | change))


@pytest.mark.parametrize("budget", [1, 15_000, 75_000, 250_000, 1 << 30])  # one head of a row of windows ... everything at once
def test_the_cut_into_chunks_does_not_change_the_cpu_form(budget, monkeypatch):
    from simmim_scale.kernels.window_attention import cpu

    monkeypatch.setattr(cpu, "_threads", lambda: 2)
    shape = (8, 12, (4, 4), (2, 2), 3, 8)
    inputs = random_arguments(shape, cosine=True)
    arguments = {"num_heads": 3, "window": (4, 4), "shift": (2, 2), "logit_scale": inputs[2]}
    expected = window_attention(*inputs[:2], implementation="reference", **arguments)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", budget)
    ours = window_attention(*inputs[:2], implementation="cpu", **arguments)
    torch.testing.assert_close(ours, expected)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 12345)  # backward must not cut anew
    for got, wanted in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("rooms", "grids"),
    [
        (1, [(1, 1, 3)] * 16),  # a row of windows at least
        (2, [(1, 2, 3), (1, 2, 3)] * 4),
        (3, [(1, 3, 3), (1, 1, 3)] * 4),  # never parts of two images
        (9, [(2, 4, 3), (2, 4, 3)]),
        (12, [(3, 4, 3), (1, 4, 3)]),
    ],
)
def test_strips_of_the_cpu_form_are_whole_images_or_rows_of_one(rooms, grids):
    from simmim_scale.kernels.window_attention import cpu

    row_bytes = 3 * 2 * 16**2 * 4  # three windows, two heads, 16 x 16 tokens, fp32
    plan = cpu._Plan(2, (4, 4), (2, 2), rooms * row_bytes * cpu.STRIP_PART)
    chunk = cpu._Chunk(slice(0, 4), slice(0, 2), (4, 4, 3), 0)
    strips = list(plan.strips(chunk, 4))
    assert [strip.grid for strip in strips] == grids
    edges = [0, *(strip.matrices.stop for strip in strips)]
    assert [strip.matrices for strip in strips] == [slice(*pair) for pair in itertools.pairwise(edges)]
    assert edges[1:] == list(itertools.accumulate(2 * math.prod(grid) for grid in grids))
    assert [strip.last_row for strip in strips] == [strip.matrices.stop % (4 * 3 * 2) == 0 for strip in strips]


@pytest.mark.parametrize("windows", [1, 2, 6, 9, 15])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_cpu_form_sums_the_gradient_of_the_bias_over_all_windows(windows, threads):
    from simmim_scale.kernels.window_attention import cpu

    matrices = torch.randn(windows, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = torch.ones(threads, 2, 4, 4, dtype=torch.float64)
    cpu._add_windows(matrices.flatten(0, 1), sums)
    torch.testing.assert_close(sums.sum(0), threads + matrices.sum(0))


def test_the_cpu_form_has_finite_gradients_where_the_scale_underflows():
    qkv, bias, _ = random_arguments((4, 4, (4, 4), (0, 0), 2, 8), cosine=True, dtype=torch.float32)
    scale = torch.full((2,), -80.0, requires_grad=True)  # exp(-160) is 0 in fp32
    output = window_attention(
        qkv, bias.float(), num_heads=2, window=(4, 4), shift=(0, 0), logit_scale=scale, implementation="cpu"
    )
    assert all(gradient.isfinite().all() for gradient in gradients(output, (qkv, bias, scale)))


@pytest.mark.parametrize("shift", [(0, 0), (4, 4)])
def test_the_cpu_form_saves_less_than_the_reference(shift):
    saved = {}
    for name in ("cpu", "reference"):
        qkv, bias, scale = random_arguments((16, 16, (8, 8), shift, 2, 8), cosine=True, dtype=torch.float32)
        sizes = {}

        def remember(tensor, sizes=sizes):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            output = window_attention(
                qkv, bias.float(), num_heads=2, window=(8, 8), shift=shift, logit_scale=scale.float(), implementation=name
            )
        assert output.requires_grad  # and so keeps what was saved alive until here: no address was used twice
        saved[name] = sum(sizes.values())
    assert saved["cpu"] < 0.7 * saved["reference"]
