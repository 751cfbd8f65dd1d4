"""The hostfile: `HOST slots=N` a line, as DeepSpeed and MPI write it, and the choice among them."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\S+)")
# A name, or an address, with an optional user; what a shell or pdsh would read as something else is refused.
NAME = re.compile(r"(?:[A-Za-z0-9._-]+@)?[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9])?")
MOST_SLOTS = 1024
FORM = "expected HOST slots=N, for example: node-1 slots=8"


@dataclass(frozen=True, kw_only=True)
class Host:
    """A node and its slots.

    Args:
        name: as ssh takes it: a name, an alias of ~/.ssh/config, an address, or user@one.
        slots: index of each device to use, in order; one rank each.
    """

    name: str
    slots: tuple[int, ...]

    @property
    def short(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a file, in its order: the first one gets rank 0.

    Raises:
        ValueError: no such file, or every line that is wrong, with its number.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"--hostfile: cannot read {path} ({reason}). {FORM[0].upper()}{FORM[1:]}, one line per node.") from error
    return parse_hostfile(text, source=str(path))


def parse_hostfile(text: str, *, source: str) -> list[Host]:
    """Raises:
    ValueError: lines that are wrong, each as `source:number: what, got, expected`.
    """
    hosts: list[Host] = []
    first_line: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        try:
            host = _parse_line(content)
            if host.short in first_line:
                raise ValueError(
                    f"{host.short} is already in line {first_line[host.short]}. Name each node once, with all its slots."
                )
        except ValueError as error:
            problems.append(f"{source}:{number}: {error}")
            continue
        first_line[host.short] = number
        hosts.append(host)
    if not hosts and not problems:
        problems = [f"{source}: no node in it; {FORM}, one line per node."]
    if problems:
        raise ValueError("the hostfile cannot be used:\n  " + "\n  ".join(problems))
    return hosts


def _parse_line(content: str) -> Host:
    found = LINE.fullmatch(content)
    if found is None:
        raise ValueError(f"got {content!r}, {FORM}")
    name, slots = found["name"], found["slots"]
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no host name; {FORM}")
    if not slots.isdecimal() or not 1 <= int(slots) <= MOST_SLOTS:
        raise ValueError(
            f"{name}: slots={slots}, expected a number from 1 to {MOST_SLOTS}: how many ranks (GPUs) this node runs."
            " Remove the line, or put # before it, to leave the node out."
        )
    return Host(name=name, slots=tuple(range(int(slots))))


def choose_hosts(hosts: Sequence[Host], *, include: str | None, exclude: str | None) -> list[Host]:
    """The hosts and slots to use.

    Args:
        include, exclude: in DeepSpeed's form, `node-1@node-2:0,2`: whole nodes, or some slots of one. At most one of the two.

    Raises:
        ValueError: an unknown node or slot, both options, or nothing left.
    """
    if include is not None and exclude is not None:
        raise ValueError("--include and --exclude: got both, expected one. Name the nodes to use, or those to leave out.")
    if include is None and exclude is None:
        return list(hosts)
    option = "--include" if include is not None else "--exclude"
    named = _parse_choice((include if include is not None else exclude) or "", option, hosts)
    chosen = []
    for host in hosts:
        slots = named.get(host.short, ())
        kept = slots if include is not None else tuple(slot for slot in host.slots if slot not in slots)
        if kept:
            chosen.append(Host(name=host.name, slots=kept))
    if not chosen:
        raise ValueError(f"{option}: leaves no node out of {', '.join(host.short for host in hosts)}. Name fewer.")
    return chosen


def _parse_choice(text: str, option: str, hosts: Sequence[Host]) -> dict[str, tuple[int, ...]]:
    known = {host.short: host for host in hosts}
    named: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, _, listed = part.partition(":")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{option}: {name!r} is not in the hostfile, which has {', '.join(known)}.{hint}")
        if name in named:
            raise ValueError(f"{option}: {name} is named twice in {text!r}. Give all its slots at once: {name}:0,1")
        named[name] = _parse_slots(listed, known[name], option) if ":" in part else known[name].slots
    return named


def _parse_slots(listed: str, host: Host, option: str) -> tuple[int, ...]:
    words = listed.split(",")
    if not all(word.isdecimal() and int(word) in host.slots for word in words) or len(set(words)) != len(words):
        raise ValueError(
            f"{option}: slots {listed!r} of {host.short}, expected different numbers from 0 to {host.slots[-1]}"
            f" (the hostfile gives it {len(host.slots)}), for example {host.short}:0"
        )
    return tuple(sorted(int(word) for word in words))
