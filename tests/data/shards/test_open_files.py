"""Test that files of any size are read whole, and that open files stay within one bound."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.helpers import text_shards
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.open_files import FilePool, PooledFile, pread_whole
from trainer.data.shards.reader import ShardReader


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel returns at most 2 GiB at a time; here at most 10 bytes."""
    data = bytes(range(200))
    (tmp_path / "a").write_bytes(data)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: real(descriptor, min(length, 10), offset))
    with open(tmp_path / "a", "rb") as file:
        assert pread_whole(file.fileno(), 150, 7) == data[7:157]
        assert pread_whole(file.fileno(), 50, 190) == data[190:]
        assert pread_whole(file.fileno(), 5, 500) == b""


@pytest.mark.slow
def test_a_read_of_more_than_2_gib(tmp_path: Path) -> None:
    size = (1 << 31) + 5
    with open(tmp_path / "a", "wb") as file:
        file.seek(size - 3)
        file.write(b"end")
    with open(tmp_path / "a", "rb") as file:
        data = pread_whole(file.fileno(), size, 0)
    assert (len(data), data[-3:]) == (size, b"end")


def files(folder: Path, count: int) -> list[Path]:
    paths = [folder / str(number) for number in range(count)]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def test_all_files_share_one_bound(tmp_path: Path) -> None:
    pool = FilePool(3)
    opened = [PooledFile(path, pool=pool) for path in files(tmp_path, 10)]
    gc.collect()  # readers of other tests close their files
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for number, file in enumerate(opened):
            assert file.read(9, 0) == str(number).encode()
            assert len(pool) <= 3
    assert len(os.listdir("/proc/self/fd")) == before + 3
    opened.clear()
    del file
    assert len(pool) == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_bound_shrinks_where_others_need_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = FilePool(100)
    opened = [PooledFile(path, pool=pool) for path in files(tmp_path, 30)]
    real = os.open

    def limited(*arguments: object, **more: object) -> int:
        if len(pool) >= 12:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", limited)
    assert [file.read(9, 0) for file in opened] == [str(number).encode() for number in range(30)]
    assert len(pool) < 12


def test_the_bound_follows_ulimit(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, expected in ((1024, 341), (6, 4), (1 << 20, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert FilePool().limit == expected


def test_many_sources_fit_under_a_small_ulimit(tmp_path: Path) -> None:
    """Ten sources with 20 shards each are 200 files; the process may open 64."""
    for source in range(10):
        text_shards(tmp_path / str(source), [1] * 20)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from pathlib import Path\n"
        "from trainer.data.shards.manifest import load_manifest\n"
        "from trainer.data.shards.reader import ShardReader\n"
        "readers = [ShardReader(load_manifest(Path(sys.argv[1], str(n), 'manifest.npz'))) for n in range(10)]\n"
        "for _ in range(2):\n"
        "    for reader in readers:\n"
        "        for shard in range(20):\n"
        "            assert reader.read(shard, 0)[1]['txt'] == b'%d/0' % shard\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)


def test_a_forked_process_reads_on(tmp_path: Path) -> None:
    reader = ShardReader(load_manifest(text_shards(tmp_path, [2, 2])))
    reader.read(0, 0)
    child = os.fork()
    if child == 0:
        os._exit(0 if reader.read(0, 1)[1]["txt"] == b"0/1" and reader.read(1, 1)[1]["txt"] == b"1/1" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader.read(1, 0)[1]["txt"] == b"1/0"


def test_a_file_of_another_size_is_refused_when_it_is_opened_again(tmp_path: Path) -> None:
    def check(descriptor: int) -> None:
        if os.fstat(descriptor).st_size != 1:
            raise ValueError("another size")

    pool = FilePool(1)
    one, other = (PooledFile(path, check, pool) for path in files(tmp_path, 2))
    assert one.read(1, 0) == b"0"
    assert other.read(1, 0) == b"1"
    (tmp_path / "0").write_bytes(b"changed")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="another size"):
        one.read(1, 0)
    assert len(os.listdir("/proc/self/fd")) <= before
