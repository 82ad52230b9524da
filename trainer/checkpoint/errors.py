"""Define the error of checkpoints."""

from __future__ import annotations

from trainer.errors import TrainerError


class CheckpointError(TrainerError):
    """Report a checkpoint that cannot be written, read or used for this run; the message says what to do."""
