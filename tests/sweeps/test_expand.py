"""From the file of a sweep to its command lines, and what is refused before anything is trained."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmim_scale.config.load import ConfigError, load_config
from simmim_scale.sweeps.expand import check, expand, slug
from simmim_scale.sweeps.spec import load_sweep


def runs_of(path, **options):
    return expand(load_sweep(path), path, **options)


def test_all_combinations_in_order_with_their_settings(write_sweep, sweep_tree, tmp_path):
    runs = runs_of(write_sweep(sweep_tree))
    assert [run.labels for run in runs] == [("8 px", ".3"), ("8 px", ".5"), ("16 px", ".3"), ("16 px", ".5")]
    assert [run.name for run in runs] == ["8-px_3", "8-px_5", "16-px_3", "16-px_5"]
    check(runs)
    (stage,) = runs[2].stages
    config = load_config(stage.config, stage.overrides)
    assert (config.mask.cell, config.mask.ratio, config.seed) == (16, 0.3, 3)
    assert config.run_dir == str(tmp_path / "runs/tried/16-px_3/pretrain")
    assert stage.arguments[0] == "pretrain"


def test_overrides_win_and_may_name_a_stage(write_sweep, sweep_tree):
    sweep_tree["stages"]["again"] = {"config": "base.yaml", "init_from": "pretrain"}
    path = write_sweep(sweep_tree)
    runs = runs_of(path, overrides=["seed=5", "again:train.steps=9", "run_dir=elsewhere"])
    first, second = (load_config(stage.config, stage.overrides) for stage in runs[0].stages)
    assert (first.seed, first.train.steps, second.seed, second.train.steps) == (5, 4, 5, 9)
    assert second.init_from == first.run_dir
    assert second.mask.cell == 8, "an axis varies the first stage"
    assert len({stage.run_dir for run in runs for stage in run.stages}) == 8, "no two trainings share a directory"
    assert "elsewhere" not in first.run_dir
    with pytest.raises(ConfigError, match=r"a stage of the sweep before the colon \(pretrain, again\), got 'other'"):
        runs_of(path, overrides=["other:seed=1"])


def test_a_value_may_set_something_in_a_later_stage(write_sweep, sweep_tree):
    sweep_tree["stages"]["again"] = {"config": "base.yaml", "init_from": "pretrain"}
    sweep_tree["axes"][0]["values"]["8 px"]["again:train.steps"] = 7
    runs = runs_of(write_sweep(sweep_tree))
    steps = [[load_config(stage.config, stage.overrides).train.steps for stage in run.stages] for run in runs]
    assert steps == [[4, 7], [4, 7], [4, 4], [4, 4]]
    sweep_tree["axes"][0]["values"]["8 px"]["other:train.steps"] = 7
    with pytest.raises(
        ConfigError, match=r"'other:train\.steps': a stage of the sweep before the colon \(pretrain, again\), got 'other'"
    ):
        runs_of(write_sweep(sweep_tree))


def test_reduced_keeps_the_first_stage_and_changes_settings_and_axes(write_sweep, sweep_tree, tmp_path):
    sweep_tree["stages"]["again"] = {"config": "base.yaml", "init_from": "pretrain"}
    (tmp_path / "small.yaml").write_text("train: {steps: 2, global_batch: 2}\nmodel: {embed_dim: 8}\n")
    sweep_tree["reduced"] = {"config": "small.yaml", "settings": {"seed": 9}, "axes": {"ratio": {".7": {"mask.ratio": 0.7}}}}
    runs = runs_of(write_sweep(sweep_tree), reduced=True)
    assert [run.labels for run in runs] == [("8 px", ".7"), ("16 px", ".7")]
    (stage,) = runs[1].stages
    config = load_config(stage.config, stage.overrides)
    assert (config.train.steps, config.train.global_batch, config.model.embed_dim, config.seed) == (2, 2, 8, 9)
    assert (config.mask.cell, config.mask.ratio, config.model.window_size) == (16, 0.7, 4)
    assert "tried-reduced" in str(stage.run_dir)


def test_a_value_can_be_a_file_and_combinations_can_be_left_out(write_sweep, sweep_tree, tmp_path):
    (tmp_path / "other.yaml").write_text("base: base.yaml\nseed: 11\n")
    sweep_tree["axes"][0]["values"]["from a file"] = "other.yaml"
    sweep_tree["leave_out"] = [{"cell": "from a file", "ratio": ".3"}, {"cell": "8 px"}]
    sweep_tree["stages"]["pretrain"]["settings"] = {}
    runs = runs_of(write_sweep(sweep_tree))
    assert [run.label for run in runs] == ["16 px, .3", "16 px, .5", "from a file, .5"]
    (stage,) = runs[2].stages
    config = load_config(stage.config, stage.overrides)
    assert (config.seed, config.mask.ratio, config.mask.cell) == (11, 0.5, 8)


def vary(tree, values):
    tree["axes"][0]["values"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: vary(tree, {"x": {"mask.cel": 8}}), r"x, \.3 \(pretrain\): .*mask\.cel: unknown key.*'cell'"),
        (lambda tree: vary(tree, {"x": {"mask.cell": 24}}), r"x, \.3 \(pretrain\): .*must divide the image"),
        (lambda tree: vary(tree, {"x": "nowhere.yaml"}), r"nowhere\.yaml"),
        (lambda tree: tree["axes"][0].update(values={}), "at least one, got none"),
        (lambda tree: tree["stages"]["pretrain"].update(confg="x"), r"unknown key\. Did you mean 'config'"),
        (lambda tree: tree["stages"]["pretrain"].update(init_from="later"), r"an earlier stage \(none\), got 'later'"),
        (lambda tree: tree.update(leave_out=[{"cell": "8px"}]), r"a value of cell .*got '8px'\. Did you mean '8 px'"),
        (lambda tree: tree.update(leave_out=[{"cells": "8 px"}]), r"an axis \(cell, ratio\), got 'cells'"),
        (lambda tree: vary(tree, {"8  px": {"mask.cell": 8}}), r"two runs would be called 8-px_3, 8-px_5"),
        (lambda tree: tree.update(layout="grid", axes=tree["axes"][:1]), "a grid has two axes, got 1"),
        (lambda tree: tree["published"]["values"].update({"8 px, .3": [1.0, 2.0]}), r"one figure per column \(1\)"),
        (lambda tree: tree.update(reduced={"stages": ["x"]}), r"stages of this sweep \(pretrain\), got x"),
        (lambda tree: tree.update(reduced={"axes": {"x": {"y": {}}}}), r"axes of this sweep \(cell, ratio\), got x"),
        (lambda tree: tree.pop("sweep"), "no sweep: its first key"),
    ],
)  # fmt: skip
def test_wrong_sweeps_are_refused_before_training(write_sweep, sweep_tree, change, message):
    change(sweep_tree)
    with pytest.raises(ConfigError, match=message):
        check(runs_of(write_sweep(sweep_tree)))


@given(st.text(min_size=1, max_size=20))
def test_names_of_runs_are_names_of_files(label):
    name = slug(label)
    assert name
    assert "/" not in name
    assert name not in (".", "..")
    assert not name.startswith("-")
