"""Files of a checkpoint, written with their checksum in one pass."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

Entry = dict[str, Any]


class _HashingFile:
    """What ``torch.save`` writes to: the bytes go to the file and into their checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:  # torch's writer reports it as a RuntimeError without the reason
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> Entry:
    """Let ``write`` fill the file, make it durable, and return its size and sha256, as manifests have them.

    Raises: OSError (a full disk, for one).
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
    """``torch.save`` through ``write_file``."""
    return write_file(path, lambda file: torch.save(value, file))


def write_bytes(path: Path, content: bytes) -> Entry:
    """Bytes through ``write_file``."""
    return write_file(path, lambda file: file.write(content))
