"""Log the events of a run other than steps to ``events.jsonl`` of the run folder.

Training writes resumed, settings_changed, step_skipped, spike, rewind, preempted, stopped_early, frozen_model_changed,
rank_times, straggler, hung and failed; ``trainer.supervise`` writes start, restart, node_lost and gave_up. A resume
does not remove earlier events.
Where the file cannot be written, a warning says so, and training goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

from trainer.runtime.run_folder import RunFolder

_log = logging.getLogger(__name__)


def event_time() -> str:
    """Return the time of an event that happens now; later times are later texts."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class EventLog:
    """Append one JSON object a line: ``time`` (UTC), ``event``, ``step`` (steps done) and details of the event.

    Args:
        run_folder: Folder of the run.
        enabled: Whether this process writes. Events of the whole run are written by one rank.
    """

    def __init__(self, run_folder: RunFolder, enabled: bool = True) -> None:
        self._path, self._enabled = run_folder.events, enabled

    def write(self, event: str, step: int | None = None, **details: Any) -> None:
        """Append an event and sync it to the disk; a warning names the file if that is not possible."""
        if not self._enabled:
            return
        record = {"time": event_time(), "event": event, "step": step, **details}
        try:
            self._append(json.dumps(record, ensure_ascii=False).encode())
        except OSError as error:
            _log.warning("cannot write %s: %s; the event %s is left out", self._path, error, event)

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            # A full disk or a kill may have cut the last line off.
            separator = b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""
            # The supervisor writes here too. One write to a file opened with O_APPEND never mixes with another one.
            written = os.write(descriptor, separator + line + b"\n")
            if written <= len(separator + line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
