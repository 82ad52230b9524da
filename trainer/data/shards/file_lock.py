"""Lock files among the processes of a node, and name file systems that have no locks."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.data.errors import ShardError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def cache_lock(path: Path, mode: int = 0o600) -> Iterator[int]:
    """Hold the lock of a file below ``data.cache_dir``; the kernel releases it when the process dies.

    Args:
        path: The file; it is created if it is missing.
        mode: Permissions of a new file.

    Yields:
        Descriptor of the file.

    Raises:
        ShardError: The file system has no locks; the message says how to get them.
        OSError: The file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise ShardError(
                f"data.cache_dir: {path.parent} cannot lock files ({error.strerror}): Lustre has to be mounted with "
                "-o flock or -o localflock, NFS with its lock service (lockd); or set data.cache_dir to a folder on a "
                "disk of the node"
            ) from error
        try:
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing does not unlock while a forked process has it open too
    finally:
        os.close(descriptor)
