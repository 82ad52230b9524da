"""What the processes of a node make once and share."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.errors import ShardError
from trainer.data.stream.order import SourceOrder
from trainer.data.stream.shared_arrays import SharedArrays

FORK = multiprocessing.get_context("fork")


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "arrays").iterdir() if path.name != "lock")


def in_processes(number: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` gives in that many processes, which start together; -1 of one that died."""
    start, results = FORK.Barrier(number), FORK.SimpleQueue()

    def main(rank: int) -> None:
        start.wait()
        results.put(work(rank))

    processes = [FORK.Process(target=main, args=(rank,)) for rank in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    alive = sum(process.exitcode == 0 for process in processes)
    return [results.get() for _ in range(alive)]


def test_one_process_makes_it_and_all_have_it(tmp_path: Path) -> None:
    made = FORK.Value("i", 0)

    def make() -> np.ndarray:
        with made.get_lock():
            made.value += 1
        return np.arange(1000, dtype=np.uint32)

    found = in_processes(4, lambda rank: SharedArrays(tmp_path).get("key", make).sum())
    assert (found, made.value) == ([499_500] * 4, 1)
    with pytest.raises(ValueError, match="read-only"):
        SharedArrays(tmp_path).get("key", make)[0] = 1


def test_who_is_killed_while_making_it_leaves_no_lock_and_no_part(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        def make() -> np.ndarray:
            if not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                (tmp_path / "arrays" / "half.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return np.ones(10)

        return int(SharedArrays(tmp_path).get("key", make).sum())

    assert in_processes(3, work) == [10, 10]


def test_a_part_of_a_file_is_made_again_and_old_ones_go(tmp_path: Path) -> None:
    shared = SharedArrays(tmp_path)
    shared.get("key", lambda: np.arange(100))
    (path,) = (tmp_path / "arrays").glob("*.npy")
    for broken in (b"", path.read_bytes()[:400]):
        path.write_bytes(broken)
        assert shared.get("key", lambda: np.arange(100)).sum() == 4950
    os.utime(path, (0, 0))
    shared.get("key", lambda: np.arange(100))  # used again: young again
    shared.get("other", lambda: np.arange(5))
    assert files(tmp_path) == [".npy", ".npy"]
    os.utime(path, (0, 0))
    shared.get("third", lambda: np.arange(5))
    assert not path.exists()


def test_a_folder_that_cannot_be_used_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match=r"data\.cache_dir"):
        SharedArrays(tmp_path / "file").get("key", lambda: np.arange(3))
    (tmp_path / "arrays").touch()
    with pytest.raises(ShardError, match=r"data\.cache_dir.* cannot be used"):
        SharedArrays(tmp_path).get("key", lambda: np.arange(3))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ShardError, match=rf"data\.cache_dir: {tmp_path}.*cannot lock.*-o flock.*lockd"):
        SharedArrays(tmp_path).get("key", lambda: np.arange(3))


def test_a_shared_order_is_the_same_order(tmp_path: Path) -> None:
    def order(counts: list[int], shared: SharedArrays | None = None, **changes: Any) -> SourceOrder:
        settings = {"seed": 1, "num_lanes": 4, "samples_per_step": 8, "read_block": 5, "shuffle_window": 7, **changes}
        return SourceOrder("s", counts, shared=shared, share_from_blocks=20, **settings)

    counts = [7, 0, 30, 11, 5] * 4
    for changes in ({}, {"seed": 2}, {"read_block": 3}):
        for shape in (counts, [*counts[:-1], 6]):
            plain, shared = order(shape, **changes), order(shape, SharedArrays(tmp_path), **changes)
            for step in (0, 3, 26, 60):
                assert shared.samples_of(step) == plain.samples_of(step)
    assert isinstance(order(counts, SharedArrays(tmp_path))._first_block, np.memmap)
    few = order([5] * 8, SharedArrays(tmp_path / "none"))
    few.prepare(0)
    assert not (tmp_path / "none").exists(), "a small source needs no files"
