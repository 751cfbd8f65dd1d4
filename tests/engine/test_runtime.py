"""The process's place in its job, the device and the precisions: what is decided before any process group exists."""

import pytest
import torch

from simmim_scale.engine import precision
from simmim_scale.engine.precision import require_precision
from simmim_scale.engine.runtime import choose_device, launcher_place

LAUNCHED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_alone_without_a_launcher():
    assert launcher_place({}) == {"local_rank": 0, "world_size": 1}
    assert launcher_place({"MASTER_PORT": "29500"})["world_size"] == 1


def test_the_place_that_a_launcher_gave():
    assert launcher_place(LAUNCHED) == {"local_rank": 1, "world_size": 8}


def test_half_an_environment_is_an_error_not_a_hang():
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE are set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"):
        launcher_place({"RANK": "0", "WORLD_SIZE": "2"})


def test_devices(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(ValueError, match="no GPU here"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="one of auto, cpu, cuda, got 'tpu'"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert choose_device("auto") == "cpu"


@pytest.mark.parametrize("wanted", ["bf16", "fp16"])
def test_a_precision_that_the_device_lacks_is_refused_with_what_it_has(monkeypatch, wanted):
    monkeypatch.setattr(precision, "_supports", lambda name, _device: name != wanted)
    other = {"bf16": "fp16", "fp16": "bf16"}[wanted]
    with pytest.raises(
        ValueError, match=f"{wanted} was asked for, but this CPU has no {wanted} arithmetic. Choose fp32 or {other}"
    ):
        require_precision(wanted, torch.device("cpu"))
    require_precision("fp32", torch.device("cpu"))
    require_precision(other, torch.device("cpu"))


@pytest.mark.parametrize(("capability", "expected"), [((7, 0), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_came_with_ampere(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert precision._supports("bf16", torch.device("cuda", 0)) is expected
    assert precision._supports("fp16", torch.device("cuda", 0))
