"""One job a run folder: a lock that the kernel releases when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import TrainerError


class RunLockedError(TrainerError):
    """Another job trains in the same run folder."""


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold ``run_dir/lock``; one process of the job does this.

    Raises: RunLockedError naming the process that holds it; OSError when the folder cannot be written.
    """
    descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise RunLockedError(
                f"{run_dir} is in use by another job ({holder}); wait for it, end it, or choose another run_dir"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # this releases the lock; the file stays, for removing it would race with the next job
