"""Test that manifests survive a round trip, and that damage to them is found."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.helpers import text_shards
from trainer.data.errors import ShardError
from trainer.data.shards.manifest import Manifest, load_manifest
from trainer.data.shards.reader import ShardReader


def manifest(path: Path, shards: int) -> Manifest:
    return Manifest.create(path, [f"{i:07d}.tar" for i in range(shards)], [7] * shards, [1000] * shards, range(shards))


def load(path: Path, mapped: bool) -> Manifest:
    """Load a manifest as a small or as a large file, in chunks so small that their ends matter."""
    return load_manifest(path, mapped_from=0 if mapped else 1 << 40, chunk=7)


@pytest.mark.parametrize("mapped", [False, True])
def test_round_trip(tmp_path: Path, mapped: bool) -> None:
    made = manifest(tmp_path / "m.npz", 20_000)
    made.save()
    loaded = load(tmp_path / "m.npz", mapped)
    assert loaded.sha256 == made.sha256
    assert (loaded.url(0), loaded.url(12_345), len(loaded)) == ("0000000.tar", "0012345.tar", 20_000)
    assert loaded.total_samples == 140_000 and not loaded.has_remote
    assert isinstance(loaded.samples, np.memmap) == mapped
    np.testing.assert_array_equal(loaded.checksums, made.checksums)
    Manifest.create(tmp_path / "m.npz", ["a", "s3://b/c"], [1, 2], [3, 4], [5, 6]).save()
    assert load(tmp_path / "m.npz", mapped).has_remote
    assert len(loaded) == 20_000, "the loaded manifest does not change with the file"
    assert loaded.url(19_999) == "0019999.tar"
    assert (tmp_path / "m.npz").stat().st_size < 50 * 20_000


def test_manifests_of_version_1_are_read(tmp_path: Path) -> None:
    path = text_shards(tmp_path, [3, 4])
    made = load_manifest(path)
    columns = {**made.columns(), "format_version": np.int64(1)}
    np.savez(path, **columns)
    old = load_manifest(path)
    assert old.sha256 == made.sha256
    assert ShardReader(old).read(1, 3)[1]["txt"] == b"1/3"


def test_sha256_covers_every_column(tmp_path: Path) -> None:
    sums = set()
    for urls, samples, size, checksum in (
        (["a", "b"], [1, 2], [5, 6], [7, 8]),
        (["ab", "c"], [1, 2], [5, 6], [7, 8]),
        (["a", "b"], [2, 1], [5, 6], [7, 8]),
        (["a", "b"], [1, 2], [6, 5], [7, 8]),
        (["a", "b"], [1, 2], [5, 6], [8, 7]),
    ):
        sums.add(Manifest.create(tmp_path / "m.npz", urls, samples, size, checksum).sha256)
    assert len(sums) == 5
    with pytest.raises(ValueError, match="'b' is listed twice"):
        Manifest.create(tmp_path / "m.npz", ["a", "b", "b"], [1] * 3, [1] * 3, [1] * 3)


@pytest.mark.parametrize("mapped", [False, True])
def test_damaged_manifests_are_errors(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "m.npz"
    with pytest.raises(ShardError, match=f"--output {path}"):
        load(path, mapped)
    manifest(path, 100).save()
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for broken in (b"", b"rubbish", data[: len(data) // 2], bytes(flipped)):
        path.write_bytes(broken)
        with pytest.raises(ShardError, match=str(path)):
            load(path, mapped)
    np.savez_compressed(path, **np.load(io.BytesIO(data)))
    if mapped:
        with pytest.raises(ShardError, match="compressed"):
            load(path, mapped)
    np.savez(path, format_version=99)
    with pytest.raises(ValueError, match="version 99"):
        load(path, mapped)
    np.savez(path, format_version=1, url_bytes=np.array([{}], object))
    with pytest.raises(ShardError, match=str(path)):
        load(path, mapped)


def test_a_failed_write_keeps_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.npz"
    manifest(path, 3).save()
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        manifest(path, 4).save()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.npz"]


def test_content_sha256_does_not_depend_on_the_place_of_the_shards(tmp_path: Path) -> None:
    def content(urls: list[str], samples: list[int], size: list[int], checksums: list[int]) -> str:
        return Manifest.create(tmp_path / "m.npz", urls, samples, size, checksums).content_sha256

    one = content(["a", "b"], [1, 2], [5, 6], [7, 8])
    assert content(["s3://x/a", "/disk2/b"], [1, 2], [5, 6], [7, 8]) == one
    others = {
        content(["a", "b"], *columns)
        for columns in (([2, 1], [5, 6], [7, 8]), ([1, 2], [6, 5], [7, 8]), ([1, 2], [5, 6], [8, 7]))
    }
    assert len(others | {one}) == 4


@pytest.mark.parametrize("mapped", [False, True])
def test_required_members_survive_a_round_trip(tmp_path: Path, mapped: bool) -> None:
    Manifest.create(tmp_path / "m.npz", ["a.tar"], [1], [2], [3], required=["txt", "jpg,png"]).save()
    loaded = load(tmp_path / "m.npz", mapped)
    assert loaded.required == ("jpg,png", "txt")
    assert loaded.index_path(0) != Manifest.create(tmp_path / "m.npz", ["a.tar"], [1], [2], [3]).index_path(0)


def test_manifests_of_version_2_are_read(tmp_path: Path) -> None:
    path = text_shards(tmp_path, [3, 4])
    made = load_manifest(path)
    np.savez(path, **{**made.columns(), "index_beside": np.ones(2, np.uint8), "format_version": np.int64(2)})
    old = load_manifest(path)
    assert (old.sha256, old.content_sha256) == (made.sha256, made.content_sha256)
    assert ShardReader(old).read(1, 3)[1]["txt"] == b"1/3"


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    path = text_shards(tmp_path, [3])
    np.savez(path, **{**load_manifest(path).columns(), "format_version": np.int64(9)})
    with pytest.raises(ValueError, match=r"manifest version 9"):
        load_manifest(path)


def test_a_linked_manifest_finds_its_shards(tmp_path: Path) -> None:
    text_shards(tmp_path / "data", [2])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/link.npz").symlink_to(tmp_path / "data/manifest.npz")
    assert ShardReader(load_manifest(tmp_path / "run/link.npz")).read(0, 1)[1]["txt"] == b"0/1"
