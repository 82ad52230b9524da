"""Test indexing, reading and training on remote shards."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.data.helpers import image_bytes, pair_builder, step_loader, text_builder, text_shards, write_shard
from tests.data.http_server import Server, cut, hang, serve, status, wrong_size
from trainer import index, inspect
from trainer.config.data_config import DataConfig, ImageTextSource, TextSource
from trainer.data.errors import ShardError
from trainer.data.shards import manifest_builder
from trainer.data.shards.manifest import Manifest, load_manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.remote_store import RemoteError, RemoteStore
from trainer.data.shards.retries import RetryPolicy
from trainer.data.shards.sidecar import load_sidecar
from trainer.data.shards.storage_settings import StorageSettings
from trainer.data.stream.order import SourceOrder
from trainer.data.stream.prefetch import BlockPrefetcher

COUNTS = [20, 7, 31]
RETRY = RetryPolicy(retries=4, timeout_seconds=0.75, deadline_seconds=60.0, first_wait_seconds=0.001)
LONG = 60.0  # seconds after which a test fails that waits for an event


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    text_shards(tmp_path / "web", COUNTS)
    with serve(tmp_path / "web") as one:
        yield one


def settings(folder: Path, **changes: Any) -> StorageSettings:
    return StorageSettings(**{"read_block": 8, "cache_dir": folder / "cache", "retry": RETRY, **changes})


def indexed(server: Server, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    output = folder / "manifest.npz"
    arguments = ["--output", str(output), "--processes", "1", server.url("{0000..0002}.tar")]
    assert index.main(arguments, store=RemoteStore(RETRY)) == 0
    return output


def test_remote_and_local_shards_give_the_same_samples(server: Server, tmp_path: Path) -> None:
    manifest = load_manifest(indexed(server, tmp_path / "run"))
    local = load_manifest(tmp_path / "web/manifest.npz")
    assert manifest.samples.tolist() == COUNTS
    assert manifest.checksums.tolist() == local.checksums.tolist()
    assert manifest.url(2) == server.url("0002.tar")
    assert not (tmp_path / "run" / "0000.tar.index").exists()
    one, other = ShardReader(manifest, storage=settings(tmp_path)), ShardReader(local)
    for shard, count in enumerate(COUNTS):
        for number in reversed(range(count)):
            assert one.read(shard, number) == other.read(shard, number)


def test_a_read_block_takes_one_range_read(server: Server, tmp_path: Path) -> None:
    manifest = load_manifest(indexed(server, tmp_path / "run"))
    server.ranges.clear()
    for _ in range(2):
        reader = ShardReader(manifest, storage=settings(tmp_path))
        for number in (19, 3, 8, 0, 15, 7, 16):
            reader.read(0, number)
    offsets = load_sidecar(manifest.index_path(0)).offsets
    asked = [(int(offsets[first, 0]), int(offsets[last, 1]) - 1) for first, last in ((16, 19), (0, 7), (8, 15))]
    assert server.ranges == [("0000.tar", f"bytes={first}-{last}") for first, last in asked]


def test_bad_answers_change_nothing(server: Server, tmp_path: Path) -> None:
    server.faults = [status(500), cut(100), hang()]
    manifest = load_manifest(indexed(server, tmp_path / "run"))
    reader = ShardReader(manifest, storage=settings(tmp_path))
    server.faults = [cut(1000), status(503), None, hang()]
    assert [reader.read(2, n)[1]["txt"] for n in range(31)] == [f"2/{n}".encode() for n in range(31)]


def test_missing_or_changed_storage_is_an_error(server: Server, tmp_path: Path) -> None:
    manifest = load_manifest(indexed(server, tmp_path / "run"))
    reader = ShardReader(manifest, storage=settings(tmp_path, retry=replace(RETRY, retries=1)))
    for fault, reason in ((status(500), "server"), (cut(10), "cut"), (wrong_size, "changed"), (status(404), "not_fo")):
        server.faults = [fault, fault]
        with pytest.raises(RemoteError, match=reason):
            reader.read(1, 2)
        server.faults = []
    assert reader.read(1, 2)[1]["txt"] == b"1/2"
    damaged = bytearray((tmp_path / "web/0002.tar").read_bytes())
    damaged[2 * 1024] ^= 1  # the header of the third sample
    (tmp_path / "web/0002.tar").write_bytes(damaged)
    with pytest.raises(ShardError, match="bad_checksum"):
        reader.read(2, 2)
    with pytest.raises(ShardError, match="no sample 31"):
        reader.read(2, 31)


def test_another_version_of_a_shard_is_not_served_from_the_cache(server: Server, tmp_path: Path) -> None:
    """Only a member's content changes; every header, offset and size stays the same."""
    path = indexed(server, tmp_path / "run")
    assert ShardReader(load_manifest(path), storage=settings(tmp_path)).read(1, 0)[1]["txt"] == b"1/0"
    data = (tmp_path / "web/0001.tar").read_bytes()
    (tmp_path / "web/0001.tar").write_bytes(data.replace(b"1/0", b"9/9"))
    indexed(server, tmp_path / "run")
    assert ShardReader(load_manifest(path), storage=settings(tmp_path)).read(1, 0)[1]["txt"] == b"9/9"


