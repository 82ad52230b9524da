"""Run a function on several real processes that form one process group.

A fork server imports the heavy libraries once, and every rank is a fork of it, so that a test costs a second or two.
Each start of the real launcher imports everything again; only test_launcher.py and its like pay for that.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Result = TypeVar("Result")

_PRELOADED = ["torch", "deepspeed", "transformers", "open_clip", "tests.distributed.preload"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port that no other process is given while the block runs.

    A socket stays bound to the port and never listens. Linux gives such a port to nobody who asks for a free one, but
    lets rank 0's store listen on it, because both sockets set SO_REUSEADDR.
    """
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("", 0))
        yield int(reservation.getsockname()[1])


def run_distributed(
    function: Callable[..., Result], world_size: int, *arguments: Any, timeout_seconds: float = 300
) -> list[Result]:
    """Return the results of ``function(world, *arguments)`` on ``world_size`` processes, by rank.

    Args:
        function: Defined at the top of its module, because it is pickled, as are its arguments.
        world_size: Number of processes.
        *arguments: Passed on after the process's ``World``.
        timeout_seconds: Time for all ranks together. No process outlives it.

    Raises:
        AssertionError: A rank failed (the message is its traceback), died without a result, or time is up.
    """
    with reserved_port() as port:
        receivers: list[Any] = []
        processes = []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank_main, args=(function, arguments, rank, world_size, port, sender))
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        try:
            return _collect(receivers, processes, timeout_seconds)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def start_fork(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start ``function(*arguments)`` in a process that has the heavy libraries loaded."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


def _collect(receivers: list[Any], processes: list[Any], timeout_seconds: float) -> list[Any]:
    """Return each rank's result; raise AssertionError at the first rank that failed or died."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_seconds
    waiting = list(receivers)
    while waiting:
        ready: list[Any] = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        missing = sorted(set(range(len(processes))) - results.keys())
        assert ready, f"ranks {missing} returned nothing within {timeout_seconds} s"
        for receiver in ready:
            try:
                rank, result, error = receiver.recv()
            except EOFError:
                rank = receivers.index(receiver)
                processes[rank].join(timeout=5)
                raise AssertionError(f"rank {rank} died (exit code {processes[rank].exitcode})") from None
            assert error is None, f"rank {rank} failed:\n{error}"
            results[rank] = result
            waiting.remove(receiver)
    return [results[rank] for rank in range(len(processes))]


def _rank_main(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world_size: int, port: int, sender: Any
) -> None:
    """Join the process group, run the function, and send its result or traceback."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    from trainer.runtime import distributed

    try:
        world = distributed.initialize(timeout_seconds=60, threads=1)
        sender.send((rank, function(world, *arguments), None))
    except BaseException:  # noqa: BLE001  the test reports whatever happened
        sender.send((rank, None, traceback.format_exc()))
    finally:
        sender.close()
        distributed.shut_down()
