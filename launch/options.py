"""Options of `python -m launch`, and what may be said about them before anything starts."""

import argparse

from launch.transport import LAUNCHERS

USAGE = """python -m launch [options] -- COMMAND [arguments]
       python -m launch check [--hostfile HOSTS] [CONFIG] [KEY=VALUE ...]
       python -m launch logs RUN_DIR [--follow]"""
DESCRIPTION = """Starts a command of simmim on every device of this node, or of the nodes of a hostfile."""
EPILOG = """\
SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 reach every rank on every node, which then save and end; a second Ctrl-C ends them at once.
The output of rank 0 is shown; the output of every rank is in RUN_DIR/logs, and `python -m launch logs RUN_DIR` merges it.

exit codes: 0 finished, 2 an error of the user's (nothing was trained), 75 stopped after a complete save,
76 a rank, a node or the network hung or was lost (see RUN_DIR/logs/stall-report-*), others: a failure

examples: python -m launch --ranks 2 -- pretrain configs/debug/demo.yaml run_dir=runs/demo
          python -m launch check --hostfile hosts configs/pretrain/swinv2_h_800ep.yaml
          python -m launch --hostfile hosts --max-restarts 5 -- pretrain configs/pretrain/swinv2_h_800ep.yaml
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ranks",
        default="auto",
        metavar="N|auto",
        help="processes on this node (with Slurm: on each); auto: one per GPU, or one",
    )
    parser.add_argument("--log-dir", metavar="DIR", help="directory of the ranks' output (default: RUN_DIR/logs)")
    parser.add_argument(
        "--grace", type=float, default=300.0, metavar="SECONDS", help="time to save after a request to stop (default: 300)"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="after a failure, go on from the last save so often (default: 0)"
    )
    add_nodes(parser)
    _add_addresses(parser)
    _add_limits(parser)
    return parser


def add_nodes(parser: argparse.ArgumentParser) -> None:
    """Options that say which nodes, and how to reach them; `check` has them too."""
    nodes = parser.add_argument_group("several nodes")
    nodes.add_argument("--hostfile", metavar="FILE", help="nodes, one `HOST slots=N` a line; the first one gets rank 0")
    nodes.add_argument("--include", metavar="HOST[:SLOT,...][@...]", help="only these nodes or slots of the hostfile")
    nodes.add_argument("--exclude", metavar="HOST[:SLOT,...][@...]", help="all but these")
    nodes.add_argument(
        "--launcher",
        default="auto",
        metavar="|".join(LAUNCHERS),
        help="auto: pdsh, or ssh where it is not installed; slurm: srun, inside an allocation; torchrun: ssh, and torchrun's"
        " rendezvous instead of DeepSpeed's launcher",
    )
    nodes.add_argument("--ssh-port", type=int, metavar="PORT", help="port of sshd on the nodes")
    nodes.add_argument("--export", action="append", default=[], metavar="NAME[=VALUE]", help="one more variable for all ranks")
    nodes.add_argument("--allow-mismatch", action="store_true", help="go on although nodes have other code or packages")
    nodes.add_argument(
        "--connect-seconds", type=float, default=120.0, metavar="S", help="until all nodes are there (default: 120)"
    )
    nodes.add_argument(
        "--control-address", metavar="ADDR", help="where nodes find this process (default: this machine's address)"
    )
    nodes.add_argument("--control-port", type=int, default=0, metavar="PORT", help="and at which port (default: a free one)")
    nodes.add_argument("--master-addr", metavar="ADDR", help="where the ranks meet (default: the first node)")


def _add_addresses(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--master-port", type=int, metavar="PORT", help="where the ranks meet (default: a free port)")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    watchdog = parser.add_argument_group("watchdog: seconds until a job that hangs is ended with a report (exit code 76)")
    limits = (
        ("--stall-seconds", 600.0, "without progress of a rank, once it trains"),
        ("--start-seconds", 1800.0, "without progress before its first step"),
        ("--heartbeat-seconds", 60.0, "without a heartbeat of a rank: its process is stopped"),
        ("--node-seconds", 30.0, "without a word from a node or from the head"),
    )
    for name, default, meaning in limits:
        watchdog.add_argument(name, type=float, default=default, metavar="S", help=f"{meaning} (default: {default:g})")


def check_options(options: argparse.Namespace) -> None:
    """Raises:
    ValueError: a number out of its range.
    """
    if not options.grace > 0:  # nan too
        raise ValueError(f"--grace: got {options.grace:g} seconds, expected more than 0. A save takes seconds to minutes.")
    for name in ("stall_seconds", "start_seconds", "heartbeat_seconds", "node_seconds", "connect_seconds"):
        if not getattr(options, name) >= 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(options, name):g}, expected at least 1 second.")
    if options.max_restarts < 0:
        raise ValueError(f"--max-restarts: got {options.max_restarts}, expected 0 or more.")
    for name in ("ssh_port", "control_port"):
        check_number(name, getattr(options, name))


def check_number(name: str, port: int | None) -> None:
    lowest = 0 if name == "control_port" else 1
    if port is not None and not lowest <= port <= 65535:
        raise ValueError(f"--{name.replace('_', '-')}: got {port}, expected a number from 1 to 65535.")


def many_nodes(options: argparse.Namespace) -> bool:
    """Whether the options speak of several nodes.

    Raises:
        ValueError: an option for several nodes without saying which.
    """
    if options.hostfile or options.launcher == "slurm":
        if options.ranks != "auto" and options.launcher != "slurm":
            raise ValueError("--ranks: the hostfile's slots say how many; change them there, or choose with --include.")
        return True
    for name in ("include", "exclude", "control_address", "master_addr"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')}: only with several nodes. Name them with --hostfile.")
    if options.launcher != "auto":
        raise ValueError(f"--launcher {options.launcher}: needs --hostfile. Without one the ranks start on this node.")
    return False
