"""Reading one sample: a byte range of a shard, its members by extension. Nothing is interpreted here."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.errors import ShardError
from trainer.data.manifest import Manifest, load_manifest
from trainer.data.tar_index import load_sidecar, sidecar_path
from trainer.data.tar_members import TarDamageError, read_members, split_name

_OPEN_SHARDS = 256


@dataclass(frozen=True)
class _OpenShard:
    descriptor: int
    offsets: NDArray[np.uint64]


class ShardReader:
    """Samples of a manifest's shards by (shard, index).

    The most recently used shards stay open with their index. Every problem is a ShardError and none is skipped: a
    missing shard, one whose size or index is no longer what the manifest says, a short read, a damaged header.
    """

    def __init__(self, manifest: Manifest, open_shards: int = _OPEN_SHARDS) -> None:
        self.manifest = manifest
        self._limit = open_shards
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def read(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """The key and the members (lower-case extension -> bytes) of a sample."""
        opened = self._shard(shard)
        if not 0 <= index < len(opened.offsets):
            raise ShardError(f"{self._where(shard)}: no sample {index}, it has {len(opened.offsets)}")
        start, end = map(int, opened.offsets[index])
        data = self._pread(shard, opened.descriptor, start, end)
        key, members = "", {}
        try:
            for member in read_members(lambda offset, n: data[offset : offset + n], len(data), whole=False):
                parts = split_name(member.name)
                if parts is not None:
                    key, extension = parts
                    members[extension] = data[member.data : member.data + member.size]
        except TarDamageError as error:
            raise ShardError(f"{self._where(shard)}: sample {index} at byte {start}: {error}") from error
        return key, members

    def close(self) -> None:
        """Closes every open shard."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def _where(self, shard: int) -> str:
        return f"shard {self.manifest.url(shard)} of {self.manifest.path}"

    def _shard(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened is not None:
            self._open.move_to_end(shard)
            return opened
        path = self.manifest.shard_path(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"{self._where(shard)}: {error.strerror} ({path})") from error
        try:
            size, expected = os.fstat(descriptor).st_size, int(self.manifest.shard_bytes[shard])
            if size != expected:
                raise ShardError(
                    f"{self._where(shard)}: {size} bytes, but the manifest says {expected}: run trainer.index again"
                )
            index = load_sidecar(sidecar_path(path))
            if (len(index.offsets), index.checksum) != (
                int(self.manifest.samples[shard]),
                int(self.manifest.checksums[shard]),
            ):
                raise ShardError(f"{self._where(shard)}: its index is of another scan: run trainer.index again")
        except BaseException:
            os.close(descriptor)
            raise
        if len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1].descriptor)
        opened = self._open[shard] = _OpenShard(descriptor, index.offsets)
        return opened

    def _pread(self, shard: int, descriptor: int, start: int, end: int) -> bytes:
        try:
            data = os.pread(descriptor, end - start, start)
        except OSError as error:
            raise ShardError(f"{self._where(shard)}: {error.strerror} at byte {start}") from error
        if len(data) != end - start:
            raise ShardError(f"{self._where(shard)}: ends at byte {start + len(data)}, expected {end}")
        return data

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.manifest.path, self._limit)


def _reopen(path: os.PathLike[str], open_shards: int) -> ShardReader:
    from pathlib import Path

    return ShardReader(load_manifest(Path(path)), open_shards)
