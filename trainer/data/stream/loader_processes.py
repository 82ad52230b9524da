"""Start loader processes where shared memory, sockets and file descriptors allow it, and say what is missing.

A loader process hands its batches over in shared memory (``/dev/shm``). It sends their descriptors through a socket
below ``TMPDIR``. Python does both in a thread that prints an error and goes on, and the training process would wait for
ever. So sockets and descriptors are checked before the start, and each batch moves to shared memory where an error is
caught.
"""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Callable
from dataclasses import fields
from multiprocessing import Lock
from multiprocessing.connection import Listener
from typing import TypeVar

import torch
from torch.utils.data import Dataset

from trainer.data.errors import DataError
from trainer.data.stream.micro_batches import MicroBatch, MicroBatches

SHARED_MEMORY = "/dev/shm"
_TENSORS = 8  # descriptors of one micro-batch, at most
_SHARE = 2  # batches in flight take at most half of the descriptors
Result = TypeVar("Result")


class SharedMicroBatches(Dataset[MicroBatch | DataError]):
    """Make micro-batches in shared memory, for a loader process.

    Args:
        micro_batches: Makes them in the memory of the process.
    """

    def __init__(self, micro_batches: MicroBatches) -> None:
        self._micro_batches = micro_batches

    def __getitem__(self, index: int) -> MicroBatch | DataError:
        made = self._micro_batches[index]
        if isinstance(made, DataError):
            return made
        try:
            for field in fields(made.batch):
                value = getattr(made.batch, field.name)
                if isinstance(value, torch.Tensor):
                    value.share_memory_()
        except (RuntimeError, OSError) as error:  # torch raises RuntimeError where the kernel has no memory
            return _explained(error, self._micro_batches.config.num_workers)
        return made


def micro_batches_ahead(wanted: int, num_workers: int) -> int:
    """Return how many micro-batches each loader process may prepare, after raising ``ulimit -n`` as far as allowed.

    Each tensor on its way holds a descriptor in the training process.

    Args:
        wanted: Micro-batches for each process.
        num_workers: Number of loader processes.
    """
    needed = wanted * num_workers * _TENSORS * _SHARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    # torch keeps two tasks for each process busy; fewer would let it idle.
    return max(2, min(wanted, soft // (num_workers * _TENSORS * _SHARE)))


def check_hand_over(num_workers: int) -> None:
    """Check that processes can have queues, and hand descriptors to one another.

    Raises:
        DataError: They cannot, because of ``/dev/shm`` or ``TMPDIR``.
    """
    try:
        # Each queue takes a few locks, and each lock a page of shared memory.
        locks = [Lock() for _ in range(4 * num_workers + 4)]
    except OSError as error:
        raise _explained(error, num_workers) from error
    del locks
    try:
        Listener(None, "AF_UNIX").close()
    except OSError as error:
        raise DataError(
            f"loader processes cannot open a socket below TMPDIR = {_temporary_folder()!r}: {error}. Set TMPDIR to a "
            f"folder that can be written, with a short name (at most about 60 characters), or data.num_workers = "
            f"{num_workers} to 0"
        ) from error


def explain_failures(call: Callable[[], Result], num_workers: int) -> Result:
    """Call torch's DataLoader, and name the cause of an error about its processes.

    Raises:
        DataError: A loader process ended, or cannot be started, or hand over its batches.
    """
    try:
        return call()
    except DataError:
        raise
    except (RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and not _is_about_processes(str(error)):
            raise
        raise _explained(error, num_workers) from error


def _is_about_processes(message: str) -> bool:
    known = ("DataLoader worker (pid", "DataLoader worker", "ancdata", "shared memory", "shm")
    return "Traceback" not in message and any(one in message for one in known)


def _explained(error: Exception, num_workers: int) -> DataError:
    """Return an error that says which resource is short."""
    text = str(error)
    setting = f"data.num_workers = {num_workers}"
    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "ancdata" in text:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return DataError(
            f"loader processes ({setting}) need more open files than ulimit -n = {soft} allows: raise it, or lower "
            f"data.num_workers or data.prefetch ({text})"
        )
    if number in (errno.EAGAIN, errno.ENOMEM):
        return DataError(
            f"a loader process ({setting}) cannot be started: {text}: raise ulimit -u or the limits of the container, "
            "or lower data.num_workers"
        )
    shared = any(one in text for one in ("shared memory", "shm", "Bus error", "No space left")) or number in (
        *(errno.ENOSPC, errno.ENOSYS, errno.EACCES, errno.EROFS, errno.ENOENT),
    )
    if shared and number != errno.ENOENT:
        return DataError(
            f"loader processes ({setting}) hand their batches over in shared memory, and {SHARED_MEMORY} "
            f"{_room()}: make it larger (docker run --shm-size=8g, Kubernetes an emptyDir with medium: Memory), or set "
            f"data.num_workers to 0 ({text.splitlines()[0] if text else type(error).__name__})"
        )
    if isinstance(error, OSError):
        return DataError(
            f"a loader process ({setting}) cannot hand over its batches: {text}; its socket lies below TMPDIR = "
            f"{_temporary_folder()!r}, which has to stay while the run lasts"
        )
    return DataError(
        f"a loader process ({setting}) ended: {text}. If the kernel killed it for memory (dmesg says so), lower "
        "data.num_workers or data.prefetch"
    )


def _room() -> str:
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    free, size = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    return f"has {free / 1e6:,.1f} MB free of {size / 1e6:,.1f} MB"


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        return os.environ.get("TMPDIR", "")
