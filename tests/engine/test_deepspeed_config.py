"""The derived DeepSpeed dictionary: the plan's numbers, one owner per number, extra keys merged."""

import pytest

from simmim_scale.config.schema import EngineConfig, OptimizerConfig
from simmim_scale.engine.deepspeed_config import deepspeed_config, guards_itself
from simmim_scale.engine.offload import require_offload


def derive(extra=None, clip=5.0, **engine):
    return deepspeed_config(
        EngineConfig(**engine), OptimizerConfig(clip_grad=clip), micro_batch=4, accumulation=3, global_batch=24, extra=extra
    )


def test_the_plans_numbers_are_in_it():
    config = derive()
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["train_batch_size"] == 24


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_clipping_has_exactly_one_owner(stage, precision):
    config = derive(zero_stage=stage, precision=precision)
    by_us = guards_itself(EngineConfig(zero_stage=stage, precision=precision))
    assert (config["gradient_clipping"] == 0.0) is by_us
    assert by_us == ((stage, precision) in {(0, "fp32"), (2, "bf16")})


def test_deepspeed_guards_what_is_offloaded():
    config = derive(zero_stage=2, precision="bf16", offload_optimizer="cpu")
    assert config["gradient_clipping"] == 5.0
    assert config["bf16"]["check_grad_overflow"]
    assert "compute_grad_norm" not in config["zero_optimization"]
    assert derive(zero_stage=2, precision="bf16")["zero_optimization"]["compute_grad_norm"] is False


def test_no_clipping_is_zero_for_deepspeed():
    assert derive(clip=None)["gradient_clipping"] == 0.0


def test_precision_sections():
    assert not {"bf16", "fp16"} & set(derive(precision="fp32"))
    assert derive(precision="bf16", zero_stage=3)["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert derive(precision="bf16", zero_stage=2)["bf16"] == {"enabled": True, "check_grad_overflow": False}
    section = derive(precision="fp16", fp16_initial_scale_power=12, fp16_scale_window=50, fp16_min_scale=2)["fp16"]
    assert section["initial_scale_power"] == 12
    assert section["loss_scale_window"] == 50
    assert section["min_loss_scale"] == 2
    assert section["loss_scale"] == 0


def test_micro_batches_are_summed_in_fp32_where_deepspeed_can():
    assert derive(precision="bf16", zero_stage=2)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in derive(precision="bf16", zero_stage=0)


def test_extra_keys_merge_section_by_section():
    config = derive({"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}, zero_stage=2)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False, "compute_grad_norm": False}
    assert config["wall_clock_breakdown"] is True


def test_extra_is_not_shared_with_the_result():
    extra = {"flops_profiler": {"output": {"file": "here"}}}
    derive(extra)["flops_profiler"]["output"]["file"] = "there"
    assert extra["flops_profiler"]["output"]["file"] == "here"


def test_offloading_becomes_deepspeeds_sections():
    assert "offload_optimizer" not in derive(zero_stage=3)["zero_optimization"]
    assert "aio" not in derive(zero_stage=3, offload_optimizer="cpu")
    section = derive(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")["zero_optimization"]
    assert section["offload_optimizer"] == section["offload_param"] == {"device": "cpu", "pin_memory": True}
    config = derive(zero_stage=3, offload_optimizer="nvme", nvme_path="/disk")
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "nvme", "pin_memory": True, "nvme_path": "/disk"}
    assert config["aio"]["block_size"] == 2**20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "cpu needs ZeRO stage 1 or more, got zero_stage 0.*zero_stage=1"),
        ({"zero_stage": 2, "offload_optimizer": "nvme", "nvme_path": "/d"}, "nvme needs ZeRO stage 3"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "offload_parameters: cpu needs ZeRO stage 3"),
        ({"zero_stage": 3, "offload_optimizer": "nvme"}, "nvme_path: offload_optimizer nvme needs a directory"),
        ({"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": "/d"}, "got offload_optimizer none"),
    ],
)
def test_offloading_that_cannot_be_says_what_it_needs(settings, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


def test_a_disk_without_libaio_says_what_to_install(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    require_offload(EngineConfig(offload_optimizer="cpu"))
    with pytest.raises(ValueError, match=r"needs libaio.*apt install libaio-dev.*or choose cpu"):
        require_offload(EngineConfig(offload_optimizer="nvme", nvme_path="/disk"))


@pytest.mark.parametrize(
    ("extra", "key", "setting"),
    [
        ({"train_batch_size": 3}, "train_batch_size", "train.global_batch"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", "engine.zero_stage"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "engine.precision"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type", "optimizer"),
        ({"scheduler": {}}, "scheduler", "schedule"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow", "train.max_nonfinite_steps"),
    ],
)
def test_a_key_that_a_setting_owns_is_refused_by_name(extra, key, setting):
    with pytest.raises(ValueError, match=rf"deepspeed\.{key}: belongs to the setting {setting}"):
        derive(extra)
