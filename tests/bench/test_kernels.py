"""`simmim bench kernels` and `simmim bench compile`: arithmetic of the floors, the comparisons' correctness, what they write."""

import json
import re
import warnings

import pytest
import torch
from typer.testing import CliRunner

from simmim_scale.bench.comparisons import flex
from simmim_scale.bench.kernel_cases import AttentionCase, LossCase, make_cases
from simmim_scale.bench.kernels import Ceilings, floor_seconds
from simmim_scale.cli.app import app
from simmim_scale.kernels.window_attention import window_attention


def test_bytes_of_swinv2_h_stage_3_are_those_of_its_tensors():
    (case,) = make_cases(["window_attention"], ["swinv2_h"], [128], [3])
    assert (case.heads, case.window, case.shift, case.side) == (44, 12, 0, 12)
    tokens, channels = 128 * 12 * 12, 44 * 32
    assert case.bytes(2)["forward"] == 2 * tokens * 4 * channels + 4 * tokens * 44
    assert case.bytes(2)["backward"] == 2 * tokens * 8 * channels + 4 * tokens * 44
    # two matrix products forward, five backward, each 2 * n * n * d per window and head
    assert case.flops() == {"forward": 2 * 2 * 128 * 44 * 144 * 144 * 32, "backward": 5 * 2 * 128 * 44 * 144 * 144 * 32}


def test_the_floor_is_the_slower_of_copy_and_product():
    case = AttentionCase("m", 1, 1, 8, 1, 4, 2, cosine=True)
    moved, computed = case.bytes(2)["forward"], case.flops()["forward"]
    assert floor_seconds(case, 2, Ceilings(copy=moved, product=computed / 3))["forward"] == pytest.approx(3.0)
    assert floor_seconds(case, 2, Ceilings(copy=moved / 5, product=computed))["forward"] == pytest.approx(5.0)


def test_bytes_of_norm_and_loss_are_those_of_their_tensors():
    (post,) = make_cases(["norm"], ["swinv2_h"], [2], [2])
    assert post.bytes(4)["forward"] == 4 * 3 * 2 * 24 * 24 * 704  # branch and residual in, sum out
    (pre,) = make_cases(["norm"], ["swin_b"], [2], [1])
    assert pre.bytes(2)["backward"] == 2 * 4 * 2 * 48 * 48 * 128  # the sum and two gradients in, one out
    numbers = 3 * 22 * 3 * 32 * 32
    assert LossCase(3).bytes(2) == {"forward": 3 * numbers, "backward": 2 * numbers}


