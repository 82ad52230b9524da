"""Large arrays that every process of a node needs: made by one of them, and mapped read-only by all.

An array is a ``.npy`` file in a folder on the node. It is written under another name and renamed, so that a kill leaves
a whole file or none; one process makes it under the folder's lock while the others wait. Nothing in it is worth
keeping: what was not asked for within a day is removed, and made again where it is needed.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.errors import ShardError
from trainer.data.shards.cache import prepare_folder

_KEPT_SECONDS = 86_400.0


class SharedArrays:
    """Arrays by key. cache_dir: of the run; None takes the default of ``BlockCache``."""

    def __init__(self, cache_dir: Path | None = None) -> None:
        self._cache_dir = cache_dir

    def get(self, key: object, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """``make()``, or what another process of the node made of the same key.

        key: anything whose repr tells this array from every other. make: must not ask for another array itself, for the
        folder has one lock. Raises ShardError for a folder without room.
        """
        folder = prepare_folder(self._cache_dir) / "arrays"
        path = folder / f"{blake2b(repr(key).encode(), digest_size=16).hexdigest()}.npy"
        try:
            array = _mapped(path)
            if array is None:
                folder.mkdir(exist_ok=True)
                with _locked(folder / "lock"):
                    array = _mapped(path)
                    if array is None:
                        _remove_old(folder)
                        _write(path, make())
                        array = _mapped(path)
        except OSError as error:
            raise ShardError(f"data.cache_dir: {folder} cannot be used: {error}") from error
        if array is None:
            raise ShardError(f"data.cache_dir: {path} was written and cannot be read")
        return array


def _mapped(path: Path) -> NDArray[Any] | None:
    """The array in a file; None where there is none, or a part of one (after a power loss)."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        os.utime(path)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return array


def _write(path: Path, array: NDArray[Any]) -> None:
    temporary = path.with_suffix(".tmp")  # of whoever holds the lock
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _remove_old(folder: Path) -> None:
    """Processes that have a file mapped keep it until they let go."""
    for path in folder.iterdir():
        if path.name != "lock" and path.stat().st_mtime < time.time() - _KEPT_SECONDS:
            path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Whoever dies holding it lets it go."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
