"""Define the error of the records that a run must not lose."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import TrainerError


class RecordError(TrainerError):
    """Report that metrics.jsonl or a ledger cannot be written, with its path and what to do."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"cannot write {path}: [Errno {error.errno}] {error.strerror}. Make its folder writable, with free space, "
            "and start the same command again: it resumes from the newest checkpoint"
        )
