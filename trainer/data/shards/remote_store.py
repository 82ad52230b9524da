"""Read byte ranges of remote files, over http(s) and through fsspec.

Failed reads are repeated as ``retries`` says. A storage that never answered this process, or does not know its
credentials, is given up within seconds, and the next reads of it fail at once. A read that fails for good raises a
``RemoteError``, which stops the run.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from trainer.data.errors import ShardError
from trainer.data.shards.http_range import http_range, http_stat
from trainer.data.shards.retries import (
    PassingFailure,
    PermanentFailure,
    RetryPolicy,
    UnreachableFailure,
    repeat,
)
from trainer.data.shards.urls import HTTP_SCHEMES, is_remote, scheme_of

# Names that fsspec's backends give to the version of an object, best first.
_VERSION_FIELDS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")
_ANSWER_SECONDS = 20.0  # for the first answer of an object store, whose libraries wait for minutes
_FORGET_SECONDS = 30.0  # after which a storage without an answer is asked again
# Classes of exceptions, in whatever library, that say that a store does not know us, or cannot be reached.
_CREDENTIALS = re.compile(r"Credential|Authenticat|Unauthorized|Forbidden|AccessDenied|GatedRepo|Token", re.IGNORECASE)
_CONNECTION = re.compile(r"Connection|Connector|ConnectTimeout|gaierror|NameResolution|SSLError", re.IGNORECASE)
_CREDENTIALS_TEXT = re.compile(
    r"credentials|InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|Anonymous caller|\b40[13]\b"
)
Result = TypeVar("Result")


class RemoteError(ShardError):
    """A remote read failed for good.

    Attributes:
        reason: Identifier, for counting.
        url: The url without its query.
        detail: Explanation for a person.
    """

    def __init__(self, reason: str, url: str, detail: str) -> None:
        super().__init__(f"{url}: {reason}: {detail}")
        self.reason, self.url, self.detail = reason, url, detail

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str, str]]:
        return RemoteError, (self.reason, self.url, self.detail)


@dataclass(frozen=True)
class RemoteStat:
    """Size and version of a remote file.

    Attributes:
        size: Bytes of the file.
        version: 63 bits of the version that the storage names; 0 if it names none.
    """

    size: int
    version: int


class _Hosts:
    """Remember which storages answered this process, and which did not."""

    def __init__(self) -> None:
        self.answered: set[str] = set()
        self._silent: dict[str, tuple[float, UnreachableFailure]] = {}

    def lose(self, host: str, failure: UnreachableFailure) -> None:
        """Note that a storage gave no answer. It counts as one that never did, until it answers again."""
        self.answered.discard(host)
        self._silent[host] = time.monotonic(), failure

    def silent(self, host: str) -> UnreachableFailure | None:
        """Return the failure of a storage that gave no answer a moment ago; None for all others."""
        since, failure = self._silent.get(host, (0.0, None))
        if failure is None or host in self.answered or time.monotonic() - since > _FORGET_SECONDS:
            return None
        return failure


_HOSTS = _Hosts()


@dataclass(frozen=True)
class RemoteStore:
    """Reads remote files. It keeps no connections, so it may be forked and pickled freely.

    Attributes:
        policy: How failed reads are repeated.
    """

    policy: RetryPolicy = field(default_factory=RetryPolicy)

    def read(self, url: str, start: int, end: int, size: int | None = None) -> bytes:
        """Return the bytes from ``start`` to ``end`` (exclusive) of a file, all of them.

        Args:
            url: The file.
            start: First byte.
            end: Byte after the last one.
            size: Bytes of the whole file. Compared if the server tells it.

        Raises:
            RemoteError: The read failed for good.
            ValueError: The url is not remote.
        """
        if end <= start:
            return b""
        if _is_http(url):
            return self._repeat(url, lambda stop: http_range(url, start, end, size, self.policy.timeout_seconds, stop))
        filesystem, path = _filesystem(url)
        if _host(url) not in _HOSTS.answered:
            self.stat(url)  # a small question; a block may take long without a fault
        return self._repeat(url, lambda _: _object_range(filesystem, path, start, end))

    def stat(self, url: str) -> RemoteStat:
        """Return size and version of a file.

        Raises:
            RemoteError: The storage gave no answer, or it is not a file.
            ValueError: The url is not remote.
        """
        if _is_http(url):
            size, version = self._repeat(url, lambda stop: http_stat(url, self.policy.timeout_seconds, stop))
        else:
            filesystem, path = _filesystem(url)
            size, version = self._repeat(url, lambda _: _object_stat(filesystem, path))
        digest = blake2b(version.encode(), digest_size=8).digest()
        return RemoteStat(size, int.from_bytes(digest, "little") >> 1 if version else 0)

    def glob(self, url: str) -> list[str]:
        """Return the files that match a pattern, sorted.

        Raises:
            RemoteError: The storage gave no listing.
            ValueError: The url is not remote, or is http, which has no listings.
        """
        if _is_http(url):
            raise ValueError(f"{url!r}: http has no listings to match a pattern with; use braces, {{000..123}}")
        filesystem, path = _filesystem(url)
        found = self._repeat(url, lambda _: _typed(lambda: filesystem.glob(path)))
        return sorted(filesystem.unstrip_protocol(one) for one in found)

    def _repeat(self, url: str, attempt: Callable[[float], Result]) -> Result:
        """Call ``attempt`` until it succeeds. Its argument is the time (``time.monotonic``) at which it has to end."""
        host, name = _host(url), without_query(url)
        silent = _HOSTS.silent(host)
        if silent is not None:
            detail = f"{silent.detail}; it is asked again {_FORGET_SECONDS:.0f} s after that"
            raise RemoteError(silent.reason, name, detail)
        known = host in _HOSTS.answered
        try:
            return repeat(lambda stop: _attempt(host, attempt, stop), self.policy, name, answered_before=known)
        except PermanentFailure as error:
            raise RemoteError(error.reason, name, error.detail) from None
        except PassingFailure as error:
            hint = "data.read_retries, data.read_timeout_seconds, data.read_deadline_seconds"
            if isinstance(error, UnreachableFailure):
                _HOSTS.lose(host, error)
                hint = hint if known else "it never answered: check the url, the network and its proxy"
            raise RemoteError(error.reason, name, f"{error.detail} ({hint})") from None


def _attempt(host: str, attempt: Callable[[float], Result], stop: float) -> Result:
    """Make one attempt, and note whether the storage answered."""
    known = host in _HOSTS.answered
    http = host.split("://")[0] in HTTP_SCHEMES
    end = stop if known or http else min(stop, time.monotonic() + _ANSWER_SECONDS)
    try:
        result = _within(end, attempt)
    except UnreachableFailure:
        raise
    except (PassingFailure, PermanentFailure) as failure:
        if failure.reason == "silent" and end < stop:
            raise UnreachableFailure("timed_out", f"no answer within {_ANSWER_SECONDS:.0f} s") from failure
        if failure.reason == "silent":
            raise PassingFailure("timed_out", failure.detail) from failure
        _HOSTS.answered.add(host)
        raise
    _HOSTS.answered.add(host)
    return result


def without_query(url: str) -> str:
    """Return a url for messages. Its query is hidden because it may hold a signature."""
    parts = urlsplit(url)
    return parts._replace(query="...").geturl() if parts.query else url


def _host(url: str) -> str:
    """Return what answers for a url: scheme and host, or bucket."""
    parts = urlsplit(url)
    return f"{parts.scheme.lower()}://{parts.netloc}"


def _is_http(url: str) -> bool:
    if not is_remote(url):
        raise ValueError(f"{url!r} is not remote")
    return scheme_of(url) in HTTP_SCHEMES


def _within(stop: float, attempt: Callable[[float], Result]) -> Result:
    """Run an attempt in a thread, because neither sockets nor fsspec's backends promise to return in time."""
    results: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((attempt(stop), None))
        except BaseException as error:  # noqa: BLE001  the caller raises it again
            results.put((None, error))

    threading.Thread(target=run, daemon=True, name="remote read").start()
    try:
        result, error = results.get(timeout=max(0.0, stop - time.monotonic()))
    except queue.Empty:
        raise PassingFailure("silent", "no answer by the deadline") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a url, which fsspec keeps for each process and thread, and the path in it.

    Credentials and endpoints come from the environment and from fsspec's own configuration files.
    """
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except ImportError as error:
        detail = f"{error} (the backends of fsspec are optional)"
        raise RemoteError("no_backend", without_query(url), detail) from error
    except Exception as error:  # a backend may raise anything, for instance for missing credentials
        failure = _backend_failure(error)
        raise RemoteError(failure.reason, without_query(url), failure.detail) from error
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
    """Call a backend and turn its errors into permanent and passing failures."""
    try:
        return call()
    except FileNotFoundError as error:
        raise PermanentFailure("not_found", str(error)) from error
    except PermissionError as error:
        raise PermanentFailure("forbidden", str(error)) from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise PermanentFailure("not_a_file", str(error)) from error
    except Exception as error:
        raise _backend_failure(error) from error


def _backend_failure(error: BaseException) -> PassingFailure:
    """Classify a backend's own error by its name and text; no two libraries share a class."""
    detail = f"{type(error).__name__}: {error}"
    cause: BaseException | None = error
    while cause is not None:
        names = " ".join(kind.__name__ for kind in type(cause).__mro__)
        codes = {getattr(cause, name, None) for name in ("status", "code", "status_code")}
        if _CREDENTIALS.search(names) or _CREDENTIALS_TEXT.search(str(cause)) or codes & {401, 403, "401", "403"}:
            return UnreachableFailure(
                "credentials", f"{detail}: the storage does not accept this process; set its credentials (see fsspec)"
            )
        if _CONNECTION.search(names):
            return UnreachableFailure("connection", detail)
        cause = cause.__cause__ or cause.__context__
    return PassingFailure("backend", detail)  # nothing says whether it passes, so it is tried again
