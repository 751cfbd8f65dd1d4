"""How nodes are started, what the errors of ssh mean, what travels, and which nodes fit together."""

import json
import shlex

import pytest

from launch.channel import Channel
from launch.hostfile import Host
from launch.nodes import check_hellos, make_nodes
from launch.order import Order, forwarded_environment
from launch.transport import Remote, advise, choose_transport

HOSTS = [Host(name="me@n1", slots=(0, 1)), Host(name="n2", slots=(0,))]


def remote(kind: str) -> Remote:
    return Remote(kind=kind, ssh_port=2222, directory="/work dir/50%", python="/venv/bin/python")


def test_ssh_starts_each_node(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/a b")
    (first, second) = remote("ssh").commands(HOSTS, "launch.node", "-")
    assert first[0][0] == "ssh"
    assert first[0][-2:] == [
        "me@n1",
        "cd '/work dir/50%' && exec env 'PYTHONPATH=/a b' /venv/bin/python -u -m launch.node 0 -",
    ]
    assert first[0][first[0].index("-p") :][:2] == ["-p", "2222"]
    assert "BatchMode=yes" in first[0]
    assert second[1] == [1]


def test_pdsh_starts_all_and_numbers_them(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    ((command, indices),) = remote("pdsh").commands(HOSTS, "launch.node", "/logs/.order")
    assert indices == [0, 1]
    assert command[command.index("-w") + 1] == "me@n1,n2"
    assert command[-1] == "cd '/work dir/50%%' && exec /venv/bin/python -u -m launch.node %n /logs/.order"
    environment = remote("pdsh").environment({"PDSH_SSH_ARGS_APPEND": "-4"})
    assert environment["PDSH_RCMD_TYPE"] == "ssh"
    assert environment["PDSH_SSH_ARGS_APPEND"].startswith("-4 -o BatchMode=yes")
    assert environment["PDSH_SSH_ARGS_APPEND"].endswith("-p 2222")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ssh: Could not resolve hostname n9: Name or service not known", "Correct the name"),
        ("me@n1: Permission denied (publickey).", "ssh-copy-id n2"),
        ("Host key verification failed.", "Accept its key once"),
        ("connect to host n2 port 22: Connection refused", "--ssh-port"),
        ("ssh: connect to host n2 port 22: Connection timed out", "--exclude n2"),
        ("bash: line 1: cd: /work: No such file or directory", "same checkout"),
        ("sh: 1: cd: can't cd to /work", "same checkout"),
        ("bash: line 1: /venv/bin/python: No such file or directory", "same virtual environment"),
        ("sh: 1: exec: /venv/bin/python: not found", "same virtual environment"),
        ("/venv/bin/python: No module named launch", "Install the same packages"),
        ("something new", "Try `ssh n2 true` by hand"),
    ],
)
def test_advice_on_what_ssh_says(said, words):
    assert words in advise(said, HOSTS[1])


def test_a_launcher_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(ValueError, match="pdsh is not installed here"):
        choose_transport("pdsh")
    with pytest.raises(ValueError, match="srun is not installed here"):
        choose_transport("slurm")
    with pytest.raises(ValueError, match=r"--launcher: got 'mpi', expected one of auto, pdsh, ssh, slurm, torchrun"):
        choose_transport("mpi")
    assert choose_transport("auto") == ("ssh", "ssh, since pdsh is not installed")


