"""Write JSON Lines files that survive a kill at any byte and continue from the step of the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.metrics.errors import RecordError


def drop_steps_after(path: Path, step: int) -> int:
    """Remove the lines of later steps, lines without a step, and a last line that a kill cut off.

    The file is replaced atomically, so a kill in the middle leaves the old file.

    Returns:
        The number of removed lines; 0 if there is no file.
    """
    if not path.exists():
        return 0
    temporary = path.with_name(f".{path.name}.tmp")
    dropped = 0
    with path.open(encoding="utf-8", errors="replace") as old, temporary.open("w", encoding="utf-8") as new:
        for line in old:
            if _keep(line, step):
                new.write(line)
            else:
                dropped += 1
        new.flush()
        os.fsync(new.fileno())
    if dropped:
        os.replace(temporary, path)
    else:
        temporary.unlink()
    return dropped


def _keep(line: str, step: int) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step


class JsonLinesWriter:
    """Append objects to a file, after removing the lines of steps beyond the one that the run resumes from.

    The file therefore holds each step exactly once, however often the run was killed.

    Raises:
        RecordError: The file cannot be written; so do all methods.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        with self._naming_the_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_steps_after(path, resume_step)
            # Without a buffer, nothing is left that could fail when the file is closed.
            self._file = path.open("ab", buffering=0)

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append a line for each object and pass all lines to the operating system in one write."""
        text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        rest = memoryview(text.encode())
        with self._naming_the_file():
            while rest:  # a disk that gets full takes a part
                rest = rest[self._file.write(rest) :]

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecordError(self._path, error) from error

    def close(self) -> None:
        """Close the file; no write may follow."""
        self._file.close()
