"""Test that the block cache is bounded, shared by processes, and verified at every read."""

from __future__ import annotations

import errno
import fcntl
import gc
import multiprocessing
import multiprocessing.synchronize
import os
import pickle
import signal
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from trainer.data.errors import ShardError
from trainer.data.shards.block_cache import BlockCache

RANGES = np.array([[0, 1000], [1000, 1500], [1500, 4000]])
FORK = multiprocessing.get_context("fork")
LONG = 60.0  # seconds after which a test fails that waits for an event


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(4000)


class Source:
    """Return a block's content, after a pause in seconds, and count the calls."""

    def __init__(self, number: int, pause: float = 0.0) -> None:
        self.number, self.pause, self.calls = number, pause, 0

    def __call__(self) -> bytes:
        self.calls += 1
        time.sleep(self.pause)
        return content(self.number)


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.block"))


def used(folder: Path) -> int:
    """Return the bytes in a cache's folder, while other processes may remove files."""
    total = 0
    for path in folder.glob("??/*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_a_block_is_fetched_once(tmp_path: Path) -> None:
    source = Source(1)
    for cache in (BlockCache(tmp_path / "new" / "cache", 100_000), BlockCache(tmp_path / "new" / "cache", 100_000)):
        for _ in range(2):
            for number, (start, end) in enumerate(RANGES.tolist()):
                assert cache.read(("a", 1), RANGES, number, source) == content(1)[start:end]
        cache.close()
    assert source.calls == 1
    assert BlockCache(tmp_path / "new" / "cache", 100_000).read(("a", 2), RANGES, 0, Source(2)) == content(2)[:1000]


def test_the_size_is_bounded_and_the_least_recently_used_blocks_are_evicted(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 50_000)
    for number in range(40):
        cache.read(number, RANGES, 0, Source(number))
        cache.close()  # so that every use opens the block and counts as a use
        first = tmp_path / cache.name_of(0)[:2] / f"{cache.name_of(0)}.block"
        os.utime(first, (time.time() + number, time.time() + number))
        assert used(tmp_path) <= 50_000
    assert len(blocks(tmp_path)) >= 10
    kept = Source(0)
    cache.read(0, RANGES, 0, kept)
    assert kept.calls == 0
    gone = Source(1)
    cache.read(1, RANGES, 0, gone)
    assert gone.calls == 1


def test_evicted_blocks_stay_readable_where_they_are_open(tmp_path: Path) -> None:
    cache, source = BlockCache(tmp_path, 50_000), Source(0)
    cache.read(0, RANGES, 0, source)
    cache.read(0, RANGES, 0, source)
    for path in blocks(tmp_path):
        path.unlink()
    assert cache.read(0, RANGES, 2, source) == content(0)[1500:]
    assert source.calls == 1


@pytest.mark.parametrize("position", [0, 10, 22, 26, 40, 3000, -1])
def test_damage_is_found_and_fetched_again(tmp_path: Path, position: int) -> None:
    BlockCache(tmp_path, 50_000).read(0, RANGES, 0, Source(0))
    (path,) = blocks(tmp_path)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    cache, source = BlockCache(tmp_path, 50_000), Source(0)
    assert [cache.read(0, RANGES, n, source) for n in range(3)] == [content(0)[a:b] for a, b in RANGES.tolist()]
    assert source.calls == 1


@pytest.mark.parametrize("length", [0, 5, 30, 2000])
def test_cut_blocks_are_fetched_again(tmp_path: Path, length: int) -> None:
    cache = BlockCache(tmp_path, 50_000)
    cache.read(0, RANGES, 0, Source(0))
    cache.read(0, RANGES, 0, Source(0))
    (path,) = blocks(tmp_path)
    with open(path, "r+b") as file:  # one of the readers below has it open
        file.truncate(length)
    for reader in (cache, BlockCache(tmp_path, 50_000)):
        assert reader.read(0, RANGES, 2, Source(0)) == content(0)[1500:]
    assert path.stat().st_size > 4000


def test_a_damaged_size_file_is_counted_again(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 50_000)
    cache.read(0, RANGES, 0, Source(0))
    (tmp_path / "size").write_bytes(b"rub")
    cache.read(1, RANGES, 0, Source(1))
    assert int.from_bytes((tmp_path / "size").read_bytes(), "little") == used(tmp_path)
    assert len(blocks(tmp_path)) == 2


def test_orphaned_temporary_files_are_removed(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 20_000)
    cache.read(0, RANGES, 0, Source(0))
    old, young = blocks(tmp_path)[0].with_name("old.tmp"), blocks(tmp_path)[0].with_name("young.tmp")
    old.write_bytes(bytes(3000))
    young.write_bytes(bytes(3000))
    os.utime(old, (0, 0))
    for number in range(1, 8):
        cache.read(number, RANGES, 0, Source(number))
        assert used(tmp_path) <= 20_000 or old.exists()
    assert not old.exists()
    assert young.exists()


def test_a_block_that_does_not_fit_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"data\.cache_bytes = 3,000 is less than one block"):
        BlockCache(tmp_path, 3000).read(0, RANGES, 0, Source(0))


