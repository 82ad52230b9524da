"""Keep a process alive when its console goes away: a closed pipe (``| head``), a lost terminal, a full disk."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class LastingStream:
    """Pass text on to a stream, and drop what the stream cannot take; everything else is the stream's own.

    Args:
        stream: Standard output or standard error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text if the stream takes it."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the lines if the stream takes them."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flush the stream if it is still there."""
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def lasting_console() -> Iterator[None]:
    """Let no ``print``, progress bar or log message fail while the context is open."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, LastingStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
