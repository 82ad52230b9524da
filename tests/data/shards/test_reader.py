"""Test reading samples, and storage that differs from the manifest."""

from __future__ import annotations

import gc
import os
import pickle
import re
from pathlib import Path

import pytest
import webdataset

from tests.data.helpers import build_manifest, text_shards, write_shard
from trainer.data.errors import ShardError
from trainer.data.shards.manifest import Manifest, load_manifest
from trainer.data.shards.reader import ShardReader


class Bomb:
    """Run code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def reader(folder: Path) -> ShardReader:
    return ShardReader(load_manifest(folder / "manifest.npz"))


def test_samples_are_webdatasets_byte_for_byte(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.tar",
        ((f"d.x/{i}", {"jpg": os.urandom(i * 500), "left.PNG": b"p", "txt": b"t"}) for i in range(5)),
    )
    build_manifest(tmp_path)
    mine = [reader(tmp_path).read(0, i) for i in range(5)]
    for (key, members), theirs in zip(
        mine, webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False), strict=True
    ):
        assert key == theirs["__key__"]
        assert members == {name: value for name, value in theirs.items() if not name.startswith("__")}


def test_few_shards_stay_open(tmp_path: Path) -> None:
    text_shards(tmp_path, [2] * 12)
    few = ShardReader(load_manifest(tmp_path / "manifest.npz"), open_shards=3)
    gc.collect()  # readers of other tests close their files
    before = len(os.listdir("/proc/self/fd"))
    for index in (0, 1):
        for shard in range(12):
            assert few.read(shard, index)[1]["txt"] == f"{shard}/{index}".encode()
    assert len(os.listdir("/proc/self/fd")) == before + 3
    few.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pickled_reader_reads_the_same(tmp_path: Path) -> None:
    text_shards(tmp_path, [2])
    original = reader(tmp_path)
    original.read(0, 0)
    assert pickle.loads(pickle.dumps(original)).read(0, 1) == original.read(0, 1)


def test_storage_that_changed_is_an_error(tmp_path: Path) -> None:
    text_shards(tmp_path, [3, 3])
    shard, sidecar = tmp_path / "0001.tar", tmp_path / "0001.tar.index"
    data, index = shard.read_bytes(), sidecar.read_bytes()

    def error() -> str:
        with pytest.raises(ShardError) as caught:
            reader(tmp_path).read(1, 2)
        return str(caught.value)

    shard.write_bytes(data[:-512])
    assert f"{len(data) - 512} bytes" in error()
    shard.write_bytes(b"")
    assert "0 bytes" in error()
    damaged = bytearray(data)
    damaged[2 * 1024] ^= 1
    shard.write_bytes(damaged)
    assert "bad_checksum" in error()
    shard.unlink()
    assert "0001.tar" in error()
    assert str(tmp_path / "manifest.npz") in error()
    shard.write_bytes(data)
    sidecar.write_bytes((tmp_path / "0000.tar.index").read_bytes()[:-1])
    assert str(sidecar) in error()
    sidecar.unlink()
    assert "trainer.index again" in error()
    sidecar.write_bytes(index)
    assert reader(tmp_path).read(1, 2)[0] == "k2"
    with pytest.raises(ShardError, match="no sample 3"):
        reader(tmp_path).read(1, 3)


def test_an_index_of_another_scan_is_an_error(tmp_path: Path) -> None:
    manifest = text_shards(tmp_path, [3])
    old = manifest.read_bytes()
    write_shard(tmp_path / "0000.tar", ((f"other{i}", {"txt": b"0/%d" % i}) for i in range(3)))
    build_manifest(tmp_path)
    manifest.write_bytes(old)
    with pytest.raises(ShardError, match="trainer.index again"):
        reader(tmp_path).read(0, 0)


def test_pickles_are_bytes_and_keys_are_not_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    write_shard(tmp_path / "a.tar", [("../../escape", {"pkl": bomb, "pth": bomb, "pyd": bomb, "txt": b"t"})])
    build_manifest(tmp_path)
    key, members = reader(tmp_path).read(0, 0)
    assert (key, members["pkl"]) == ("../../escape", bomb)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index", "manifest.npz"]


def test_pipe_urls_never_run(tmp_path: Path) -> None:
    url = f"pipe:touch {tmp_path}/ran"
    manifest = Manifest.create(tmp_path / "m.npz", [url], [1], [1], [1])
    with pytest.raises(ValueError, match=re.escape(repr(url))):
        ShardReader(manifest).read(0, 0)
    assert os.listdir(tmp_path) == []