def test_an_unusable_folder_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match=r"data\.cache_dir"):
        BlockCache(tmp_path / "file", 50_000).read(0, RANGES, 0, Source(0))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ShardError, match=rf"data\.cache_dir: {tmp_path}.*cannot lock.*Lustre.*-o flock"):
        BlockCache(tmp_path, 50_000).read(0, RANGES, 0, Source(0))


def test_the_default_folder_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = BlockCache(None, 50_000)
    cache.read(0, RANGES, 0, Source(0))
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    cache.folder.chmod(0o777)
    with pytest.raises(ShardError, match=rf"data\.cache_dir: {cache.folder}"):
        BlockCache(None, 50_000).read(0, RANGES, 0, Source(0))
    assert pickle.loads(pickle.dumps(cache)).folder == cache.folder


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise ShardError("storage")

    cache = BlockCache(tmp_path, 50_000)
    with pytest.raises(ShardError, match="storage"):
        cache.read(0, RANGES, 0, fail)
    assert list(tmp_path.glob("??/*")) == []
    assert cache.read(0, RANGES, 0, Source(0)) == content(0)[:1000]


def test_threads_that_want_the_same_block_wait_for_one_fetch(tmp_path: Path) -> None:
    cache, source = BlockCache(tmp_path, 50_000), Source(0, pause=0.05)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(cache.read(0, RANGES, 1, source))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content(0)[1000:1500]] * 6
    assert source.calls == 1


def read_at_random(folder: Path, seed: int, results: multiprocessing.Queue[object]) -> None:
    cache, rng = BlockCache(folder, 50_000), np.random.default_rng(seed)
    largest, wrong = 0, 0
    for _ in range(150):
        block, number = int(rng.integers(30)), int(rng.integers(3))
        start, end = RANGES[number].tolist()
        wrong += cache.read(block, RANGES, number, Source(block)) != content(block)[start:end]
        largest = max(largest, used(folder))
    results.put((wrong, largest))


def test_processes_that_share_a_small_cache(tmp_path: Path) -> None:
    results = FORK.Queue()
    processes = [FORK.Process(target=read_at_random, args=(tmp_path, seed, results)) for seed in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=LONG) for _ in processes]
    for process in processes:
        process.join()
    assert [wrong for wrong, _ in found] == [0] * 4
    # Files come and go during the sum, so a process may count a few more than exist at any time.
    assert max(largest for _, largest in found) <= 50_000 + 4 * 4100
    assert used(tmp_path) <= 50_000


def test_killed_processes_leave_a_usable_cache(tmp_path: Path) -> None:
    """SIGKILL hits processes anywhere: in a fetch, under a lock, in the middle of a file."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        queue = FORK.Queue()
        processes = [
            FORK.Process(target=read_at_random, args=(tmp_path, int(rng.integers(99)), queue)) for _ in range(2)
        ]
        for process in processes:
            process.start()
        time.sleep(float(rng.uniform(0.01, 0.06)))
        for process in processes:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    cache = BlockCache(tmp_path, 50_000)
    for block in range(30):
        assert cache.read(block, RANGES, 2, Source(block)) == content(block)[1500:]
    assert used(tmp_path) <= 50_000


def _fetch_forever(started: multiprocessing.synchronize.Event) -> bytes:
    started.set()
    threading.Event().wait()
    raise AssertionError


def read_in_thread(folder: Path) -> bytes:
    """Read a sample of block 0 with another cache; fail if a lock blocks the read."""
    found: list[bytes] = []
    cache = BlockCache(folder, 50_000)
    thread = threading.Thread(target=lambda: found.append(cache.read(0, RANGES, 0, Source(0))), daemon=True)
    thread.start()
    thread.join(LONG)
    assert found, "the lock is still held"
    return found[0]


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    started = FORK.Event()
    cache = BlockCache(tmp_path, 50_000)
    process = FORK.Process(target=cache.read, args=(0, RANGES, 0, partial(_fetch_forever, started)))
    process.start()
    assert started.wait(LONG)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert read_in_thread(tmp_path) == content(0)[:1000]


def test_a_forked_process_does_not_keep_a_lock(tmp_path: Path) -> None:
    """Loader processes are forked, perhaps while a thread of their parent holds a lock."""
    release = FORK.Event()
    child = FORK.Process(target=release.wait)

    def fetch() -> bytes:
        child.start()
        return content(0)

    BlockCache(tmp_path, 50_000).read(0, RANGES, 0, fetch)
    blocks(tmp_path)[0].unlink()
    assert read_in_thread(tmp_path) == content(0)[:1000]
    assert child.is_alive()
    release.set()
    child.join()


def test_many_blocks_do_not_keep_many_files_open(tmp_path: Path) -> None:
    gc.collect()  # readers of other tests close their files
    cache, before = BlockCache(tmp_path, 500_000, max_open_blocks=3), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for number in range(9):
            cache.read(number, RANGES, 0, Source(number))
    assert len(os.listdir("/proc/self/fd")) == before + 3
    cache.close()
    assert len(os.listdir("/proc/self/fd")) == before
