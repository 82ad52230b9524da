"""Test reads over http and fsspec: which failures are tried again or are final, and which urls are never opened."""

from __future__ import annotations

import pickle
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from tests.data import http_server
from tests.data.http_server import Server, cut, drip, hang, serve, shifted, status, whole_file, wrong_size
from trainer.data.errors import ShardError
from trainer.data.shards import remote_store, retries
from trainer.data.shards.remote_store import RemoteError, RemoteStore, without_query
from trainer.data.shards.retries import RetryPolicy
from trainer.data.shards.urls import is_remote

DATA = bytes(range(256)) * 40
STORE = RemoteStore(RetryPolicy(retries=4, timeout_seconds=0.75, deadline_seconds=60.0, first_wait_seconds=0.001))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "a.tar").write_bytes(DATA)
    with serve(tmp_path) as one:
        yield one


def failure(server: Server, store: RemoteStore = STORE, name: str = "a.tar", end: int = 600) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        store.read(server.url(name), 100, end, len(DATA))
    return caught.value


def test_ranges_are_exact(server: Server) -> None:
    for start, end in ((0, 1), (0, len(DATA)), (100, 600), (len(DATA) - 1, len(DATA))):
        assert STORE.read(server.url("a.tar"), start, end, len(DATA)) == DATA[start:end]
    assert STORE.read(server.url("a.tar"), 5, 5) == b""
    assert server.requests["a.tar"] == 4


def test_size_and_version(server: Server, tmp_path: Path) -> None:
    before = STORE.stat(server.url("a.tar"))
    assert before.size == len(DATA)
    assert before == STORE.stat(server.url("a.tar"))
    (tmp_path / "a.tar").write_bytes(DATA[::-1])
    assert STORE.stat(server.url("a.tar")).version not in (0, before.version)
    (tmp_path / "empty.tar").write_bytes(b"")
    assert STORE.stat(server.url("empty.tar")).size == 0


@pytest.mark.parametrize(
    "fault",
    [status(500), status(503, Retry_After="0"), status(429), cut(0), cut(123), hang(), shifted],
    ids=["500", "503", "429", "closed", "cut", "silent", "shifted"],
)
def test_passing_failures_are_tried_again(server: Server, fault: object) -> None:
    server.faults = [fault, fault]
    assert STORE.read(server.url("a.tar"), 100, 600, len(DATA)) == DATA[100:600]
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


