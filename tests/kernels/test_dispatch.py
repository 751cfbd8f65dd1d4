"""Choosing an implementation: first that can run, refusals with reasons, no silent fall-back."""

import types

import pytest
import torch

from simmim_scale.kernels import dispatch
from simmim_scale.kernels.dispatch import Implementation, choose, describe

CPU = torch.device("cpu")
FUNCTIONS = {"norm": ("layer_norm", "post_norm", "pre_norm")}  # of ops with several


@pytest.fixture
def table(monkeypatch):
    """An op with one implementation that lacks a package, one that refuses half precision, and one that always runs."""
    picky = types.SimpleNamespace(
        unavailable=lambda device, dtype, **facts: "it is fp32 only" if dtype != torch.float32 else None, op=lambda: "picky"
    )
    plain = types.SimpleNamespace(unavailable=lambda device, dtype, **facts: None, op=lambda: "plain")
    real_import = dispatch.importlib.import_module
    fakes = {"fake.picky": picky, "fake.plain": plain}
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: fakes.get(name) or real_import(name))
    entries = (
        Implementation("absent", "fake.absent", needs="no_such_package"),
        Implementation("picky", "fake.picky"),
        Implementation("plain", "fake.plain"),
    )
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", {"op": entries})
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.mark.usefixtures("table")
def test_auto_takes_the_first_that_can_run_and_says_why():
    choice = choose("op", "auto", device=CPU, dtype=torch.float32)
    assert (choice.name, choice.function()) == ("picky", "picky")
    assert "no_such_package is not installed" in choice.reason


@pytest.mark.usefixtures("table")
def test_auto_moves_on_when_the_type_does_not_fit():
    choice = choose("op", "auto", device=CPU, dtype=torch.float16)
    assert choice.name == "plain"
    assert "picky: it is fp32 only" in choice.reason


@pytest.mark.usefixtures("table")
def test_a_named_implementation_never_falls_back():
    with pytest.raises(ValueError, match=r"picky cannot run here: it is fp32 only\. Can run here: plain"):
        choose("op", "picky", device=CPU, dtype=torch.float16)


@pytest.mark.usefixtures("table")
def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="Known: auto, absent, picky, plain"):
        choose("op", "fast", device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="unknown op 'other'"):
        choose("other", "auto", device=CPU, dtype=torch.float32)


def test_describe_gives_a_row_per_op():
    rows = describe({"window_attention": "reference"}, device=CPU, dtype=torch.float32)
    assert rows == [{"op": "window_attention", "implementation": "reference", "reason": "asked for by name"}]


def test_every_entry_of_the_real_table_can_be_imported_and_answers():
    for op in dispatch.IMPLEMENTATIONS:
        assert dispatch.implementations(op)[-1] == "reference"
        for entry in dispatch.IMPLEMENTATIONS[op]:
            if entry.needs is None:
                module = dispatch.importlib.import_module(entry.module)
                reason = module.unavailable(CPU, torch.float32, head_dim=32, tokens=144)
                assert reason is None or reason.strip()
                assert all(callable(getattr(module, name)) for name in FUNCTIONS.get(op, (op,)))
