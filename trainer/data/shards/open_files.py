"""Keep the files that a process reads open, within one bound for all sources.

A file that was not read for long is closed and opened again when it is needed, so that any number of sources, shards
and cached blocks fits under ``ulimit -n``. A forked loader process inherits the open files, and the bound with them.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

_LARGEST_LIMIT = 4096
_SMALLEST_LIMIT = 4
_SHARE = 3  # one third of the process's descriptors; batches in flight and everything else have the rest


def pread_whole(descriptor: int, length: int, offset: int) -> bytes:
    """Return ``length`` bytes from ``offset`` on; fewer only if the file ends.

    One call of the kernel returns at most 2,147,479,552 bytes, and a network file system may return fewer.
    """
    data = os.pread(descriptor, length, offset)
    if len(data) == length or not data:
        return data
    parts, found = [data], len(data)
    while found < length and (data := os.pread(descriptor, length - found, offset + found)):
        parts.append(data)
        found += len(data)
    del data
    return b"".join(parts)


class FilePool:
    """Hold the open descriptors of a process, the least recently used first.

    Args:
        limit: Most descriptors. None takes a third of ``ulimit -n``.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # by id of the file
        self.lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._descriptors)

    @property
    def limit(self) -> int:
        """Most descriptors that stay open."""
        if self._limit is None:
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            allowed = _LARGEST_LIMIT * _SHARE if soft == resource.RLIM_INFINITY else soft
            self._limit = max(_SMALLEST_LIMIT, min(_LARGEST_LIMIT, allowed // _SHARE))
        return self._limit

    def descriptor(self, owner: int, open_file: Callable[[], int]) -> int:
        """Return the descriptor of a file, opened if necessary. Hold ``lock`` while it is used."""
        found = self._descriptors.get(owner)
        if found is not None:
            self._descriptors.move_to_end(owner)
            return found
        while len(self._descriptors) >= self.limit:
            self._close_oldest()
        while True:
            try:
                found = open_file()
                break
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._descriptors:
                    raise
                self._limit = max(_SMALLEST_LIMIT, len(self._descriptors) // 2)  # others need more than expected
                while len(self._descriptors) >= self._limit:
                    self._close_oldest()
        self._descriptors[owner] = found
        return found

    def close(self, owner: int) -> None:
        """Close a file; it may be closed already."""
        with self.lock:
            found = self._descriptors.pop(owner, None)
            if found is not None:
                os.close(found)

    def _close_oldest(self) -> None:
        os.close(self._descriptors.popitem(last=False)[1])

    def renew_lock(self) -> None:
        """Replace the lock in a forked process: a thread of the parent may have held it."""
        self.lock = threading.RLock()


POOL = FilePool()
os.register_at_fork(after_in_child=POOL.renew_lock)


class PooledFile:
    """A file that is read at any place and kept open by a pool.

    Args:
        path: The file.
        check: Called with the descriptor whenever the file is opened; raises if it is not the file wanted.
        pool: Bounds the open files.
    """

    def __init__(self, path: Path, check: Callable[[int], None] = lambda _: None, pool: FilePool = POOL) -> None:
        self._path, self._check, self._pool = path, check, pool

    def read(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on; fewer only if the file ends.

        Raises:
            OSError: The file cannot be opened or read.
        """
        with self._pool.lock:  # otherwise another thread could close the descriptor, and a third one reuse its number
            return pread_whole(self._pool.descriptor(id(self), self._open), length, offset)

    def touch(self) -> None:
        """Set the file's time of use to now."""
        with self._pool.lock:
            os.utime(self._pool.descriptor(id(self), self._open))

    def open(self) -> None:
        """Open and check the file now.

        Raises:
            OSError: The file cannot be opened.
        """
        with self._pool.lock:
            self._pool.descriptor(id(self), self._open)

    def close(self) -> None:
        """Close the file. It can be read again."""
        self._pool.close(id(self))

    def __del__(self) -> None:
        self.close()

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._check(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor
