"""Make one attempt to read a byte range over http(s), and name the way in which it failed.

The opener knows http, https and the environment's proxies, nothing else. It opens no ``file:``, ``ftp:`` or ``data:``
url, whatever a redirect says, and sends no credentials.
"""

from __future__ import annotations

import http.client
import re
import ssl
import time
from collections.abc import Callable
from email.message import Message
from functools import cache
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from trainer.data.shards.retries import PassingFailure, PermanentFailure, UnreachableFailure

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)$")
_PASSING_STATUS = (408, 425, 429)  # and 5xx except 501 and 505
_PERMANENT_STATUS = {401: "forbidden", 403: "forbidden", 404: "not_found", 410: "not_found"}
_READ_BYTES = 1 << 18
_CONNECT_SECONDS = 10.0  # a host that is there accepts a connection at once, even if its answers take long


def http_range(url: str, start: int, end: int, size: int | None, timeout: float, stop: float) -> bytes:
    """Return the bytes from ``start`` to ``end`` (exclusive).

    Args:
        url: An http(s) url.
        start: First byte.
        end: Byte after the last one.
        size: Bytes that the whole file should have; None if unknown.
        timeout: Seconds of silence that end the attempt.
        stop: Time (``time.monotonic``) that ends the attempt even if bytes keep coming.

    Raises:
        PermanentFailure: Another attempt cannot help.
        PassingFailure: Another attempt may help.
    """
    with _open(url, start, end, timeout) as answer:
        first, last, total = _content_range(answer)
        if first is None and (start, total) != (0, end):
            raise PermanentFailure("no_ranges", "the server sends whole files: it has to support range requests")
        if size is not None and total not in (None, size):
            raise PermanentFailure("changed", f"{total} bytes, expected {size}: run trainer.index again")
        if first is not None and (first, last) != (start, end - 1):
            raise PassingFailure("wrong_range", f"bytes {first}-{last}, asked for {start}-{end - 1}")
        return _body(answer, end - start, stop)


def http_stat(url: str, timeout: float, stop: float) -> tuple[int, str]:
    """Return a file's size in bytes and the version that the server names ("" if it names none).

    It asks for one byte, because not all servers allow HEAD.

    Args:
        url: An http(s) url.
        timeout: Seconds of silence that end the attempt.
        stop: Time (``time.monotonic``) that ends the attempt even if bytes keep coming.

    Raises:
        PermanentFailure: Another attempt cannot help.
        PassingFailure: Another attempt may help.
    """
    try:
        with _open(url, 0, 1, timeout) as answer:
            first, _, total = _content_range(answer)
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            if first is None:
                raise PermanentFailure("no_ranges", "the server sends whole files: it has to support range requests")
            if total is None:
                raise PermanentFailure("no_size", "the server does not tell the file's size")
            _body(answer, 1, stop)
            return total, version
    except PermanentFailure as failure:
        if failure.reason == "empty":
            return 0, ""
        raise


