"""The manifest: one columnar file that says which shards there are and how many samples each has.

It is an uncompressed ``.npz`` (any numpy reads it, nothing is pickled): ``url_bytes`` (utf-8, one after the other) with
``url_ends``, ``samples``, ``bytes`` and ``checksum`` (of ``trainer.data.shards.tar_index``) per shard. Its sha256 is over
these columns, not over the file, and stands in every checkpoint. A last column, ``index_beside``, says where a shard's
index lies: beside the shard, or (0: the shard is remote, or its folder read-only) in the folder ``MANIFEST.index``.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.errors import ShardError
from trainer.data.shards.tar_index import collected_sidecar_path, sidecar_path
from trainer.data.shards.urls import local_path
from trainer.runtime.files import write_atomically

FORMAT_VERSION = 2  # 1 had no index_beside: all indices lay beside their shards, and it is read so
_CONTENT_VERSION = 1  # of the columns that sha256 covers
# Entries of a column looked at together: of copies of whole columns, malloc would keep tens of MB in each process.
_CHUNK = 1 << 16
# Manifests from this size on are mapped, so that a node has them in memory once. Smaller ones are read: on a network
# file system, a mapped file that another machine replaces is gone.
_MAPPED_BYTES = 1 << 25
_COLUMNS = {"url_bytes": "|u1", "url_ends": "<i8", "samples": "<i8", "bytes": "<i8", "checksum": "<u8"}


@dataclass(frozen=True)
class Manifest:
    """A list of shards. ``samples`` and ``shard_bytes`` are int64 [shards], ``checksums`` uint64 [shards].

    index_beside: bool [shards], whether the shard's index lies beside it.
    """

    path: Path
    url_bytes: NDArray[np.uint8]
    url_ends: NDArray[np.int64]
    samples: NDArray[np.int64]
    shard_bytes: NDArray[np.int64]
    checksums: NDArray[np.uint64]
    index_beside: NDArray[np.bool_]

    @classmethod
    def create(
        cls,
        path: Path,
        urls: Sequence[str],
        samples: Sequence[int],
        shard_bytes: Sequence[int],
        checksums: Sequence[int],
        index_beside: Sequence[bool] | None = None,
    ) -> Manifest:
        """A manifest in memory; ``save`` writes it. index_beside: None for all. Raises ValueError for a url twice."""
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
        )

    def __len__(self) -> int:
        return len(self.samples)

    def url(self, shard: int) -> str:
        """The url of a shard as it stands in the manifest."""
        start = int(self.url_ends[shard - 1]) if shard else 0
        return self.url_bytes[start : int(self.url_ends[shard])].tobytes().decode("utf-8", "surrogateescape")

    def shard_path(self, shard: int) -> Path:
        """The file of a shard; relative urls start at the manifest's folder. Raises ValueError (scheme)."""
        return local_path(self.url(shard), self.path.parent)

    def index_path(self, shard: int) -> Path:
        """The file of a shard's index."""
        if self.index_beside[shard]:
            return sidecar_path(self.shard_path(shard))
        return collected_sidecar_path(self.path, self.url(shard))

    @property
    def has_remote(self) -> bool:
        """Whether a url may be remote (any with ``://``)."""
        starts = range(0, len(self.url_bytes), _CHUNK)
        return any(b"://" in self.url_bytes[start : start + _CHUNK + 2].tobytes() for start in starts)

    @property
    def total_samples(self) -> int:
        """Samples of all shards."""
        return int(self.samples.sum())

    @cached_property
    def sha256(self) -> str:
        """Of the content, wherever the file lies."""
        digest = hashlib.sha256(f"flamingo-manifest {_CONTENT_VERSION}".encode())
        for name, column in self._columns().items():
            digest.update(name.encode() + len(column).to_bytes(8, "little"))
            for start in range(0, len(column), _CHUNK):
                digest.update(column[start : start + _CHUNK].tobytes())
        return digest.hexdigest()

    def save(self) -> None:
        """Writes ``path`` atomically."""
        buffer = io.BytesIO()
        columns = {**self._columns(), "index_beside": self.index_beside.astype(np.uint8)}
        np.savez(buffer, **{"format_version": np.int64(FORMAT_VERSION), **columns})  # type: ignore[arg-type]
        write_atomically(self.path, buffer.getvalue())

    def _columns(self) -> dict[str, NDArray[Any]]:
        values = (self.url_bytes, self.url_ends, self.samples, self.shard_bytes, self.checksums)
        return {name: np.asarray(value, kind) for (name, kind), value in zip(_COLUMNS.items(), values, strict=True)}

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return load_manifest, (self.path,)  # a loader process reads it again instead of receiving the columns


def load_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest. Raises ShardError (missing or damaged) and ValueError (another version)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            version = int(file["format_version"])
            if version not in (1, FORMAT_VERSION):
                raise ValueError(
                    f"{path}: manifest version {version}, this trainer reads {FORMAT_VERSION}: run trainer.index again"
                )
            large = path.stat().st_size >= _MAPPED_BYTES
            found = _mapped_columns(path, file.zip) if large else file
            columns = {name: found[name].astype(kind, copy=False) for name, kind in _COLUMNS.items()}
            beside = found["index_beside"] if version > 1 else np.ones(len(columns["samples"]), np.uint8)
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such manifest; write it with python -m trainer.index --output {path}") from error
    except (OSError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ShardError(f"{path}: not a manifest, or damaged ({error})") from error
    except ValueError as error:
        if "manifest version" in str(error):
            raise
        raise ShardError(f"{path}: not a manifest, or damaged ({error})") from error
    shards = len(columns["samples"])
    ends = columns["url_ends"]
    lengths = {len(columns[name]) for name in ("url_ends", "bytes", "checksum")} | {len(beside)}
    if lengths != {shards} or (shards and (not _rising(ends) or int(ends[-1]) != len(columns["url_bytes"]))):
        raise ShardError(f"{path}: damaged: its columns do not fit together")
    return Manifest(
        path,
        columns["url_bytes"],
        ends,
        columns["samples"],
        columns["bytes"],
        columns["checksum"],
        beside.view(np.bool_),  # no copy: it may be mapped
    )


def _rising(ends: NDArray[np.int64]) -> bool:
    """Whether each is more than the one before, from more than 0 on."""
    starts = range(0, len(ends), _CHUNK)
    steps = (np.diff(ends[start : start + _CHUNK + 1]) for start in starts)
    return int(ends[0]) > 0 and all(bool(np.all(step > 0)) for step in steps)


def _mapped_columns(path: Path, archive: zipfile.ZipFile) -> dict[str, NDArray[Any]]:
    """The arrays of an uncompressed ``.npz``, mapped read-only. Raises zipfile.BadZipFile, ValueError and KeyError."""
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
            raw.seek(member.header_offset + 26)  # of the local header, whose extra field may have its own length
            name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
        if dtype.hasobject or fortran_order:
            raise ValueError(f"{member.filename} is no plain column")
        start = member.header_offset + 30 + name + extra + header
        columns[member.filename.removesuffix(".npy")] = np.memmap(path, dtype, "r", start, shape)
    return columns
