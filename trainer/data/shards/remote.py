"""Shards that are not on this machine: byte ranges over http(s) and through fsspec, tried again until a deadline.

A failure is permanent (missing, forbidden, changed, no ranges: trying again cannot help) or passing (a busy server, a
cut or slow answer). Passing ones are repeated after waits that double and are drawn at random, so that a thousand
processes which failed together do not return together. What is left is a ``RemoteError``, and stops the run.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from trainer.data.errors import ShardError
from trainer.data.shards.http_range import PassingFailure, PermanentFailure, http_range, http_stat
from trainer.data.shards.urls import HTTP_SCHEMES, is_remote, scheme_of

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 20.0  # seconds
# What stores call the version of an object, best first.
_VERSION_FIELDS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")
_random = random.SystemRandom()  # forked processes would share the state of any other generator
Result = TypeVar("Result")


class RemoteError(ShardError):
    """A remote read that failed for good. ``reason`` is an identifier, ``url`` is shown without its query."""

    def __init__(self, reason: str, url: str, detail: str) -> None:
        super().__init__(f"{url}: {reason}: {detail}")
        self.reason, self.url, self.detail = reason, url, detail

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str, str]]:
        return RemoteError, (self.reason, self.url, self.detail)


@dataclass(frozen=True)
class RetryPolicy:
    """data.read_retries, data.read_timeout_seconds and data.read_deadline_seconds."""

    retries: int = 10
    timeout_seconds: float = 30.0
    deadline_seconds: float = 300.0


@dataclass(frozen=True)
class RemoteStat:
    """size: bytes. version: 63 bits of what the store says about the version; 0 where it says nothing."""

    size: int
    version: int


@dataclass(frozen=True)
class RemoteStore:
    """Byte ranges of remote files. It keeps no connections, so it may be forked and pickled freely."""

    policy: RetryPolicy = RetryPolicy()

    def read(self, url: str, start: int, end: int, size: int | None = None) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive) of a file, all of them.

        size: of the whole file, compared where the store tells it. Raises RemoteError; ValueError for the url.
        """
        if end <= start:
            return b""
        if _is_http(url):
            return self._repeat(url, lambda stop: http_range(url, start, end, size, self.policy.timeout_seconds, stop))
        filesystem, path = _filesystem(url)
        return self._repeat(url, lambda _: _object_range(filesystem, path, start, end))

    def stat(self, url: str) -> RemoteStat:
        """Size and version of a file. Raises like ``read``."""
        if _is_http(url):
            size, version = self._repeat(url, lambda stop: http_stat(url, self.policy.timeout_seconds, stop))
        else:
            filesystem, path = _filesystem(url)
            size, version = self._repeat(url, lambda _: _object_stat(filesystem, path))
        digest = blake2b(version.encode(), digest_size=8).digest()
        return RemoteStat(size, int.from_bytes(digest, "little") >> 1 if version else 0)

    def glob(self, url: str) -> list[str]:
        """The files that match a pattern, sorted. Raises ValueError for http, which has no listings."""
        if _is_http(url):
            raise ValueError(f"{url!r}: http has no listings to match a pattern with; use braces, {{000..123}}")
        filesystem, path = _filesystem(url)
        found = self._repeat(url, lambda _: _typed(lambda: filesystem.glob(path)))
        return sorted(filesystem.unstrip_protocol(one) for one in found)

    def _repeat(self, url: str, attempt: Callable[[float], Result]) -> Result:
        """``attempt`` takes the time (of time.monotonic) at which it has to be over."""
        start = time.monotonic()
        stop = start + self.policy.deadline_seconds
        for number in range(self.policy.retries + 1):
            try:
                return _within(stop, attempt)
            except PermanentFailure as error:
                raise RemoteError(error.reason, shown(url), error.detail) from None
            except PassingFailure as error:
                last = error
            wait = _random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**number))
            wait = max(wait, last.retry_after)
            if number == self.policy.retries or time.monotonic() + wait >= stop:
                break
            time.sleep(wait)
        raise RemoteError(
            last.reason,
            shown(url),
            f"{last.detail}; gave up after {number + 1} attempts in {time.monotonic() - start:.1f} s "
            "(data.read_retries, data.read_timeout_seconds, data.read_deadline_seconds)",
        )


def shown(url: str) -> str:
    """A url for messages: without its query, which may hold a signature."""
    parts = urlsplit(url)
    return parts._replace(query="...").geturl() if parts.query else url


def _is_http(url: str) -> bool:
    if not is_remote(url):
        raise ValueError(f"{url!r} is not remote")
    return scheme_of(url) in HTTP_SCHEMES


def _within(stop: float, attempt: Callable[[float], Result]) -> Result:
    """Runs an attempt in a thread: neither sockets nor fsspec's backends promise to return by a given time."""
    results: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((attempt(stop), None))
        except BaseException as error:  # noqa: BLE001  raised again by the caller
            results.put((None, error))

    threading.Thread(target=run, daemon=True, name="remote read").start()
    try:
        result, error = results.get(timeout=max(0.0, stop - time.monotonic()))
    except queue.Empty:
        raise PassingFailure("timed_out", "no answer by the deadline") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a url (it keeps one per process and thread) and the path in it.

    Credentials and endpoints come from the environment and from fsspec's own configuration files.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise RemoteError("no_backend", shown(url), f"{error} (the backends of fsspec are optional)") from error
    except Exception as error:  # backends raise whatever they like, for instance for missing credentials
        raise RemoteError("backend", shown(url), f"{type(error).__name__}: {error}") from error
    return filesystem, path


def _object_range(filesystem: Any, path: str, start: int, end: int) -> bytes:
    data: bytes = _typed(lambda: filesystem.cat_file(path, start=start, end=end))
    if len(data) != end - start:
        raise PassingFailure("short", f"{len(data)} bytes from {start} on, expected {end - start}")
    return data


def _object_stat(filesystem: Any, path: str) -> tuple[int, str]:
    info = _typed(lambda: filesystem.info(path))
    if info.get("type") == "directory" or not isinstance(info.get("size"), int):
        raise PermanentFailure("not_a_file", f"the store says type {info.get('type')!r}, size {info.get('size')!r}")
    return info["size"], next((str(info[name]) for name in _VERSION_FIELDS if info.get(name)), "")


def _typed(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except FileNotFoundError as error:
        raise PermanentFailure("not_found", str(error)) from error
    except PermissionError as error:
        raise PermanentFailure("forbidden", str(error)) from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise PermanentFailure("not_a_file", str(error)) from error
    except Exception as error:  # a backend's own errors: which of them pass is not written anywhere
        raise PassingFailure("backend", f"{type(error).__name__}: {error}") from error
