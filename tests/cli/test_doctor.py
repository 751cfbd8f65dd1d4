"""`simmim doctor`: sound here, and telling when something is missing."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
from typer.testing import CliRunner

from simmim_scale.cli import doctor, doctor_machine
from simmim_scale.cli.app import app
from simmim_scale.cli.doctor import Row, Wanted


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_this_machine_is_healthy_and_trains(repository):
    # A process of its own: under ZeRO-3 DeepSpeed replaces functions of torch for good.
    command = [sys.executable, "-m", "simmim_scale", "doctor", "--json"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["healthy"]
    status = {row["check"]: row["status"] for row in report["checks"]}
    assert {status[name] for name in ("python", "packages", "JPEG decoding", "window attention", "training")} == {"ok"}


def test_quick_runs_nothing_and_the_table_has_advice():
    text = call("--quick")
    assert "training" not in text
    assert "python" in text


def test_more_gpus_than_there_are_is_a_failure_with_advice():
    report = json.loads(call("--quick", "--json", "--gpus", "4096", code=1))
    assert not report["healthy"]
    (row,) = [row for row in report["checks"] if row["check"] == "GPUs"]
    assert "4096 expected" in row["found"]
    assert "--gpus all" in row["advice"]


def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "webdataset":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "torch" else real(name)

    monkeypatch.setattr(doctor_machine.metadata, "version", version)
    (row,) = doctor_machine.check_packages(Wanted())
    assert row.status == "fail"
    assert "webdataset is not installed" in row.found
    assert "torch 1.0 is not torch>=" in row.found
    assert "constraints.txt" in row.advice


def test_a_build_label_is_no_part_of_the_version(monkeypatch):
    monkeypatch.setattr(doctor_machine.metadata, "version", lambda _: "99.0+cu130")
    (row,) = doctor_machine.check_packages(Wanted())
    assert row.status == "ok"


def test_apex_is_a_failure_only_where_it_is_wanted():
    wanted, unwanted = (
        {row.check: row for row in doctor_machine.check_compiled_parts(Wanted(apex=apex))} for apex in (True, False)
    )
    if wanted["apex"].status == "ok":
        pytest.skip("NVIDIA Apex is installed here")
    assert (wanted["apex"].status, unwanted["apex"].status) == ("fail", "note")
    assert "apex.sh" in wanted["apex"].advice


def test_a_check_that_breaks_is_a_row_and_the_others_go_on(monkeypatch):
    def check_broken_library(_: Wanted):
        raise OSError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(doctor_machine, "CHECKS", (check_broken_library, doctor_machine.check_python))
    rows = doctor.examine(Wanted(), quick=True)
    assert rows[0].check == "broken library"
    assert rows[0].status == "fail"
    assert "libfoo.so" in rows[0].found
    assert rows[1].check == "python"


def test_the_exit_code_counts_failures_alone():
    note, fail = Row("a", "note", "x", "y"), Row("b", "fail", "x", "y")
    assert (doctor.exit_code([note]), doctor.exit_code([note, fail])) == (0, 1)
