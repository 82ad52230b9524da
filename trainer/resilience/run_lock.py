"""Lock a folder for one job; the kernel releases the lock however the process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import TrainerError
from trainer.runtime.run_folder import RunFolder

# Lustre without the mount option flock, NFS without its lock service, and file systems that have no locks at all.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

_log = logging.getLogger(__name__)


class RunLockedError(TrainerError):
    """Report that another job uses the same folder."""


@contextmanager
def run_lock(run_folder: RunFolder) -> Iterator[None]:
    """Hold the lock of a run folder; one process of the job does this.

    Raises:
        RunLockedError: Another process holds the lock; the message names it.
        OSError: The folder cannot be written.
    """
    with hold_lock(run_folder.lock, run_folder.path, "choose another run_dir"):
        yield


@contextmanager
def hold_lock(lock: Path, folder: Path, advice: str) -> Iterator[None]:
    """Hold the lock of a folder.

    Args:
        lock: File of the lock; it is made where it is missing, and stays.
        folder: Folder that the lock is for.
        advice: What else a user can do than wait for the other job or end it.

    Raises:
        RunLockedError: Another process holds the lock; the message names it.
        OSError: The file cannot be written.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise RunLockedError(
                f"{folder} is in use by another job ({holder}); wait for it, end it, or {advice}"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning(
                "the file system of %s has no file locks (%s), so nothing keeps a second job out of this run folder: "
                "start one job only, or enable locks (Lustre: mount with -o flock; NFS: run its lock service)",
                folder,
                error,
            )
        with suppress(OSError):  # a full disk: only the other job's message would lack this
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # releases the lock; the file stays, since its removal would race with the next job
