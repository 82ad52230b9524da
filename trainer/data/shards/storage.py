"""How the bytes of a shard are had: a local file's by ``pread``, a remote one's block by block through the cache."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.config.data_config import DataConfig
from trainer.data.errors import ShardError
from trainer.data.shards.cache import BlockCache
from trainer.data.shards.manifest import Manifest
from trainer.data.shards.remote import RemoteStore, RetryPolicy
from trainer.data.shards.tar_index import ShardIndex


@dataclass(frozen=True)
class StorageSettings:
    """The settings of ``data`` that remote shards need. read_block: samples that are fetched at once."""

    read_block: int = 250
    cache_dir: Path | None = None
    cache_bytes: int = 20_000_000_000
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def of(cls, config: DataConfig) -> StorageSettings:
        """Those of a run."""
        retry = RetryPolicy(config.read_retries, config.read_timeout_seconds, config.read_deadline_seconds)
        return cls(config.read_block, config.cache_dir, config.cache_bytes, retry)


class LocalShard:
    """An open file. Raises ShardError when it is missing or has another size than ``size``."""

    def __init__(self, path: Path, size: int, index: ShardIndex, where: str) -> None:
        self.offsets, self._where = index.offsets, where
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{where}: {error.strerror} ({path})") from error
        found = os.fstat(self._descriptor).st_size
        if found != size:
            os.close(self._descriptor)
            raise ShardError(f"{where}: {found} bytes, but the manifest says {size}: run trainer.index again")

    def sample(self, index: int) -> bytes:
        """The bytes of a sample's members. Raises ShardError."""
        start, end = self.offsets.item(index, 0), self.offsets.item(index, 1)
        try:
            data = os.pread(self._descriptor, end - start, start)
        except OSError as error:
            raise ShardError(f"{self._where}: {error.strerror} at byte {start}") from error
        if len(data) != end - start:
            raise ShardError(f"{self._where}: ends at byte {start + len(data)}, expected {end}")
        return data

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


class RemoteShard:
    """A remote file: one range read fetches the ``block`` consecutive samples that a sample is in, once a node."""

    def __init__(
        self, url: str, size: int, index: ShardIndex, store: RemoteStore, cache: BlockCache, block: int
    ) -> None:
        self.offsets = index.offsets
        self._url, self._size, self._store, self._cache, self._block = url, size, store, cache, block
        self._identity = (url, size, index.checksum, index.version)

    def sample(self, index: int) -> bytes:
        """The bytes of a sample's members. Raises RemoteError and ShardError."""
        number, within = divmod(index, self._block)
        start, end, ranges = self._range(number)
        return self._cache.read((*self._identity, start, end), ranges, within, lambda: self._fetch(start, end))

    def prefetch(self, number: int) -> None:
        """Puts a block into the cache. Raises RemoteError and ShardError."""
        start, end, ranges = self._range(number)
        self._cache.ensure((*self._identity, start, end), ranges, lambda: self._fetch(start, end))

    def close(self) -> None:
        """Nothing is kept open."""

    def _range(self, number: int) -> tuple[int, int, NDArray[np.int64]]:
        """Start and end in the shard of a block, and int64 [samples, 2] of its samples in the block."""
        offsets = self.offsets[number * self._block : (number + 1) * self._block].astype(np.int64)
        start, end = int(offsets[0, 0]), int(offsets[-1, 1])
        return start, end, offsets - start

    def _fetch(self, start: int, end: int) -> bytes:
        return self._store.read(self._url, start, end, self._size)


def check_cache_size(manifest: Manifest, settings: StorageSettings, lanes: int, window: int, where: str) -> None:
    """A cache that cannot hold what the lanes of a process read from would fetch every block again for every sample.

    lanes: of this process. window: samples. Raises ValueError for remote shards and too small a cache.
    """
    if not manifest.has_remote or not manifest.total_samples:
        return
    block_bytes = settings.read_block * int(manifest.shard_bytes.sum()) / manifest.total_samples
    blocks = -(-window // settings.read_block) + 1
    needed = int(lanes * 2 * blocks * block_bytes)  # of the window that is read and of the next
    needed = min(needed, int(manifest.shard_bytes.sum()))
    if needed > settings.cache_bytes:
        raise ValueError(
            f"{where}: its {lanes} lanes of this process read from {needed:,} bytes of remote blocks at a time, more "
            f"than data.cache_bytes = {settings.cache_bytes:,}: raise it, or lower data.shuffle_window ({window}) or data.num_lanes"
        )
