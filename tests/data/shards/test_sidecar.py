"""Test that a sidecar survives a round trip, and that damage to it is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.data.helpers import write_shard
from trainer.data.errors import ShardError
from trainer.data.shards.sidecar import load_sidecar, save_sidecar
from trainer.data.shards.tar_scan import scan_shard


def test_sidecar_round_trip_and_damage(tmp_path: Path) -> None:
    samples = ((f"s{number}", {"jpg": b"J" * 700, "txt": b"t"}) for number in range(4))
    index = scan_shard(write_shard(tmp_path / "a.tar", samples), ["jpg", "nothing"])
    path = tmp_path / "a.tar.index"
    save_sidecar(index, path)
    loaded = load_sidecar(path)
    assert loaded.offsets.tolist() == index.offsets.tolist()
    assert (loaded.checksum, loaded.tar_bytes, loaded.version) == (index.checksum, index.tar_bytes, index.version)
    assert (loaded.required, loaded.rejected) == (index.required, index.rejected)
    data = path.read_bytes()
    for broken in (b"", data[:50], data[:-1], b"X" + data[1:], data[:8] + b"\x09" + data[9:]):
        path.write_bytes(broken)
        with pytest.raises(ShardError, match=re.escape(str(path))):
            load_sidecar(path)
