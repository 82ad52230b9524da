"""Reading one sample: a byte range of a shard, its members by extension. Nothing is interpreted here."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from trainer.data.errors import ShardError
from trainer.data.shards.cache import BlockCache
from trainer.data.shards.manifest import Manifest, load_manifest
from trainer.data.shards.remote import RemoteStore
from trainer.data.shards.storage import LocalShard, RemoteShard, StorageSettings
from trainer.data.shards.tar_index import ShardIndex, load_sidecar
from trainer.data.shards.tar_members import TarDamageError, sample_members
from trainer.data.shards.urls import is_remote

_OPEN_SHARDS = 256


class ShardReader:
    """Samples of a manifest's shards by (shard, index).

    The most recently used shards stay open with their index. Every problem is a ShardError and none is skipped: a
    missing shard, one whose size or index is no longer what the manifest says, a short read, a damaged header, remote
    storage that does not answer. storage: for remote shards; None takes the defaults of ``data``.
    """

    def __init__(
        self, manifest: Manifest, open_shards: int = _OPEN_SHARDS, storage: StorageSettings | None = None
    ) -> None:
        self.manifest = manifest
        self._limit = open_shards
        self._open: OrderedDict[int, LocalShard | RemoteShard] = OrderedDict()
        self._storage = storage or StorageSettings()
        self._store = RemoteStore(self._storage.retry)
        self._cache = BlockCache(self._storage.cache_dir, self._storage.cache_bytes)

    def read(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """The key and the members (lower-case extension -> bytes) of a sample."""
        opened = self.open(shard)
        if not 0 <= index < len(opened.offsets):
            raise ShardError(f"{self._where(shard)}: no sample {index}, it has {len(opened.offsets)}")
        data = opened.sample(index)
        try:
            return sample_members(data)
        except TarDamageError as error:
            start = int(opened.offsets[index][0])
            raise ShardError(f"{self._where(shard)}: sample {index} at byte {start}: {error}") from error

    def close(self) -> None:
        """Closes every open shard and block."""
        while self._open:
            self._open.popitem()[1].close()
        self._cache.close()

    def _where(self, shard: int) -> str:
        return f"shard {self.manifest.url(shard)} of {self.manifest.path}"

    def open(self, shard: int) -> LocalShard | RemoteShard:
        """A shard, checked against the manifest when it was not open yet. Raises ShardError."""
        opened = self._open.get(shard)
        if opened is not None:
            self._open.move_to_end(shard)
            return opened
        url, size = self.manifest.url(shard), int(self.manifest.shard_bytes[shard])
        if is_remote(url):
            index = self._index(shard)
            opened = RemoteShard(url, size, index, self._store, self._cache, self._storage.read_block)
        else:
            path = self.manifest.shard_path(shard)
            opened = LocalShard(path, size, self._index(shard), self._where(shard))
        if len(self._open) >= self._limit:
            self._open.popitem(last=False)[1].close()
        self._open[shard] = opened
        return opened

    def _index(self, shard: int) -> ShardIndex:
        index = load_sidecar(self.manifest.index_path(shard))
        expected = (int(self.manifest.samples[shard]), int(self.manifest.checksums[shard]))
        if (len(index.offsets), index.checksum) != expected:
            raise ShardError(f"{self._where(shard)}: its index is of another scan: run trainer.index again")
        return index

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.manifest.path, self._limit, self._storage)


def _reopen(path: os.PathLike[str], open_shards: int, storage: StorageSettings) -> ShardReader:
    return ShardReader(load_manifest(Path(path)), open_shards, storage)
