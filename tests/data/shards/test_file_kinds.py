"""Test that files given by mistake are named."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from trainer import index
from trainer.data.errors import ShardError
from trainer.data.shards.file_kinds import kind_of
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.tar_scan import scan_shard


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


FILES = {
    "a parquet file": b"PAR1" + bytes(600) + b"PAR1",
    "a zip archive": zipped(),
    "a JSON file": b'{"count": 1}',
    "a text file": b"image,caption\n" * 100,
    "an HTML page": b"<!DOCTYPE html><html>404" + b" " * 600,
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a JPEG image": b"\xff\xd8\xff\xe0" + bytes(600),
    "an XML text": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "an MP4 video": b"\0\0\0\x20ftypisom" + bytes(600),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_tar_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.tar").write_bytes(FILES[kind])
    (problem,) = scan_shard(tmp_path / "a.tar").rejected
    assert problem.reason == "not_a_tar"
    assert problem.detail.startswith(kind)


def test_a_tar_with_a_damaged_first_header_is_still_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[0] = ord("{")
    (tmp_path / "a.tar").write_bytes(data)
    assert [one.reason for one in scan_shard(tmp_path / "a.tar").rejected] == ["bad_checksum"]


def test_nothing_is_said_of_unknown_bytes() -> None:
    assert kind_of(b"") is None
    assert kind_of(bytes(range(1, 256))) is None


def test_a_manifest_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.npz").write_text(json.dumps({"a": 1}))
    with pytest.raises(ShardError, match=r"m\.npz: this is a JSON file, not a manifest"):
        load_manifest(tmp_path / "m.npz")
    with pytest.raises(ShardError, match="Is a directory"):
        load_manifest(tmp_path)


def test_a_folder_of_shards_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").mkdir()
    assert index.main(["--output", str(tmp_path / "m.npz"), str(tmp_path / "shards")]) == 1
    assert f"{tmp_path}/shards/*.tar" in capsys.readouterr().err
