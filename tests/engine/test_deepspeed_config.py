"""The derived DeepSpeed dictionary: the plan's numbers, one owner per number, extra keys merged."""

import pytest

from simmim_scale.config.schema import EngineConfig, OptimizerConfig
from simmim_scale.engine.deepspeed_config import deepspeed_config, guards_itself
from simmim_scale.engine.offload import prepare_offload


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
    extra = {"comms_logger": {"output": {"file": "here"}}}
    derive(extra)["comms_logger"]["output"]["file"] = "there"
    assert extra["comms_logger"]["output"]["file"] == "here"


def test_a_profiler_that_counts_wrongly_is_refused():
    with pytest.raises(ValueError, match=r"deepspeed.flops_profiler: counts no parameters.*Use simmim describe"):
        derive({"flops_profiler": {"enabled": True}})


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
    prepare_offload(EngineConfig(offload_optimizer="cpu"), rank=0)
    with pytest.raises(ValueError, match=r"needs libaio.*apt install libaio-dev.*or choose cpu"):
        prepare_offload(EngineConfig(offload_optimizer="nvme", nvme_path="/disk"), rank=0)


def test_a_disk_is_cleared_of_this_ranks_last_start_and_must_be_writable(monkeypatch, tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    for rank in (0, 1):
        left = tmp_path / f"zero_stage_3/optimizer/rank{rank}/139.tensor.swp"
        left.parent.mkdir(parents=True)
        left.touch()
    prepare_offload(EngineConfig(offload_optimizer="nvme", nvme_path=str(tmp_path)), rank=1)
    assert [file.parent.name for file in tmp_path.rglob("*.swp")] == ["rank0"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"nvme_path: a directory.*got .*/file \(Not a directory\)"):
        prepare_offload(EngineConfig(offload_optimizer="nvme", nvme_path=str(tmp_path / "file")), rank=0)


def test_what_is_on_a_disk_is_not_in_memory_as_well():
    section = derive(zero_stage=3, offload_optimizer="nvme", offload_parameters="nvme", nvme_path="/disk")["zero_optimization"]
    assert section["offload_param"]["max_in_cpu"] == 0
    assert section["sub_group_size"] == 10**8
    sized = derive({"zero_optimization": {"offload_param": {"buffer_size": 7}}}, zero_stage=3, offload_parameters="cpu")
    assert sized["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True, "buffer_size": 7}


@pytest.mark.parametrize(
    ("extra", "key", "setting"),
    [
        ({"train_batch_size": 3}, "train_batch_size", "train.global_batch"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", "engine.zero_stage"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "engine.precision"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param.device",
            "engine.offload_p",
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type", "optimizer"),
        ({"scheduler": {}}, "scheduler", "schedule"),
        ({"wandb": {"enabled": True}}, "wandb.enabled", "report.wandb"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile", "engine.compile"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal", "checkpoint"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow", "train.max_nonfinite_steps"),
    ],
)
def test_a_key_that_a_setting_owns_is_refused_by_name(extra, key, setting):
    with pytest.raises(ValueError, match=rf"deepspeed\.{key}: belongs to the setting {setting}"):
        derive(extra)
