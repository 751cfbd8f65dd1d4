"""Memory, time and advice of `simmim plan` against arithmetic done by hand."""

from dataclasses import replace

import pytest

from simmim_scale.config.advice import Machine, all_options, best, reason
from simmim_scale.config.cluster import DEVICES, find_device, find_link
from simmim_scale.config.memory import (
    GIB,
    BlockCost,
    Linear,
    ModelCost,
    Sharding,
    buffer_bytes,
    estimate,
    largest_micro_batch,
    state_bytes,
)
from simmim_scale.config.step_time import communication_bytes, step_time

MIB = 2**20


def block(stage, input_mib, saved_mib, kept_mib, multiply_adds):
    def line(mib):
        return Linear(0, mib * MIB)

    return BlockCost(stage, line(input_mib), line(saved_mib), line(kept_mib), multiply_adds)


# Two early blocks, one late: saved 10, 20, 5 MiB a sample, inputs 1, 2, 1, of which results of products are 4, 6, 2; outside 3.
MODEL = ModelCost(
    sizes=(900_000_000, 100_000_000),
    largest_block=100_000_000,
    blocks=(block(0, 1, 10, 4, 10**9), block(1, 2, 20, 6, 2 * 10**9), block(2, 1, 5, 2, 3 * 10**9)),
    outside=Linear(7 * MIB, 3 * MIB),
    largest_tensor=Linear(0, 2 * MIB),
    multiply_adds=8 * 10**9,
)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("none", 3 + 10 + 20 + 5),
        # Backward of the second block comes when the third one's input is gone: 3 + 1 + 20.
        ("block", 3 + 1 + 20),
        ("stage", max(3 + 1 + 2 + 5, 3 + 1 + 20)),
        ("selective", 3 + (1 + 4) + 20),
        ("offload", 3 + 20),
    ],
)
def test_activations_at_their_peak(policy, expected):
    assert MODEL.activations(policy, 4) == (7 + 4 * expected) * MIB


def test_shares_of_the_forward_that_run_again():
    assert [MODEL.recomputed(policy) for policy in ("none", "selective", "stage", "block", "offload")] == [
        0,
        0,
        3 / 8,
        6 / 8,
        6 / 8,
    ]


def test_a_turn_of_attention_exists_beside_what_its_block_saves():
    early = block(0, 1, 8, 3, 10**9)
    turns = replace(MODEL, blocks=(replace(early, again=10**8, in_turn=Linear(4 * MIB, 12 * MIB), turn=0.25), *MODEL.blocks[2:]))
    # In backward of the first block: outside, its own 8 a sample, and a quarter of one image's 4 + 12.
    assert turns.activations("block", 2) == (7 + 2 * (3 + 8) + 4) * MIB
    assert [turns.recomputed(policy) for policy in ("none", "selective", "stage")] == [1 / 80, 2 / 80, 11 / 80]


@pytest.mark.parametrize(
    ("half", "stage", "parameters", "gradients", "optimizer"),
    [
        (True, 0, 2, 2, 12),
        (True, 1, 2, 4, 12 / 4),
        (True, 2, 2, 4 / 4, 12 / 4),
        (True, 3, 2 / 4, 4 / 4, 12 / 4),
        (False, 0, 4, 4, 8),
        (False, 1, 4, 4, 12 / 4),
        (False, 2, 4, 4 / 4, 12 / 4),
        (False, 3, 4 / 4, 4 / 4, 12 / 4),
    ],
)
def test_bytes_of_an_element_on_four_ranks(half, stage, parameters, gradients, optimizer):
    found = state_bytes(10**9, Sharding(stage=stage, ranks=4, half=half))
    assert found == {"parameters": parameters * 1e9, "gradients": gradients * 1e9, "optimizer": optimizer * 1e9}


def test_offloading_moves_state_to_the_cpu_and_the_disk_leaves_buffers_there():
    cpu = estimate(MODEL, Sharding(3, 4, True, "cpu", "cpu"), policy="offload", micro_batch=2)
    assert (cpu.parameters, cpu.gradients, cpu.optimizer) == (0, 0, 0)
    assert cpu.cpu == (0.5 + 1 + 3) * 1e9 + 2 * (1 + 2 + 1) * MIB
    disk = estimate(MODEL, Sharding(3, 4, True, "nvme", "nvme"), policy="none", micro_batch=2)
    assert (disk.parameters, disk.optimizer) == (0, 0)
    assert disk.cpu == 4 * 4 * 1e8 + 2 * 12 * 1e8 / 4, "four sub-groups in fp32, twelve parts of parameters in bf16"


def test_buffers_of_gathers_and_reductions():
    sharding = Sharding(3, 4, True, reduce_bucket=10**8, live=5 * 10**8, reuse=0, persistence=0)
    assert buffer_bytes(MODEL, sharding) == 2 * (10**8 + 3 * 10**8)
    assert buffer_bytes(MODEL, replace(sharding, reuse=2 * 10**9)) == 2 * (10**8 + 5 * 10**8), "all that may live at once"
    assert buffer_bytes(MODEL, replace(sharding, stage=2, buckets=2)) == 2 * 2 * 10**8


