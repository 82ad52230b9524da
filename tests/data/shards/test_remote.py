"""Byte ranges over http and fsspec: what is tried again, what is final, and that nothing else is ever opened."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.data.http_server import Server, cut, drip, hang, serve, shifted, status, whole_file, wrong_size
from trainer.data.errors import ShardError
from trainer.data.shards.remote import RemoteError, RemoteStore, RetryPolicy, shown
from trainer.data.shards.urls import is_remote

DATA = bytes(range(256)) * 40
QUICK = RemoteStore(RetryPolicy(retries=4, timeout_seconds=0.3, deadline_seconds=5.0))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("trainer.data.shards.remote._FIRST_WAIT", 0.001)
    (tmp_path / "a.tar").write_bytes(DATA)
    with serve(tmp_path) as one:
        yield one


def failure(server: Server, store: RemoteStore = QUICK, name: str = "a.tar", end: int = 600) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        store.read(server.url(name), 100, end, len(DATA))
    return caught.value


def test_ranges_are_exact(server: Server) -> None:
    for start, end in ((0, 1), (0, len(DATA)), (100, 600), (len(DATA) - 1, len(DATA))):
        assert QUICK.read(server.url("a.tar"), start, end, len(DATA)) == DATA[start:end]
    assert QUICK.read(server.url("a.tar"), 5, 5) == b""
    assert server.requests["a.tar"] == 4


def test_size_and_version(server: Server, tmp_path: Path) -> None:
    before = QUICK.stat(server.url("a.tar"))
    assert before.size == len(DATA)
    assert before == QUICK.stat(server.url("a.tar"))
    (tmp_path / "a.tar").write_bytes(DATA[::-1])
    assert QUICK.stat(server.url("a.tar")).version not in (0, before.version)
    (tmp_path / "empty.tar").write_bytes(b"")
    assert QUICK.stat(server.url("empty.tar")).size == 0


@pytest.mark.parametrize(
    "fault",
    [status(500), status(503, Retry_After="0"), status(429), cut(0), cut(123), hang(0.6), shifted],
    ids=["500", "503", "429", "closed", "cut", "silent", "shifted"],
)
def test_passing_failures_are_tried_again(server: Server, fault: object) -> None:
    server.faults = [fault, fault]
    assert QUICK.read(server.url("a.tar"), 100, 600, len(DATA)) == DATA[100:600]
    assert server.requests["a.tar"] == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (status(404), "not_found"),
        (status(403), "forbidden"),
        (status(400), "refused"),
        (status(416), "changed"),
        (whole_file, "no_ranges"),
        (wrong_size, "changed"),
        (status(302, Location="file:///etc/hostname"), "redirect"),
        (status(302, Location="ftp://127.0.0.1/a"), "redirect"),
        (status(302, Location="data:text/plain,x"), "redirect"),
        (status(302), "redirect"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_final_failures_are_not_tried_again(server: Server, fault: object, reason: str) -> None:
    server.faults = [fault]
    assert failure(server).reason == reason
    assert server.requests["a.tar"] == 1


def test_a_file_that_is_not_there(server: Server) -> None:
    error = failure(server, name="gone.tar?signature=secret")
    assert (error.reason, "secret" in str(error)) == ("not_found", False)
    assert isinstance(error, ShardError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_redirects_are_followed_a_few_times(server: Server) -> None:
    there = status(302, Location=server.url("a.tar"))
    server.faults = [there, there]
    assert QUICK.read(server.url("b.tar"), 100, 600) == DATA[100:600]
    server.faults = [there] * 10
    assert failure(server).reason == "redirect"


def test_retries_end_and_name_the_settings(server: Server) -> None:
    server.faults = [status(500)] * 9
    error = failure(server)
    assert error.reason == "server"
    assert "after 5 attempts" in str(error)
    assert "data.read_retries" in str(error)
    assert server.requests["a.tar"] == 5


@pytest.mark.parametrize(
    ("fault", "timeout"), [(hang(3), 30.0), (drip(0.05), 30.0), (status(503, Retry_After="60"), 30.0)]
)
def test_the_deadline_holds(server: Server, fault: object, timeout: float) -> None:
    """A silent server, one that is never silent for long, and one that asks for more patience than there is."""
    server.faults = [fault] * 9
    start = time.monotonic()
    error = failure(server, RemoteStore(RetryPolicy(50, timeout, 0.4)))
    assert time.monotonic() - start < 2
    assert error.reason in ("timed_out", "server")


def test_a_server_that_is_not_there() -> None:
    store = RemoteStore(RetryPolicy(retries=1, timeout_seconds=0.5, deadline_seconds=3))
    with pytest.raises(RemoteError, match="connection") as caught:
        store.read("http://127.0.0.1:9/a.tar", 0, 10)
    assert caught.value.reason == "connection"


def test_fsspec_ranges() -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/remote-test/a.tar", DATA)
    files.pipe_file("/remote-test/b.tar", b"")
    url = "memory://remote-test/a.tar"
    assert QUICK.read(url, 100, 600) == DATA[100:600]
    assert QUICK.stat(url).size == len(DATA)
    assert QUICK.glob("memory://remote-test/*.tar") == [
        "memory:///remote-test/a.tar",
        "memory:///remote-test/b.tar",
    ]
    for read in (lambda: QUICK.read("memory://remote-test/c.tar", 0, 1), lambda: QUICK.stat("memory://remote-test/c")):
        with pytest.raises(RemoteError) as caught:
            read()
        assert caught.value.reason == "not_found"
    with pytest.raises(RemoteError) as caught:
        QUICK.stat("memory://remote-test")
    assert caught.value.reason == "not_a_file"


def test_fsspec_failures_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.shards.remote._FIRST_WAIT", 0.001)
    files = fsspec.filesystem("memory")
    files.pipe_file("/remote-test/a.tar", DATA)
    calls: list[int] = []

    def flaky(path: str, start: int, end: int) -> bytes:
        calls.append(start)
        if len(calls) == 1:
            raise RuntimeError("SlowDown")
        return DATA[start : end - (len(calls) == 2)]  # then a short answer

    monkeypatch.setattr(type(files), "cat_file", lambda self, path, start=None, end=None: flaky(path, start, end))
    assert QUICK.read("memory://remote-test/a.tar", 100, 600) == DATA[100:600]
    assert len(calls) == 3


def test_a_backend_that_is_not_installed_is_named() -> None:
    with pytest.raises(RemoteError, match=r"no_backend|backend") as caught:
        QUICK.read("hdfs://host/a.tar", 0, 1)
    assert "hdfs" in caught.value.url


@pytest.mark.parametrize(
    "url",
    ["pipe:cat x", "ftp://h/a", "github://o:r@/a", "simplecache::s3://b/a", "s3://b/a::http://h/x", "zip://a", "x:y"],
)
def test_urls_that_are_never_opened(url: str) -> None:
    with pytest.raises(ValueError, match=r"never opened|not from|chained"):
        is_remote(url)
    with pytest.raises(ValueError):
        QUICK.read(url, 0, 1)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "/etc/hostname", "etc/hostname"])
def test_local_files_are_not_remote(url: str) -> None:
    assert not is_remote(url)
    with pytest.raises(ValueError, match="not remote"):
        QUICK.read(url, 0, 1)


def test_control_characters_in_urls_send_nothing(server: Server) -> None:
    with pytest.raises(RemoteError) as caught:
        QUICK.read(server.url("a.tar HTTP/1.1\r\nHost: other"), 0, 1)
    assert caught.value.reason == "invalid_url"
    assert not server.requests


def test_messages_hide_queries() -> None:
    assert shown("https://h/a.tar?X-Amz-Signature=1") == "https://h/a.tar?..."
