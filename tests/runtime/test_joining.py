"""Let processes of a run wait for each other, for one that is missing, and for a port that is taken."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from trainer.runtime import joining
from trainer.runtime.joining import JoinError, wait_for_all


@pytest.fixture
def listener() -> Any:
    """Return a socket that listens on a port of its own."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server


@pytest.fixture
def port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def set_variables(rank: int, size: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def join(rank: int, size: int, port: int, timeout_seconds: float) -> str:
    """Wait for all in a process of its own; return the error, or an empty text."""
    set_variables(rank, size, port)
    try:
        store = wait_for_all(timeout_seconds)
    except JoinError as error:
        return str(error)
    time.sleep(1)  # the others read the store of rank 0
    del store
    return ""


def results(ranks: list[int], size: int, port: int, timeout_seconds: float) -> list[str]:
    with ProcessPoolExecutor(len(ranks), mp_context=get_context("spawn")) as pool:
        futures: list[Future[str]] = [pool.submit(join, rank, size, port, timeout_seconds) for rank in ranks]
        return [future.result() for future in futures]


@pytest.mark.slow
def test_a_missing_process_is_named_on_all_ranks(port: int) -> None:
    found = results([0, 2], 3, port, 30)
    assert all("rank 1 (1 of 3 processes)" in message for message in found)
    assert all("unset RANK" in message for message in found)


def test_a_port_in_use_is_named_with_what_to_do(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    set_variables(0, 1, port)
    with pytest.raises(JoinError) as caught:
        wait_for_all(5)
    assert f"port {port}" in str(caught.value)
    assert "MASTER_PORT" in str(caught.value)


def test_a_rank_says_that_it_waits_for_rank_0(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(joining, "_NOTICE_SECONDS", 0.2)
    set_variables(1, 2, port)
    with pytest.raises(JoinError, match=f"rank 0 is not at 127.0.0.1:{port}"):
        wait_for_all(1)
    assert f"rank 1 of 2 has been waiting for rank 0 at 127.0.0.1:{port}" in caplog.text


def test_rank_0_says_whom_it_waits_for(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(joining, "_NOTICE_SECONDS", 0.2)
    monkeypatch.setattr(joining, "_READ_SECONDS", 0.0)
    set_variables(0, 30, port)
    with pytest.raises(JoinError):
        wait_for_all(1)
    assert "waiting for rank 1, 2, 3" in caplog.text
    assert "20, ... (29 of 30 processes)" in caplog.text


def test_a_late_rank_0_is_waited_for(port: int) -> None:
    """Let rank 0 listen only after the other rank has tried."""
    set_variables(1, 2, port)
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def listen() -> None:
        time.sleep(0.5)
        server.bind(("127.0.0.1", port))
        server.listen()

    thread = threading.Thread(target=listen)
    thread.start()
    joining._wait_for_server(1, 2, "127.0.0.1", port, time.monotonic() + 20)
    thread.join()
    server.close()
