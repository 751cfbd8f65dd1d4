"""Hostfiles: what they may hold, every mistake with its line, and the choice of nodes and slots."""

import pytest

from launch.hostfile import Host, choose_hosts, parse_hostfile, read_hostfile

GOOD = """\
# the cluster
node-1 slots=4
root@node-2   slots=2  # the old one

10.0.0.3 slots=1
"""


def parse(text: str) -> list[Host]:
    return parse_hostfile(text, source="hosts")


def test_nodes_keep_their_order():
    assert [(host.name, host.short, len(host.slots)) for host in parse(GOOD)] == [
        ("node-1", "node-1", 4),
        ("root@node-2", "node-2", 2),
        ("10.0.0.3", "10.0.0.3", 1),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("node-2", r"hosts:2: got 'node-2', expected HOST slots=N, for example"),
        ("node-2 8", "hosts:2: got 'node-2 8'"),
        ("node-2 slots = 8", "hosts:2: got 'node-2 slots = 8'"),
        ("node-2 slots=8 max=9", "hosts:2: got"),
        ("node-2 slots=0", "hosts:2: node-2: slots=0, expected a number from 1 to 1024.*put # before it"),
        ("node-2 slots=-1", "hosts:2: node-2: slots=-1"),
        ("node-2 slots=two", "hosts:2: node-2: slots=two"),
        ("node-2 slots=99999", "hosts:2: node-2: slots=99999"),
        ("node-1 slots=4", "hosts:2: node-1 is already in line 1. Name each node once"),
        ("root@node-1 slots=4", "hosts:2: node-1 is already in line 1"),
        ("a,b slots=4", "hosts:2: 'a,b' is no host name"),
        ("$(reboot) slots=4", "hosts:2: .* is no host name"),
        ("-oProxyCommand=x slots=4", "hosts:2: .* is no host name"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(line, message):
    with pytest.raises(ValueError, match=message):
        parse(f"node-1 slots=4\n{line}\n")


def test_every_wrong_line_is_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)hosts:1: .*hosts:3: .*hosts:4: "):
        parse("one\ngood slots=1\ngood slots=2\nx slots=0\n")


@pytest.mark.parametrize("text", ["", "\n# nothing\n"])
def test_an_empty_file_is_refused(text):
    with pytest.raises(ValueError, match="hosts: no node in it"):
        parse(text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--hostfile: cannot read .*none \(No such file.*Expected HOST slots=N"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is no text"):
        read_hostfile(tmp_path / "binary")


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (None, None, {"node-1": (0, 1, 2, 3), "node-2": (0, 1), "10.0.0.3": (0,)}),
        ("node-2", None, {"node-2": (0, 1)}),
        ("10.0.0.3@node-1:3,1", None, {"node-1": (1, 3), "10.0.0.3": (0,)}),
        (None, "node-1", {"node-2": (0, 1), "10.0.0.3": (0,)}),
        (None, "node-1:0@10.0.0.3", {"node-1": (1, 2, 3), "node-2": (0, 1)}),
        (None, "node-2:0,1", {"node-1": (0, 1, 2, 3), "10.0.0.3": (0,)}),
    ],
)
def test_include_and_exclude(include, exclude, chosen):
    assert {host.short: host.slots for host in choose_hosts(parse(GOOD), include=include, exclude=exclude)} == chosen


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("node-1", "node-2", "got both"),
        ("nodde-1", None, "--include: 'nodde-1' is not in the hostfile.*Did you mean 'node-1'"),
        (None, "other", "--exclude: 'other' is not in the hostfile, which has node-1, node-2, 10.0.0.3"),
        ("node-2:2", None, "slots '2' of node-2, expected different numbers from 0 to 1"),
        ("node-2:0,0", None, "expected different numbers"),
        ("node-2:", None, "slots ''"),
        ("node-1@node-1:0", None, "named twice"),
        (None, "node-1@node-2@10.0.0.3", "leaves no node"),
        ("", None, "is not in the hostfile"),
    ],
)
def test_a_wrong_choice_is_refused(include, exclude, message):
    with pytest.raises(ValueError, match=message):
        choose_hosts(parse(GOOD), include=include, exclude=exclude)
