"""Write files and compute their checksums in the same pass."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

Entry = dict[str, Any]  # of a manifest: {"bytes": size, "sha256": hexadecimal digest}


class _HashingFile:
    """Pass written bytes on to a file and to their checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:  # torch.save turns it into a RuntimeError without the reason
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> Entry:
    """Let ``write`` fill the file, sync it to the disk and return its entry for a manifest.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    with open(path, "wb") as file:
        target = _HashingFile(file)
        try:
            write(cast(BinaryIO, target))
        except RuntimeError:
            if target.error is not None:
                raise target.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": target.digest.hexdigest()}


def write_tensors(path: Path, value: Any) -> Entry:
    """Write a value with ``torch.save``; errors as ``write_file``."""
    return write_file(path, lambda file: torch.save(value, file))


def write_bytes(path: Path, content: bytes) -> Entry:
    """Write bytes; errors as ``write_file``."""
    return write_file(path, lambda file: file.write(content))
