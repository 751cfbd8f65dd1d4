"""What a person meets before training over two hosts: `launch check`, nodes that do not come, Slurm."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.rig import ADDRESSES, REPOSITORY, Rig

PROGRAM = Path(__file__).parent / "programs" / "rank_program.py"
ENTRY = "import sys; from launch.cli import main; sys.exit(main(sys.argv[2:], program=[sys.argv[1]]))"
MARK = "start"

# srun and scontrol in front of two hosts that ssh reaches: what the launcher asks of Slurm, no more
SRUN = """#!/bin/sh
for word; do case $word in --nodelist=*) nodes=$(echo "${word#*=}" | tr , ' ');; esac; last=$word; done
index=0
for node in $nodes; do
    ssh "$node" "SLURM_PROCID=$index; $last" &
    index=$((index + 1))
done
wait
"""
SCONTROL = f"#!/bin/sh\nprintf '%s\\n' {' '.join(ADDRESSES.values())}\n"


def run(rig: Rig, *arguments: str, variables: dict[str, str] | None = None) -> tuple[int, str]:
    command = [sys.executable, *arguments]
    wide = {"COLUMNS": "300", **(variables or {})}
    process = rig.start(command, mark=MARK, variables=wide, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate(timeout=300)
    assert not rig.family(MARK), output
    return process.returncode, output


@pytest.fixture
def hosts(tmp_path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("a slots=1\nb slots=1\n")
    return path


def rows(output: str) -> dict[str, list[str]]:
    """check -> the verdicts of its rows."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) == 6 and cells[1]:
            found.setdefault(cells[1], []).append(cells[2])
    return found


def test_a_check_of_two_good_hosts_and_of_what_is_wrong_with_them(rig, hosts, shards, tmp_path):
    settings = [f"data.train={shards}", "data.validation=null", f"run_dir={tmp_path / 'runs' / 'x'}"]
    config = "configs/debug/tiny_swinv2.yaml"
    code, output = run(rig, "-m", "launch", "check", "--hostfile", str(hosts), config, *settings)
    assert code == 0, output
    everything = ["ssh", "code", "packages", "clock", "GPUs", "apex", "run directory", "data", "port", "network"]
    assert {check: rows(output).get(check) for check in everything} == {check: ["ok"] for check in everything}
    assert {"disk", "compute"} <= set(rows(output))
    assert "32 samples, the same on 2 nodes" in output
    assert "1 node can connect to 10.99.0.1" in output
    assert "GB/s all-reduce over gloo" in output
    assert not (tmp_path / "runs").exists()  # what it made to look, it took away again

    # one host that is not there, another package called apex, and no data
    (tmp_path / "fake" / "apex").mkdir(parents=True)
    (tmp_path / "fake" / "apex" / "__init__.py").write_text("")
    hosts.write_text("a slots=1\nnowhere slots=4\n")
    path = {"PYTHONPATH": f"{REPOSITORY}:{tmp_path / 'fake'}"}
    settings[0] = f"data.train={tmp_path / 'none'}"
    code, output = run(rig, "-m", "launch", "check", "--hostfile", str(hosts), config, *settings, variables=path)
    assert code == 1, output
    assert rows(output)["ssh"] == ["failed", "ok"]
    assert rows(output)["apex"] == ["failed"]
    assert rows(output)["data"] == ["failed"]
    assert "nowhere: ssh: Could not resolve hostname nowhere" in output
    assert "Correct the name in the hostfile" in output
    assert "is PyPI's apex, which is not NVIDIA's" in output


def test_a_launch_says_who_did_not_come_and_why(rig, hosts, tmp_path):
    hosts.write_text("a slots=1\nnowhere slots=1\n")
    for launcher in ("ssh", "pdsh"):
        options = ["--hostfile", str(hosts), "--launcher", launcher, "--log-dir", str(tmp_path / "logs")]
        code, output = run(rig, "-m", "launch", *options, "--", "describe")
        assert code == 1, output
        assert "1 of 2 nodes did not come" in output
        assert "nowhere: the start on it ended" in output
        assert "Could not resolve hostname nowhere" in output
        assert "python -m launch check" in output
        assert not list((tmp_path / "logs").iterdir())


def test_slurm_names_the_nodes_and_starts_them(rig, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (out := tmp_path / "out").mkdir()
    variables = {"SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{tools}:{rig.environment()['PATH']}"}
    options = ["--launcher", "slurm", "--ranks", "1", "--log-dir", str(tmp_path / "logs")]
    code, output = run(rig, "-c", ENTRY, str(PROGRAM), *options, "--", str(out), "finish", variables=variables)
    assert code == 0, output
    assert "2 ranks on 2 nodes, by slurm" in output
    assert sorted(path.name for path in out.glob("seen_*")) == ["seen_0.json", "seen_1.json"]
    assert (tmp_path / "logs" / "launcher_10.99.0.2.log").exists()
