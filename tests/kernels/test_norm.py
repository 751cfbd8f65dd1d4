"""LayerNorm with its residual sums: every implementation against the formulas in float64, forward and backward.

The Triton kernels are here compiled for GPUs that need not be here; tests/kernels/test_norm_interpreted.py runs them.
"""

import pytest
import torch

from simmim_scale.kernels.norm import EPS, layer_norm, post_norm, pre_norm
from tests.kernels.norm_cases import ORDERS, compare, make_case, run

CPU_FORMS = ("torch_native", "compile", "reference")
CUDA_FORMS = ("torch_native", "triton", "apex", "compile", "reference")
TYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", [name for name in CPU_FORMS if name != "compile"])
def test_it_is_within_its_precision_of_float64(form, order, dtype):
    case = make_case((3, 5, 2, 44), dtype, scaled=order != "plain")
    compare(run(order, case, form), run(order, case.double(), "reference"), dtype)


@pytest.mark.parametrize("order", ORDERS)
def test_without_drop_path_too(order):
    case = make_case((2, 7, 96), torch.float32, scaled=False)
    compare(run(order, case, "torch_native"), run(order, case.double(), "reference"), torch.float32)


def test_the_formulas_have_the_gradients_that_finite_differences_give():
    case = make_case((2, 3, 5), torch.float64, scaled=True)
    for function, count in ((layer_norm, 1), (post_norm, 2), (pre_norm, 2)):

        def call(*tensors, function=function, count=count):
            scale = (case.scale,) if count == 2 else ()
            return function(*tensors[:count], *scale, *tensors[count:], eps=EPS, implementation="torch_native")

        inputs = (*(case.branch, case.residual)[:count], case.weight, case.bias)
        assert torch.autograd.gradcheck(call, [tensor.detach().requires_grad_() for tensor in inputs])


@pytest.mark.usefixtures("shapes_unchecked")
def test_one_form_that_torch_compile_made_serves_other_batches():
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            case = make_case((batch, 4, 33), torch.float32, scaled=True)
            compare(run("post", case, "compile"), run("post", case.double(), "reference"), torch.float32)


def test_statistics_are_fp32_for_half_precisions_too():
    """A row far from 0: in bf16 its variance would drown in the square of its mean."""
    case = make_case((4, 6, 64), torch.bfloat16, scaled=False)
    case = case.replace(branch=(case.branch * 0.5 + 24).bfloat16())
    for form in ("torch_native", "reference"):
        compare(run("plain", case, form), run("plain", case.double(), "reference"), torch.bfloat16)


@pytest.mark.parametrize("scaled", [True, False])
def test_post_norm_keeps_the_branch_and_two_numbers_a_row(scaled):
    case = make_case((4, 6, 64), torch.float32, scaled=scaled)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run("post", case, "torch_native", backward=False)
    own = {tensor.data_ptr(): tensor.numel() for tensor in kept}
    assert sum(own.values()) <= case.branch.numel() + 2 * 4 * 6 + 2 * 64 + 4


def test_a_named_form_that_cannot_run_here_is_refused_with_its_reason():
    case = make_case((1, 2, 8), torch.float32, scaled=False)
    with pytest.raises(ValueError, match=r"norm: apex cannot run here: .*NVIDIA/apex"):
        run("plain", case, "apex")
    with pytest.raises(ValueError, match=r"norm: unknown implementation 'fast'\. Known: auto, torch_native"):
        run("plain", case, "fast")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*TYPES, torch.float16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", CUDA_FORMS)
@pytest.mark.parametrize("width", [96, 352, 2816, 4096])
def test_on_a_gpu_it_is_within_its_precision_of_float64(form, order, dtype, width):
    from simmim_scale.kernels import apex

    if form == "apex" and apex.unavailable("normalization", "fused_layer_norm_cuda"):
        pytest.skip("NVIDIA's Apex is not installed")
    case = make_case((3, 37, width), dtype, scaled=order != "plain").to("cuda")
    compare(run(order, case, form), run(order, case.double(), "reference"), dtype)


@pytest.mark.gpu
def test_on_a_gpu_triton_gives_the_same_digits_every_time():
    case = make_case((8, 576, 704), torch.bfloat16, scaled=True).to("cuda")
    first, second = run("pre", case, "triton"), run("pre", case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
