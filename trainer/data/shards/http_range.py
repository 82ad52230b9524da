"""One attempt at a byte range over http(s), with every way in which an answer can be wrong told apart.

The opener knows http, https and the environment's proxies and nothing else: no ``file:``, ``ftp:`` or ``data:`` url is
opened, whatever a redirect says, and no credentials are sent.
"""

from __future__ import annotations

import http.client
import re
import time
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

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)$")
_PASSING_STATUS = (408, 425, 429)  # and all of 5xx but 501 and 505
_PERMANENT_STATUS = {401: "forbidden", 403: "forbidden", 404: "not_found", 410: "not_found"}
_READ_BYTES = 1 << 18


class PermanentFailure(Exception):
    """Trying again cannot help. ``reason`` is an identifier."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class PassingFailure(Exception):
    """May be over soon. ``retry_after``: seconds that the server asks for."""

    def __init__(self, reason: str, detail: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.retry_after = reason, detail, retry_after


def http_range(url: str, start: int, end: int, size: int | None, timeout: float, stop: float) -> bytes:
    """Bytes ``start`` to ``end`` (exclusive).

    size: of the whole file as it should be. timeout: seconds of silence. stop: the time (of time.monotonic) at which a
    server that never stops dripping has had enough. Raises PermanentFailure and PassingFailure.
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
    """(size in bytes, what the server says about the version). Asks for one byte: not all servers allow HEAD."""
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
    except (URLError, OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        if isinstance(error, http.client.InvalidURL) or "unknown url type" in str(cause):
            raise PermanentFailure("invalid_url", str(cause)) from error
        reason = "timed_out" if isinstance(cause, TimeoutError) else "connection"
        raise PassingFailure(reason, f"{type(cause).__name__}: {cause}") from error


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
    """(first byte, last byte, size of the file); the first two are None for a whole file."""
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
    """Follows a few redirects, from https to https only."""

    max_redirections = 5

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message[str, str], newurl: str
    ) -> Request | None:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            raise PermanentFailure("redirect", f"from {old}: to {new}:, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


@cache  # it holds no connection; its TLS settings take long to load
def _opener() -> OpenerDirector:
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        HTTPHandler(),
        HTTPSHandler(),
        HTTPDefaultErrorHandler(),
        _Redirects(),
        HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
