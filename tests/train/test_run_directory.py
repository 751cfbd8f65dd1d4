"""Which configuration a run directory belongs to, and that only one process works in it."""

from pathlib import Path

import pytest

from simmim_scale.config.load import load_config
from simmim_scale.config.schema import Config, TrainConfig
from simmim_scale.train.run_directory import RunDirectory, changed_settings


def config(**changes) -> Config:
    return Config(train=TrainConfig(steps=4), **changes)


def trained(path: Path, settings: Config) -> RunDirectory:
    """A directory in which a run has made a step."""
    directory = RunDirectory(path)
    directory.claim(settings).close()
    directory.metrics.write_text('{"step": 1}\n')
    return directory


def test_a_new_directory_is_claimed_and_holds_the_whole_configuration(tmp_path):
    directory = RunDirectory(tmp_path / "a/b")
    directory.check(config())
    directory.claim(config(seed=3)).close()
    assert load_config(directory.config) == config(seed=3)


def test_the_same_run_is_accepted_again_with_other_logging(tmp_path):
    directory = trained(tmp_path / "run", config())
    directory.check(load_config(directory.config, ["report.terminal_every_steps=1", "data.workers=0", "validation.samples=3"]))


@pytest.mark.parametrize(
    "override", ["seed=1", "model.window_size=6", "mask.ratio=0.5", "train.steps=8", "engine.precision=fp32"]
)
def test_other_settings_are_refused_by_name(tmp_path, override):
    directory = trained(tmp_path / "run", config())
    with pytest.raises(ValueError, match=override.partition("=")[0].replace(".", r"\.")):
        directory.check(load_config(directory.config, [override]))


def test_a_start_that_never_trained_does_not_hold_the_directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config(seed=1)).close()
    directory.check(config(seed=2))


def test_foreign_files_are_never_taken_over(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"picture")
    with pytest.raises(ValueError, match=r"holiday\.jpg"):
        RunDirectory(tmp_path).check(config())
    with pytest.raises(ValueError, match="is a file"):
        RunDirectory(tmp_path / "holiday.jpg").check(config())


def test_the_logs_of_the_launcher_may_come_first(tmp_path):
    (tmp_path / "logs").mkdir()
    RunDirectory(tmp_path).check(config())


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    lock = directory.claim(config())
    with pytest.raises(ValueError, match="another process"):
        directory.claim(config())
    lock.close()
    directory.claim(config()).close()


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir: cannot write to .*file/run"):
        RunDirectory(tmp_path / "file/run").claim(config())


def test_changed_settings_name_both_values():
    assert changed_settings(config(seed=1), config(seed=2, run_dir="elsewhere")) == [("seed", 1, 2)]
