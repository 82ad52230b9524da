"""``trainer.index`` and the manifest."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.helpers import text_shards, write_shard
from trainer import index
from trainer.data.errors import ShardError
from trainer.data.shards import manifest as manifests
from trainer.data.shards import shard_scan
from trainer.data.shards.manifest import Manifest, load_manifest
from trainer.runtime import files


def run(folder: Path, *arguments: str) -> int:
    return index.main(["--output", str(folder / "manifest.npz"), *arguments])


def test_manifest_of_shards_in_parallel_and_in_order(tmp_path: Path) -> None:
    counts = [3, 1, 4, 1, 5, 9, 2, 6]
    text_shards(tmp_path, counts)
    one = load_manifest(tmp_path / "manifest.npz")
    for sidecar in tmp_path.glob("*.index"):
        sidecar.unlink()
    assert run(tmp_path, "--processes", "2", str(tmp_path / "{0000..0007}.tar")) == 0
    two = load_manifest(tmp_path / "manifest.npz")
    assert two.samples.tolist() == counts
    assert [two.url(i) for i in range(len(two))] == [f"{i:04d}.tar" for i in range(8)]
    assert two.shard_bytes.tolist() == [(tmp_path / two.url(i)).stat().st_size for i in range(8)]
    assert two.sha256 == one.sha256


def test_manifest_and_shards_move_together(tmp_path: Path) -> None:
    text_shards(tmp_path / "here", [2, 2])
    before = load_manifest(tmp_path / "here" / "manifest.npz").sha256
    (tmp_path / "here").rename(tmp_path / "there")
    moved = load_manifest(tmp_path / "there" / "manifest.npz")
    assert moved.sha256 == before
    assert moved.shard_path(1).exists()


def test_shards_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_shards(tmp_path / "data", [2])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    assert run(Path("lists"), "data/0000.tar") == 0
    assert load_manifest(tmp_path / "lists/manifest.npz").url(0) == "../data/0000.tar"
    assert run(tmp_path / "lists", f"file://{tmp_path}/data/0000.tar") == 0
    manifest = load_manifest(tmp_path / "lists/manifest.npz")
    assert manifest.url(0) == str(tmp_path / "data/0000.tar")
    assert manifest.shard_path(0).exists()


def test_rejected_samples_stop_the_manifest_unless_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "a.tar", [("one", {"jpg": b"j", "txt": b"t"}), ("two", {"txt": b"t"})])
    (tmp_path / "b.tar").write_bytes(b"")
    arguments = ["--require", "jpg", "txt", "--processes", "1", "--", str(tmp_path / "*.tar"), str(tmp_path / "c.tar")]
    assert run(tmp_path, *arguments) == 1
    assert not (tmp_path / "manifest.npz").exists()
    report = json.loads((tmp_path / "manifest.npz.rejected.json").read_text())
    assert [(Path(one["shard"]).name, one["reason"], one["key"]) for one in report] == [
        ("a.tar", "missing_member", "two"),
        ("b.tar", "empty", None),
        ("c.tar", "unreadable", None),
    ]
    assert report[0]["offset"] == 2048
    assert "--allow-rejected" in capsys.readouterr().err
    assert run(tmp_path, "--allow-rejected", *arguments) == 0
    assert load_manifest(tmp_path / "manifest.npz").samples.tolist() == [1]


def test_unchanged_sidecars_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_shards(tmp_path, [2, 3])
    scanned: list[str] = []
    scan = shard_scan.scan_shard

    def counted(path: Path, required: tuple[str, ...]) -> object:
        scanned.append(path.name)
        return scan(path, required)

    monkeypatch.setattr(shard_scan, "scan_shard", counted)
    arguments = ["--processes", "1", str(tmp_path / "*.tar")]
    assert run(tmp_path, *arguments) == 0
    assert scanned == []
    write_shard(tmp_path / "0001.tar", [("k", {"txt": b"another"})])
    assert run(tmp_path, *arguments) == 0
    assert scanned == ["0001.tar"]
    assert load_manifest(tmp_path / "manifest.npz").samples.tolist() == [2, 1]
    assert run(tmp_path, *arguments, "--require", "txt") == 0  # another question to the same shards
    assert scanned == ["0001.tar", "0000.tar", "0001.tar"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:touch {folder}/ran", "never opened"),
        ("ftp://host/a.tar", "not from ftp:"),
        ("s3://bucket/a.tar::s3://other/b.tar", "chained"),
        ("{folder}/nothing-*.tar", "nothing matches"),
    ],
)
def test_urls_that_are_refused(tmp_path: Path, url: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, url.replace("{folder}", str(tmp_path))) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_shard_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_shards(tmp_path, [2])
    assert run(tmp_path, str(tmp_path / "0000.tar"), str(tmp_path / "*.tar")) == 2
    assert "more than once" in capsys.readouterr().err


def test_ranks_of_mpi_make_the_same_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks one after the other, with a communicator that passes on what rank 1 gathers."""
    text_shards(tmp_path, [1, 2, 3, 4, 5])
    expected = load_manifest(tmp_path / "manifest.npz").sha256

    class Communicator:
        size = 2

        def __init__(self, rank: int, other: list[object] | None = None) -> None:
            self.rank, self.other, self.sent = rank, other, []

        def bcast(self, value: object) -> object:
            return sorted(map(str, tmp_path.glob("*.tar"))) if self.rank else value

        def gather(self, value: list[object]) -> list[object] | None:
            self.sent = value
            return [value, self.other] if self.rank == 0 else None

    one = Communicator(1)
    monkeypatch.setattr(
        one, "bcast", lambda value: sorted(map(str, tmp_path.glob("*.tar"))) if value is None else value
    )
    monkeypatch.setattr(index, "_mpi_communicator", lambda: one)
    assert run(tmp_path, str(tmp_path / "*.tar")) == 0
    assert len(one.sent) == 2
    monkeypatch.setattr(index, "_mpi_communicator", lambda: Communicator(0, one.sent))
    (tmp_path / "manifest.npz").unlink()
    assert run(tmp_path, str(tmp_path / "*.tar")) == 0
    assert load_manifest(tmp_path / "manifest.npz").sha256 == expected


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun")
def test_mpirun_makes_the_same_manifest(tmp_path: Path) -> None:
    # Asked in another process: importing it starts an MPI job here, whose environment mpirun would inherit and fail by.
    if subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, check=False).returncode:
        pytest.skip("no mpi4py, or it finds no MPI library")
    text_shards(tmp_path, [1, 2, 3, 4, 5])
    expected = load_manifest(tmp_path / "manifest.npz").sha256
    (tmp_path / "manifest.npz").unlink()
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "trainer.index"]
    arguments = ["--output", str(tmp_path / "manifest.npz"), str(tmp_path / "*.tar")]
    subprocess.run([*command, *arguments], check=True, timeout=120)
    assert load_manifest(tmp_path / "manifest.npz").sha256 == expected


