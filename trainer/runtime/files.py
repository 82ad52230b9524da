"""Write files that are either whole or absent after a crash, and compute checksums."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 8 * 2**20


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: after a crash it holds its old content or all of the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value as ``write_atomically`` does."""
    write_atomically(path, canonical_json(value))


def canonical_json(value: Any) -> str:
    """Return a JSON value as text, the same text for equal values."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def sync_folder(folder: Path) -> None:
    """Make new and renamed files in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
