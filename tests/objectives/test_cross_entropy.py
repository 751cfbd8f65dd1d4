"""The chunked cross-entropy against PyTorch's own over whole pictures: values, gradients, every resolution and number of bins."""

import pytest
import torch
from torch.nn import functional as F

from simmim_scale.objectives.cross_entropy import Classes, hidden_cross_entropy, most_likely
from simmim_scale.objectives.prediction import to_picture

TINY = 1  # bytes: one token at a time


def make(n=6, d=5, groups=2, count=3, pixels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = {"generator": generator, "dtype": torch.float64}
    return {
        "inputs": torch.randn(n, d, **random).requires_grad_(),
        "weight": torch.randn(groups * count * pixels, d, **random).requires_grad_(),
        "bias": torch.randn(groups * count * pixels, **random).requires_grad_(),
        "labels": torch.randint(0, count, (n, groups, pixels), generator=generator),
        "hidden": torch.rand(n, pixels, generator=generator) < 0.6,
    }


@pytest.mark.parametrize("chunk", [TINY, 10_000])
def test_gradcheck(chunk):
    values = make(n=4, d=3, pixels=2)
    classes = Classes(2, 3, chunk)
    call = lambda x, w, b: hidden_cross_entropy(x, w, b, values["labels"], values["hidden"], classes)  # noqa: E731
    assert torch.autograd.gradcheck(call, (values["inputs"], values["weight"], values["bias"]))
    logits = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: call(x, None, None), (logits,))


@pytest.mark.parametrize("bins", [2, 4, 8, 16, 32, 256])
@pytest.mark.parametrize(
    "patch", [1, 4, 8], ids=lambda patch: f"patch{patch}"
)  # 6^2, 48^2 and 192^2 are 1, 8 and 32 at stride 32
def test_fused_and_plain_loss_agree_at_every_resolution(bins, patch):
    values = make(n=4, d=6, groups=3, count=bins, pixels=patch**2, seed=bins)
    weight_of_tokens = torch.rand(4, dtype=torch.float64)
    leaves = [values["inputs"], values["weight"], values["bias"]]
    sums = hidden_cross_entropy(*leaves, values["labels"].short(), values["hidden"], Classes(3, bins, TINY))
    ours = torch.autograd.grad((sums * weight_of_tokens).sum(), leaves)

    picture = to_picture(F.linear(*leaves)[None], grid=(2, 2), patch=patch)  # (1, 3 * bins, 2 patch, 2 patch)
    labels = to_picture(values["labels"].reshape(1, 4, -1), grid=(2, 2), patch=patch)
    hidden = to_picture(values["hidden"].reshape(1, 4, -1), grid=(2, 2), patch=patch)
    each = F.cross_entropy(picture.view(1, 3, bins, 2 * patch, 2 * patch).transpose(1, 2), labels, reduction="none")
    spread = weight_of_tokens.view(1, 2, 2).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    plain = torch.autograd.grad((each * hidden * spread[:, None]).sum(), leaves)
    torch.testing.assert_close(sums.sum(), (each * hidden).sum(), rtol=1e-12, atol=0)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    likeliest = most_likely(*leaves, Classes(3, bins, TINY)).reshape(1, 4, -1)
    assert torch.equal(to_picture(likeliest, grid=(2, 2), patch=patch), picture.view(1, 3, bins, *picture.shape[2:]).argmax(2))


def test_half_precision_is_summed_in_fp32_and_chunks_leave_no_seam():
    values = {name: value.detach() for name, value in make(n=32).items()}
    leaves = [values[name].bfloat16().requires_grad_() for name in ("inputs", "weight", "bias")]
    results = []
    for chunk in (TINY, 10_000):
        sums = hidden_cross_entropy(*leaves, values["labels"], values["hidden"], Classes(2, 3, chunk))
        assert sums.dtype == torch.float32
        results.append((sums, *torch.autograd.grad(sums.sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    exact = hidden_cross_entropy(*(leaf.double() for leaf in leaves), values["labels"], values["hidden"], Classes(2, 3, TINY))
    torch.testing.assert_close(results[0][0].double(), exact, rtol=3e-2, atol=1e-2)