@pytest.mark.parametrize("room_gib", [5, 12, 20, 40])
@pytest.mark.parametrize("policy", ["none", "block", "selective"])
def test_the_largest_micro_batch_is_what_trying_all_finds(room_gib, policy):
    sharding = Sharding(2, 8, True)
    fits = [n for n in range(1, 301) if estimate(MODEL, sharding, policy=policy, micro_batch=n).device <= room_gib * GIB]
    assert largest_micro_batch(MODEL, sharding, policy=policy, room=room_gib * GIB, at_most=300) == max(fits, default=0)


def test_what_each_rank_sends():
    def sent(stage, accumulation):
        return communication_bytes(10**9, Sharding(stage, 4, True), accumulation=accumulation)

    whole = 2 * 10**9 * 3 / 4
    assert [sent(stage, 1) for stage in range(4)] == [2 * whole, 3 * whole, 2 * whole, 3 * whole]
    assert [sent(stage, 5) for stage in range(4)] == [2 * whole, 3 * whole, 6 * whole, 15 * whole]
    assert communication_bytes(10**9, Sharding(3, 1, True), accumulation=1) == 0


def test_a_step_by_hand():
    device, link = find_device("h100"), find_link("25", DEVICES["H100"], nodes=2)
    arguments = {"policy": "block", "micro_batch": 2, "accumulation": 3, "device": device, "link": link, "gpus_per_node": 8}
    found = step_time(MODEL, Sharding(2, 16, True), **arguments)
    assert found.matrix == pytest.approx(2 * 8e9 * 6 * 3.75 / (0.6 * 989.4e12))
    assert found.elementwise == pytest.approx(6 * (4 / 3) * 3 * (7 + 2 * 38) * MIB / (0.8 * 3350e9))
    assert found.optimizer == pytest.approx(28 * 1e9 / 16 / (0.8 * 3350e9))
    sending = 4 * 2e9 * 15 / 16 / (0.8 * 25e9)
    assert found.communication == pytest.approx(sending - 0.5 * (found.matrix + found.elementwise))
    assert found.seconds == pytest.approx(found.matrix + found.elementwise + found.optimizer + found.communication)


@pytest.mark.parametrize(
    ("text", "nodes", "per_gpu"),
    [
        (None, 1, 450e9), ("NVLink", 1, 450e9), ("pcie4", 1, 32e9), (None, 4, 50e9), ("ib-200", 4, 25e9),
        ("ethernet-100", 4, 12.5e9 / 8), ("40", 4, 40e9), ("2.5 GB/s", 1, 2.5e9),
    ],
)  # fmt: skip
def test_links(text, nodes, per_gpu):
    assert find_link(text, DEVICES["H100"], nodes=nodes).per_gpu(8) == per_gpu


@pytest.mark.parametrize("text", ["carrier pigeon", "ib-0", "0", "-3", "ib-"])
def test_an_unknown_link_lists_the_known_ones(text):
    with pytest.raises(ValueError, match=r"--interconnect: nvlink, pcie.*GB/s as a positive number, got"):
        find_link(text, DEVICES["H100"], nodes=1)


def test_a_link_inside_a_node_does_not_join_nodes():
    with pytest.raises(ValueError, match=r"ends at a node's edge, got 2 nodes.*ib-400"):
        find_link("nvlink", DEVICES["H100"], nodes=2)


def machine(memory_gib, nodes=1):
    device = DEVICES["H100"]
    return Machine(nodes, 8, device, find_link(None, device, nodes=nodes), memory_gib * GIB)


SHARDINGS = [Sharding(stage, 8, True) for stage in range(4)] + [Sharding(3, 8, True, "cpu", "cpu")]


def test_the_fastest_that_fits_is_chosen_and_the_reason_says_what_does_not():
    options = all_options(MODEL, SHARDINGS, machine(12), global_batch=512)
    chosen = best(options)
    timed = [option.time.seconds for option in options if option.time]
    assert chosen.time.seconds <= 1.02 * min(timed)
    assert chosen.memory.device <= 12 * GIB * 0.95
    assert chosen.micro_batch * chosen.accumulation * 8 == 512
    assert f"train.micro_batch={chosen.micro_batch}" in chosen.overrides()
    assert "do not fit" in reason(chosen, options)
    assert not any(option.time for option in options if option.sharding.stage == 0), "16 bytes an element are 15 GiB"


def test_with_room_the_plainest_way_among_equals():
    plain = [Sharding(stage, 1, True) for stage in range(4)]
    single = Machine(1, 1, DEVICES["H100"], find_link(None, DEVICES["H100"], nodes=1), 80 * GIB)
    chosen = best(all_options(MODEL, plain, single, global_batch=64))
    assert (chosen.sharding.stage, chosen.policy) == (0, "none")


def test_nothing_fits_says_what_the_smallest_needs():
    with pytest.raises(ValueError, match=r"nothing fits: even ZeRO-3, optimizer on cpu.*needs \d\.\d GiB of the GPU"):
        best(all_options(MODEL, SHARDINGS, machine(1), global_batch=512))


def test_a_batch_that_the_gpus_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="multiple of the number of ranks, got 100 for 8 ranks"):
        all_options(MODEL, SHARDINGS, machine(80), global_batch=100)