def _open(url: str, start: int, end: int, timeout: float) -> Any:
    request = Request(url, headers={"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"})
    try:
        return _opener().open(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        raise _status_failure(error, start) from None
    except TimeoutError as error:
        raise PassingFailure("timed_out", str(error) or "no answer") from error
    except http.client.InvalidURL as error:
        raise PermanentFailure("invalid_url", str(error)) from error
    except URLError as error:  # no connection, or nothing could be sent over it
        cause = error.reason
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise PermanentFailure("certificate", str(cause)) from error
        if isinstance(cause, TimeoutError):
            raise UnreachableFailure("timed_out", f"no connection to {request.host}: {cause}") from error
        raise UnreachableFailure("connection", f"no connection to {request.host}: {cause}") from error
    except (OSError, http.client.HTTPException) as error:
        raise PassingFailure("connection", f"{type(error).__name__}: {error}") from error


def _status_failure(error: HTTPError, start: int) -> PermanentFailure | PassingFailure:
    status, detail = error.code, f"status {error.code} {error.reason}"
    if status in _PASSING_STATUS or (status >= 500 and status not in (501, 505)):
        seconds = error.headers.get("Retry-After", "")
        return PassingFailure("server", detail, float(seconds) if seconds.isdigit() else 0.0)
    if status == 416:
        match = _CONTENT_RANGE.match(error.headers.get("Content-Range", ""))
        if match is not None and match[3] == "0":
            return PermanentFailure("empty", "the file has no bytes")
        return PermanentFailure("changed", f"the file ends before byte {start}: run trainer.index again")
    if 300 <= status < 400:
        return PermanentFailure("redirect", f"{detail} ({error.headers.get('Location', 'nowhere')!a})")
    return PermanentFailure(_PERMANENT_STATUS.get(status, "refused"), detail)


def _content_range(answer: Any) -> tuple[int | None, int | None, int | None]:
    """Return first byte, last byte and size of the file. The first two are None if the answer is the whole file."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise PermanentFailure("encoded", f"Content-Encoding {answer.headers['Content-Encoding']!a} has no byte ranges")
    if answer.status != 206:
        length = answer.headers.get("Content-Length", "")
        return None, None, int(length) if length.isdigit() else None
    match = _CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
    if match is None or match[1] is None:
        raise PassingFailure("wrong_range", f"Content-Range {answer.headers.get('Content-Range')!a}")
    return int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])


def _body(answer: Any, length: int, stop: float) -> bytes:
    """Read the body, which must have ``length`` bytes."""
    data = bytearray()
    try:
        while len(data) < length and (part := answer.read1(min(_READ_BYTES, length - len(data)))):
            data += part
            if time.monotonic() > stop:
                raise PassingFailure("timed_out", f"{len(data)} of {length} bytes by the deadline")
    except TimeoutError as error:
        raise PassingFailure("timed_out", f"silence after {len(data)} of {length} bytes") from error
    except (OSError, http.client.HTTPException) as error:
        raise PassingFailure("cut", f"{type(error).__name__} after {len(data)} of {length} bytes") from error
    if len(data) != length:
        raise PassingFailure("cut", f"{len(data)} of {length} bytes")
    return bytes(data)


class _Redirects(HTTPRedirectHandler):
    """Follow a few redirects; an https url may only lead to https."""

    max_redirections = 5

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message[str, str], newurl: str
    ) -> Request | None:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            raise PermanentFailure("redirect", f"from {old}: to {new}:, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


class _QuickConnection(http.client.HTTPConnection):
    """Wait less long for the connection than for an answer."""

    def connect(self) -> None:
        """Open the connection."""
        _connect_quickly(self, super().connect)


class _QuickTlsConnection(http.client.HTTPSConnection):
    """Do the same over TLS."""

    def connect(self) -> None:
        """Open the connection and shake hands."""
        _connect_quickly(self, super().connect)


def _connect_quickly(connection: http.client.HTTPConnection, connect: Callable[[], None]) -> None:
    patience = connection.timeout
    connection.timeout = min(patience, _CONNECT_SECONDS) if patience is not None else _CONNECT_SECONDS
    try:
        connect()
    finally:
        connection.timeout = patience
    connection.sock.settimeout(patience)


class _Http(HTTPHandler):
    def http_open(self, req: Request) -> http.client.HTTPResponse:
        """Open an http url."""
        return self.do_open(_QuickConnection, req)


class _Https(HTTPSHandler):
    def __init__(self) -> None:
        self._settings = ssl.create_default_context()
        super().__init__(context=self._settings)

    def https_open(self, req: Request) -> http.client.HTTPResponse:
        """Open an https url."""
        return self.do_open(_QuickTlsConnection, req, context=self._settings)


@cache  # TLS settings take long to load; an opener holds no connection
def _opener() -> OpenerDirector:
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        _Http(),
        _Https(),
        HTTPDefaultErrorHandler(),
        _Redirects(),
        HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
