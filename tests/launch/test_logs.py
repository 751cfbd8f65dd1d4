"""The merged view of the ranks' logs."""

import os

import pytest

from launch.logs import main
from launch.output import RankOutput

LOGS = {
    0: "===== 2026-11-24 10:00:00 rank 0 of 2 on a: old\n2026-11-24T10:00:01.000Z old line\n"
    "===== 2026-11-24 11:00:00 rank 0 of 2 on a: python\n2026-11-24T11:00:01.500Z second\n2026-11-24T11:00:03.000Z fourth\n",
    1: "===== 2026-11-24 11:00:00 rank 1 of 2 on b: python\n2026-11-24T11:00:01.250Z first\n2026-11-24T11:00:02.000Z third\n",
}


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    (tmp_path / "logs").mkdir()
    for rank, text in LOGS.items():
        (tmp_path / "logs" / f"rank_{rank:05d}.log").write_text(text)
    return tmp_path


def shown(capsys, *arguments: str) -> list[str]:
    assert main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_lines_of_all_ranks_in_the_order_of_time(run_dir, capsys):
    lines = shown(capsys, str(run_dir))
    assert [line.rpartition(" ")[2] for line in lines[2:]] == ["first", "second", "third", "fourth"]
    assert lines[2] == "11:00:01.250 [b:1] first"
    assert lines[5] == "11:00:03.000 [a:0] fourth"


def test_earlier_starts_and_single_ranks_on_request(run_dir, capsys):
    assert "10:00:01.000 [a:0] old line" in shown(capsys, str(run_dir / "logs"), "--all")
    assert all("[b:1]" in line for line in shown(capsys, str(run_dir), "--rank", "1"))
    with pytest.raises(ValueError, match="no log of rank 7"):
        main([str(run_dir), "--rank", "7"])


def test_a_directory_without_logs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no logs of ranks"):
        main([str(tmp_path)])


def test_every_line_gets_its_time_once_however_it_arrives(tmp_path, capsys):
    with RankOutput(str(tmp_path), 0, echo=[]) as output:
        for piece in (b"one\ntw", b"o\n", b"\n", b"three"):
            os.write(output.stdout, piece)
            output.read(output.sources[0])
        output.started()
    text = (tmp_path / "rank_00000.log").read_text()
    assert text.count("Z ") == 4
    assert [line.partition("Z ")[2] for line in text.splitlines()] == ["one", "two", "", "three"]