def test_an_interrupted_index_continues(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[int] = []
    scan = manifest_builder.scan_tar

    def interrupted(*arguments: Any) -> object:
        scanned.append(arguments[1])
        if len(scanned) == 3:
            raise KeyboardInterrupt
        return scan(*arguments)

    monkeypatch.setattr(manifest_builder, "scan_tar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        indexed(server, tmp_path / "run")
    assert not (tmp_path / "run/manifest.npz").exists()
    indexed(server, tmp_path / "run")
    assert len(scanned) == 4
    write_shard(tmp_path / "web/0001.tar", ((f"k{n}", {"txt": b"new %d" % n}) for n in range(5)))
    assert load_manifest(indexed(server, tmp_path / "run")).samples.tolist() == [20, 5, 31]
    assert len(scanned) == 5


def test_unreadable_and_damaged_shards_are_reported(server: Server, tmp_path: Path) -> None:
    (tmp_path / "web/0001.tar").write_bytes((tmp_path / "web/0001.tar").read_bytes()[:3000])
    (tmp_path / "web/0003.tar").write_bytes(b"")
    (tmp_path / "run").mkdir()
    output = tmp_path / "run/manifest.npz"
    arguments = ["--output", str(output), "--processes", "1", server.url("{0000..0004}.tar")]
    assert index.main(arguments) == 1
    report = json.loads((tmp_path / "run/manifest.npz.rejected.json").read_text())
    assert [(one["shard"][-8:], one["reason"]) for one in report] == [
        ("0001.tar", "truncated"),
        ("0003.tar", "empty"),
        ("0004.tar", "unreadable"),
    ]
    assert index.main([*arguments, "--allow-rejected"]) == 0
    assert load_manifest(output).samples.tolist() == [20, 3, 31]  # the third sample lost its padding alone


def test_the_scan_jumps_over_large_members(server: Server, tmp_path: Path) -> None:
    big = {"mp4": bytes(100_000), "txt": b"film"}
    write_shard(tmp_path / "web/video.tar", ((f"k{n}", big) for n in range(6)))
    url, store = server.url("video.tar"), RemoteStore(RETRY)
    entry = manifest_builder.index_shard(url, tmp_path / "m.npz", (), store, read_ahead=4096)
    assert entry.samples == 6
    asked = [text.removeprefix("bytes=").split("-") for name, text in server.ranges if name == "video.tar"]
    assert sum(int(last) - int(first) + 1 for first, last in asked) < 100_000


def test_fsspec_shards(tmp_path: Path) -> None:
    text_shards(tmp_path / "here", COUNTS)
    files = fsspec.filesystem("memory")
    for path in (tmp_path / "here").glob("*.tar"):
        files.pipe_file(f"/shards/{path.name}", path.read_bytes())
    output = tmp_path / "manifest.npz"
    assert index.main(["--output", str(output), "--processes", "1", "memory://shards/*.tar"]) == 0
    manifest = load_manifest(output)
    assert manifest.samples.tolist() == COUNTS
    reader = ShardReader(manifest, storage=settings(tmp_path))
    assert reader.read(2, 30)[1]["txt"] == b"2/30"


def test_local_shards_in_a_read_only_folder(tmp_path: Path) -> None:
    text_shards(tmp_path / "shards", [3, 4])
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.with_name(shard.name + ".index").unlink()
        shard.with_name(shard.name + ".index").mkdir()  # even root cannot write a file over a folder
    output = tmp_path / "lists/manifest.npz"
    arguments = ["--output", str(output), "--processes", "1", str(tmp_path / "shards/*.tar")]
    output.parent.mkdir()
    assert index.main(arguments) == 0
    manifest = load_manifest(output)
    assert manifest.index_beside.tolist() == [False, False]
    assert ShardReader(manifest).read(1, 3)[1]["txt"] == b"1/3"
    shutil.copytree(tmp_path / "lists", tmp_path / "copy")
    assert load_manifest(tmp_path / "copy/manifest.npz").sha256 == manifest.sha256
    assert ShardReader(load_manifest(tmp_path / "copy/manifest.npz")).read(0, 1)[1]["txt"] == b"0/1"


def texts(folder: Path, manifest: Path, **changes: Any) -> list[list[tuple[str, int, list[int]]]]:
    values = {"num_lanes": 4, "read_block": 8, "shuffle_window": 10, "cache_dir": folder / "cache"}
    data = DataConfig((TextSource("text", manifest, 8, max_tokens=30),), **{**values, **changes})
    loader = step_loader(data, {"text": text_builder(max_tokens=30)}, stop=12)
    return [
        [(s.shard[-8:], s.index, row.tolist()) for s, row in zip(batch.samples, batch.input_ids, strict=True)]
        for step in loader
        for batch in step.micro_batches
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_global_batches_do_not_depend_on_where_shards_are(server: Server, tmp_path: Path, workers: int) -> None:
    """The storage fails now and then, and several loader processes share one cache."""
    local = texts(tmp_path, tmp_path / "web/manifest.npz")
    manifest = indexed(server, tmp_path / "run")
    server.faults = [status(500), None, cut(300), None, None, status(429), cut(0)]
    server.ranges.clear()
    remote = texts(tmp_path, manifest, num_workers=workers)
    assert remote == local
    blocks = sum(-(-count // 8) for count in COUNTS)
    assert len(server.ranges) == blocks + 4  # each block once for all processes, and the four failed reads again


def test_storage_that_keeps_failing_stops_the_stream(server: Server, tmp_path: Path) -> None:
    manifest = indexed(server, tmp_path / "run")
    server.faults = [status(503)] * 1000
    with pytest.raises(RemoteError, match=r"after 2 attempts.*data\.read_retries"):
        texts(tmp_path, manifest, num_workers=1, read_retries=1)


def test_a_cache_that_is_too_small_for_the_lanes_is_refused(server: Server, tmp_path: Path) -> None:
    manifest = indexed(server, tmp_path / "run")
    with pytest.raises(ValueError, match=r"data\.cache_bytes = 20,000.*data\.shuffle_window"):
        texts(tmp_path, manifest, cache_bytes=20_000)
    assert texts(tmp_path, tmp_path / "web/manifest.npz", cache_bytes=20_000)


def test_bad_samples_in_remote_shards_are_replaced(server: Server, tmp_path: Path) -> None:
    good = {"png": image_bytes(), "txt": b"red"}
    write_shard(
        tmp_path / "web/pairs.tar",
        ((f"k{n}", {**good, "png": b""} if n % 7 == 0 else good) for n in range(40)),
    )
    output = tmp_path / "pairs.npz"
    assert index.main(["--output", str(output), "--processes", "1", server.url("pairs.tar")]) == 0
    data = DataConfig(
        (ImageTextSource("pairs", output, 4),), read_block=8, cache_dir=tmp_path / "cache", shuffle_window=10
    )
    builders = {"pairs": pair_builder()}
    loader = step_loader(replace(data, max_bad_fraction=1.0), builders)
    batches = [batch for step in loader for batch in step.micro_batches]
    assert all(sample.index % 7 for batch in batches for sample in batch.samples)
    assert sum(batch.rejected["empty_image"] for batch in batches) >= 6


def test_pipe_urls_never_run(tmp_path: Path) -> None:
    url = f"pipe:touch {tmp_path}/ran"
    manifest = Manifest.create(tmp_path / "m.npz", [url], [1], [1], [1], [False])
    with pytest.raises(ValueError, match=re.escape(repr(url))):
        ShardReader(manifest).read(0, 0)
    assert index.main(["--output", str(tmp_path / "m.npz"), url]) == 2
    assert os.listdir(tmp_path) == []


def test_the_next_window_is_fetched_ahead(server: Server, tmp_path: Path) -> None:
    """After a lane's first sample, the read blocks of its window and of the next one are in the cache."""
    manifest = load_manifest(indexed(server, tmp_path / "run"))
    order = SourceOrder(
        "text", manifest.samples, seed=0, num_lanes=2, samples_per_step=2, read_block=8, shuffle_window=10
    )
    one = BlockPrefetcher(manifest, order, settings(tmp_path))
    wanted = {*order.blocks_of(1, 0, 0), *order.blocks_of(1, 0, 1)}
    positions = [order.at(1, position) for position in range(20)]
    assert wanted == {(place.shard, place.index // 8) for place in positions}
    server.ranges.clear()
    one.reading(1, 0)
    one.reading(1, 9)
    deadline = time.monotonic() + LONG
    while len(list((tmp_path / "cache").glob("??/*.block"))) < len(wanted) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(server.ranges) == len(wanted)
    reader = ShardReader(manifest, storage=settings(tmp_path))
    for place in positions:
        reader.read(place.shard, place.index)
    assert len(server.ranges) == len(wanted)


def test_blocks_ahead_of_the_end_of_an_epoch_belong_to_the_next_epoch() -> None:
    order = SourceOrder("text", COUNTS, seed=0, num_lanes=2, samples_per_step=2, read_block=8, shuffle_window=10)
    last = order.samples_per_lane - 1
    places = [order.at(1, position) for position in range(last + 1, last + 11)]
    assert order.blocks_of(1, last, 1) == list(dict.fromkeys((place.shard, place.index // 8) for place in places))


def test_inspect_reads_as_the_run_would(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = TextSource("text", indexed(server, tmp_path / "run"), 2)
    data = DataConfig((source,), read_block=8, shuffle_window=10, cache_dir=tmp_path / "cache", read_retries=0)
    assert len(list(inspect.describe_step(data, 0))) == 3
    assert list((tmp_path / "cache").glob("*/*.block"))
    shutil.rmtree(tmp_path / "cache")
    server.faults = [status(503)]
    with pytest.raises(RemoteError, match="1 attempts"):
        list(inspect.describe_step(data, 0))
