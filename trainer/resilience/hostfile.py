"""Read and write DeepSpeed's hostfile, which lists the nodes of a job.

Each line names a host and the number of processes (GPUs) to start there: ``NAME slots=N``. ``#`` starts a comment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import TrainerError
from trainer.runtime.files import write_atomically

# A name becomes an argument of ssh and pdsh. It must not look like an option ("-oProxyCommand=...") or contain pdsh's
# own syntax ("node[1-4]", "a,b").
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)")


class HostfileError(TrainerError, ValueError):
    """Report a hostfile that cannot start a job; the message names every wrong line."""

    exit_code = 2


@dataclass(frozen=True)
class Host:
    """Describe one node.

    Attributes:
        name: Host name or address.
        slots: Processes to start on the node.
    """

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Return the hosts of a hostfile in its order; the first one is the master.

    Raises:
        HostfileError: The file cannot be read, a line is not ``NAME slots=N``, a host is listed twice or has no slots,
            the numbers of slots differ, or there is no host. The message lists all problems.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HostfileError(f"the hostfile {path} cannot be read: {error}") from error
    hosts: dict[str, tuple[Host, int]] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        matched = _LINE.fullmatch(text)
        if matched is None or not _NAME.fullmatch(matched["name"]):
            problems.append(f'line {number}: {text!r} is not "NAME slots=N"')
            continue
        host = Host(matched["name"], int(matched["slots"]))
        if host.name in hosts:
            problems.append(f"line {number}: {host.name} is listed twice, first in line {hosts[host.name][1]}")
            continue
        if host.slots == 0:
            problems.append(f"line {number}: {host.name} has no slots; remove the line to leave the host out")
        hosts[host.name] = host, number
    problems += _unequal_slots([numbered for numbered in hosts.values() if numbered[0].slots])
    if not hosts and not problems:
        problems.append('it names no host; write a line "NAME slots=N" for each host')
    if problems:
        raise HostfileError("\n".join([f"{path} cannot be used:", *(f"  {problem}" for problem in problems)]))
    return tuple(host for host, _ in hosts.values())


def _unequal_slots(numbered: Sequence[tuple[Host, int]]) -> list[str]:
    """Refuse unequal slots: DeepSpeed numbers local ranks wrongly then, and the slowest node sets the pace anyway."""
    if len({host.slots for host, _ in numbered}) <= 1:
        return []
    listed = ", ".join(f"{host.name} {host.slots} (line {number})" for host, number in numbered)
    return [f"the hosts have unequal slots: {listed}; give all hosts the same number"]


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    """Write a hostfile atomically."""
    write_atomically(path, "".join(f"{host.name} slots={host.slots}\n" for host in hosts).encode())
