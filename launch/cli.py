"""The command line: `python -m launch [options] -- pretrain CONFIG [key=value ...]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.job import Job
from launch.machine import check_port, choose_devices, find_devices, free_port
from launch.outcome import USER_ERROR
from launch.supervisor import Supervisor

PROGRAM = ("-m", "simmim_scale")  # what every rank runs: python -u -m simmim_scale COMMAND ...

DESCRIPTION = """Starts a command of simmim on every device of this node, through the DeepSpeed launcher."""
EPILOG = """\
SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 reach every rank, which then saves and ends; a second Ctrl-C ends them at once.
The output of rank 0 is shown; the output of every rank is in RUN_DIR/logs.

exit codes: 0 finished, 2 an error of the user's (nothing was trained), 75 stopped after a complete save, others: a failure

example: python -m launch --ranks 2 -- pretrain configs/debug/demo.yaml run_dir=runs/demo
"""


def main(arguments: Sequence[str] | None = None, *, program: Sequence[str] = PROGRAM) -> int:
    """Runs the command line and returns the exit code.

    Args:
        arguments: those after `python -m launch`; None takes them from this process.
        program: what follows `python -u` in every rank, before the command.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        job = make_job(arguments, program=program)
        where = "GPU" if job.on_gpu else "CPU"
        sys.stderr.write(f"launch: {job.ranks} {'rank' if job.ranks == 1 else 'ranks'} on {where}; logs in {job.log_dir}\n")
        supervisor = Supervisor(job, os.environ)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    except OSError as error:
        sys.stderr.write(f"error: {error.filename}: {error.strerror}. Check that it can be written to.\n")
        return USER_ERROR
    return supervisor.run()


def make_job(arguments: Sequence[str], *, program: Sequence[str]) -> Job:
    """Everything that can be refused before anything is started.

    Raises:
        ValueError: an option, the configuration or this node does not allow the start.
        OSError: the directory of the logs cannot be made.
    """
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = _parser().parse_args(arguments[:cut])
    command = tuple(arguments[cut + 1 :])
    if not command:
        raise ValueError("no command, expected one after ` -- `. For example: python -m launch --ranks 2 -- pretrain CONFIG")
    if not options.grace > 0:  # nan too
        raise ValueError(f"--grace: got {options.grace:g} seconds, expected more than 0. A save takes seconds to minutes.")
    found = find_devices(os.environ)
    devices = choose_devices(options.ranks, found)
    if options.master_port is not None:
        check_port(options.master_port)
    log_dir = Path(options.log_dir) if options.log_dir else _log_dir(command)
    log_dir.mkdir(parents=True, exist_ok=True)
    return Job(
        program=(*program, *command),
        devices=tuple(devices),
        on_gpu=bool(found),
        log_dir=log_dir,
        master_port=options.master_port or free_port(),
        grace=options.grace,
    )


def _log_dir(command: Sequence[str]) -> Path:
    """RUN_DIR/logs of the configuration that the command names; reading it here shows its errors at once, and only once."""
    # Here, because `--help` and an explicit --log-dir need no configuration.
    from simmim_scale.config.load import load_config

    configs = [word for word in command[1:] if word.endswith((".yaml", ".yml")) and "=" not in word]
    if not configs:
        raise ValueError(
            f"--log-dir: needed, since the command names no configuration to take the run directory from: {' '.join(command)!r}. "
            "Give --log-dir DIR, or a CONFIG.yaml after the command."
        )
    overrides = [word for word in command[1:] if "=" in word and not word.startswith("-")]
    return Path(load_config(configs[0], overrides).run_dir) / "logs"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        usage="python -m launch [options] -- COMMAND [arguments]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", default="auto", metavar="N|auto", help="processes; auto: one per GPU, or one on the CPU")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="where the ranks meet (default: a free port)")
    parser.add_argument("--log-dir", metavar="DIR", help="directory of the ranks' output (default: RUN_DIR/logs)")
    parser.add_argument(
        "--grace", type=float, default=300.0, metavar="SECONDS", help="time to save after a request to stop (default: 300)"
    )
    return parser
