"""Cache read blocks of remote shards on a local disk, shared by every process of a node.

A block is one file: a header, a CRC-32 for each sample, and the samples' bytes as the tar has them. It is written under
another name and then renamed, so that a kill at any time leaves a whole block or a temporary file. A checksum is
verified at every read. A damaged block is removed and fetched again.

The file ``size`` counts the folder's bytes, under its own lock. A temporary file gets its full length inside that lock,
so the bound holds with any number of writers. After a kill the count may be too high, never too low. When the count
reaches the bound, a scan of the folder corrects it and evicts the least recently used blocks. An evicted block stays
readable for the processes that have it open.
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.errors import ShardError
from trainer.data.shards.file_lock import cache_lock
from trainer.data.shards.open_files import PooledFile

_MAGIC = b"FLBLOCK1"
_HEADER = struct.Struct("<8sIQI")  # magic, samples, bytes of content, CRC-32 of the table
_SIZE = struct.Struct("<q")
_FETCH_LOCKS = 256  # a process holds one at a time; two blocks with the same lock only wait for each other
_EVICT_TO = 0.9  # share of the bound that an eviction leaves, so that the next block does not evict again
_ORPHAN_SECONDS = 600.0  # a write takes milliseconds: the process of an older temporary file is dead
_TOUCH_SECONDS = 60.0  # between two updates of a block's time of use


@dataclass
class _OpenBlock:
    """A block that this process has open.

    Attributes:
        file: The file.
        sums: uint32 [samples], CRC-32 of each sample.
        content: Byte of the file at which the content begins.
        touched: Time (``time.monotonic``) at which the file's time of use was last updated.
    """

    file: PooledFile
    sums: NDArray[np.uint32]
    content: int
    touched: float


class BlockCache:
    """Blocks by key in a folder of bounded size.

    It may be used by threads, by forked processes and by unrelated processes at the same time.
    """

    def __init__(self, folder: Path | None, max_bytes: int, max_open_blocks: int = 256) -> None:
        """Create a cache; the folder is first used when a block is.

        Args:
            folder: The folder. None takes a folder of this user in the system's temporary folder.
            max_bytes: Bound of the folder's size.
            max_open_blocks: Most blocks of which this process keeps the checksums, and their files open.
        """
        self.folder, self.max_bytes, self.max_open_blocks = folder or default_cache_folder(), max_bytes, max_open_blocks
        self._private = folder is None
        self._open: OrderedDict[str, _OpenBlock] = OrderedDict()
        self._lock = threading.Lock()
        self._ready = False

    def read(self, key: object, ranges: NDArray[np.int64], sample: int, fetch: Callable[[], bytes]) -> bytes:
        """Return the bytes of one sample of a block.

        Args:
            key: Anything whose ``repr`` tells this block, and this version of it, from every other.
            ranges: int64 [samples, 2], start and end of each sample in the block's content.
            sample: Position of the sample in the block.
            fetch: Returns the block's content; called if the cache does not hold it.

        Raises:
            ShardError: The folder cannot be used; the message names the setting.
        """
        self._prepare()
        name = self.name_of(key)
        start, end = map(int, ranges[sample])
        data = self._read(name, len(ranges), sample, start, end)
        if data is None:
            content = self.ensure(key, ranges, fetch)
            data = content[start:end] if content is not None else self._read(name, len(ranges), sample, start, end)
        if data is None:  # another process evicted or damaged it at once: do without the disk
            data = fetch()[start:end]
        return data

    def ensure(self, key: object, ranges: NDArray[np.int64], fetch: Callable[[], bytes]) -> bytes | None:
        """Fetch a block unless the cache holds it.

        One process of the node fetches while the others wait. The kernel releases the lock of a killed process.

        Args:
            key: See ``read``.
            ranges: See ``read``.
            fetch: See ``read``.

        Returns:
            The block's content, or None if the cache held it already.

        Raises:
            ShardError: The folder cannot be used; the message names the setting.
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
        """Return the name of a block's file, without its ending."""
        return blake2b(repr(key).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def close(self) -> None:
        """Close every open block. The cache can be used again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].file.close()

    def __reduce__(self) -> tuple[type[BlockCache], tuple[Path | None, int, int]]:
        return BlockCache, (None if self._private else self.folder, self.max_bytes, self.max_open_blocks)

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

    def _read(self, name: str, num_samples: int, sample: int, start: int, end: int) -> bytes | None:
        """Return a sample of a block; None if there is no block, or if it was damaged and is now removed."""
        with self._lock:  # otherwise a second thread may close the descriptor and a third one reuse its number
            block = self._opened(name, num_samples)
            if block is None:
                return None
            try:
                data = block.file.read(end - start, block.content + start)
            except OSError:
                data = b""
            if len(data) == end - start and zlib.crc32(data) == block.sums[sample]:
                return data
            self._open.pop(name).file.close()
        self._path(name).unlink(missing_ok=True)
        return None

    def _opened(self, name: str, num_samples: int) -> _OpenBlock | None:
        """Return a block, opened if necessary; None if there is none or its table is damaged."""
        block, now = self._open.get(name), time.monotonic()
        if block is None:
            file = PooledFile(self._path(name))
            try:
                sums = _checked_sums(file, self._path(name).stat().st_size, num_samples)
            except OSError:
                return None
            if sums is None:
                file.close()
                self._path(name).unlink(missing_ok=True)
                return None
            if len(self._open) >= self.max_open_blocks:
                self._open.popitem(last=False)[1].file.close()
            block = self._open[name] = _OpenBlock(file, sums, _HEADER.size + 4 * num_samples, -_TOUCH_SECONDS)
        else:
            self._open.move_to_end(name)
        if now - block.touched > _TOUCH_SECONDS:
            block.touched = now
            with suppress(OSError):  # another user owns the file: only that user's reads count as use
                block.file.touch()
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
        """Make room for a temporary file of ``size`` bytes and create it; return its descriptor and name."""
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
        """Remove the least recently used blocks until at most ``wanted`` bytes are left; return the bytes left."""
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
        with ExitStack() as stack:
            try:
                descriptor = stack.enter_context(cache_lock(path, 0o600 if self._private else 0o666))
            except OSError as error:
                raise ShardError(f"data.cache_dir: {self.folder} cannot be written: {error}") from error
            yield descriptor


def prepare_folder(cache_dir: Path | None) -> Path:
    """Create the folder of ``data.cache_dir`` if it is missing, and return it.

    Args:
        cache_dir: The setting. None means a folder of this user in the system's temporary folder.

    Raises:
        ShardError: The folder cannot be used, or the temporary one belongs to somebody else.
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
    """Return the folder of this user in the system's temporary folder."""
    return Path(tempfile.gettempdir()) / f"flamingo-trainer-{os.getuid()}"


def _checked_sums(file: PooledFile, size: int, num_samples: int) -> NDArray[np.uint32] | None:
    """Return the table of CRC-32 sums of a block, or None if its header, table or length is damaged."""
    head = file.read(_HEADER.size + 4 * num_samples, 0)
    if len(head) != _HEADER.size + 4 * num_samples:
        return None
    magic, count, content, table_sum = _HEADER.unpack_from(head)
    expected = (_MAGIC, num_samples, len(head) + content)
    if (magic, count, size) != expected or zlib.crc32(head[_HEADER.size :]) != table_sum:
        return None
    return np.frombuffer(head, "<u4", num_samples, _HEADER.size)
