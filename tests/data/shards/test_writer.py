"""Test that written shards read as they were written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import webdataset

from trainer.data.errors import ShardError
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.sidecar import load_sidecar
from trainer.data.shards.tar_scan import scan_shard
from trainer.data.shards.writer import IndexedShardWriter


def test_the_writer_indexes_what_webdataset_reads(tmp_path: Path) -> None:
    wanted = [(f"{n:05d}", {"jpg": os.urandom(n * 700), "txt": b"t%d" % n}) for n in range(25)]
    with IndexedShardWriter(tmp_path, max_samples=10, max_bytes=85_000) as writer:
        for key, members in wanted:
            writer.write(key, members)
    reader = ShardReader(load_manifest(tmp_path / "manifest.npz"))
    assert [reader.read(shard, index) for shard, count in enumerate((10, 9, 6)) for index in range(count)] == wanted
    manifest = reader.manifest
    assert manifest.samples.tolist() == [10, 9, 6]
    urls = [str(manifest.shard_path(shard)) for shard in range(3)]
    theirs = [(one["__key__"], one["jpg"], one["txt"]) for one in webdataset.WebDataset(urls, shardshuffle=False)]
    assert theirs == [(key, members["jpg"], members["txt"]) for key, members in wanted]
    for shard in range(3):
        made, found = load_sidecar(manifest.index_path(shard)), scan_shard(manifest.shard_path(shard))
        assert (made.checksum, made.version, made.tar_bytes) == (found.checksum, found.version, found.tar_bytes)


def test_the_same_samples_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with IndexedShardWriter(tmp_path / name) as writer:
            writer.write("k", {"txt": b"text"})
    assert (tmp_path / "a/000000.tar").read_bytes() == (tmp_path / "b/000000.tar").read_bytes()


def test_names_that_webdataset_would_split_otherwise_are_refused(tmp_path: Path) -> None:
    with IndexedShardWriter(tmp_path) as writer:
        for key in ("", "a.b", "/a", "a/", "__meta__"):
            with pytest.raises(ValueError, match="key"):
                writer.write(key, {"txt": b""})
        for extension in ("", "JPG", "a/b", "_x", ".txt"):
            with pytest.raises(ValueError, match="extension"):
                writer.write("k", {extension: b""})
        writer.write("k", {"txt": b""})
    with pytest.raises(ValueError, match=str(tmp_path / "manifest.npz")):
        IndexedShardWriter(tmp_path)


def test_duplicate_keys_are_errors_of_the_writer(tmp_path: Path) -> None:
    writer = IndexedShardWriter(tmp_path)
    for key in ("a", "b", "a"):
        writer.write(key, {"txt": b""})
    with pytest.raises(ShardError, match=r"000000\.tar does not read as written.*duplicate_key"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_an_interrupted_writer_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedShardWriter(tmp_path, max_samples=2) as writer:
        for number in range(5):
            writer.write(f"{number}", {"txt": b""})
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["000000.tar", "000000.tar.index", "000001.tar", "000001.tar.index"]


def test_output_names_never_reach_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with IndexedShardWriter(Path("pipe:touch ran;x")) as writer:
        writer.write("k", {"txt": b""})
    assert os.listdir(tmp_path) == ["pipe:touch ran;x"]
