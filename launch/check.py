"""`python -m launch check`: whether these nodes can train together, found out before anything trains; a table with advice."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.examination import Examination
from launch.findings import (
    Finding,
    Verdict,
    errors,
    failure,
    good,
    judge_apex,
    judge_clocks,
    judge_compute,
    judge_data,
    judge_disks,
    judge_gpus,
    judge_links,
    judge_sharing,
    judge_versions,
    ok,
)
from launch.hostfile import Host, choose_hosts, read_hostfile
from launch.nodes import Node
from launch.options import add_nodes, check_number
from launch.order import forwarded_environment
from launch.outcome import FAILED, FINISHED, count
from launch.transport import Remote, advise, slurm_hosts
from launch.versions import identify

ALL_PAIRS = 8  # up to so many nodes every pair is measured; beyond, neighbours at distances 1, 2, 4, ...
STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "bold red"}
QUICK, SLOW = 60.0, 240.0  # seconds for a question; importing torch on a cold file system can take a minute
LAST_WORDS = 3


def main(arguments: Sequence[str]) -> int:
    """Prints the table.

    Returns:
        0 if training can start, 1 if not; warnings alone are 0.

    Raises:
        ValueError: an option, the hostfile or the configuration is wrong.
    """
    options = _parser().parse_args(arguments)
    for name in ("ssh_port", "control_port", "master_port"):
        check_number(name, getattr(options, name))
    hosts, remote = _nodes(options)
    run_dir, directories, urls = _places(options)
    console = Console(stderr=False, soft_wrap=False)
    rows = []
    forwarded = forwarded_environment(os.environ, options.export)
    with Examination(
        hosts,
        remote,
        environment=os.environ,
        forwarded=forwarded,
        control_address=options.control_address,
        control_port=options.control_port,
    ) as examination:
        for finding in examine(examination, options, run_dir=run_dir, directories=directories, urls=urls):
            sys.stderr.write(f"check: {finding.check}: {finding.verdict.value}\n")
            rows.append(finding)
    console.print(make_table(rows))
    counts = Counter(row.verdict for row in rows)
    console.print(f"nodes: {len(hosts)}; " + ", ".join(f"{verdict.value}: {counts[verdict]}" for verdict in Verdict))
    return FAILED if counts[Verdict.FAILED] else FINISHED


def examine(
    examination: Examination, options: argparse.Namespace, *, run_dir: str | None, directories: list[str], urls: list[str]
) -> Iterator[Finding]:
    """Every check in turn, the cheap ones first."""
    examination.gather(options.connect_seconds)
    yield from reachable(examination)
    nodes = examination.present
    if not nodes:
        return
    yield from judge_versions(identify(), {node.name: node.hello["versions"] for node in nodes})
    yield from judge_clocks(_clock_skews(examination))
    gpus = _named(examination.ask_each("gpus", {node: {"slots": list(node.host.slots)} for node in nodes}, seconds=SLOW))
    yield from judge_gpus(gpus, {node.name: node.host.slots for node in nodes})
    on_gpu = any(answer.get("gpus") for answer in gpus.values())
    yield from judge_apex(_named(examination.ask("apex", nodes, seconds=QUICK)), on_gpu=on_gpu)
    yield from judge_disks(_named(examination.ask("disk", nodes, seconds=QUICK, run_dir=run_dir or ".")))
    if run_dir is not None:
        yield from _sharing(examination, run_dir)
        data = _named(examination.ask("data", nodes, seconds=SLOW, directories=directories))
        yield from judge_data(data, urls)
    yield from _ports(examination, options)
    answers = examination.ask_each("compute", {node: {"slots": list(node.host.slots)} for node in nodes}, seconds=SLOW)
    yield from judge_compute(_named(answers))
    if len(nodes) > 1:
        yield from judge_links(measure_links(examination))


def reachable(examination: Examination) -> Iterator[Finding]:
    there = examination.present
    for node in examination.nodes:
        if node in there:
            continue
        said = " ".join(line for line in node.said if line.strip())
        last = " | ".join([line for line in node.said if line.strip()][-LAST_WORDS:]) or "it has not answered"
        yield failure("ssh", f"{node.name}: {last}", advise(said, node.host))
    if there:
        yield ok("ssh", f"{len(there)} of {len(examination.nodes)} nodes answer")


def pairs_by_round(count: int) -> list[list[tuple[int, int]]]:
    """Which nodes measure at the same time: in a round every node is in one pair at most.

    Up to ALL_PAIRS nodes every pair has its turn (a round-robin tournament); beyond, node i and i + 1, i + 2, i + 4, ..., which
    crosses every switch a few times and takes few rounds.
    """
    if count <= ALL_PAIRS:
        return [pairs for pairs in _tournament(count) if pairs]
    rounds, distance = [], 1
    while distance < count:
        for parity in (0, 1):
            pairs = [(i, i + distance) for i in range(count - distance) if i // distance % 2 == parity]
            rounds += [pairs] if pairs else []
        distance *= 2
    return rounds


def _tournament(count: int) -> Iterator[list[tuple[int, int]]]:
    """The circle method: one stays, the others move on by one place a round."""
    circle = list(range(count + count % 2))
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        opposite = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in opposite if max(pair) < count]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def measure_links(examination: Examination) -> dict[tuple[str, str], dict[str, Any]]:
    """All-reduce between pairs of nodes."""
    nodes = examination.present
    results = {}
    for pairs in pairs_by_round(len(nodes)):
        first = {nodes[one]: nodes[two] for one, two in pairs}
        ports = examination.ask("serve", list(first), seconds=QUICK, port=0)
        examination.ask("close_server", list(first), seconds=QUICK)
        questions = {}
        for one, two in first.items():
            for rank, node in enumerate((one, two)):
                place = {"address": one.address, "port": ports[one].get("port", 0), "rank": rank, "slot": node.host.slots[0]}
                questions[node] = place
        answers = examination.ask_each("transfer", questions, seconds=SLOW)
        for one, two in first.items():
            wrong = next((answers[node] for node in (one, two) if "error" in answers[node]), None)
            results[(one.name, two.name)] = wrong or answers[one]
    return results


def make_table(rows: Sequence[Finding]) -> Table:
    table = Table(title="python -m launch check", title_justify="left")
    for column in ("check", "verdict", "found", "advice"):
        table.add_column(column, overflow="fold")
    for row in rows:
        style = STYLES[row.verdict]
        table.add_row(row.check, f"[{style}]{row.verdict.value}[/]", escape(row.found), escape(row.advice))
    return table


def _clock_skews(examination: Examination) -> dict[str, float]:
    """One node at a time, so that the answer is not waited for behind others: the time of the middle of question and answer."""
    skews = {}
    for node in examination.present:
        asked = time.time()
        answer = examination.ask("clock", [node], seconds=QUICK)[node]
        if "time" in answer:
            skews[node.name] = answer["time"] - (asked + examination.arrived(node, "clock")) / 2
    return skews


def _sharing(examination: Examination, run_dir: str) -> list[Finding]:
    first, *others = examination.present
    token = examination.ask("write_token", [first], seconds=QUICK, run_dir=run_dir)[first]
    if "error" in token:
        return errors("run directory", {first.name: token}, "Choose a run_dir that can be written to.")
    answers = examination.ask("read_token", others, seconds=QUICK, path=token["path"])
    examination.ask("remove_token", [first], seconds=QUICK, path=token["path"], made=token["made"])
    return judge_sharing(run_dir, token["content"], _named(answers))


def _ports(examination: Examination, options: argparse.Namespace) -> list[Finding]:
    """Whether the other nodes can connect to the first one, where the ranks meet."""
    first, *others = examination.present
    opened = examination.ask("serve", [first], seconds=QUICK, port=options.master_port or 0)
    if "error" in opened[first]:
        return errors("port", _named(opened), "Something else uses it: choose another --master-port, or leave it out.")
    port = opened[first]["port"]
    address = options.master_addr or first.address
    answers = _named(examination.ask("dial", others, seconds=QUICK, address=address, port=port))
    examination.ask("close_server", [first], seconds=QUICK)
    advice = f"Open the firewall between the nodes (NCCL and gloo choose any port), or name a --master-addr other than {address}."
    found = errors("port", answers, advice)
    if not found:
        text = (
            f"{count(len(good(answers)), 'node')} can connect to {address} port {port}"
            if others
            else f"{address} port {port} can be opened"
        )
        found.append(ok("port", text))
    return found


def _named(answers: dict[Node, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {node.name: answer for node, answer in answers.items()}


def _nodes(options: argparse.Namespace) -> tuple[list[Host], Remote]:
    """The nodes, and how to reach them. Never pdsh: each node has a connection of its own, so that its failure is one row."""
    if options.launcher == "slurm" and not options.hostfile:
        hosts = slurm_hosts(os.environ, slots=int(os.environ.get("SLURM_GPUS_ON_NODE", "1")))
        return choose_hosts(hosts, include=options.include, exclude=options.exclude), Remote(kind="slurm")
    if options.hostfile:
        hosts = choose_hosts(read_hostfile(options.hostfile), include=options.include, exclude=options.exclude)
        kind = "slurm" if options.launcher == "slurm" else "ssh"
        return hosts, Remote(kind=kind, ssh_port=options.ssh_port)
    return [Host(name="localhost", slots=(0,))], Remote(kind="local")


def _places(options: argparse.Namespace) -> tuple[str | None, list[str], list[str]]:
    """The run directory, directories of shards and URLs of the configuration, if one was given."""
    if options.config is None:
        return None, [], []
    from simmim_scale.config.load import load_config

    if "=" in options.config and not Path(options.config).exists():
        raise ValueError(f"got the setting {options.config!r} without a CONFIG.yaml before it. Name the configuration first.")
    config = load_config(options.config, options.settings)
    places = [place for place in (config.data.train, config.data.validation) if place]
    urls = [place for place in places if "://" in place]
    return str(Path(config.run_dir).absolute()), [place for place in places if place not in urls], urls


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch check",
        description="Finds out whether these nodes can train together. Without --hostfile: this node alone.",
        epilog="exit codes: 0 nothing failed, 1 something did, 2 wrong options",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="also look at its data and run directory")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="settings that replace those of the file")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="where the ranks will meet (default: a free port)")
    add_nodes(parser)
    return parser