def test_a_missing_file(server: Server) -> None:
    error = failure(server, name="gone.tar?signature=secret")
    assert (error.reason, "secret" in str(error)) == ("not_found", False)
    assert isinstance(error, ShardError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_redirects_are_followed_a_few_times(server: Server) -> None:
    there = status(302, Location=server.url("a.tar"))
    server.faults = [there, there]
    assert STORE.read(server.url("b.tar"), 100, 600) == DATA[100:600]
    server.faults = [there] * 10
    assert failure(server).reason == "redirect"


def test_retries_end_and_name_the_settings(server: Server) -> None:
    server.faults = [status(500)] * 9
    error = failure(server)
    assert error.reason == "server"
    assert "after 5 attempts" in str(error)
    assert "data.read_retries" in str(error)
    assert server.requests["a.tar"] == 5


@pytest.mark.parametrize("fault", [hang(), drip(0.1), status(503, Retry_After="3600")], ids=["silent", "slow", "busy"])
def test_the_deadline_ends_a_read(server: Server, fault: object) -> None:
    """Without a deadline, the store would wait for an hour, or read the slow answer successfully."""
    server.faults = [fault] * 9
    error = failure(server, RemoteStore(RetryPolicy(retries=50, timeout_seconds=3600, deadline_seconds=0.5)))
    assert error.reason in ("timed_out", "server")
    assert "gave up after 1 attempts" in str(error)
    assert "data.read_deadline_seconds" in str(error)
    assert server.requests["a.tar"] <= 1


def test_a_port_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as bound, pytest.raises(RemoteError) as caught:
        bound.bind(("127.0.0.1", 0))  # a port that nobody listens on, and that nobody else can take
        STORE.read(f"http://127.0.0.1:{bound.getsockname()[1]}/a.tar", 0, 10)
    assert caught.value.reason == "connection"
    assert "after 5 attempts" in str(caught.value)


def test_a_dead_host_is_not_found_out_again_for_every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(retries, "FIRST_CONTACT_SECONDS", 0.3)
    store = RemoteStore(replace(STORE.policy, retries=1000, first_wait_seconds=0.2))
    start = time.monotonic()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        for number in range(200):
            with pytest.raises(RemoteError, match="never answered|asked again") as caught:
                store.stat(f"http://127.0.0.1:{bound.getsockname()[1]}/{number}.tar")
            assert caught.value.reason == "connection"
    assert time.monotonic() - start < 20


def test_a_host_that_answered_before_has_all_retries(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that restarts must not end a run."""
    monkeypatch.setattr(retries, "FIRST_CONTACT_SECONDS", 0.0)
    STORE.read(server.url("a.tar"), 0, 10)
    port, folder = server.server_port, server.folder
    server.shutdown()
    server.server_close()
    revived: list[Server] = []

    def revive() -> None:
        time.sleep(0.5)
        monkeypatch.setattr(http_server, "PORT", port)
        revived.append(Server(folder))
        threading.Thread(target=revived[0].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    threading.Thread(target=revive).start()
    store = RemoteStore(RetryPolicy(retries=1000, first_wait_seconds=0.05, longest_wait_seconds=0.05))
    assert store.read(f"http://127.0.0.1:{port}/a.tar", 0, 10) == DATA[:10]
    revived[0].shutdown()
    revived[0].server_close()


def test_a_name_that_does_not_resolve_fails_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(retries, "FIRST_CONTACT_SECONDS", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    start = time.monotonic()
    with pytest.raises(RemoteError, match="nowhere"):
        RemoteStore().stat("http://nowhere.invalid/a.tar")
    assert time.monotonic() - start < 20


class NoCredentialsError(Exception):
    """Named as botocore's error."""


class HttpError(Exception):
    """Has a status, as gcsfs's error."""

    code = 401


class EndpointConnectionError(Exception):
    """Named as botocore's error for a dead endpoint."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NoCredentialsError("Unable to locate credentials"), "credentials"),
        (HttpError("Anonymous caller does not have storage.objects.get access"), "credentials"),
        (OSError("An error occurred (InvalidAccessKeyId) when calling the HeadObject operation"), "credentials"),
        (EndpointConnectionError("Could not connect to the endpoint URL"), "connection"),
        (OSError("wrapped"), "connection"),
    ],
    ids=["botocore", "gcsfs", "key", "endpoint", "cause"],
)
def test_missing_credentials_and_dead_endpoints_fail_in_seconds(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, request: pytest.FixtureRequest
) -> None:
    files = fsspec.filesystem("memory")
    if str(error) == "wrapped":
        error.__cause__ = EndpointConnectionError("x")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(files), "info", fail)
    monkeypatch.setattr(type(files), "cat_file", fail)
    monkeypatch.setattr(retries, "FIRST_CONTACT_SECONDS", 0.3)
    bucket = f"memory://{request.node.callspec.id}"
    start = time.monotonic()
    for number in range(50):
        with pytest.raises(RemoteError) as caught:
            RemoteStore().read(f"{bucket}/{number}.tar", 0, 10)
        assert caught.value.reason == reason
    assert time.monotonic() - start < 20
    assert type(error).__name__ in str(caught.value)


def test_an_object_store_without_an_answer_fails_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(remote_store, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(retries, "FIRST_CONTACT_SECONDS", 0.3)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", lambda *_, **__: release.wait())
    with pytest.raises(RemoteError, match=r"no answer within.*never answered") as caught:
        RemoteStore().read("memory://silent/a.tar", 0, 10)
    assert caught.value.reason == "timed_out"
    release.set()


def test_retries_are_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.faults = [status(503), cut(3)]
    STORE.read(server.url("a.tar?signature=secret"), 0, 10)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "status 503" in messages[0] and "retry 1 of 4" in messages[0] and "secret" not in messages[0]


def test_fsspec_ranges() -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/remote-test/a.tar", DATA)
    files.pipe_file("/remote-test/b.tar", b"")
    url = "memory://remote-test/a.tar"
    assert STORE.read(url, 100, 600) == DATA[100:600]
    assert STORE.stat(url).size == len(DATA)
    assert STORE.glob("memory://remote-test/*.tar") == [
        "memory:///remote-test/a.tar",
        "memory:///remote-test/b.tar",
    ]
    for read in (lambda: STORE.read("memory://remote-test/c.tar", 0, 1), lambda: STORE.stat("memory://remote-test/c")):
        with pytest.raises(RemoteError) as caught:
            read()
        assert caught.value.reason == "not_found"
    with pytest.raises(RemoteError) as caught:
        STORE.stat("memory://remote-test")
    assert caught.value.reason == "not_a_file"


def test_fsspec_failures_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/remote-test/a.tar", DATA)
    calls: list[int] = []

    def flaky(path: str, start: int, end: int) -> bytes:
        calls.append(start)
        if len(calls) == 1:
            raise RuntimeError("SlowDown")
        return DATA[start : end - (len(calls) == 2)]  # then a short answer

    monkeypatch.setattr(type(files), "cat_file", lambda self, path, start=None, end=None: flaky(path, start, end))
    assert STORE.read("memory://remote-test/a.tar", 100, 600) == DATA[100:600]
    assert len(calls) == 3


def test_a_missing_backend_is_named() -> None:
    with pytest.raises(RemoteError) as caught:
        STORE.read("hdfs://host/a.tar", 0, 1)
    assert caught.value.reason in ("no_backend", "backend")
    assert "hdfs" in caught.value.url


@pytest.mark.parametrize(
    "url",
    ["pipe:cat x", "ftp://h/a", "github://o:r@/a", "simplecache::s3://b/a", "s3://b/a::http://h/x", "zip://a", "x:y"],
)
def test_urls_that_are_never_opened(url: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(url))):
        is_remote(url)
    with pytest.raises(ValueError):
        STORE.read(url, 0, 1)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "/etc/hostname", "etc/hostname"])
def test_local_files_are_not_remote(url: str) -> None:
    assert not is_remote(url)
    with pytest.raises(ValueError, match=re.escape(repr(url))):
        STORE.read(url, 0, 1)


def test_control_characters_in_urls_send_nothing(server: Server) -> None:
    with pytest.raises(RemoteError) as caught:
        STORE.read(server.url("a.tar HTTP/1.1\r\nHost: other"), 0, 1)
    assert caught.value.reason == "invalid_url"
    assert not server.requests


def test_messages_hide_queries() -> None:
    assert without_query("https://h/a.tar?X-Amz-Signature=1") == "https://h/a.tar?..."
