"""The block cache: bounded, shared, and never believed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.data.errors import ShardError
from trainer.data.shards import cache
from trainer.data.shards.cache import BlockCache

RANGES = np.array([[0, 1000], [1000, 1500], [1500, 4000]])


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(4000)


class Source:
    """Makes blocks and counts how often."""

    def __init__(self, number: int, pause: float = 0.0) -> None:
        self.number, self.pause, self.calls = number, pause, 0

    def __call__(self) -> bytes:
        self.calls += 1
        time.sleep(self.pause)
        return content(self.number)


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.block"))


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def test_a_block_is_fetched_once(tmp_path: Path) -> None:
    source = Source(1)
    for one in (BlockCache(tmp_path / "new" / "cache", 100_000), BlockCache(tmp_path / "new" / "cache", 100_000)):
        for _ in range(2):
            for number, (start, end) in enumerate(RANGES.tolist()):
                assert one.read(("a", 1), RANGES, number, source) == content(1)[start:end]
        one.close()
    assert source.calls == 1
    assert BlockCache(tmp_path / "new" / "cache", 100_000).read(("a", 2), RANGES, 0, Source(2)) == content(2)[:1000]


def test_the_size_is_bounded_and_the_least_recently_used_go(tmp_path: Path) -> None:
    one = BlockCache(tmp_path, 50_000)
    for number in range(40):
        one.read(number, RANGES, 0, Source(number))
        one._open.clear()  # as another process would: every use opens the block
        first = tmp_path / one.name_of(0)[:2] / f"{one.name_of(0)}.block"
        os.utime(first, (time.time() + number, time.time() + number))
        assert used(tmp_path) <= 50_000
    assert len(blocks(tmp_path)) >= 10
    kept = Source(0)
    one.read(0, RANGES, 0, kept)
    assert kept.calls == 0
    gone = Source(1)
    one.read(1, RANGES, 0, gone)
    assert gone.calls == 1


def test_evicted_blocks_stay_readable_where_they_are_open(tmp_path: Path) -> None:
    one, source = BlockCache(tmp_path, 50_000), Source(0)
    one.read(0, RANGES, 0, source)
    one.read(0, RANGES, 0, source)
    for path in blocks(tmp_path):
        path.unlink()
    assert one.read(0, RANGES, 2, source) == content(0)[1500:]
    assert source.calls == 1


@pytest.mark.parametrize("position", [0, 10, 22, 26, 40, 3000, -1])
def test_damage_is_found_and_fetched_again(tmp_path: Path, position: int) -> None:
    BlockCache(tmp_path, 50_000).read(0, RANGES, 0, Source(0))
    (path,) = blocks(tmp_path)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    one, source = BlockCache(tmp_path, 50_000), Source(0)
    assert [one.read(0, RANGES, n, source) for n in range(3)] == [content(0)[a:b] for a, b in RANGES.tolist()]
    assert source.calls == 1


@pytest.mark.parametrize("length", [0, 5, 30, 2000])
def test_cut_blocks_are_fetched_again(tmp_path: Path, length: int) -> None:
    one = BlockCache(tmp_path, 50_000)
    one.read(0, RANGES, 0, Source(0))
    one.read(0, RANGES, 0, Source(0))
    (path,) = blocks(tmp_path)
    with open(path, "r+b") as file:  # also under the feet of who has it open
        file.truncate(length)
    for reader in (one, BlockCache(tmp_path, 50_000)):
        assert reader.read(0, RANGES, 2, Source(0)) == content(0)[1500:]
    assert path.stat().st_size > 4000


def test_rubbish_in_the_size_file_is_counted_again(tmp_path: Path) -> None:
    one = BlockCache(tmp_path, 50_000)
    one.read(0, RANGES, 0, Source(0))
    (tmp_path / "size").write_bytes(b"rub")
    one.read(1, RANGES, 0, Source(1))
    assert int.from_bytes((tmp_path / "size").read_bytes(), "little") == used(tmp_path)
    assert len(blocks(tmp_path)) == 2


def test_orphaned_temporary_files_go(tmp_path: Path) -> None:
    one = BlockCache(tmp_path, 20_000)
    one.read(0, RANGES, 0, Source(0))
    old, young = blocks(tmp_path)[0].with_name("old.tmp"), blocks(tmp_path)[0].with_name("young.tmp")
    old.write_bytes(bytes(3000))
    young.write_bytes(bytes(3000))
    os.utime(old, (0, 0))
    for number in range(1, 8):
        one.read(number, RANGES, 0, Source(number))
        assert used(tmp_path) <= 20_000 or old.exists()
    assert not old.exists()
    assert young.exists()


def test_a_block_that_does_not_fit_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"data\.cache_bytes = 3,000 is less than one block"):
        BlockCache(tmp_path, 3000).read(0, RANGES, 0, Source(0))


def test_a_folder_that_cannot_be_used_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match=r"data\.cache_dir"):
        BlockCache(tmp_path / "file", 50_000).read(0, RANGES, 0, Source(0))


def test_the_default_folder_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = BlockCache(None, 50_000)
    one.read(0, RANGES, 0, Source(0))
    assert one.folder.stat().st_mode & 0o777 == 0o700
    one.folder.chmod(0o777)
    with pytest.raises(ShardError, match="belongs to somebody else"):
        BlockCache(None, 50_000).read(0, RANGES, 0, Source(0))
    assert pickle.loads(pickle.dumps(one)).folder == one.folder


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise ShardError("storage")

    one = BlockCache(tmp_path, 50_000)
    with pytest.raises(ShardError, match="storage"):
        one.read(0, RANGES, 0, fail)
    assert list(tmp_path.glob("??/*")) == []
    assert one.read(0, RANGES, 0, Source(0)) == content(0)[:1000]


def test_threads_that_want_the_same_block_wait_for_one_fetch(tmp_path: Path) -> None:
    one, source = BlockCache(tmp_path, 50_000), Source(0, pause=0.05)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(one.read(0, RANGES, 1, source))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content(0)[1000:1500]] * 6
    assert source.calls == 1


def _hammer(folder: Path, seed: int, results: multiprocessing.Queue[object]) -> None:
    one, rng = BlockCache(folder, 50_000), np.random.default_rng(seed)
    largest, wrong = 0, 0
    for _ in range(150):
        block, number = int(rng.integers(30)), int(rng.integers(3))
        start, end = RANGES[number].tolist()
        wrong += one.read(block, RANGES, number, Source(block)) != content(block)[start:end]
        largest = max(largest, used_safely(folder))
    results.put((wrong, largest))


def used_safely(folder: Path) -> int:
    total = 0
    for path in folder.glob("??/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            pass
    return total


def test_processes_that_share_a_small_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_hammer, args=(tmp_path, seed, results)) for seed in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [wrong for wrong, _ in found] == [0] * 4
    # Files come and go while they are added up, so one process may see a few more than there are at a time.
    assert max(largest for _, largest in found) <= 50_000 + 4 * 4100
    assert used(tmp_path) <= 50_000


def test_killed_processes_leave_a_sound_cache(tmp_path: Path) -> None:
    """SIGKILL anywhere, also within fetches, under locks and in the middle of files."""
    context = multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    for _ in range(12):
        queue = context.Queue()
        processes = [context.Process(target=_hammer, args=(tmp_path, int(rng.integers(99)), queue)) for _ in range(2)]
        for process in processes:
            process.start()
        time.sleep(float(rng.uniform(0.01, 0.06)))
        for process in processes:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    one = BlockCache(tmp_path, 50_000)
    for block in range(30):
        assert one.read(block, RANGES, 2, Source(block)) == content(block)[1500:]
    assert used(tmp_path) <= 50_000


def test_a_killed_owner_of_a_lock_blocks_nobody(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=BlockCache(tmp_path, 50_000).read, args=(0, RANGES, 0, Source(0, pause=60)))
    process.start()
    deadline = time.monotonic() + 10
    while not list(tmp_path.glob("locks/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    start = time.monotonic()
    assert BlockCache(tmp_path, 50_000).read(0, RANGES, 0, Source(0)) == content(0)[:1000]
    assert time.monotonic() - start < 5


def test_a_forked_process_does_not_keep_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loader processes start by fork, perhaps while a thread of their parent holds a lock."""
    context = multiprocessing.get_context("fork")
    one, children = BlockCache(tmp_path, 50_000), []

    def fetch() -> bytes:
        child = context.Process(target=time.sleep, args=(20,))
        child.start()
        children.append(child)
        return content(0)

    one.read(0, RANGES, 0, fetch)
    blocks(tmp_path)[0].unlink()
    start = time.monotonic()
    BlockCache(tmp_path, 50_000).read(0, RANGES, 0, Source(0))
    assert time.monotonic() - start < 5
    children[0].kill()
    children[0].join()


def test_many_blocks_do_not_keep_many_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_OPEN_BLOCKS", 3)
    one, before = BlockCache(tmp_path, 500_000), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for number in range(9):
            one.read(number, RANGES, 0, Source(number))
    assert len(os.listdir("/proc/self/fd")) == before + 3
    one.close()
    assert len(os.listdir("/proc/self/fd")) == before