def test_every_stage_is_there_and_the_last_has_one_window():
    found = make_cases(["window_attention"], ["swin_b", "swinv2_h"], [1, 2])
    assert len(found) == 16
    last = found[-1]
    assert (last.side, last.window, last.shift, last.heads) == (6, 6, 0, 88)
    assert len(make_cases(["norm", "masked_loss"], ["swin_b", "swinv2_h"], [1, 2])) == 16 + 2
    for wrong, message in (
        ((["norm"], ["vit"], [1]), r"unknown model 'vit'\. Known: swin_b, swin_l, swinv2_h"),
        ((["gelu"], ["swin_b"], [1]), r"unknown op 'gelu'\. Known: window_attention, norm, masked_loss"),
        ((["norm"], ["swin_b"], [1], [5]), r"unknown stage 5\. Known: 1, 2, 3, 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cases(*wrong)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("shift", [(0, 0), (2, 0)])
def test_flex_attention_computes_the_same(cosine, shift):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 8, 4, 3 * 2 * 16, generator=generator)
    bias = torch.randn(2, 16, 16, generator=generator)
    arguments = {"num_heads": 2, "window": (4, 4), "shift": shift, "logit_scale": torch.ones(2) if cosine else None}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs without compiling
        ours = flex(compiled=False)(qkv, bias, **arguments)
    torch.testing.assert_close(ours, window_attention(qkv, bias, implementation="reference", **arguments), rtol=1e-4, atol=1e-5)


def run_bench(out, *arguments):
    """What the command prints, and what it writes."""
    result = CliRunner().invoke(app, ["bench", "kernels", "--batch", "1", "--turns", "1", "--out", str(out), *arguments])
    assert result.exit_code == 0, result.output
    assert (out / "kernels.png").read_bytes().startswith(b"\x89PNG")
    return result.output, json.loads((out / "kernels.json").read_text())


def test_the_command_measures_every_op_and_writes_json_and_a_plot(tmp_path):
    output, written = run_bench(tmp_path, "--model", "swin_b", "--no-comparisons")
    names = {(row["op"], row["implementation"]) for row in written["rows"]}
    assert names == {
        *(("window_attention", name) for name in ("cpu", "sdpa", "reference")),
        *(("norm", name) for name in ("torch_native", "reference")),
        *(("masked_loss", name) for name in ("one_pass", "reference")),
    }
    assert len(written["rows"]) == 4 * 3 + 4 * 2 + 2
    for row in written["rows"]:
        for direction in ("forward", "backward"):
            assert row[direction]["difference"] < 1e-5
            assert row[direction]["seconds"] > 0
            assert row[direction]["times_floor"] == pytest.approx(row[direction]["seconds"] / row[direction]["floor_seconds"])
    assert written["ceilings"]["copy"] > 1e8
    assert written["left_out"]["norm"]["triton"] == "it runs on an NVIDIA GPU, got cpu"
    assert "Window attention, not measured: triton (it runs on an NVIDIA GPU, got cpu)" in output
    assert "swin_b stage 4, batch 1" in output
    assert "\u2026" not in output  # no cell is cut short


def test_comparisons_run_on_a_cpu_and_what_they_lack_is_said(tmp_path):
    arguments = ("--model", "swinv2_h", "--stage", "4", "--op", "window_attention", "--op", "masked_loss")
    output, written = run_bench(tmp_path, *arguments)
    rows = {(row["op"], row["implementation"]): row for row in written["rows"]}
    for op, name in (("window_attention", "reference, compiled"), ("masked_loss", "reference, compiled")):
        assert max(rows[op, name][direction]["difference"] for direction in ("forward", "backward")) < 1e-5
    flexible = rows["window_attention", "flex, compiled"]
    assert flexible["forward"]["difference"] < 1e-5
    assert "backward" not in flexible
    assert "flex, compiled (backward: PyTorch's FlexAttention has none on a CPU)" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--dtype", "int8"], "unknown type 'int8'. Known: bf16, fp16, fp32"),
        (["compile", "--out", "x", "--capability", "7.0"], "unknown compute capability 7.0. Known: 8.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_a_sweep_goes_on_where_it_was_and_reports(tmp_path, monkeypatch):
    compile_module = pytest.importorskip("simmim_scale.bench.compile")
    compiled = []

    def fake(kernel, problem, capability):
        from simmim_scale.kernels.window_attention.triton_ahead import Usage

        compiled.append(kernel)
        stack = 8 if problem.window == (24, 24) and problem.shifted else 0
        return Usage(kernel, capability, 4, 100, stack, 1000, 2000, 12)

    monkeypatch.setattr(compile_module, "compile_kernel", fake)
    faults = compile_module.sweep(tmp_path, dtypes=["bf16"], capabilities=[(9, 0)], progress=lambda text: None)
    rows = compile_module.read_record(tmp_path / "compiled.jsonl")
    assert len(rows) == len(compiled) > 100
    assert faults == sum(row["stack"] > 0 for row in rows) > 0
    text = (tmp_path / "README.md").read_text()
    assert f"**{len(rows)} kernels, {faults} with faults**" in text
    assert "sm_80 bf16: " in text.split("Not compiled yet")[1]  # only sm_90 was asked for
    assert "sm_90 bf16" not in text.split("Not compiled yet")[1].split("\n")[0]
    assert "| bf16 | 12x12 | 32 | query_gradient | sm_90 | 16x128+16, 4 warps | 100 | 0 | 1,000 | 2,000 |" in text
    assert "At most: 100 registers, 8 bytes of stack, 50% of a device's shared memory (1,000 of 2,000 bytes on sm_90)." in text
    assert re.search(r"ptxas 1\d\.[\d.]+", text)
    assert compile_module.sweep(tmp_path, dtypes=["bf16"], capabilities=[(9, 0)], progress=lambda text: None) == faults
    assert len(rows) == len(compiled)


def test_an_interrupted_sweep_leaves_a_report(tmp_path, monkeypatch):
    compile_module = pytest.importorskip("simmim_scale.bench.compile")
    compiled = []

    def fake(kernel, problem, capability):
        from simmim_scale.kernels.window_attention.triton_ahead import Usage

        if len(compiled) == 150:
            raise KeyboardInterrupt
        compiled.append(kernel)
        return Usage(kernel, capability, 4, 100, 0, 1000, 2000, 12)

    monkeypatch.setattr(compile_module, "compile_kernel", fake)
    with pytest.raises(KeyboardInterrupt):
        compile_module.sweep(tmp_path, dtypes=["bf16"], capabilities=[(9, 0)], progress=lambda text: None)
    assert len(compile_module.read_record(tmp_path / "compiled.jsonl")) == 150
    assert "**100 kernels, 0 with faults**" in (tmp_path / "README.md").read_text()


def test_a_sweep_compiles_again_what_was_cut_otherwise_or_whose_code_changed(tmp_path, monkeypatch):
    compile_module = pytest.importorskip("simmim_scale.bench.compile")
    compiled = []

    def fake(kernel, problem, capability):
        from simmim_scale.kernels.window_attention.triton_ahead import Usage

        compiled.append(kernel)
        return Usage(kernel, capability, 4, 100, 0, 1000, 2000, 12)

    monkeypatch.setattr(compile_module, "compile_kernel", fake)
    only = [compile_module.Problem((12, 12), 32, torch.bfloat16, cosine=True, shifted=True)]
    monkeypatch.setattr(compile_module, "problems", lambda dtypes: only)

    def sweep():
        compiled.clear()
        compile_module.sweep(tmp_path, dtypes=["bf16"], capabilities=[(9, 0)], progress=lambda text: None)
        return set(compiled)

    kernels = {"forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel"}
    assert sweep() == kernels
    assert sweep() == set()
    record = tmp_path / "compiled.jsonl"
    record.write_text(record.read_text().replace("16x128+16, 4 warps", "16x128+16, 8 warps"))
    assert sweep() == {"query_gradient_kernel"}
    digest = compile_module.source_digest("forward_kernel")
    record.write_text(record.read_text().replace(digest, "0" * len(digest)))
    assert sweep() == {"forward_kernel"}
    assert len({compile_module.source_digest(kernel) for kernel in kernels}) == 3
