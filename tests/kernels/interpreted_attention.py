"""Runs the Triton kernels of window attention in Triton's interpreter and holds them against the reference in float64.

Started by test_window_attention_triton.py as its own process, since TRITON_INTERPRET must be set before Triton is imported.
Prints one JSON object per case: relative errors of the output and of each gradient. New tensors are full of NaN, so what a
kernel does not write is seen.
"""

import json
import sys

import torch

from simmim_scale.kernels.window_attention import window_attention

TYPES = {"float32": torch.float32, "float16": torch.float16}


def poison_new_tensors() -> None:
    """Uninitialised memory of this process is NaN from here on."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def make_inputs(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Fresh random float64 inputs, already rounded to the type under test: qkv, bias, logit scale, gradient of the output."""
    generator = torch.Generator().manual_seed(case["seed"])
    height, width = case["size"]
    heads, dim, dtype = case["heads"], case["dim"], TYPES[case["dtype"]]
    tokens = case["window"][0] * case["window"][1]
    random = {"generator": generator, "dtype": torch.float64}
    qkv = torch.randn(case["batch"], height, width, 3 * heads * dim, **random)
    bias = torch.randn(heads, tokens, tokens, **random)
    scale = torch.linspace(1.0, 5.0, heads, dtype=torch.float64) if case["cosine"] else None  # 5 > ln 100: clamped
    grad = torch.randn(case["batch"], height, width, heads * dim, **random)
    if case.get("zeros"):
        qkv[0, : height // 2] = 0.0
    if case.get("extreme"):
        qkv[..., : heads * dim] *= 50.0
        bias *= 100.0
    return qkv.to(dtype).double(), bias.float().double(), scale, grad.to(dtype).double()


def run(case: dict, name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of qkv, bias and logit scale by the implementation `name`."""
    qkv, bias, scale, grad = make_inputs(case)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [qkv.to(dtype), bias.to(wide), None if scale is None else scale.to(wide)]
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in inputs]
    given = leaves[0]
    grad = grad.to(dtype)
    if case.get("strided"):
        given = given.transpose(1, 2).contiguous().transpose(1, 2)
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        # Every second number of a longer scale, as a view into a buffer of many parameters may be.
        leaves[2] = None if scale is None else torch.stack([leaves[2].detach()] * 2, 1)[:, 0].requires_grad_()
    arguments = {"num_heads": case["heads"], "window": tuple(case["window"]), "shift": tuple(case["shift"])}
    attend = window_attention
    if case.get("compiled"):  # one graph, whose operators run as they are
        attend = torch.compile(window_attention, backend="aot_eager", fullgraph=True)
    output = attend(given, leaves[1], logit_scale=leaves[2], implementation=name, **arguments)
    return [output.detach(), *torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad)]


def errors(case: dict) -> dict:
    """Errors in norm, relative to norms above 1, whether everything is finite, and whether a second run gives the same bits."""
    ours = run(case, "triton", TYPES[case["dtype"]])
    again = run(case, "triton", TYPES[case["dtype"]]) if case.get("twice") else ours
    exact = run(case, "reference", torch.float64)
    names = ("output", "qkv", "bias", "scale")
    relative = {
        name: float((got.double() - wanted).norm() / wanted.norm().clamp(min=1.0))
        for name, got, wanted in zip(names, ours, exact, strict=False)
    }
    return {
        "errors": relative,
        "finite": all(bool(tensor.isfinite().all()) for tensor in ours),
        "same": all(torch.equal(first, second) for first, second in zip(ours, again, strict=True)),
        "zero_rows": float(ours[1][0, : case["size"][0] // 2].double().abs().max()),
        "zero_rows_exact": float(exact[1][0, : case["size"][0] // 2].abs().max()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    poison_new_tensors()
    for line in json.loads(sys.argv[1]):
        sys.stdout.write(json.dumps(errors(line)) + "\n")
