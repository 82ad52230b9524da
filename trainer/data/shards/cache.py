"""Blocks of remote shards on a local disk, shared by every process of a node.

A block is one file: a header, a CRC-32 for each sample, and the samples' bytes as they are in the tar. It is written
under another name and renamed, so that a kill at any point leaves either a whole block or a temporary file; it is
checked when it is used, so that whatever a disk or a crash did to it, it is fetched again instead of believed.

The folder's size is counted in the file ``size``, under its lock. A temporary file gets its length inside that lock,
so that the bound holds with any number of writers. The count may be too high after a kill, never too low; when it
reaches the bound, the folder is looked through, the count is corrected, and what was not used for longest goes.
Evicted blocks stay readable for processes that have them open.
"""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.errors import ShardError

_MAGIC = b"FLBLOCK1"
_HEADER = struct.Struct("<8sIQI")  # magic, samples, bytes of content, CRC-32 of the table
_SIZE = struct.Struct("<q")
_FETCH_LOCKS = 256  # of which a process holds one at a time; two blocks with the same one only wait for each other
_OPEN_BLOCKS = 256
_EVICT_TO = 0.9  # share of the bound that an eviction leaves, so that not every block makes the next one
_ORPHAN_SECONDS = 600.0  # writing takes milliseconds: an older temporary file belongs to a dead process
_TOUCH_SECONDS = 60.0


@dataclass
class _OpenBlock:
    descriptor: int
    sums: NDArray[np.uint32]
    content: int  # where it begins in the file
    touched: float


