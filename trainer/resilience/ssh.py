"""Run commands on the hosts of a job over ssh, without ever asking for a password."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from trainer.resilience.hostfile import Host, HostfileError

_PARALLEL = 64  # connections at the same time: far below the file descriptors that a process may open


def ssh_command(host: Host, ssh_arguments: Sequence[str], timeout_seconds: float, command: str) -> list[str]:
    """Return the ssh call that runs a shell command on a host.

    Args:
        host: Where to run the command.
        ssh_arguments: Further arguments of ssh, such as ``("-F", "ssh_config", "-p", "2222")``.
        timeout_seconds: How long to wait for the connection.
        command: Shell command.
    """
    connect = max(1, int(timeout_seconds))
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={connect}"]
    return ["ssh", *options, *ssh_arguments, "--", host.name, command]


def unreachable_hosts(hosts: Sequence[Host], ssh_arguments: Sequence[str], timeout_seconds: float) -> dict[str, str]:
    """Return the hosts that run no command over ssh, with the reason; all hosts are tried at the same time.

    Args:
        hosts: Hosts to try.
        ssh_arguments: Further arguments of ssh.
        timeout_seconds: How long a host may take to connect and answer.
    """
    with ThreadPoolExecutor(_PARALLEL) as pool:
        reasons = pool.map(lambda host: _unreachable_reason(host, ssh_arguments, timeout_seconds), hosts)
        return {host.name: reason for host, reason in zip(hosts, reasons, strict=True) if reason}


def _unreachable_reason(host: Host, ssh_arguments: Sequence[str], timeout_seconds: float) -> str:
    """Return why a host does not answer; empty if it does."""
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


def master_address(hosts: Sequence[Host], ssh_arguments: Sequence[str], timeout_seconds: float = 20) -> str:
    """Return the address of the first host, as the last host resolves it.

    The last host resolves the name because a host often resolves its own name to 127.0.1.1. With one host, or if only
    ssh knows the name, the result is the first address that the host itself has.

    Args:
        hosts: Hosts of the job.
        ssh_arguments: Further arguments of ssh.
        timeout_seconds: How long to wait for a connection.

    Raises:
        HostfileError: Neither host knows the address.
    """
    name = hosts[0].name
    attempts = [(hosts[-1], f"getent ahostsv4 {name} | cut -d' ' -f1 | head -n 1"), (hosts[0], "hostname -I")]
    for host, command in attempts:
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
