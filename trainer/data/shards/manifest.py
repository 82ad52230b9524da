"""List the shards of a source, with their sizes and sample counts, in one columnar file: the manifest.

The file is an uncompressed ``.npz``; any numpy reads it, and nothing in it is pickled. Its columns:

- ``url_bytes``: the urls in UTF-8, one after the other; ``url_ends``: where each of them ends.
- ``samples``, ``bytes``, ``checksum``: samples, size and index checksum (see ``sidecar``) of each shard.
- ``index_beside``: 1 if a shard's sidecar lies beside it. 0 if the shard is remote or its folder read-only; its sidecar
  then lies in the folder ``MANIFEST.index``.
- ``required``: a JSON list of the members that every sample must have. The sidecars' names depend on it.

The manifest's sha256 covers the urls, samples, bytes and checksums; its content_sha256 covers all of these but the
urls, so it stays the same when the shards move. Every checkpoint contains both.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.errors import ShardError
from trainer.data.shards.file_kinds import PROBE_BYTES, kind_of
from trainer.data.shards.sidecar import collected_sidecar_path, sidecar_path
from trainer.data.shards.urls import local_path
from trainer.runtime.files import write_atomically

# Version 1 has no index_beside: all its sidecars lie beside their shards. Versions 1 and 2 have no required, and their
# sidecars are named as if it were empty. They are still read.
FORMAT_VERSION = 3
_CONTENT_VERSION = 1  # of the columns that sha256 covers
# A column is processed in chunks: malloc would keep the copy of a whole column, tens of MB, in each process.
CHUNK_ENTRIES = 1 << 16
# A large manifest is mapped, so that a node has it in memory once. A small one is read: if another machine replaces a
# mapped file on a network file system, the mapping becomes invalid.
MAPPED_FROM_BYTES = 1 << 25
_COLUMNS = {"url_bytes": "|u1", "url_ends": "<i8", "samples": "<i8", "bytes": "<i8", "checksum": "<u8"}


@dataclass(frozen=True)
class Manifest:
    """A list of shards.

    Attributes:
        path: The file. Relative urls start at its folder.
        url_bytes: uint8, the urls in UTF-8, one after the other.
        url_ends: int64 [shards], end of each url in ``url_bytes``.
        samples: int64 [shards], samples of each shard.
        shard_bytes: int64 [shards], size of each shard.
        checksums: uint64 [shards], checksum of each shard's index.
        index_beside: bool [shards], whether the shard's sidecar lies beside it.
        required: Members that every sample must have, sorted.
        chunk: Entries of a column that are processed at a time.
    """

    path: Path
    url_bytes: NDArray[np.uint8]
    url_ends: NDArray[np.int64]
    samples: NDArray[np.int64]
    shard_bytes: NDArray[np.int64]
    checksums: NDArray[np.uint64]
    index_beside: NDArray[np.bool_]
    required: tuple[str, ...] = ()
    chunk: int = CHUNK_ENTRIES

    @classmethod
    def create(
        cls,
        path: Path,
        urls: Sequence[str],
        samples: Sequence[int],
        shard_bytes: Sequence[int],
        checksums: Sequence[int],
        index_beside: Sequence[bool] | None = None,
        required: Sequence[str] = (),
    ) -> Manifest:
        """Build a manifest in memory; ``save`` writes it.

        Args:
            path: The file that ``save`` writes.
            urls: Url of each shard.
            samples: Samples of each shard.
            shard_bytes: Size of each shard in bytes.
            checksums: Checksum of each shard's index.
            index_beside: Whether each shard's sidecar lies beside it; None means that all do.
            required: Members that every sample must have.

        Raises:
            ValueError: A url is listed twice.
        """
        if len(set(urls)) != len(urls):
            twice = Counter(urls).most_common(1)[0][0]
            raise ValueError(f"{path}: the shard {twice!r} is listed twice: its samples would count double")
        encoded = [url.encode("utf-8", "surrogateescape") for url in urls]
        return cls(
            path,
            np.frombuffer(b"".join(encoded), np.uint8),
            np.cumsum([len(one) for one in encoded], dtype=np.int64),
            np.asarray(samples, np.int64),
            np.asarray(shard_bytes, np.int64),
            np.asarray(checksums, np.uint64),
            np.ones(len(urls), np.bool_) if index_beside is None else np.asarray(index_beside, np.bool_),
            tuple(sorted(required)),
        )

    def __len__(self) -> int:
        return len(self.samples)

    def url(self, shard: int) -> str:
        """Return the url of a shard as the manifest holds it."""
        start = int(self.url_ends[shard - 1]) if shard else 0
        return self.url_bytes[start : int(self.url_ends[shard])].tobytes().decode("utf-8", "surrogateescape")

    def shard_path(self, shard: int) -> Path:
        """Return the file of a local shard.

        Raises:
            ValueError: The shard is not local.
        """
        return self._shard_path(shard, self._home)

    def _shard_path(self, shard: int, home: Path) -> Path:
        return local_path(self.url(shard), home.parent)

    def index_path(self, shard: int) -> Path:
        """Return the sidecar of a shard."""
        return self._index_path(shard, self._home)

    def _index_path(self, shard: int, home: Path) -> Path:
        if self.index_beside[shard]:
            return sidecar_path(self._shard_path(shard, home), self.required)
        return collected_sidecar_path(home, self.url(shard), self.required)

    @cached_property
    def _home(self) -> Path:
        """Path that shards and sidecars lie beside: ``path``, or its target if it is a link and they lie there."""
        if not self.path.is_symlink() or not len(self) or self._index_path(0, self.path).exists():
            return self.path
        target = self.path.resolve()
        return target if self._index_path(0, target).exists() else self.path

    @property
    def has_remote(self) -> bool:
        """Whether a url may be remote, because it contains ``://``."""
        return any(b"://" in chunk.tobytes() for chunk in _chunks(self.url_bytes, self.chunk, overlap=2))

    @property
    def total_samples(self) -> int:
        """Number of samples in all shards."""
        return int(self.samples.sum())

    @cached_property
    def sha256(self) -> str:
        """Digest of the shards' urls, samples, sizes and index checksums; the manifest's own place is no part of it."""
        return self._digest(tuple(_COLUMNS))

    @cached_property
    def content_sha256(self) -> str:
        """Digest of the shards' samples, sizes and index checksums. It does not depend on where the shards lie."""
        return self._digest(("samples", "bytes", "checksum"))

    def _digest(self, names: Sequence[str]) -> str:
        digest, columns = hashlib.sha256(f"flamingo-manifest {_CONTENT_VERSION}".encode()), self.columns()
        for name in names:
            digest.update(name.encode() + len(columns[name]).to_bytes(8, "little"))
            for chunk in _chunks(columns[name], self.chunk):
                digest.update(chunk.tobytes())
        return digest.hexdigest()

    def save(self) -> None:
        """Write ``path`` atomically."""
        buffer = io.BytesIO()
        required = np.frombuffer(json.dumps(self.required).encode(), np.uint8)
        columns = {**self.columns(), "index_beside": self.index_beside.astype(np.uint8), "required": required}
        np.savez(buffer, **{"format_version": np.int64(FORMAT_VERSION), **columns})  # type: ignore[arg-type]
        write_atomically(self.path, buffer.getvalue())

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns that sha256 covers, as the file holds them."""
        values = (self.url_bytes, self.url_ends, self.samples, self.shard_bytes, self.checksums)
        return {name: np.asarray(value, kind) for (name, kind), value in zip(_COLUMNS.items(), values, strict=True)}

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return load_manifest, (self.path,)  # a loader process reads the file instead of receiving the columns


def load_manifest(path: Path, *, mapped_from: int = MAPPED_FROM_BYTES, chunk: int = CHUNK_ENTRIES) -> Manifest:
    """Read and check a manifest.

    Args:
        path: The file.
        mapped_from: Bytes from which on the file is mapped instead of read.
        chunk: Entries of a column that are processed at a time.

    Raises:
        ShardError: The manifest is missing or damaged.
        ValueError: The manifest is of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            version = int(file["format_version"])
            known = 1 <= version <= FORMAT_VERSION
            if known:
                found = _mapped_columns(path, file.zip) if path.stat().st_size >= mapped_from else file
                columns = {name: found[name].astype(kind, copy=False) for name, kind in _COLUMNS.items()}
                beside = found["index_beside"] if version > 1 else np.ones(len(columns["samples"]), np.uint8)
                required = tuple(json.loads(file["required"].tobytes())) if version > 2 else ()
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such manifest; write it with python -m trainer.index --output {path}") from error
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ShardError(f"{path}: {_kind_of_file(path) or f'not a manifest, or damaged ({error})'}") from error
    if not known:
        raise ValueError(
            f"{path}: manifest version {version}, this trainer reads {FORMAT_VERSION}: run trainer.index again"
        )
    shards, ends = len(columns["samples"]), columns["url_ends"]
    lengths = {len(columns[name]) for name in ("url_ends", "bytes", "checksum")} | {len(beside)}
    if lengths != {shards} or (shards and (not _rising(ends, chunk) or int(ends[-1]) != len(columns["url_bytes"]))):
        raise ShardError(f"{path}: damaged: its columns do not fit together")
    return Manifest(
        path,
        columns["url_bytes"],
        ends,
        columns["samples"],
        columns["bytes"],
        columns["checksum"],
        beside.view(np.bool_),  # a copy would undo the mapping
        required,
        chunk,
    )


