"""Read one sample of a manifest's shards: its key and its members by extension, as bytes."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from trainer.data.errors import ShardError
from trainer.data.shards.block_cache import BlockCache
from trainer.data.shards.manifest import Manifest, load_manifest
from trainer.data.shards.open_shard import LocalShard, RemoteShard
from trainer.data.shards.remote_store import RemoteStore
from trainer.data.shards.sidecar import ShardIndex, load_sidecar
from trainer.data.shards.storage_settings import StorageSettings
from trainer.data.shards.tar_members import TarDamageError, sample_members
from trainer.data.shards.urls import is_remote

_OPEN_SHARDS = 256


class ShardReader:
    """Read samples by (shard, index).

    The most recently used shards stay open with their index. Every problem raises a ShardError, none is passed over:
    a missing shard, a size or an index that differs from the manifest, a short read, a damaged header, remote storage
    that does not answer. Reads that fail for a while are repeated first. A reader is not safe for threads.
    """

    def __init__(
        self, manifest: Manifest, open_shards: int = _OPEN_SHARDS, storage: StorageSettings | None = None
    ) -> None:
        """Create a reader; no shard is opened yet.

        Args:
            manifest: The shards.
            open_shards: Most shards that stay open.
            storage: How remote shards are read; None takes the defaults of ``data``.
        """
        self.manifest = manifest
        self._open_shards = open_shards
        self._opened: OrderedDict[int, LocalShard | RemoteShard] = OrderedDict()
        self._storage = storage or StorageSettings()
        self._store = RemoteStore(self._storage.retry)
        self._cache = BlockCache(self._storage.cache_dir, self._storage.cache_bytes)

    def read(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """Return the key and the members (lower-case extension -> bytes) of a sample.

        Args:
            shard: Position of the shard in the manifest.
            index: Position of the sample in the shard.

        Raises:
            ShardError: The sample cannot be read.
        """
        opened = self.open(shard)
        if not 0 <= index < len(opened.offsets):
            raise ShardError(f"{self._where(shard)}: no sample {index}, it has {len(opened.offsets)}")
        data = opened.sample(index)
        try:
            return sample_members(data)
        except TarDamageError as error:
            start = int(opened.offsets[index][0])
            raise ShardError(f"{self._where(shard)}: sample {index} at byte {start}: {error}") from error

    def open(self, shard: int) -> LocalShard | RemoteShard:
        """Return an open shard. It is compared with the manifest when it is opened.

        Raises:
            ShardError: The shard is missing or differs from the manifest.
        """
        opened = self._opened.get(shard)
        if opened is not None:
            self._opened.move_to_end(shard)
            return opened
        url, size = self.manifest.url(shard), int(self.manifest.shard_bytes[shard])
        if is_remote(url):
            index = self._load_index(shard)
            opened = RemoteShard(url, size, index, self._store, self._cache, self._storage.read_block)
        else:
            path = self.manifest.shard_path(shard)
            opened = LocalShard(path, size, self._load_index(shard), self._where(shard), self._storage.retry)
        if len(self._opened) >= self._open_shards:
            self._opened.popitem(last=False)[1].close()
        self._opened[shard] = opened
        return opened

    def close(self) -> None:
        """Close every open shard and read block."""
        while self._opened:
            self._opened.popitem()[1].close()
        self._cache.close()

    def _where(self, shard: int) -> str:
        return f"shard {self.manifest.url(shard)} of {self.manifest.path}"

    def _load_index(self, shard: int) -> ShardIndex:
        path = self.manifest.index_path(shard)
        try:
            index = load_sidecar(path, self._storage.retry)
        except FileNotFoundError as error:
            raise ShardError(
                f"{self._where(shard)}: its index {path} is missing: run python -m trainer.index again, on the shards' "
                "new place if they have moved"
            ) from error
        expected = (int(self.manifest.samples[shard]), int(self.manifest.checksums[shard]))
        if (len(index.offsets), index.checksum) != expected:
            raise ShardError(
                f"{self._where(shard)}: its index {path} is of another scan, because the shard was written or indexed "
                "again: run trainer.index again"
            )
        return index

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.manifest.path, self._open_shards, self._storage)


def _reopen(path: os.PathLike[str], open_shards: int, storage: StorageSettings) -> ShardReader:
    return ShardReader(load_manifest(Path(path)), open_shards, storage)
