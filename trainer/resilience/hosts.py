"""The nodes of a job: DeepSpeed's hostfile, and which of its hosts answer over ssh.

A hostfile has a line a host, ``name slots=N``: N processes (GPUs) are started there. ``#`` starts a comment.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import TrainerError
from trainer.runtime.files import write_atomically

# What may stand in a host's name or address. A name becomes an argument of ssh and pdsh, so it must not look like an
# option ("-oProxyCommand=...") nor hold pdsh's own syntax ("node[1-4]", "a,b").
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)")
_PARALLEL = 64  # probes at once: far below the file descriptors that a process may open


class HostfileError(TrainerError, ValueError):
    """A hostfile that no job can be started with; its message names every wrong line."""

    exit_code = 2


@dataclass(frozen=True)
class Host:
    """One node. slots: processes to start on it."""

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a hostfile, in its order: the first one is the master.

    Raises: HostfileError with all problems at once: lines that are no ``name slots=N``, a host listed twice, no slots,
    different numbers of slots, no host at all, a file that cannot be read.
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
    problems += _unequal([one for one in hosts.values() if one[0].slots])
    if not hosts and not problems:
        problems.append('it names no host; write a line "NAME slots=N" for each')
    if problems:
        raise HostfileError("\n".join([f"{path} cannot be used:", *(f"  {problem}" for problem in problems)]))
    return tuple(host for host, _ in hosts.values())


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    """Write what ``read_hostfile`` reads, whole or not at all."""
    write_atomically(path, "".join(f"{host.name} slots={host.slots}\n" for host in hosts).encode())


def unreachable(hosts: Sequence[Host], ssh_arguments: Sequence[str], timeout_seconds: float) -> dict[str, str]:
    """The hosts that run no command over ssh, with what ssh said; all are asked at once.

    ssh_arguments: of every call, such as ``("-F", "ssh_config", "-p", "2222")``. Nobody is asked for a password.
    timeout_seconds: for a host to connect and answer.
    """
    with ThreadPoolExecutor(_PARALLEL) as pool:
        reasons = pool.map(lambda host: _why_unreachable(host, ssh_arguments, timeout_seconds), hosts)
        return {host.name: reason for host, reason in zip(hosts, reasons, strict=True) if reason}


def ssh_command(host: Host, ssh_arguments: Sequence[str], timeout_seconds: float, command: str) -> list[str]:
    """The ssh call that runs a shell command on a host, without ever asking anything."""
    connect = max(1, int(timeout_seconds))
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={connect}"]
    return ["ssh", *options, *ssh_arguments, "--", host.name, command]


def master_address(hosts: Sequence[Host], ssh_arguments: Sequence[str], timeout_seconds: float = 20) -> str:
    """The first host's address as the last host resolves it.

    Asked there, since a host's own name is often 127.0.1.1 to itself. With one host, or where only ssh knows the name:
    the first address that the host has.

    Raises: HostfileError when neither host says.
    """
    name = hosts[0].name
    asked = [(hosts[-1], f"getent ahostsv4 {name} | cut -d' ' -f1 | head -n 1"), (hosts[0], "hostname -I")]
    for host, command in asked:
        done = subprocess.run(
            ssh_command(host, ssh_arguments, timeout_seconds, command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = done.stdout.split()
        if done.returncode == 0 and found and not found[0].startswith("127."):
            return found[0]
    raise HostfileError(f"the address of {name} is not known; check `ssh {name} hostname -I`, or set MASTER_ADDR")


def _unequal(found: Sequence[tuple[Host, int]]) -> list[str]:
    """DeepSpeed numbers local ranks wrongly where nodes differ, and the slowest node sets the pace anyway."""
    if len({host.slots for host, _ in found}) <= 1:
        return []
    listed = ", ".join(f"{host.name} {host.slots} (line {number})" for host, number in found)
    return [f"the hosts have unequal slots: {listed}; give all the same number"]


def _why_unreachable(host: Host, ssh_arguments: Sequence[str], timeout_seconds: float) -> str:
    """ "" for a host that answers."""
    command = ssh_command(host, ssh_arguments, timeout_seconds, "true")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_seconds:g} s (it is down, or its login hangs, in ~/.bashrc for example)"
    if done.returncode == 0:
        return ""
    return done.stderr.strip().rpartition("\n")[2] or f"ssh ended with code {done.returncode}"