def test_what_travels(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("# ours\nNCCL_IB_HCA=mlx5\nMY_SETTING=a=b\n")
    here = {"NCCL_DEBUG": "INFO", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin", "MINE": "1", "HOME": "/x"}
    chosen = forwarded_environment(here, ["MINE", "OTHER=x=y"])
    assert chosen == {
        **{"NCCL_DEBUG": "INFO", "DS_ACCELERATOR": "cpu", "MINE": "1", "OTHER": "x=y"},
        **{"NCCL_IB_HCA": "mlx5", "MY_SETTING": "a=b"},
    }
    with pytest.raises(ValueError, match="--export: NONE is not set in this shell"):
        forwarded_environment(here, ["NONE"])
    with pytest.raises(ValueError, match=r"--export: got '1X=3', expected NAME or NAME=VALUE"):
        forwarded_environment({}, ["1X=3"])
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nwhat\n")
    with pytest.raises(ValueError, match=r"\.deepspeed_env:2: got 'what', expected NAME=VALUE"):
        forwarded_environment(here, [])


def test_an_order_arrives_whole():
    order = Order(
        **{
            "secret": "s",
            "addresses": ("10.0.0.1",),
            "port": 7,
            "world": {"b": ("0", "1"), "a": ("3",)},
            "program": ("-m", "ä b"),
        },
        **{"log_dir": "/l", "grace": 1.5, "launcher": "deepspeed", "silence": 2.0, "heartbeat": 3.0, "stall": 4.0, "start": 5.0},
        environment={"A": "$(x) 'y'\n"},
    )
    line = order.encode()
    assert line.count(b"\n") == 1
    assert shlex.quote(line.decode().strip()) == line.decode().strip() or b"=" in line
    arrived = Order.decode(line)
    assert arrived == order
    assert list(arrived.world) == ["b", "a"]  # the order of ranks


HERE = {"source": "1", "torch": "2"}


def said_hello(**changes: dict) -> list:
    nodes = make_nodes(HOSTS, ["10.0.0.1", "10.0.0.2"])
    for node in nodes:
        node.hello = {"versions": HERE, "devices": [], "log_dir": True, **changes.get(node.name, {})}
    return nodes


def test_nodes_that_fit_together():
    assert check_hellos(said_hello(), HERE, log_dir="/l", allow_mismatch=False) is False
    with_gpus = said_hello(n1={"devices": ["0", "1"]}, n2={"devices": ["0"]})
    assert check_hellos(with_gpus, HERE, log_dir="/l", allow_mismatch=False) is True
    assert [list(node.ranks) for node in with_gpus] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"n2": {"versions": {**HERE, "source": "2", "commit": "abc"}}},
            "n2: code abc .source 2. instead of without git .source 1.",
        ),
        ({"n1": {"versions": {**HERE, "torch": "3"}}}, "n1: torch 3 instead of 2.*--allow-mismatch"),
        ({"n1": {"devices": ["0"]}, "n2": {"devices": ["0"]}}, "n1: slot 1 was asked for, but it has 1 GPU"),
        ({"n1": {"devices": ["0", "1"]}}, "n2: no GPU, while other nodes have some"),
        ({"n2": {"log_dir": False}}, "n2: does not see /l. The run directory must be on a file system that all nodes share"),
    ],
)
def test_nodes_that_do_not_fit_are_named(changes, words):
    with pytest.raises(ValueError, match=f"(?s)do not fit together.*{words}"):
        check_hellos(said_hello(**changes), HERE, log_dir="/l", allow_mismatch=False)


def test_a_mismatch_may_be_allowed(capsys):
    check_hellos(said_hello(n2={"versions": {**HERE, "torch": "3"}}), HERE, log_dir="/l", allow_mismatch=True)
    assert "warning: n2 has torch 3 instead of 2" in capsys.readouterr().err


def test_a_slow_reader_loses_nothing_and_one_that_is_gone_is_noticed():
    import socket

    ours, theirs = socket.socketpair()
    sender, receiver = Channel(ours), Channel(theirs)
    messages = [{"number": number, "data": "x" * 5000} for number in range(200)]
    for message in messages:
        sender.send(message)
    assert sender.unsent
    assert not sender.closed
    received = []
    while len(received) < len(messages):
        received += receiver.receive()
        sender.flush()
    assert json.dumps(received) == json.dumps(messages)
    receiver.close()
    while not sender.closed:
        sender.send(messages[0])


def test_slurms_tasks_get_the_allocations_cores():
    allocation = {"SLURM_CPUS_PER_TASK": "96", "PATH": "/bin"}
    assert Remote(kind="slurm").environment(allocation)["SRUN_CPUS_PER_TASK"] == "96"
    assert Remote(kind="slurm").environment({**allocation, "SRUN_CPUS_PER_TASK": "8"})["SRUN_CPUS_PER_TASK"] == "8"
    assert "SRUN_CPUS_PER_TASK" not in Remote(kind="ssh").environment(allocation)
