"""Serve byte ranges over local http, with delays, cuts, lies and failures on request."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT = 0  # 0 takes a free one
Fault = Callable[["Handler", bytes], bool]


class Handler(BaseHTTPRequestHandler):
    """Answer with files of ``server.folder``; each request takes the next of ``server.faults``, where None is none."""

    server: Server  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer a request."""
        self.close_connection = True
        path = self.server.folder / self.path.lstrip("/").split("?")[0]
        with self.server.lock:
            self.server.requests[path.name] += 1
            self.server.ranges.append((path.name, self.headers["Range"]))
            fault = self.server.faults.pop(0) if self.server.faults else None
        try:
            data = path.read_bytes() if path.is_file() else b""
            if fault is not None and fault(self, data):
                return
            if not path.is_file():
                self.send_error(404)
                return
            self.send_range(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def send_range(self, data: bytes, *, cut: int | None = None, pause: float = 0.0, total: int | None = None) -> None:
        """Send the requested range.

        Args:
            data: Content of the whole file.
            cut: Bytes after which to stop; None sends all.
            pause: Seconds to wait before each byte.
            total: Size of the file to claim; None tells the truth.
        """
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        if first >= len(data):
            self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        part = data[first : last + 1]
        size = len(data) if total is None else total
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{size}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hash(data)}"')
        self.end_headers()
        for start in range(0, len(part[:cut]), 1 if pause else 1 << 20):
            time.sleep(pause)
            self.wfile.write(part[:cut][start : start + (1 if pause else 1 << 20)])
            self.wfile.flush()

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> bool:
        """Send any answer and return True."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        return True

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Server(ThreadingHTTPServer):
    """An http server on a free port of this machine.

    Attributes:
        folder: Folder of the files.
        faults: Faults of the next requests; None answers as it should.
        requests: Number of requests, by file name.
        ranges: File name and requested range of each request, in their order.
        lock: Guards the attributes above.
        closing: Set when the server closes.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        """Bind a free port and start to listen."""
        super().__init__(("127.0.0.1", PORT), Handler)
        self.folder = folder
        self.faults: list[Fault | None] = []
        self.requests: Counter[str] = Counter()
        self.ranges: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def url(self, name: str) -> str:
        """Return the url of a file."""
        return f"http://127.0.0.1:{self.server_port}/{name}"


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder until the ``with`` statement ends."""
    server = Server(folder)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def status(code: int, **headers: str) -> Fault:
    """Answer with a status."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.answer(code, names)


def cut(after: int) -> Fault:
    """Promise the whole range and close the connection after some bytes of it."""
    return lambda handler, data: handler.send_range(data, cut=after) or True


def hang() -> Fault:
    """Send nothing until the server closes."""
    return lambda handler, _: handler.server.closing.wait()


def drip(pause: float) -> Fault:
    """Send byte by byte, with a pause in seconds before each."""
    return lambda handler, data: handler.send_range(data, pause=pause) or True


def whole_file(handler: Handler, data: bytes) -> bool:
    """Ignore the requested range, as simple servers do."""
    return handler.answer(200, {}, data)


def wrong_size(handler: Handler, data: bytes) -> bool:
    """Claim another file size than before."""
    handler.send_range(data, total=len(data) + 1)
    return True


def shifted(handler: Handler, data: bytes) -> bool:
    """Send another range than the requested one."""
    return handler.answer(206, {"Content-Range": f"bytes 1-4/{len(data)}"}, data[1:5])
