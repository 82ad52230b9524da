"""Files of one JSON object a line that survive a kill at any byte and continue where the checkpoint stands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO


def drop_steps_after(path: Path, step: int) -> int:
    """Take out the lines of steps after ``step``, lines without one, and a last line that a kill cut off.

    The file is replaced atomically, so a kill in here leaves the old one. Returns how many lines went; 0 where there is
    no file.
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
    """Appends objects to a file, after dropping what lies beyond the step that a run resumes from.

    Each step therefore stands in the file exactly once, however often the run was killed.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_steps_after(path, resume_step)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append a line for each object and hand them to the operating system in one write."""
        text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        self._file.write(text)
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing may be written after."""
        self._file.close()
