"""The manifest: one columnar file that says which shards there are and how many samples each has.

It is an uncompressed ``.npz`` (any numpy reads it, nothing is pickled): ``url_bytes`` (utf-8, one after the other) with
``url_ends``, ``samples``, ``bytes`` and ``checksum`` (of ``trainer.data.tar_index``) per shard. Its sha256 is over
these columns, not over the file, and stands in every checkpoint.
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
from trainer.data.files import local_path, write_atomically

FORMAT_VERSION = 1
_COLUMNS = {"url_bytes": "|u1", "url_ends": "<i8", "samples": "<i8", "bytes": "<i8", "checksum": "<u8"}


@dataclass(frozen=True)
class Manifest:
    """A list of shards. ``samples`` and ``shard_bytes`` are int64 [shards], ``checksums`` uint64 [shards]."""

    path: Path
    url_bytes: NDArray[np.uint8]
    url_ends: NDArray[np.int64]
    samples: NDArray[np.int64]
    shard_bytes: NDArray[np.int64]
    checksums: NDArray[np.uint64]

    @classmethod
    def create(
        cls,
        path: Path,
        urls: Sequence[str],
        samples: Sequence[int],
        shard_bytes: Sequence[int],
        checksums: Sequence[int],
    ) -> Manifest:
        """A manifest in memory; ``save`` writes it. Raises ValueError when a url comes twice."""
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

    @property
    def total_samples(self) -> int:
        """Samples of all shards."""
        return int(self.samples.sum())

    @cached_property
    def sha256(self) -> str:
        """Of the content, wherever the file lies."""
        digest = hashlib.sha256(f"flamingo-manifest {FORMAT_VERSION}".encode())
        for name, column in self._columns().items():
            digest.update(name.encode() + len(column).to_bytes(8, "little") + column.tobytes())
        return digest.hexdigest()

    def save(self) -> None:
        """Writes ``path`` atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, **{"format_version": np.int64(FORMAT_VERSION), **self._columns()})  # type: ignore[arg-type]
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
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"{path}: manifest version {version}, this trainer reads {FORMAT_VERSION}: run trainer.index again"
                )
            columns = {name: file[name].astype(kind, copy=False) for name, kind in _COLUMNS.items()}
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
    if any(len(columns[name]) != shards for name in ("url_ends", "bytes", "checksum")) or (
        shards and (np.any(np.diff(ends, prepend=0) <= 0) or int(ends[-1]) != len(columns["url_bytes"]))
    ):
        raise ShardError(f"{path}: damaged: its columns do not fit together")
    return Manifest(path, columns["url_bytes"], ends, columns["samples"], columns["bytes"], columns["checksum"])
