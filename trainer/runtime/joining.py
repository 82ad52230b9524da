"""Wait until all processes of a run have joined, and say who is waited for.

torch waits silently, for as long as a collective may take, and ends with a stack of C++ frames. So the processes meet
here first, at the address and port where torch's own store is then made.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from trainer.errors import TrainerError
from trainer.runtime.launch_environment import ADVICE

_NOTICE_SECONDS, _NEXT_NOTICE_SECONDS = 10.0, 60.0
_POLL_SECONDS, _CONNECT_SECONDS = 0.1, 5.0
_READ_SECONDS = 2.0  # in which the other ranks read why rank 0 gave up
_MOST_RANKS_SHOWN = 20

_log = logging.getLogger(__name__)


class JoinError(TrainerError):
    """Report that the processes of a run did not find each other."""


def wait_for_all(timeout_seconds: float) -> object:
    """Wait for all processes that the environment promises, and return the store at which they met.

    Keep the store until torch's process group exists: both share one server, on one port.

    Args:
        timeout_seconds: Longest wait.

    Raises:
        JoinError: The port is in use, or a process is missing.
    """
    environment = os.environ
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    # torchrun's agent has the store already, and keeps it over restarts.
    has_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + timeout_seconds
    is_server = rank == 0 and not has_agent
    if is_server:
        _check_port(port)
    else:
        _wait_for_server(rank, size, address, port, deadline)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, but missing in torch's __all__
            address, port, size, is_server, timeout, wait_for_workers=False, multi_tenant=True
        )
        group = dist.PrefixStore(  # type: ignore[attr-defined]
            f"trainer/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
        )
        group.set(f"rank/{rank}", socket.gethostname())
        group.add("joined", 1)
        if rank == 0:
            _wait_for_ranks(group, size, deadline)
        elif obstacle := _answer_of_rank_0(group, deadline + _READ_SECONDS):
            raise JoinError(obstacle)
    except RuntimeError as error:  # torch's errors of stores and sockets
        first = str(error).partition("\n")[0]
        raise JoinError(f"rank {rank} of {size} could not join at {address}:{port}: {first}. {ADVICE}") from error
    return store


def _check_port(port: int) -> None:
    """Check that this process can listen on the port: torch would print a stack of C++ frames."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            raise JoinError(
                f"port {port} of this machine cannot be used ({error.strerror}): another run may have it. Set "
                f"MASTER_PORT to a free port, or give --master_port to the deepspeed launcher"
            ) from None


def _notices(deadline: float) -> Iterator[float | None]:
    """Yield until the deadline: the seconds waited so far when it is time to say so, else None."""
    start = time.monotonic()
    due = start + _NOTICE_SECONDS
    while (now := time.monotonic()) < deadline:
        if now >= due:
            due = now + _NEXT_NOTICE_SECONDS
            yield now - start
        else:
            yield None


def _wait_for_server(rank: int, size: int, address: str, port: int, deadline: float) -> None:
    """Wait until rank 0 listens."""
    reason = "it did not answer"
    for seconds in _notices(deadline):
        if seconds is not None:
            message = "rank %d of %d has been waiting for rank 0 at %s:%d for %.0f s (%s). %s"
            _log.warning(message, rank, size, address, port, seconds, reason, ADVICE)
        try:
            socket.create_connection((address, port), _CONNECT_SECONDS).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(_POLL_SECONDS)
    raise JoinError(f"rank {rank} of {size}: rank 0 is not at {address}:{port} ({reason}). {ADVICE}")


def _wait_for_ranks(group: Any, size: int, deadline: float) -> None:
    """Wait until all ranks have joined, and tell the others whether they have; only rank 0 calls this."""
    for seconds in _notices(deadline):
        if group.add("joined", 0) >= size:
            group.set("obstacle", "")
            return
        if seconds is not None:
            _log.warning("waiting for %s for %.0f s. %s", _missing(group, size), seconds, ADVICE)
        time.sleep(_POLL_SECONDS)
    obstacle = f"these processes did not join: {_missing(group, size)}. {ADVICE}"
    group.set("obstacle", obstacle)
    time.sleep(_READ_SECONDS)
    raise JoinError(obstacle)


def _answer_of_rank_0(group: Any, deadline: float) -> str:
    """Wait for rank 0, and return why not all have joined; empty if they have.

    This polls, because a signal cannot interrupt torch's own wait.
    """
    pause = _POLL_SECONDS
    while time.monotonic() < deadline:
        if group.check(["obstacle"]):
            return str(group.get("obstacle").decode())
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)  # thousands of ranks ask
    return f"rank 0 gave no answer. {ADVICE}"


def _missing(group: Any, size: int) -> str:
    ranks = [rank for rank in range(size) if not group.check([f"rank/{rank}"])]
    shown = ", ".join(map(str, ranks[:_MOST_RANKS_SHOWN]))
    return f"rank {shown}{', ...' if len(ranks) > _MOST_RANKS_SHOWN else ''} ({len(ranks)} of {size} processes)"
