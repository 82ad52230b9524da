"""Share large arrays among the processes of a node: one makes an array, all map it read-only.

An array is a ``.npy`` file in a folder of the node. It is written under another name and then renamed, so a kill leaves
a whole file or none. One process makes it under the folder's lock while the others wait. The files are a cache: what
was not asked for within a day is removed, and made again when it is needed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.errors import ShardError
from trainer.data.shards.block_cache import prepare_folder
from trainer.data.shards.file_lock import cache_lock


class SharedArrays:
    """Keep arrays by key.

    Args:
        cache_dir: ``data.cache_dir``; None takes the default of ``BlockCache``.
        kept_seconds: Age since the last use at which an array is removed.
    """

    def __init__(self, cache_dir: Path | None = None, kept_seconds: float = 86_400.0) -> None:
        self._cache_dir, self._kept_seconds = cache_dir, kept_seconds

    def get(self, key: object, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return ``make()``, or the array that another process of the node made for the same key.

        Args:
            key: Any object whose repr tells this array from all others.
            make: Makes the array. It must not ask for another array, because the folder has one lock.

        Raises:
            ShardError: The folder cannot be used or has no room.
        """
        folder = prepare_folder(self._cache_dir) / "arrays"
        path = folder / f"{blake2b(repr(key).encode(), digest_size=16).hexdigest()}.npy"
        try:
            array = _mapped(path)
            if array is None:
                folder.mkdir(exist_ok=True)
                with cache_lock(folder / "lock"):
                    array = _mapped(path)
                    if array is None:
                        _remove_old(folder, self._kept_seconds)
                        _write(path, make())
                        array = _mapped(path)
        except OSError as error:
            raise ShardError(f"data.cache_dir: {folder} cannot be used: {error}") from error
        if array is None:
            raise ShardError(f"data.cache_dir: {path} was written and cannot be read")
        return array


def _mapped(path: Path) -> NDArray[Any] | None:
    """Map the array of a file; None where the file is missing or cut off (after a power loss)."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        os.utime(path)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return array


def _write(path: Path, array: NDArray[Any]) -> None:
    temporary = path.with_suffix(".tmp")  # only the holder of the lock writes it
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _remove_old(folder: Path, kept_seconds: float) -> None:
    """Remove old files; a process that has one mapped keeps its content."""
    for path in folder.iterdir():
        if path.name != "lock" and path.stat().st_mtime < time.time() - kept_seconds:
            path.unlink()
