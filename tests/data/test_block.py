"""Batches in one block of shared memory: what comes out is what went in, whatever its type and layout, in another process too."""

import numpy as np
import torch
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data._utils.pin_memory import pin_memory as torch_pin_memory

from simmim_scale.data.block import ALIGNMENT, Block

DTYPES = (torch.uint8, torch.bool, torch.int64, torch.float32, torch.bfloat16)


def tensor_of(dtype, shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape)).to(dtype)


def equal(a, b):
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)), min_size=1, max_size=6
    )
)
def test_what_goes_in_comes_out(kinds):
    batch = {f"entry{i}": tensor_of(dtype, shape, i) for i, (dtype, shape) in enumerate(kinds)}
    block = Block.pack(batch)
    assert equal(block.unpack(), batch)
    assert block.memory.is_shared()
    assert all(part.offset % ALIGNMENT == 0 for part in block.parts.values())


def test_layouts_are_kept_and_gaps_are_not():
    image = tensor_of(torch.uint8, (4, 3, 6, 5)).contiguous(memory_format=torch.channels_last)
    every_other = tensor_of(torch.int64, (8, 4))[::2]
    out = Block.pack({"image": image, "rows": every_other}).unpack()
    assert out["image"].is_contiguous(memory_format=torch.channels_last)
    assert out["rows"].is_contiguous()
    assert equal(out, {"image": image, "rows": every_other})


def test_entries_do_not_overlap():
    batch = {"a": torch.zeros(5, dtype=torch.uint8), "b": torch.zeros(3), "c": torch.zeros(2, dtype=torch.int64)}
    out = Block.pack(batch).unpack()
    for number, tensor in enumerate(out.values(), 1):
        tensor.fill_(number)
    assert [set(tensor.flatten().tolist()) for tensor in out.values()] == [{1}, {2}, {3}]


def _send(queue, done):
    queue.put(Block.pack({"image": tensor_of(torch.uint8, (2, 3, 4, 4)), "valid": torch.tensor([True, False])}))
    done.wait(60)


def test_it_reaches_another_process_as_one_piece():
    context = torch.multiprocessing.get_context("fork")
    queue, done = context.Queue(), context.Event()
    process = context.Process(target=_send, args=(queue, done))
    process.start()
    block = queue.get(timeout=120)
    done.set()
    process.join(60)
    out = block.unpack()
    assert equal(out, {"image": tensor_of(torch.uint8, (2, 3, 4, 4)), "valid": torch.tensor([True, False])})
    assert len({tensor.untyped_storage().data_ptr() for tensor in out.values()}) == 1


def test_dataloader_moves_it_to_page_locked_memory_as_one_piece(monkeypatch):
    moved = []

    def pin(tensor):
        moved.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)  # the real one needs a GPU
    batch = {"image": tensor_of(torch.uint8, (2, 3, 4, 4)), "label": torch.tensor([3, 4])}
    pinned, damaged = torch_pin_memory((Block.pack(batch), []))
    assert len(moved) == 1
    assert damaged == []
    assert not pinned.memory.is_shared()
    assert equal(pinned.unpack(), batch)
