"""Index shards, wherever they lie, and build their manifest: the work behind ``python -m trainer.index``."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from braceexpand import braceexpand

from trainer.data.errors import ShardError
from trainer.data.shards.manifest import Manifest
from trainer.data.shards.remote_store import RemoteStore
from trainer.data.shards.sidecar import (
    Rejection,
    ShardIndex,
    collected_sidecar_path,
    load_sidecar,
    save_sidecar,
    sidecar_path,
)
from trainer.data.shards.tar_scan import scan_shard, scan_tar
from trainer.data.shards.urls import HTTP_SCHEMES, OBJECT_SCHEMES, is_remote, local_path, path_url, scheme_of

READ_AHEAD_BYTES = 4 << 20  # bytes of a remote shard that are read at once; the scan jumps over larger members


@dataclass(frozen=True)
class ManifestEntry:
    """One shard of a manifest. The offsets of its samples stay in the sidecar.

    Attributes:
        url: Url as the manifest holds it.
        samples: Number of samples.
        tar_bytes: Size of the shard.
        checksum: Checksum of the shard's index.
        rejected: Samples and parts that were left out.
        reused: Whether an earlier sidecar was still valid.
        beside: Whether the sidecar lies beside the shard.
    """

    url: str
    samples: int
    tar_bytes: int
    checksum: int
    rejected: tuple[Rejection, ...]
    reused: bool = False
    beside: bool = True


def expand_urls(urls: Iterable[str], store: RemoteStore) -> list[str]:
    """Return the shards that urls with braces and patterns name, in their order; matches of a pattern are sorted.

    Raises:
        ValueError: A url has a scheme that is not read, matches nothing, or names a shard a second time.
        RemoteError: The storage did not list the files that match a pattern.
    """
    shards: list[str] = []
    for url in urls:
        for one in (url,) if _is_file(url) else braceexpand(url):
            found = _matches(path_url(one) if _is_local_name(one) else one, store)
            if not found:
                raise ValueError(f"nothing matches {url!r}")
            shards += found
    _refuse_repetitions(shards)
    return shards


def _matches(url: str, store: RemoteStore) -> list[str]:
    """Return the shards that match a pattern, or the one that a url names, whether it exists or not."""
    if is_remote(url):
        # In an http url, a question mark begins the query. Http has no listings to match a pattern with.
        has_pattern = glob.has_magic(url) and scheme_of(url) not in HTTP_SCHEMES
        return store.glob(url) if has_pattern else [url]
    path = str(local_path(url))
    if not glob.has_magic(path) or os.path.exists(path):
        return [path_url(path)]
    return [path_url(one) for one in sorted(glob.glob(path, recursive=True))]


def _is_file(name: str) -> bool:
    """Tell whether a file has this very name, braces and all."""
    return "{" in name and os.path.isfile(name)


def _is_local_name(name: str) -> bool:
    """Tell whether a name with a colon is a path: no url is read that begins like it, but files match it."""
    scheme = scheme_of(name)
    if scheme is None or scheme in (*HTTP_SCHEMES, *OBJECT_SCHEMES, "file", "pipe"):
        return False
    return os.path.exists(name) or bool(glob.has_magic(name) and glob.glob(name, recursive=True))


def _refuse_repetitions(shards: Sequence[str]) -> None:
    """Refuse a shard that is named twice, also under another name or through a link.

    Raises:
        ValueError: A shard comes twice.
    """
    folder_of = lru_cache(maxsize=1 << 16)(os.path.realpath)
    first: dict[str, str] = {}
    for one in shards:
        place = one
        if not is_remote(one):
            folder, name = os.path.split(os.path.abspath(local_path(one)))
            place = os.path.join(folder_of(folder), name)
            place = os.path.realpath(place) if os.path.islink(place) else place
        earlier = first.setdefault(place, one)
        if earlier is not one:
            also = "" if earlier == one else f", as {earlier} and as {one}"
            raise ValueError(f"the shard {place} is named more than once{also}: its samples would count double")


def index_shard(
    shard: str, manifest: Path, required: Sequence[str], store: RemoteStore, read_ahead: int = READ_AHEAD_BYTES
) -> ManifestEntry:
    """Scan a shard and write its sidecar, unless a valid sidecar exists.

    Args:
        shard: A remote url or a local path.
        manifest: Path that the manifest will have.
        required: Extensions that every sample must have; see ``scan_tar``.
        store: Reads remote shards.
        read_ahead: Bytes of a remote shard that are read at once.

    Returns:
        The shard's entry. A shard that cannot be read has no samples and the rejection ``unreadable``; one whose
        sidecar cannot be written has the rejection ``index_not_written``.
    """
    url = manifest_url(shard, manifest.parent)
    try:
        if is_remote(shard):
            index, reused, beside = _index_remote(url, manifest, required, store, read_ahead)
        else:
            index, reused, beside = _index_local(Path(shard), url, manifest, required)
    except (ShardError, OSError) as error:
        reason = "unreadable" if isinstance(error, ShardError) else "index_not_written"
        return ManifestEntry(url, 0, 0, 0, (Rejection(reason, 0, str(error)),))
    return ManifestEntry(url, len(index.offsets), index.tar_bytes, index.checksum, index.rejected, reused, beside)


def manifest_url(shard: str, folder: Path) -> str:
    """Return the url that the manifest in ``folder`` holds for a shard.

    It is relative to the folder if the shard was named by a relative path or lies below the folder. Such a folder can
    move as a whole.
    """
    if is_remote(shard):
        return shard
    path = Path(shard)
    absolute, base = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    if path.is_absolute() and not absolute.is_relative_to(base):
        return absolute.as_posix()
    target = os.path.realpath(absolute)
    # In a symlinked folder, ".." leads to the parent of the link's target.
    for start in (str(base), os.path.realpath(base)):
        relative = os.path.relpath(absolute, start)
        if os.path.realpath(os.path.join(base, relative)) == target:
            return path_url(Path(relative).as_posix())
    return absolute.as_posix()


def build_manifest(path: Path, entries: Sequence[ManifestEntry], required: Sequence[str] = ()) -> Manifest:
    """Build the manifest of the shards that have samples.

    Args:
        path: The file that ``save`` writes.
        entries: Entries of all shards.
        required: Members that every sample must have.

    Raises:
        ValueError: A shard comes twice.
    """
    used = [entry for entry in entries if entry.samples]
    return Manifest.create(
        path,
        [entry.url for entry in used],
        [entry.samples for entry in used],
        [entry.tar_bytes for entry in used],
        [entry.checksum for entry in used],
        [entry.beside for entry in used],
        required,
    )


def find_copies(entries: Sequence[ManifestEntry]) -> list[tuple[str, str]]:
    """Return pairs of shards whose headers and sizes agree; they are probably copies of one another."""
    first: dict[tuple[int, int], str] = {}
    pairs = []
    for entry in entries:
        earlier = first.setdefault((entry.checksum, entry.tar_bytes), entry.url)
        if earlier != entry.url and entry.samples:
            pairs.append((earlier, entry.url))
    return pairs


def _index_local(path: Path, url: str, manifest: Path, required: Sequence[str]) -> tuple[ShardIndex, bool, bool]:
    """Return the index, whether it was reused, and whether it lies beside the shard."""
    beside, collected = sidecar_path(path, required), collected_sidecar_path(manifest, url, required)
    try:
        status = path.stat()
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}") from error
    for sidecar in (beside, collected):
        index = _load_valid(sidecar, status.st_size, status.st_mtime_ns, required)
        if index is not None:
            return index, True, sidecar == beside
    index = scan_shard(path, required)
    try:
        save_sidecar(index, beside)
    except OSError:  # the folder is read-only
        _save_collected(index, collected)
        return index, False, False
    return index, False, True


def _index_remote(
    url: str, manifest: Path, required: Sequence[str], store: RemoteStore, read_ahead: int
) -> tuple[ShardIndex, bool, bool]:
    """Do the same as ``_index_local`` for a remote shard."""
    sidecar, status = collected_sidecar_path(manifest, url, required), store.stat(url)
    # If the storage names no version, only the size can show that the shard is unchanged.
    index = _load_valid(sidecar, status.size, status.version, required)
    if index is not None:
        return index, True, False
    read = _SequentialReader(store, url, status.size, read_ahead)
    index = scan_tar(read, status.size, status.version, required)
    _save_collected(index, sidecar)
    return index, False, False


def _load_valid(sidecar: Path, size: int, version: int, required: Sequence[str]) -> ShardIndex | None:
    """Return the index in a sidecar if it describes this version of the shard and these required members."""
    if not sidecar.exists():
        return None
    try:
        index = load_sidecar(sidecar)
    except (ShardError, FileNotFoundError):
        return None
    same = (index.tar_bytes, index.version, index.required)
    return index if same == (size, version, tuple(sorted(required))) else None


def _save_collected(index: ShardIndex, sidecar: Path) -> None:
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    save_sidecar(index, sidecar)


class _SequentialReader:
    """Read a remote file from its start to its end, ``read_ahead`` bytes at a time."""

    def __init__(self, store: RemoteStore, url: str, size: int, read_ahead: int) -> None:
        self._store, self._url, self._size, self._read_ahead = store, url, size, read_ahead
        self._start, self._data = 0, b""

    def __call__(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self._size)
        if not self._start <= offset <= end <= self._start + len(self._data):
            stop = min(max(end, offset + self._read_ahead), self._size)
            self._data = self._store.read(self._url, offset, stop, self._size)
            self._start = offset
        return self._data[offset - self._start : end - self._start]
