"""The command line: `python -m launch [options] -- pretrain CONFIG [key=value ...]`, `check` and `logs`."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.head import ClusterJob, start_cluster
from launch.hostfile import Host, choose_hosts, read_hostfile
from launch.job import Job
from launch.machine import check_port, choose_devices, find_devices, free_port
from launch.options import check_number, check_options, make_parser, many_nodes
from launch.order import forwarded_environment
from launch.outcome import USER_ERROR, count
from launch.restarts import run_with_restarts
from launch.supervisor import Supervisor
from launch.transport import Remote, choose_transport, slurm_hosts
from launch.watch import Limits

if TYPE_CHECKING:
    from simmim_scale.config.schema import Config

PROGRAM = ("-m", "simmim_scale")  # what every rank runs: python -u -m simmim_scale COMMAND ...


def main(arguments: Sequence[str] | None = None, *, program: Sequence[str] = PROGRAM) -> int:
    """Runs the command line and returns the exit code.

    Args:
        arguments: those after `python -m launch`; None takes them from this process.
        program: what follows `python -u` in every rank, before the command.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["logs"]:
            from launch.logs import main as show_logs

            return show_logs(arguments[1:])
        if arguments[:1] == ["check"]:
            from launch.check import main as check

            return check(arguments[1:])
        return start(arguments, program=program)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
    except OSError as error:
        sys.stderr.write(f"error: {error.filename}: {error.strerror}. Check that it can be written to.\n")
    return USER_ERROR


def start(arguments: Sequence[str], *, program: Sequence[str]) -> int:
    """Starts the job, on one node or many, and again after failures if asked to.

    Raises:
        ValueError: an option, the configuration or this node does not allow the start.
        OSError: the directory of the logs cannot be made.
    """
    options, command = split(arguments)
    if many_nodes(options):
        job, said = make_cluster_job(options, command, program=program)
        size = f"{count(job.ranks, 'rank')} on {count(len(job.hosts), 'node')}"
        sys.stderr.write(f"launch: {size}, by {said}; logs in {job.log_dir}\n")
        return run_with_restarts(lambda: start_cluster(job, os.environ), most=options.max_restarts)
    job = make_job(arguments, program=program)
    where = "GPU" if job.on_gpu else "CPU"
    sys.stderr.write(f"launch: {count(job.ranks, 'rank')} on {where}; logs in {job.log_dir}\n")

    def start_here() -> tuple[int, bool]:
        supervisor = Supervisor(job, os.environ)
        return supervisor.run(), supervisor.requested

    return run_with_restarts(start_here, most=options.max_restarts)


def split(arguments: Sequence[str]) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Options of ours, checked, and the command for the ranks.

    Raises:
        ValueError: no command, or a number out of range.
    """
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments[:cut])
    if rest and (meant := difflib.get_close_matches(rest[0], ("check", "logs"), n=1)):
        raise ValueError(f"got {rest[0]!r}. Did you mean python -m launch {meant[0]}?")
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"got {rest[0]!r} among the options. Write ` -- ` before the command: python -m launch -- {rest[0]} ...")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    command = tuple(arguments[cut + 1 :])
    if not command:
        raise ValueError("no command, expected one after ` -- `. For example: python -m launch --ranks 2 -- pretrain CONFIG")
    check_options(options)
    return options, command


def make_job(arguments: Sequence[str], *, program: Sequence[str]) -> Job:
    """The job of this node alone: everything that can be refused before anything is started.

    Raises:
        ValueError: an option, the configuration or this node does not allow the start.
        OSError: the directory of the logs cannot be made.
    """
    options, command = split(arguments)
    found = find_devices(os.environ)
    devices = choose_devices(options.ranks, found)
    if options.master_port is not None:
        check_port(options.master_port)
    return Job(
        program=(*program, *command),
        devices=tuple(devices),
        on_gpu=bool(found),
        log_dir=_make_log_dir(options, command),
        master_port=options.master_port or free_port(),
        grace=options.grace,
        limits=_limits(options),
    )


def make_cluster_job(options: argparse.Namespace, command: Sequence[str], *, program: Sequence[str]) -> tuple[ClusterJob, str]:
    """The job of many nodes, and how they are reached, in words.

    Raises:
        ValueError: the hostfile, an option or the configuration does not allow the start.
        OSError: the directory of the logs cannot be made.
    """
    hosts = find_hosts(options)
    kind, said = choose_transport(options.launcher)
    check_number("master_port", options.master_port)
    job = ClusterJob(
        hosts=tuple(hosts),
        remote=Remote(kind=kind, ssh_port=options.ssh_port),
        launcher="torchrun" if options.launcher == "torchrun" else "deepspeed",
        program=(*program, *command),
        log_dir=_make_log_dir(options, command).resolve(),
        grace=options.grace,
        master_addr=options.master_addr,
        master_port=options.master_port,
        control_address=options.control_address,
        control_port=options.control_port,
        connect_seconds=options.connect_seconds,
        silence=options.node_seconds,
        limits=_limits(options),
        environment=forwarded_environment(os.environ, options.export),
        allow_mismatch=options.allow_mismatch,
    )
    return job, said


def find_hosts(options: argparse.Namespace) -> list[Host]:
    """The nodes and slots that the options choose.

    Raises:
        ValueError: a hostfile or a choice that is wrong.
    """
    if options.hostfile:
        return choose_hosts(read_hostfile(options.hostfile), include=options.include, exclude=options.exclude)
    slots = os.environ.get("SLURM_GPUS_ON_NODE", "1") if options.ranks == "auto" else options.ranks
    if not slots.isdecimal() or int(slots) < 1:
        raise ValueError(f"--ranks: got {slots!r}, expected how many ranks each node runs: --ranks 8")
    hosts = slurm_hosts(os.environ, slots=int(slots))
    return choose_hosts(hosts, include=options.include, exclude=options.exclude)


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(heartbeat=options.heartbeat_seconds, stall=options.stall_seconds, start=options.start_seconds)


def _make_log_dir(options: argparse.Namespace, command: Sequence[str]) -> Path:
    if options.log_dir:
        log_dir = Path(options.log_dir)
    else:
        config = read_config(command)
        log_dir = Path(config.run_dir) / "logs"
        if 60 * config.engine.timeout_minutes <= options.stall_seconds:
            sys.stderr.write(
                f"launch: warning: a collective fails after engine.timeout_minutes={config.engine.timeout_minutes:g}, before the"
                f" watchdog would report on it (--stall-seconds {options.stall_seconds:g}). Make the first one longer.\n"
            )
    log_dir.mkdir(parents=True, exist_ok=True)
    return log_dir


def read_config(command: Sequence[str]) -> "Config":
    """The configuration that the command names; reading it here shows its errors at once, and only once."""
    # Here, because `--help` and an explicit --log-dir need no configuration.
    from simmim_scale.config.load import load_config

    configs = [word for word in command[1:] if word.endswith((".yaml", ".yml")) and "=" not in word]
    if not configs:
        raise ValueError(
            f"no CONFIG.yaml in the command {' '.join(command)!r}, whose run directory would take the logs."
            f" Write one after {command[0]}, or say with --log-dir DIR where the logs go."
        )
    overrides = [word for word in command[1:] if "=" in word and not word.startswith("-")]
    return load_config(configs[0], overrides)
