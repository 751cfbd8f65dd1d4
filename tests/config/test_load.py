"""Reading configurations: merging, overrides, and errors that a person can act on."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from simmim_scale.config.document import documented_yaml
from simmim_scale.config.load import (
    ConfigError,
    _all_keys,
    _models_of,
    config_digest,
    load_config,
    load_source,
    resolved_yaml,
    validate,
)
from simmim_scale.config.schema import Config
from simmim_scale.config.yaml_source import parse_value

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_base_files_merge_key_by_key_and_the_nearest_wins(tmp_path):
    write(tmp_path, "a.yaml", "mask: {cell: 16, ratio: 0.5}\nseed: 1\n")
    write(tmp_path, "sub/b.yaml", "base: ../a.yaml\nmask: {ratio: 0.7}\n")
    config = load_config(write(tmp_path, "sub/c.yaml", "base: b.yaml\nseed: 3\n"), ["mask.sampler=block"])
    assert (config.mask.cell, config.mask.ratio, config.mask.sampler, config.seed) == (16, 0.7, "block", 3)


def test_later_bases_of_a_list_win(tmp_path):
    write(tmp_path, "a.yaml", "seed: 1\nmask: {cell: 16}\n")
    write(tmp_path, "b.yaml", "seed: 2\n")
    config = load_config(write(tmp_path, "c.yaml", "base: [a.yaml, b.yaml]\n"))
    assert (config.seed, config.mask.cell) == (2, 16)


def test_another_kind_of_schedule_keeps_what_both_have_and_drops_the_rest(tmp_path):
    write(tmp_path, "a.yaml", "schedule: {name: cosine, min_lr: 1e-6, warmup_epochs: 3}\n")
    config = load_config(write(tmp_path, "b.yaml", "base: a.yaml\nschedule: {name: step, gamma: 0.5}\n"))
    assert config.schedule.name == "step"
    assert config.schedule.gamma == 0.5
    assert config.schedule.warmup_epochs == 3


def test_another_kind_of_model_keeps_the_size_and_says_where_it_is_from(tmp_path):
    path = write(
        tmp_path,
        "a.yaml",
        "model:\n  name: swin_v2\n  image_size: 64\n  depths: [1, 1]\n  num_heads: [2, 4]\n  extra_norm_period: 2\n",
    )
    source = load_source(path, ["model.name=swin", "mask.cell=16"])
    model = validate(source).model
    assert (model.name, model.image_size, model.depths) == ("swin", (64, 64), (1, 1))
    assert ("model", "extra_norm_period") not in source.places
    assert str(source.places["model", "image_size"]) == f"{path}:3"
    own = load_config(path, ["model.name=mine:build", "mask.cell=16"]).model
    assert (own.name, own.image_size) == ("mine:build", (64, 64))


def test_an_error_does_not_blame_an_override_of_another_key(tmp_path):
    path = write(tmp_path, "a.yaml", "data:\n  workers: 0\n")
    text = message(path, "data.validation=null", "model.in_chans=1")
    assert text.startswith(f"{path}:1: data.mean")


def test_one_length_of_the_run_replaces_the_other(tmp_path):
    path = write(tmp_path, "a.yaml", "train: {epochs: 10}\n")
    assert load_config(path, ["train.steps=5"]).train.epochs is None
    both = message(path, "train.steps=5", "train.epochs=3")
    assert "either epochs or steps" in both
    assert "train.steps=5" in both or "train.epochs=3" in both


def test_scientific_notation_is_a_number(tmp_path):
    config = load_config(write(tmp_path, "a.yaml", "optimizer: {base_lr: 3e-4, eps: 1E-8}\n"), ["optimizer.weight_decay=5e-2"])
    assert config.optimizer.base_lr == 3e-4
    assert config.optimizer.weight_decay == 0.05


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_an_override(value):
    assert parse_value(repr(value)) == value


def test_unknown_key_names_file_line_and_suggestion(tmp_path):
    path = write(tmp_path, "a.yaml", "seed: 1\nmask:\n  ration: 0.5\n")
    assert message(path) == f"{path}:3: mask.ration: unknown key. Did you mean 'ratio'?"


def test_a_key_in_the_wrong_section_is_pointed_to_its_own(tmp_path):
    path = write(tmp_path, "a.yaml", "train: {weight_decay: 0.1}\n")
    assert "Did you mean 'optimizer.weight_decay'?" in message(path)


def test_unknown_key_of_an_override_names_the_override(tmp_path):
    path = write(tmp_path, "a.yaml", "seed: 1\n")
    assert message(path, "train.epoch=4") == "override 'train.epoch=4': train.epoch: unknown key. Did you mean 'epochs'?"


def test_every_problem_is_reported_at_once_with_its_line(tmp_path):
    path = write(tmp_path, "a.yaml", "seed: -1\nmask: {ratio: 1.5}\nmodel:\n  name: swin\n  depths: [2, two]\n")
    text = message(path)
    assert f"{path}:1: seed" in text
    assert f"{path}:2: mask.ratio" in text
    assert f"{path}:5: model.depths.1" in text


@pytest.mark.parametrize("value", ['"0.6"', "true", "[0.6]", "a lot"])
def test_wrong_types_are_errors(tmp_path, value):
    assert "mask.ratio" in message(write(tmp_path, "a.yaml", f"mask: {{ratio: {value}}}\n"))


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.0001])
def test_mask_ratio_outside_zero_one_is_an_error(tmp_path, ratio):
    assert "mask.ratio" in message(write(tmp_path, "a.yaml", f"mask: {{ratio: {ratio}}}\n"))


def test_cell_that_does_not_divide_the_image(tmp_path):
    path = write(tmp_path, "a.yaml", "model: {name: swin, image_size: 224}\nmask:\n  cell: 48\n")
    assert message(path).startswith(f"{path}:3: mask.cell: must divide the image")


def test_misspelt_kind_of_model(tmp_path):
    text = message(write(tmp_path, "a.yaml", "model: {name: swin_v3}\n"))
    assert "model.name" in text
    assert "swin_v2" in text


def test_files_that_cannot_be_read(tmp_path):
    existing = write(tmp_path, "demo.yaml", "seed: 1\n")
    assert str(existing) in message(tmp_path / "dem.yaml")
    assert "not valid YAML" in message(write(tmp_path, "bad.yaml", "a: [1\n"))
    assert "empty" in message(write(tmp_path, "empty.yaml", ""))
    assert "mapping" in message(write(tmp_path, "list.yaml", "- 1\n"))
    assert "given twice" in message(write(tmp_path, "twice.yaml", "seed: 1\nseed: 2\n"))


def test_a_circle_of_bases_ends(tmp_path):
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    assert "circle" in message(write(tmp_path, "b.yaml", "base: a.yaml\n"))


@pytest.mark.parametrize("override", ["seed", "=3", ".=1", "mask..ratio=1", "seed=[1"])
def test_malformed_overrides(tmp_path, override):
    assert "override" in message(write(tmp_path, "a.yaml", "seed: 1\n"), override)


def test_a_config_is_frozen(tmp_path):
    config = load_config(write(tmp_path, "a.yaml", "seed: 1\n"))
    with pytest.raises(ValidationError):
        config.mask.ratio = 0.5


def test_resolved_and_documented_forms_load_back_equal(tmp_path):
    for path in sorted(CONFIGS.rglob("*.yaml")):
        source = load_source(path)
        if "sweep" in source.tree:  # a description of many runs: tests/sweeps
            continue
        config = validate(source)
        assert load_config(write(tmp_path, "resolved.yaml", resolved_yaml(config))) == config
        assert load_config(write(tmp_path, "documented.yaml", documented_yaml(config, source))) == config


def test_every_shipped_config_opens_with_command_hardware_and_expectation():
    paths = sorted(CONFIGS.rglob("*.yaml"))
    assert paths
    for path in paths:
        comment = "".join(line for line in path.read_text().splitlines(keepends=True)[:12] if line.startswith("#"))
        assert all(word in comment for word in ("command:", "hardware:", "expected:")), path


def test_every_setting_is_documented():
    undocumented = [key for key in _all_keys(Config) if not _field(Config, key).description]
    assert not undocumented


def _field(model, dotted):
    name, _, rest = dotted.partition(".")
    field = model.model_fields[name]
    if not rest:
        return field
    for child in _models_of(field.annotation):
        if rest.partition(".")[0] in child.model_fields:
            return _field(child, rest)
    raise AssertionError(dotted)


def test_digest_ignores_what_it_is_told_to():
    config = load_config(CONFIGS / "pretrain/swin_b_100ep.yaml")
    other = load_config(CONFIGS / "pretrain/swin_b_100ep.yaml", ["report.tensorboard=true"])
    assert config_digest(config) != config_digest(other)
    assert config_digest(config, ignore=["report"]) == config_digest(other, ignore=["report"])