def _kind_of_file(path: Path) -> str | None:
    """Return what a file is that is no manifest, if its first bytes say it."""
    try:
        with open(path, "rb") as file:
            kind = kind_of(file.read(PROBE_BYTES))
    except OSError as error:
        return error.strerror
    if kind is None or "zip" in kind:  # a manifest is a zip archive itself
        return None
    return f"this is {kind}, not a manifest; write one with python -m trainer.index --output MANIFEST.npz SHARD..."


def _chunks(column: NDArray[Any], size: int, overlap: int = 0) -> Iterator[NDArray[Any]]:
    """Yield a column in parts, each with the first ``overlap`` entries of the next part."""
    for start in range(0, len(column), size):
        yield column[start : start + size + overlap]


def _rising(ends: NDArray[np.int64], chunk: int) -> bool:
    """Tell whether the first entry exceeds 0 and each further entry exceeds the one before."""
    return int(ends[0]) > 0 and all(bool(np.all(np.diff(part) > 0)) for part in _chunks(ends, chunk, overlap=1))


def _mapped_columns(path: Path, archive: zipfile.ZipFile) -> dict[str, NDArray[Any]]:
    """Map the arrays of an uncompressed ``.npz`` read-only.

    Raises:
        zipfile.BadZipFile: The archive is damaged or compressed.
        ValueError: An array is not a plain column.
    """
    damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    columns: dict[str, NDArray[Any]] = {}
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"{member.filename} is compressed")
        with archive.open(member) as file, open(path, "rb") as raw:
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            header = file.tell()
            # The local header of a zip member repeats its name and may have an extra field of its own length.
            raw.seek(member.header_offset + 26)
            name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
        if dtype.hasobject or fortran_order:
            raise ValueError(f"{member.filename} is no plain column")
        start = member.header_offset + 30 + name + extra + header
        columns[member.filename.removesuffix(".npy")] = np.memmap(path, dtype, "r", start, shape)
    return columns
