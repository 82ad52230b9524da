"""Read the byte range of a sample from one open shard, local or remote."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.errors import ShardError
from trainer.data.shards.block_cache import BlockCache
from trainer.data.shards.open_files import PooledFile
from trainer.data.shards.remote_store import RemoteStore
from trainer.data.shards.retries import RetryPolicy, repeat_disk
from trainer.data.shards.sidecar import ShardIndex

Result = TypeVar("Result")


class LocalShard:
    """A shard in a local file.

    Attributes:
        offsets: uint64 [samples, 2], start and end of each sample in bytes.
    """

    def __init__(
        self, path: Path, size: int, shard_index: ShardIndex, where: str, policy: RetryPolicy | None = None
    ) -> None:
        """Open the file.

        Args:
            path: The file.
            size: Bytes of the file according to the manifest.
            shard_index: Index of the shard.
            where: Begins every error message.
            policy: How failed reads are repeated; None takes the defaults of ``data``.

        Raises:
            ShardError: The file is missing or has another size.
        """
        self.offsets = shard_index.offsets
        self._path, self._size, self._where, self._policy = path, size, where, policy or RetryPolicy()
        self._file = PooledFile(path, self._check_size)
        self._repeat(self._file.open, f"({path}); if the shards have moved, run trainer.index on them again")

    def sample(self, index: int) -> bytes:
        """Return the bytes of a sample's members.

        Raises:
            ShardError: The read failed or came short.
        """
        start, end = self.offsets.item(index, 0), self.offsets.item(index, 1)
        data = self._repeat(lambda: self._file.read(end - start, start), f"at byte {start}")
        if len(data) != end - start:
            raise ShardError(f"{self._where}: ends at byte {start + len(data)}, expected {end}")
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _repeat(self, read: Callable[[], Result], where: str) -> Result:
        def attempt() -> Result:
            try:
                return read()
            except OSError:
                self._file.close()  # a stale handle stays stale: the next attempt opens the file again
                raise

        try:
            return repeat_disk(attempt, self._policy, self._where)
        except OSError as error:
            raise ShardError(f"{self._where}: {error.strerror} {where}") from error

    def _check_size(self, descriptor: int) -> None:
        found = os.fstat(descriptor).st_size
        if found != self._size:
            raise ShardError(
                f"{self._where}: {found} bytes, but the manifest says {self._size}: run trainer.index again"
            )


class RemoteShard:
    """A shard in remote storage.

    One range read fetches a whole read block: the ``read_block`` consecutive samples around a sample. The block cache
    makes that one read for all processes of a node.

    Attributes:
        offsets: uint64 [samples, 2], start and end of each sample in bytes.
    """

    def __init__(
        self, url: str, size: int, shard_index: ShardIndex, store: RemoteStore, cache: BlockCache, read_block: int
    ) -> None:
        self.offsets = shard_index.offsets
        self._url, self._size, self._store, self._cache, self._read_block = url, size, store, cache, read_block
        self._identity = (url, size, shard_index.checksum, shard_index.version)

    def sample(self, index: int) -> bytes:
        """Return the bytes of a sample's members.

        Raises:
            RemoteError: The storage did not deliver the read block.
            ShardError: The cache folder cannot be used.
        """
        block, sample_in_block = divmod(index, self._read_block)
        start, end, ranges = self._block_range(block)
        return self._cache.read((*self._identity, start, end), ranges, sample_in_block, lambda: self._fetch(start, end))

    def prefetch(self, block: int) -> None:
        """Put a read block into the cache, unless it is there.

        Raises:
            RemoteError: The storage did not deliver the read block.
            ShardError: The cache folder cannot be used.
        """
        start, end, ranges = self._block_range(block)
        self._cache.ensure((*self._identity, start, end), ranges, lambda: self._fetch(start, end))

    def close(self) -> None:
        """Do nothing: a remote shard keeps nothing open."""

    def _block_range(self, block: int) -> tuple[int, int, NDArray[np.int64]]:
        """Return a read block's start and end in the shard, and int64 [samples, 2], the samples' ranges in it."""
        offsets = self.offsets[block * self._read_block : (block + 1) * self._read_block].astype(np.int64)
        start, end = int(offsets[0, 0]), int(offsets[-1, 1])
        return start, end, offsets - start

    def _fetch(self, start: int, end: int) -> bytes:
        return self._store.read(self._url, start, end, self._size)
