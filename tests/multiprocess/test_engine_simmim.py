"""A real SwinV2 under SimMIM, through the engine: stages, ranks, accumulation and checkpointing leave the loss curve as it is."""

import json

import pytest

from tests.multiprocess.engine_ranks import run_ranks

# stage, accumulation, precision, activation checkpointing, backbone, window attention ("auto" is "cpu" here), compilation
# (test_engine.py goes through all combinations with a smaller module)
ONE_RANK = [(0, 1, "fp32", "none")]
TWO_RANKS = [
    (1, 1, "fp32", "none"),
    (2, 2, "fp32", "block"),
    (3, 4, "fp32", "block"),
    (3, 1, "bf16", "block"),
    (3, 1, "fp32", "block", "swin_v2", "reference"),
    (3, 1, "fp32", "none", "swin_v2", "sdpa"),
    (3, 1, "fp32", "block", "swin_v2", "sdpa"),
]
# Other backbones, plain and with everything. A ResNet normalises by the statistics of a rank's micro-batch: one rank only.
VIT, RESNET = [(0, 1, "fp32", "none", "vit")], [(0, 1, "fp32", "none", "resnet"), (3, 1, "fp32", "block", "resnet")]
COMPILED = [(3, 2, "fp32", "block", "swin_v2", "auto", "block"), (3, 1, "bf16", "none", "swin_v2", "auto", "block")]
VIT_ON_TWO = [(3, 2, "fp32", "block", "vit"), (3, 1, "bf16", "none", "vit")]


def run(world_size, runs, directory):
    plan = directory / "runs.json"
    plan.write_text(json.dumps(runs))
    outputs = run_ranks("simmim_worker.py", world_size, str(plan))
    (line,) = [line for line in outputs[0].splitlines() if line.startswith("RESULT simmim ")]
    return json.loads(line.removeprefix("RESULT simmim "))


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    one = run(1, [*ONE_RANK, *VIT, *RESNET, (3, 1, "bf16", "none", "resnet")], tmp_path_factory.mktemp("one"))
    two = run(2, [*TWO_RANKS, *VIT_ON_TWO, *COMPILED], tmp_path_factory.mktemp("two"))
    return {f"1 {name}": curve for name, curve in one.items()} | {f"2 {name}": curve for name, curve in two.items()}


def names(precision):
    runs = [(1, run) for run in ONE_RANK] + [(2, run) for run in (*TWO_RANKS, *COMPILED)]
    return [f"{ranks} " + "-".join(map(str, run)) for ranks, run in runs if run[2] == precision]


REFERENCE = names("fp32")[0]


@pytest.mark.parametrize("name", names("fp32")[1:])
def test_one_curve_however_the_work_is_cut(curves, name):
    found, expected = curves[name], curves[REFERENCE]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
    assert found["weights"] == pytest.approx(expected["weights"], rel=1e-5)


@pytest.mark.parametrize("name", names("bf16"))
def test_bf16_follows_fp32(curves, name):
    found, expected = curves[name], curves[REFERENCE]
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.03)
    assert found["dtypes"] == ["torch.float32"], "weights are exported from the fp32 masters"


def test_it_learns(curves):
    losses = curves[REFERENCE]["losses"]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize(
    ("found", "expected", "tolerance"),
    [
        ("2 3-2-fp32-block-vit", "1 0-1-fp32-none-vit", 1e-5),
        # Batch normalisation divides by deviations near 0 where a picture is flat: rounding grows by a tenth of itself a step.
        ("1 3-1-fp32-block-resnet", "1 0-1-fp32-none-resnet", 1e-4),
    ],
)
def test_other_backbones_train_the_same_under_zero_and_checkpointing(curves, found, expected, tolerance):
    for part in ("losses", "evaluated", "weights"):
        assert curves[found][part] == pytest.approx(curves[expected][part], rel=tolerance)
    assert curves[found]["losses"][:5] == pytest.approx(curves[expected]["losses"][:5], rel=2e-6)
    losses = curves[expected]["losses"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize(
    ("found", "expected"), [("2 3-1-bf16-none-vit", "1 0-1-fp32-none-vit"), ("1 3-1-bf16-none-resnet", "1 0-1-fp32-none-resnet")]
)
def test_other_backbones_follow_fp32_in_bf16(curves, found, expected):
    assert curves[found]["losses"] == pytest.approx(curves[expected]["losses"], rel=0.05)