def test_a_launcher_without_mpi4py_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(SystemExit, match=r"OMPI_COMM_WORLD_SIZE=2.*\n.*flamingo-trainer\[mpi\]"):
        run(tmp_path, "a.tar")


def manifest(path: Path, shards: int) -> Manifest:
    return Manifest.create(path, [f"{i:07d}.tar" for i in range(shards)], [7] * shards, [1000] * shards, range(shards))


@pytest.fixture(params=["read", "mapped"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests are read whole, or mapped as large ones are."""
    monkeypatch.setattr(manifests, "_MAPPED_BYTES", 0 if request.param == "mapped" else 1 << 40)
    monkeypatch.setattr(manifests, "_CHUNK", 7)


@pytest.mark.usefixtures("_both_ways")
def test_manifest_round_trip_at_some_size(tmp_path: Path) -> None:
    made = manifest(tmp_path / "m.npz", 20_000)
    made.save()
    loaded = load_manifest(tmp_path / "m.npz")
    assert loaded.sha256 == made.sha256
    assert (loaded.url(0), loaded.url(12_345), len(loaded)) == ("0000000.tar", "0012345.tar", 20_000)
    assert loaded.total_samples == 140_000 and not loaded.has_remote
    assert isinstance(loaded.samples, np.memmap) == (manifests._MAPPED_BYTES == 0)
    np.testing.assert_array_equal(loaded.checksums, made.checksums)
    Manifest.create(tmp_path / "m.npz", ["a", "s3://b/c"], [1, 2], [3, 4], [5, 6]).save()
    assert load_manifest(tmp_path / "m.npz").has_remote and len(loaded) == 20_000, "the old one stays as it was"
    assert loaded.url(19_999) == "0019999.tar"
    assert (tmp_path / "m.npz").stat().st_size < 50 * 20_000


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


@pytest.mark.usefixtures("_both_ways")
def test_damaged_manifests_are_told(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    with pytest.raises(ShardError, match="no such manifest"):
        load_manifest(path)
    manifest(path, 100).save()
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for broken in (b"", b"rubbish", data[: len(data) // 2], bytes(flipped)):
        path.write_bytes(broken)
        with pytest.raises(ShardError, match=str(path)):
            load_manifest(path)
    np.savez_compressed(path, **np.load(io.BytesIO(data)))
    if manifests._MAPPED_BYTES == 0:
        with pytest.raises(ShardError, match="compressed"):
            load_manifest(path)
    np.savez(path, format_version=99)
    with pytest.raises(ValueError, match="version 99"):
        load_manifest(path)
    np.savez(path, format_version=1, url_bytes=np.array([{}], object))
    with pytest.raises(ShardError, match="not a manifest"):
        load_manifest(path)


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.npz"
    manifest(path, 3).save()
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        manifest(path, 4).save()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.npz"]