class BlockCache:
    """Blocks by key in a folder of at most ``max_bytes``.

    folder: None takes one of this user's in the system's temporary folder. Safe for threads, for forked and for
    unrelated processes. Raises ShardError, which names the setting, when the folder cannot be used.
    """

    def __init__(self, folder: Path | None, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder or default_cache_folder(), max_bytes
        self._private = folder is None
        self._open: OrderedDict[str, _OpenBlock] = OrderedDict()
        self._lock = threading.Lock()
        self._ready = False

    def read(self, key: object, ranges: NDArray[np.int64], number: int, fetch: Callable[[], bytes]) -> bytes:
        """The bytes of one sample of a block.

        key: anything whose repr tells this block from every other, its version included. ranges: int64 [samples, 2],
        start and end of each sample in the block's content. fetch: makes the content where the cache has it not.
        """
        self._prepare()
        name = self.name_of(key)
        start, end = map(int, ranges[number])
        data = self._read(name, len(ranges), number, start, end)
        if data is None:
            content = self.ensure(key, ranges, fetch)
            data = content[start:end] if content is not None else self._read(name, len(ranges), number, start, end)
        if data is None:  # it was evicted or damaged within microseconds: do not depend on the disk for it
            data = fetch()[start:end]
        return data

    def ensure(self, key: object, ranges: NDArray[np.int64], fetch: Callable[[], bytes]) -> bytes | None:
        """Fetches a block unless it is there; returns its content if it was fetched.

        One process of the node fetches, the others wait for it. A killed one loses its lock with its life.
        """
        name = self.name_of(key)
        self._prepare()
        path = self._path(name)
        if path.exists():
            return None
        with self._file_lock(self.folder / "locks" / f"{int(name[:2], 16) % _FETCH_LOCKS:02x}"):
            if path.exists():
                return None
            content = fetch()
            self._write(path, content, ranges)
            return content

    @staticmethod
    def name_of(key: object) -> str:
        """The name of a block's file."""
        return blake2b(repr(key).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def close(self) -> None:
        """Closes every open block."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].descriptor)

    def __reduce__(self) -> tuple[type[BlockCache], tuple[Path | None, int]]:
        return BlockCache, (None if self._private else self.folder, self.max_bytes)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.block"

    def _prepare(self) -> None:
        if self._ready:
            return
        prepare_folder(None if self._private else self.folder)
        try:
            (self.folder / "locks").mkdir(exist_ok=True)
        except OSError as error:
            raise ShardError(f"data.cache_dir: {self.folder} cannot be used: {error}") from error
        self._ready = True

    def _read(self, name: str, samples: int, number: int, start: int, end: int) -> bytes | None:
        """A sample of a block that is there and sound; None, and the block is gone, otherwise."""
        with self._lock:  # or another thread closes the descriptor and a third gets its number
            block = self._opened(name, samples)
            if block is None:
                return None
            try:
                data = os.pread(block.descriptor, end - start, block.content + start)
            except OSError:
                data = b""
            if len(data) == end - start and zlib.crc32(data) == block.sums[number]:
                return data
            os.close(self._open.pop(name).descriptor)
        self._path(name).unlink(missing_ok=True)
        return None

    def _opened(self, name: str, samples: int) -> _OpenBlock | None:
        block, now = self._open.get(name), time.monotonic()
        if block is None:
            try:
                descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
            sums = _check(descriptor, samples)
            if sums is None:
                os.close(descriptor)
                self._path(name).unlink(missing_ok=True)
                return None
            if len(self._open) >= _OPEN_BLOCKS:
                os.close(self._open.popitem(last=False)[1].descriptor)
            block = self._open[name] = _OpenBlock(descriptor, sums, _HEADER.size + 4 * samples, -_TOUCH_SECONDS)
        else:
            self._open.move_to_end(name)
        if now - block.touched > _TOUCH_SECONDS:
            block.touched = now
            with suppress(OSError):  # a folder that others own: then their order of use decides
                os.utime(block.descriptor)
        return block

    def _write(self, path: Path, content: bytes, ranges: NDArray[np.int64]) -> None:
        sums = np.array([zlib.crc32(content[start:end]) for start, end in ranges.tolist()], "<u4").tobytes()
        header = _HEADER.pack(_MAGIC, len(ranges), len(content), zlib.crc32(sums))
        size = len(header) + len(sums) + len(content)
        if size > self.max_bytes:
            raise ShardError(
                f"data.cache_bytes = {self.max_bytes:,} is less than one block of {size:,} bytes: raise it, or lower "
                "data.read_block"
            )
        temporary = None
        try:
            path.parent.mkdir(exist_ok=True)
            descriptor, temporary = self._reserve(path, size)
            with open(descriptor, "wb") as file:
                file.write(header + sums)
                file.write(content)
            os.replace(temporary, path)
        except OSError as error:
            raise ShardError(f"data.cache_dir: {self.folder}: {error.strerror or error}") from error
        finally:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)

    def _reserve(self, path: Path, size: int) -> tuple[int, str]:
        """A temporary file of ``size`` bytes, for which older blocks made room."""
        with self._file_lock(self.folder / "size") as counter:
            stored = os.pread(counter, _SIZE.size, 0)
            total = size + (_SIZE.unpack(stored)[0] if len(stored) == _SIZE.size else self.max_bytes)
            if total > self.max_bytes:
                total = size + self._evict(min(self.max_bytes - size, int(_EVICT_TO * self.max_bytes)))
            os.pwrite(counter, _SIZE.pack(total), 0)
            descriptor, temporary = tempfile.mkstemp(suffix=".tmp", prefix=path.stem, dir=path.parent)
            os.ftruncate(descriptor, size)
            return descriptor, temporary

    def _evict(self, wanted: int) -> int:
        """Removes the blocks that were not used for longest until at most ``wanted`` bytes are left; returns those."""
        found, total = [], 0
        for folder in os.scandir(self.folder):
            if len(folder.name) != 2:
                continue
            for file in os.scandir(folder):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    found.append((status.st_mtime, status.st_size, file.path))
                    total += status.st_size
        orphaned = time.time() - _ORPHAN_SECONDS
        for used, size, name in sorted(found):
            temporary = name.endswith(".tmp")
            if (temporary and used < orphaned) or (total > wanted and not temporary):
                with suppress(FileNotFoundError):
                    os.unlink(name)
                total -= size
        return total

    @contextmanager
    def _file_lock(self, path: Path) -> Iterator[int]:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600 if self._private else 0o666)
        except OSError as error:
            raise ShardError(f"data.cache_dir: {self.folder} cannot be written: {error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough while a forked process has it open too
            os.close(descriptor)


def prepare_folder(cache_dir: Path | None) -> Path:
    """The folder of ``data.cache_dir``, made where it is missing; None: this user's in the system's temporary folder.

    Raises ShardError when it cannot be used, or when the temporary one is somebody else's.
    """
    folder = cache_dir or default_cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.lstat()
    except OSError as error:
        raise ShardError(f"data.cache_dir: {folder} cannot be used: {error}") from error
    if cache_dir is None and (owner.st_uid != os.getuid() or owner.st_mode & 0o022):
        raise ShardError(f"data.cache_dir: {folder} belongs to somebody else; set a folder of your own")
    return folder


def default_cache_folder() -> Path:
    """A folder of this user's in the system's temporary folder."""
    return Path(tempfile.gettempdir()) / f"flamingo-trainer-{os.getuid()}"


def _check(descriptor: int, samples: int) -> NDArray[np.uint32] | None:
    """The sums of a block, or None where its file is not what it should be."""
    head = os.pread(descriptor, _HEADER.size + 4 * samples, 0)
    if len(head) != _HEADER.size + 4 * samples:
        return None
    magic, count, content, table_sum = _HEADER.unpack_from(head)
    size = os.fstat(descriptor).st_size
    if (magic, count, size) != (_MAGIC, samples, len(head) + content) or zlib.crc32(head[_HEADER.size :]) != table_sum:
        return None
    return np.frombuffer(head, "<u4", samples, _HEADER.size)
