"""``run_dir/events.jsonl``: what happened to a run beside its updates, in the order it happened, never cut back."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


class EventLog:
    """Appends one object a line: ``time`` (UTC), ``event``, ``step`` (updates done) and the event's own details.

    enabled: False on all ranks but one.
    """

    def __init__(self, run_dir: Path, enabled: bool = True) -> None:
        self._path, self._enabled = run_dir / EVENTS, enabled

    def write(self, event: str, step: int | None = None, **details: Any) -> None:
        """Append an event and have it on the disk."""
        if not self._enabled:
            return
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, "step": step, **details}
        line = json.dumps(record, ensure_ascii=False) + "\n"
        # The supervisor writes here as well: one write to a file opened for appending never mixes with another's.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
