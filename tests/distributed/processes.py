"""Run a function on several real processes of one group. Imports are shared, so that a test costs a second or two.

A fork server imports the heavy libraries once; every rank is a fork of it. The real launcher is tested apart from this
(test_launcher.py), since each of its starts pays for all imports again.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, TypeVar

Result = TypeVar("Result")

_PRELOADED = ["torch", "deepspeed", "transformers", "open_clip", "tests.distributed.preload"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world_size: int, port: int, sender: Any
) -> None:
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
    except BaseException:  # noqa: BLE001  whatever happens belongs into the test's report
        sender.send((rank, None, traceback.format_exc()))
    finally:
        sender.close()
        distributed.shut_down()


def run_distributed(
    function: Callable[..., Result], world_size: int, *arguments: Any, timeout_seconds: float = 120
) -> list[Result]:
    """Results of ``function(world, *arguments)`` on ``world_size`` processes, by rank.

    The function and its arguments are pickled: define it at the top of its module.
    Raises: AssertionError with the first failed rank's traceback, or when time is up. Nothing is left running.
    """
    port = free_port()
    receivers: list[Any] = []
    processes = []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank_main, args=(function, arguments, rank, world_size, port, sender))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    results: dict[int, Result] = {}
    deadline = time.monotonic() + timeout_seconds
    try:
        waiting = list(receivers)
        while waiting:
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            missing = sorted(set(range(world_size)) - results.keys())
            assert ready, f"ranks {missing} gave no answer in {timeout_seconds} s"
            receiver: Any
            for receiver in ready:
                try:
                    rank, result, error = receiver.recv()
                except EOFError:
                    rank = receivers.index(receiver)
                    processes[rank].join(timeout=5)
                    raise AssertionError(
                        f"rank {rank} died without an answer (exit code {processes[rank].exitcode})"
                    ) from None
                assert error is None, f"rank {rank} failed:\n{error}"
                results[rank] = result
                waiting.remove(receiver)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]
