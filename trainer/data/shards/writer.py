"""Write samples to shards with webdataset's writer, with their sidecars and manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from webdataset import TarWriter

from trainer.data.errors import ShardError
from trainer.data.shards.manifest import Manifest
from trainer.data.shards.sidecar import ShardIndex, save_sidecar, sidecar_path
from trainer.data.shards.tar_scan import scan_shard

MANIFEST_NAME = "manifest.npz"


class IndexedShardWriter:
    """Write samples to ``FOLDER/000000.tar``, ``FOLDER/000001.tar``, ...

    A full shard is scanned from the disk before it gets its name. So a sample that cannot be read again is an error
    now, not in training. An interrupted writer leaves whole shards and no manifest.
    """

    def __init__(self, folder: Path, max_samples: int = 1000, max_bytes: int = 1_000_000_000) -> None:
        """Create the folder.

        Args:
            folder: Where shards, sidecars and manifest go.
            max_samples: Samples that finish a shard.
            max_bytes: Bytes of content that finish a shard.

        Raises:
            ValueError: The folder has a manifest already.
        """
        self.manifest_path = folder / MANIFEST_NAME
        if self.manifest_path.exists():
            raise ValueError(f"{self.manifest_path} is there already: remove it, or write to another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._max_samples, self._max_bytes = folder, max_samples, max_bytes
        self._indices: list[ShardIndex] = []
        self._shard: TarWriter | None = None
        self._file: IO[bytes]
        self._samples = self._bytes = 0

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Write one sample.

        Args:
            key: Key of the sample; no other sample of the shard may have it.
            members: Content by lower-case extension ("jpg", "0.png").

        Raises:
            ValueError: webdataset would split the names of the members in another way.
            ShardError: The shard is full and does not read as it was written.
        """
        if not key or key != key.strip("/") or "." in key.rpartition("/")[2] or key.startswith("__"):
            raise ValueError(
                f"the key {key!a} does not name one sample: no dots in its last part, no slash at its ends"
            )
        for extension in members:
            # webdataset does not write members that begin with an underscore.
            if not extension or extension != extension.lower() or "/" in extension or extension[0] in "._":
                raise ValueError(f"the member {extension!a} of {key!a} is not a lower-case extension")
        if self._shard is None:
            # webdataset would give a name such as "pipe:..." to a shell, so it gets an open file.
            self._file = open(self._temporary, "wb")  # noqa: SIM115  closed with the shard
            # With a time of 0, equal samples give equal bytes, and no extended header is needed.
            self._shard = TarWriter(self._file, encoder=False, compress=False, mtime=0)
        self._shard.write({"__key__": key, **members})
        self._samples += 1
        self._bytes += sum(map(len, members.values()))
        if self._samples >= self._max_samples or self._bytes >= self._max_bytes:
            self._finish_shard()

    def close(self) -> Manifest | None:
        """Finish the last shard and write the manifest.

        Returns:
            The manifest; None if no sample was written.

        Raises:
            ShardError: The shard does not read as it was written.
        """
        self._finish_shard()
        if not self._indices:
            return None
        manifest = Manifest.create(
            self.manifest_path,
            [self._name(number) for number in range(len(self._indices))],
            [len(index.offsets) for index in self._indices],
            [index.tar_bytes for index in self._indices],
            [index.checksum for index in self._indices],
        )
        manifest.save()
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.close()
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self._folder / f".{self._name(len(self._indices))}.{os.getpid()}.tmp"

    @staticmethod
    def _name(number: int) -> str:
        return f"{number:06d}.tar"

    def _finish_shard(self) -> None:
        """Scan the shard as it lies on the disk, give it its name and write its sidecar."""
        if self._shard is None:
            return
        self._shard.close()
        self._file.close()
        self._shard = None
        index = scan_shard(self._temporary)
        if index.rejected or len(index.offsets) != self._samples:
            problem = index.rejected[0] if index.rejected else f"{len(index.offsets)} of {self._samples} samples"
            self._temporary.unlink()
            raise ShardError(f"{self._folder / self._name(len(self._indices))} does not read as written: {problem}")
        target = self._folder / self._name(len(self._indices))
        os.replace(self._temporary, target)  # keeps the modification time that the index holds
        save_sidecar(index, sidecar_path(target))
        self._indices.append(index)
        self._samples = self._bytes = 0
