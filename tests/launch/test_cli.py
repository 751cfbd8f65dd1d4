"""What is refused before anything starts, and the job that the options make."""

import base64
import json
import os
import socket
import sys

import pytest

from launch.cli import main, make_job
from launch.machine import choose_devices, find_devices, threads_per_rank
from launch.settings import RankSettings


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def refused(capsys, *arguments: str) -> str:
    assert main(arguments, program=["nothing"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error:") == 1
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.usefixtures("on_cpu")
class TestRefused:
    def test_no_command(self, capsys):
        assert "no command" in refused(capsys, "--ranks", "2")

    @pytest.mark.parametrize("ranks", ["0", "-1", "two", "1.5", "100000", ""])
    def test_ranks(self, capsys, ranks):
        assert "--ranks" in refused(capsys, f"--ranks={ranks}", "--", "pretrain", "x.yaml")

    def test_a_missing_config(self, capsys, tmp_path):
        error = refused(capsys, "--", "pretrain", str(tmp_path / "none.yaml"))
        assert "none.yaml" in error

    def test_an_unknown_key(self, capsys, tmp_path):
        config = tmp_path / "c.yaml"
        config.write_text("mask: {ration: 0.5}\ntrain: {steps: 2, epochs: null}\n")
        error = refused(capsys, "--", "pretrain", str(config))
        assert "ration" in error
        assert "ratio" in error

    def test_no_config_to_take_the_run_directory_from(self, capsys):
        assert "--log-dir" in refused(capsys, "--", "describe")

    def test_a_misspelt_check_is_not_taken_for_a_command_of_the_ranks(self, capsys):
        assert "Did you mean python -m launch check?" in refused(capsys, "chekc", "--hostfile", "hosts")

    def test_a_command_without_its_config_is_told_what_is_missing(self, capsys):
        error = refused(capsys, "--ranks", "2", "--", "pretrain", "engine.zero_stage=1")
        assert "no CONFIG.yaml in the command 'pretrain engine.zero_stage=1'" in error
        assert "Write one after pretrain" in error

    def test_a_setting_without_a_config_to_check(self, capsys):
        assert "got the setting 'data.train=x' without a CONFIG.yaml before it" in refused(capsys, "check", "data.train=x")

    def test_a_run_directory_that_is_a_file(self, capsys, tmp_path):
        config = tmp_path / "c.yaml"
        config.write_text("train: {steps: 2, epochs: null}\n")
        (tmp_path / "file").write_text("")
        error = refused(capsys, "--", "pretrain", str(config), f"run_dir={tmp_path / 'file'}")
        assert str(tmp_path / "file") in error

    def test_a_port_in_use(self, capsys, tmp_path):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            error = refused(capsys, "--master-port", str(port), "--log-dir", str(tmp_path), "--", "x")
        assert f"--master-port: {port} cannot be used" in error

    @pytest.mark.parametrize("option", ["--grace=0", "--grace=-3", "--grace=nan", "--master-port=0", "--master-port=70000"])
    def test_numbers_out_of_range(self, capsys, tmp_path, option):
        assert option.split("=")[0] in refused(capsys, option, "--log-dir", str(tmp_path), "--", "x")


@pytest.mark.usefixtures("on_cpu")
class TestRefusedForSeveralNodes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--hostfile", "none"], "--hostfile: cannot read none"),
            (["--hostfile", "HOSTS", "--ranks", "2"], "the hostfile's slots say how many"),
            (["--hostfile", "HOSTS", "--include", "c"], "'c' is not in the hostfile"),
            (["--hostfile", "HOSTS", "--launcher", "mpi"], "expected one of auto, pdsh, ssh, slurm, torchrun"),
            (["--hostfile", "HOSTS", "--master-port", "0"], "--master-port: got 0"),
            (["--hostfile", "HOSTS", "--control-port", "70000"], "--control-port: got 70000"),
            (["--hostfile", "HOSTS", "--ssh-port", "0"], "--ssh-port: got 0"),
            (["--hostfile", "HOSTS", "--max-restarts", "-1"], "--max-restarts: got -1"),
            (["--hostfile", "HOSTS", "--stall-seconds", "0"], "--stall-seconds: got 0"),
            (["--hostfile", "HOSTS", "--node-seconds", "nan"], "--node-seconds: got nan"),
            (["--include", "a"], "--include: only with several nodes"),
            (["--master-addr", "a"], "--master-addr: only with several nodes"),
            (["--launcher", "ssh"], "--launcher ssh: needs --hostfile"),
            (["--launcher", "slurm"], "no allocation here"),
        ],
    )
    def test_options(self, capsys, tmp_path, monkeypatch, options, message):
        monkeypatch.setattr("shutil.which", lambda program: f"/bin/{program}")
        monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
        (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
        options = [str(tmp_path / "hosts") if option == "HOSTS" else option for option in options]
        assert message in refused(capsys, *options, "--log-dir", str(tmp_path / "logs"), "--", "x")

    def test_a_first_node_that_others_cannot_reach(self, capsys, tmp_path):
        (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
        assert main(["--hostfile", str(tmp_path / "hosts"), "--launcher", "ssh", "--log-dir", str(tmp_path), "--", "x"]) == 2
        assert "--master-addr: 127.0.0.1 is 127.0.0.1 here, where other nodes cannot reach it" in capsys.readouterr().err

    def test_a_command_without_the_two_dashes(self, capsys):
        assert "Write ` -- ` before the command" in refused(capsys, "--ranks", "1", "pretrain", "x.yaml")


def test_unknown_options_are_a_user_error(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--rank", "x", "--unknown", "--", "pretrain"])
    assert error.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.usefixtures("on_cpu")
def test_the_job_of_a_command(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"run_dir: {tmp_path / 'runs' / 'a'}\ntrain: {{steps: 2, epochs: null}}\n")
    job = make_job(["--ranks", "3", "--", "pretrain", str(config), "seed=1"], program=["-m", "simmim_scale"])
    assert job.program == ("-m", "simmim_scale", "pretrain", str(config), "seed=1")
    assert job.log_dir == tmp_path / "runs" / "a" / "logs"
    assert (job.ranks, job.on_gpu) == (3, False)
    assert 1 <= job.master_port <= 65535
    overridden = make_job(["--", "pretrain", str(config), f"run_dir={tmp_path / 'b'}"], program=["-m", "simmim_scale"])
    assert overridden.log_dir == tmp_path / "b" / "logs"
    assert overridden.ranks == 1


@pytest.mark.usefixtures("on_cpu")
def test_collectives_that_fail_before_the_watchdog_looks_are_warned_of(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"run_dir: {tmp_path / 'a'}\ntrain: {{steps: 2, epochs: null}}\nengine: {{timeout_minutes: 10}}\n")
    make_job(["--stall-seconds", "599", "--", "pretrain", str(config)], program=["p.py"])
    assert capsys.readouterr().err == ""
    make_job(["--stall-seconds", "600", "--", "pretrain", str(config)], program=["p.py"])
    assert "engine.timeout_minutes=10, before the watchdog would report on it" in capsys.readouterr().err


@pytest.mark.usefixtures("on_cpu")
def test_the_deepspeed_launcher_gets_the_ranks_and_hands_the_settings_on(tmp_path):
    job = make_job(["--ranks", "2", "--grace", "7.5", "--log-dir", str(tmp_path), "--", "pretrain", "--", "-m"], program=["p.py"])
    command = job.command("/tmp/s")
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    world = next(word for word in command if word.startswith("--world_info=")).partition("=")[2]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": ["0", "1"]}
    settings = RankSettings.parse(command[command.index("launch.rank") + 1 :])
    expected = RankSettings(socket="/tmp/s", log_dir=str(tmp_path), grace=7.5, program=("p.py", "pretrain", "--", "-m"))
    assert settings == expected


@pytest.mark.usefixtures("on_cpu")
def test_a_persons_own_environment_wins(tmp_path):
    job = make_job(["--ranks", "1", "--log-dir", str(tmp_path), "--", "x"], program=["p.py"])
    assert job.environment({"OMP_NUM_THREADS": "5", "PATH": "/bin"})["OMP_NUM_THREADS"] == "5"
    chosen = job.environment({})
    assert chosen["DS_ACCELERATOR"] == "cpu"
    assert chosen["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert chosen["PATH"]


@pytest.mark.parametrize(
    ("ranks", "devices", "chosen"),
    [
        ("auto", [], ["0"]),
        ("auto", ["0", "1"], ["0", "1"]),
        ("auto", ["GPU-a", "GPU-b"], ["GPU-a", "GPU-b"]),
        ("3", [], ["0", "1", "2"]),
        ("2", ["3", "5", "7"], ["3", "5"]),
    ],
)
def test_devices_of_the_ranks(ranks, devices, chosen):
    assert choose_devices(ranks, devices) == chosen


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(ValueError, match="this node has 2 GPUs"):
        choose_devices("3", ["0", "1"])


def test_devices_are_those_that_are_visible(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").write_text("")
    monkeypatch.setattr("launch.machine.GPU_FILES", (str(tmp_path / "nvidia0"),))
    monkeypatch.setattr("launch.machine._count_devices", lambda: 2)
    assert find_devices({}) == ["0", "1"]
    assert find_devices({"CUDA_VISIBLE_DEVICES": "3, 5"}) == ["3", "5"]
    assert find_devices({"DS_ACCELERATOR": "cpu"}) == []


def test_cores_are_shared_out():
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank(1) == cores
    assert threads_per_rank(10 * cores) == 1
