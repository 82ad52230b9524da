"""Indexing one shard, wherever it lies, and reusing what an earlier scan found: the work behind ``trainer.index``."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from trainer.data.errors import ShardError
from trainer.data.shards.manifest import Manifest
from trainer.data.shards.remote import RemoteStore
from trainer.data.shards.tar_index import (
    Rejection,
    ShardIndex,
    collected_sidecar_path,
    load_sidecar,
    save_sidecar,
    scan_shard,
    scan_tar,
    sidecar_path,
)
from trainer.data.shards.urls import is_remote, local_path

_READ_AHEAD = 4 << 20  # bytes of a remote shard that are read at once; members that are larger are skipped over


@dataclass(frozen=True)
class IndexEntry:
    """What the manifest needs of a shard; the offsets stay in the sidecar. url: as in the manifest."""

    url: str
    samples: int
    tar_bytes: int
    checksum: int
    rejected: tuple[Rejection, ...]
    reused: bool = False
    beside: bool = True


def expand(urls: Iterable[str], store: RemoteStore) -> list[str]:
    """The shards that urls mean, in their order; patterns sorted. Raises ValueError: a scheme, nothing found, twice.

    Raises RemoteError when remote storage does not list what matches a pattern.
    """
    shards: list[str] = []
    for url in urls:
        for one in braceexpand(url):
            if is_remote(one):
                # In http a question mark begins the query, and there are no listings to match with.
                has_pattern = glob.has_magic(one) and not one.lower().startswith("http")
            else:
                one = str(local_path(one))
                has_pattern = glob.has_magic(one) and not os.path.exists(one)
            if not has_pattern:
                shards.append(one)
                continue
            found = store.glob(one) if is_remote(one) else sorted(glob.glob(one, recursive=True))
            if not found:
                raise ValueError(f"nothing matches {url!r}")
            shards += found
    counts = Counter(one if is_remote(one) else os.path.abspath(one) for one in shards)
    if counts and counts.most_common(1)[0][1] > 1:
        raise ValueError(f"the shard {counts.most_common(1)[0][0]} is named more than once")
    return shards


def index_shard(shard: str, manifest: Path, required: Sequence[str], store: RemoteStore) -> IndexEntry:
    """Scans a shard and writes its sidecar, unless an unchanged one is there.

    shard: a remote url or a local path. manifest: where the manifest will be written. A shard that cannot be read is
    an entry without samples, rejected as ``unreadable``.
    """
    url = manifest_url(shard, manifest.parent)
    try:
        if is_remote(shard):
            index, reused, beside = _index_remote(url, manifest, required, store)
        else:
            index, reused, beside = _index_local(Path(shard), url, manifest, required)
    except (ShardError, OSError) as error:
        reason = "unreadable" if isinstance(error, ShardError) else "index_not_written"
        return IndexEntry(url, 0, 0, 0, (Rejection(reason, 0, str(error)),))
    return IndexEntry(url, len(index.offsets), index.tar_bytes, index.checksum, index.rejected, reused, beside)


def manifest_url(shard: str, folder: Path) -> str:
    """Relative to the manifest where the shard was given so or lies below it: then the folder can move as a whole."""
    if is_remote(shard):
        return shard
    path = Path(shard)
    absolute, base = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    if not path.is_absolute() or absolute.is_relative_to(base):
        return Path(os.path.relpath(absolute, base)).as_posix()
    return absolute.as_posix()


def build_manifest(path: Path, entries: Sequence[IndexEntry]) -> Manifest:
    """The manifest of the shards that have samples. Raises ValueError for a shard that comes twice."""
    used = [entry for entry in entries if entry.samples]
    return Manifest.create(
        path,
        [entry.url for entry in used],
        [entry.samples for entry in used],
        [entry.tar_bytes for entry in used],
        [entry.checksum for entry in used],
        [entry.beside for entry in used],
    )


def _index_local(path: Path, url: str, manifest: Path, required: Sequence[str]) -> tuple[ShardIndex, bool, bool]:
    """(index, whether it was there already, whether it lies beside the shard)."""
    beside, collected = sidecar_path(path), collected_sidecar_path(manifest, url)
    try:
        status = path.stat()
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}") from error
    for place in (beside, collected):
        index = _unchanged(place, status.st_size, status.st_mtime_ns, required)
        if index is not None:
            return index, True, place == beside
    index = scan_shard(path, required)
    try:
        save_sidecar(index, beside)
    except OSError:  # a folder that only somebody else may write
        _save_collected(index, collected)
        return index, False, False
    return index, False, True


def _index_remote(
    url: str, manifest: Path, required: Sequence[str], store: RemoteStore
) -> tuple[ShardIndex, bool, bool]:
    place, status = collected_sidecar_path(manifest, url), store.stat(url)
    # Where the store tells no version, the size alone has to say that nothing has changed.
    index = _unchanged(place, status.size, status.version, required)
    if index is not None:
        return index, True, False
    read = _ReadAhead(store, url, status.size)
    index = scan_tar(read, status.size, status.version, required)
    _save_collected(index, place)
    return index, False, False


def _unchanged(place: Path, size: int, version: int, required: Sequence[str]) -> ShardIndex | None:
    if not place.exists():
        return None
    try:
        index = load_sidecar(place)
    except ShardError:
        return None
    same = (index.tar_bytes, index.version, index.required)
    return index if same == (size, version, tuple(sorted(required))) else None


def _save_collected(index: ShardIndex, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    save_sidecar(index, place)


class _ReadAhead:
    """(offset, length) -> bytes of a remote file that is read from its start to its end."""

    def __init__(self, store: RemoteStore, url: str, size: int) -> None:
        self._store, self._url, self._size = store, url, size
        self._start, self._data = 0, b""

    def __call__(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self._size)
        if not self._start <= offset <= end <= self._start + len(self._data):
            stop = min(max(end, offset + _READ_AHEAD), self._size)
            self._data = self._store.read(self._url, offset, stop, self._size)
            self._start = offset
        return self._data[offset - self._start : end - self._start]
