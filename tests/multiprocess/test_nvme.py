"""ZeRO-Infinity on two ranks: optimizer and parameters on a disk give the losses of a run without, also after a save."""

import json

import pytest

from tests.multiprocess.engine_ranks import finish_ranks, start_ranks

MIB = 2**20
PLAIN = {"zero_stage": 3, "precision": "fp32"}
OPTIMIZER = {**PLAIN, "offload_optimizer": "nvme"}
PARAMETERS = {**PLAIN, "offload_optimizer": "cpu", "offload_parameters": "nvme"}
BOTH = {**PLAIN, "offload_optimizer": "nvme", "offload_parameters": "nvme"}
CHECKPOINTED = {**BOTH, "activation_checkpointing": "block"}
HALF = {**BOTH, "precision": "bf16"}

pytestmark = pytest.mark.slow  # the first time on a machine DeepSpeed compiles its async_io, minutes; later starts find it


def name(case: dict) -> str:
    return "-".join(map(str, case.values()))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs libaio and its headers (apt install libaio-dev)")
    directory = tmp_path_factory.mktemp("nvme")
    cases = directory / "cases.json"
    cases.write_text(json.dumps([PLAIN, OPTIMIZER, PARAMETERS, BOTH, CHECKPOINTED, HALF]))
    processes = start_ranks("policies_worker.py", 2, str(directory), str(cases), "swin_v2_wide")
    outputs = finish_ranks(processes, timeout=1800)
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("RESULT policies ")]
    return [json.loads(line.removeprefix("RESULT policies ")) for line in lines]


@pytest.mark.parametrize("case", [OPTIMIZER, PARAMETERS, BOTH, CHECKPOINTED], ids=name)
def test_a_disk_changes_no_loss_and_the_run_goes_on_from_its_save(found, case):
    for rank in found:
        assert rank[name(case)]["losses"] == pytest.approx(rank[name(PLAIN)]["losses"], abs=1e-6)
        assert rank[name(case)]["resumed"] == rank[name(case)]["losses"][2:]


def test_bf16_goes_on_from_its_save(found):
    assert found[0][name(HALF)]["resumed"] == found[0][name(HALF)]["losses"][2:]


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        (OPTIMIZER, {"optimizer"}),
        (PARAMETERS, {"float32params"}),
        (BOTH, {"optimizer", "float32params"}),
        (HALF, {"optimizer", "bfloat16params"}),
    ],
    ids=["optimizer", "parameters", "both", "bf16"],
)
def test_it_really_lies_on_the_disk(found, case, kinds):
    for rank in found:
        on_disk = rank[name(case)]["on_disk"]
        assert set(on_disk) == kinds
        # Matrices of at least a MiB a rank go there: 12 MiB of the parameters, and three times that of optimizer state.
        assert all(size >= (12 if "float32" in kind else 4) * MIB for kind, size in on_disk.items())
