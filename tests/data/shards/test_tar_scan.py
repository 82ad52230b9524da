"""Test the scan of shards, whole and damaged."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from tests.data.helpers import write_shard
from trainer.data.errors import ShardError
from trainer.data.shards.tar_members import TAR_BLOCK, read_members
from trainer.data.shards.tar_scan import scan_shard


def shard(tmp_path: Path, count: int = 4) -> Path:
    return write_shard(
        tmp_path / "a.tar", ((f"s{i}", {"jpg": b"J" * (700 + i), "txt": b"t%d" % i}) for i in range(count))
    )


def tar_of(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def reasons(path: Path, *required: str) -> list[tuple[str, str | None]]:
    return [(one.reason, one.key) for one in scan_shard(path, required).rejected]


def test_offsets_enclose_the_members_of_a_sample(tmp_path: Path) -> None:
    path = shard(tmp_path)
    index = scan_shard(path, ["jpg", "txt"])
    assert index.rejected == ()
    assert index.tar_bytes == path.stat().st_size
    data = path.read_bytes()
    for number, (start, end) in enumerate(index.offsets.tolist()):
        piece = data[start:end]
        members = read_members(lambda offset, n, piece=piece: piece[offset : offset + n], len(piece), whole=False)
        assert {m.name: piece[m.data : m.data + m.size] for m in members} == {
            f"s{number}.jpg": b"J" * (700 + number),
            f"s{number}.txt": b"t%d" % number,
        }


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names(tmp_path: Path, kind: int) -> None:
    folder = "x" * 90 if kind == tarfile.USTAR_FORMAT else "é" * 200
    names = [f"{folder}/{'y' * 60}.jpg", f"{folder}/{'y' * 60}.txt", "short.jpg", "short.txt"]
    path = tar_of(tmp_path / "a.tar", [(name, b"content") for name in names], kind)
    index = scan_shard(path, ["jpg", "txt"])
    assert index.rejected == ()
    assert len(index.offsets) == 2
    with open(path, "rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        assert [member.name for member in read_members(read, index.tar_bytes)] == names


def test_a_cut_shard_loses_only_its_end_and_reports_it(tmp_path: Path) -> None:
    data = shard(tmp_path).read_bytes()
    whole = scan_shard(tmp_path / "a.tar").offsets.tolist()
    cut = tmp_path / "cut.tar"
    for length in range(0, whole[-1][1] + TAR_BLOCK, 256):
        cut.write_bytes(data[:length])
        index = scan_shard(cut)
        # The content of the last member has two bytes; its padding may be cut off.
        complete = [[start, min(end, length)] for start, end in whole if end - TAR_BLOCK + 2 <= length]
        assert index.offsets.tolist() == complete
        assert index.rejected[-1].reason in ("truncated", "empty")


def test_a_cut_member_is_reported_with_the_offset_of_its_header(tmp_path: Path) -> None:
    path = shard(tmp_path)
    start = int(scan_shard(path).offsets[2][0])
    path.write_bytes(path.read_bytes()[: start + TAR_BLOCK + 700])  # s2.jpg has 702 bytes
    last = scan_shard(path).rejected[-1]
    assert (last.reason, last.offset, last.detail) == (
        "truncated",
        start,
        "the file ends 2 bytes before the member's end",
    )


def test_a_sample_cut_between_its_members_is_rejected(tmp_path: Path) -> None:
    path = shard(tmp_path)
    data = path.read_bytes()
    start = scan_shard(path).offsets[3][0]
    path.write_bytes(data[: int(start) + TAR_BLOCK + 1024])  # s3.jpg is complete, s3.txt is gone
    index = scan_shard(path)
    assert len(index.offsets) == 3
    assert [(one.reason, one.key) for one in index.rejected] == [("partial", "s3"), ("truncated", None)]


@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_damaged_header_stops_the_scan_with_its_offset(tmp_path: Path, position: int) -> None:
    path = shard(tmp_path)
    offset = int(scan_shard(path).offsets[position][0])
    data = bytearray(path.read_bytes())
    data[offset + 3] ^= 0x55
    path.write_bytes(data)
    index = scan_shard(path)
    assert len(index.offsets) == position
    assert (index.rejected[-1].reason, index.rejected[-1].offset) == ("bad_checksum", offset)


def test_duplicate_keys_are_rejected_everywhere(tmp_path: Path) -> None:
    names = ["a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt"]
    path = tar_of(tmp_path / "a.tar", [(name, b"x") for name in names])
    assert reasons(path) == [("duplicate_key", "a"), ("duplicate_key", "a")]
    assert len(scan_shard(path).offsets) == 1


def test_interleaved_members_are_not_samples(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(name, b"x") for name in ("a.jpg", "b.jpg", "a.txt", "b.txt")])
    assert {reason for reason, _ in reasons(path)} == {"duplicate_key"}
    assert len(scan_shard(path).offsets) == 0


def test_members_that_stand_apart_have_a_cure(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(name, b"x") for name in ("a.jpg", "b.jpg", "a.txt", "b.txt")])
    details = [one.detail for one in scan_shard(path).rejected]
    assert len(details) == 4
    assert all("sort the tar" in one and "--sort=name" in one for one in details)
    path = tar_of(tmp_path / "a.tar", [(name, b"x") for name in ("a.jpg", "b.jpg", "a.jpg")])
    assert "sort" not in scan_shard(path).rejected[0].detail


def test_members_in_different_folders_have_a_cure(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [("images/1.jpg", b"x"), ("texts/1.txt", b"x")])
    details = [one.detail for one in scan_shard(path, ["jpg", "txt"]).rejected]
    assert "texts/1.txt" in details[0]
    assert "images/1.jpg" in details[1]


def cut_before(path: Path, member: str) -> None:
    """Flip a byte in the header of a member, as damage does."""
    data = bytearray(path.read_bytes())
    data[data.index(member.encode()) + 200] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("names", "damaged", "required", "kept"),
    [
        (["a.jpg", "a.txt", "b.jpg", "b.txt", "c.jpg"], "c.jpg", (), 2),
        (["a.jpg", "a.txt", "b.jpg", "b.txt"], "b.txt", (), 1),
        (["a.jpg", "a.txt", "b.jpg"], "b.jpg", (), 1),
        (["a.jpg", "b.jpg"], "b.jpg", (), 0),  # one member alone shows nothing
        (["a.jpg", "b.jpg"], "b.jpg", ("jpg",), 1),
        (["a.jpg", "a.txt", "b.jpg"], "b.jpg", ("jpg", "txt"), 1),
        (["a.jpg", "a.json", "b.jpg", "c.jpg"], "c.jpg", ("jpg",), 1),  # b.json may be missing
        (["a.txt", "b.txt", "c.txt"], "c.txt", (), 2),
        (["a.png", "a.txt", "b.jpg", "b.txt", "c.jpg"], "c.jpg", (), 2),
    ],
)
def test_a_complete_sample_before_damage_is_kept(
    tmp_path: Path, names: list[str], damaged: str, required: tuple[str, ...], kept: int
) -> None:
    path = tar_of(tmp_path / "a.tar", [(name, b"x") for name in names])
    cut_before(path, damaged)
    index = scan_shard(path, required)
    assert len(index.offsets) == kept
    assert index.rejected[-1].reason == "bad_checksum"


def test_the_member_that_is_cut_off_tells_which_sample_is_partial(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.txt", b"y" * 600)])
    path.write_bytes(path.read_bytes()[: 2 * 1024 - 100])
    assert [(one.reason, one.key) for one in scan_shard(path).rejected] == [("partial", "a"), ("truncated", None)]
    path = tar_of(tmp_path / "a.tar", [("a.txt", b"x"), ("b.txt", b"y" * 600)])
    path.write_bytes(path.read_bytes()[: 2 * 1024 - 100])
    assert reasons(path) == [("truncated", None)]


def test_required_and_duplicate_members(tmp_path: Path) -> None:
    names = ["a.png", "a.txt", "b.txt", "c.JPG", "c.jpg", "c.txt", "d.jpg", "d.txt"]
    path = tar_of(tmp_path / "a.tar", [(name, b"x") for name in names])
    assert reasons(path, "jpg,png", "txt") == [("missing_member", "b"), ("duplicate_member", "c")]
    assert len(scan_shard(path, ["jpg,png", "txt"]).offsets) == 2


def test_links_are_rejected_and_folders_are_not(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("d/a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        text = tarfile.TarInfo("d/b.txt")
        text.size = 1
        tar.addfile(text, io.BytesIO(b"x"))
    assert reasons(tmp_path / "a.tar") == [("not_a_file", "d/a")]


def test_empty_compressed_and_concatenated_shards(tmp_path: Path) -> None:
    empty, compressed, second = tmp_path / "e.tar", tmp_path / "c.tar", tmp_path / "s.tar"
    empty.write_bytes(b"")
    assert reasons(empty) == [("empty", None)]
    with tarfile.open(compressed, "w:gz") as tar:
        info = tarfile.TarInfo("a.bin")
        info.size = 4096
        tar.addfile(info, io.BytesIO(random.Random(0).randbytes(4096)))
    assert reasons(compressed) == [("compressed", None)]
    data = shard(tmp_path).read_bytes()
    second.write_bytes(data + data)
    assert reasons(second) == [("trailing_data", None)]
    assert len(scan_shard(second).offsets) == 4
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    assert reasons(tmp_path / "none.tar") == [("empty", None)]
    with pytest.raises(ShardError, match=r"gone\.tar"):
        scan_shard(tmp_path / "gone.tar")


def test_the_checksum_changes_with_the_names_of_members(tmp_path: Path) -> None:
    one = tar_of(tmp_path / "a.tar", [("a.txt", b"x")])
    two = tar_of(tmp_path / "b.tar", [("b.txt", b"x")])
    assert scan_shard(one).checksum != scan_shard(two).checksum


def test_the_checksum_changes_with_the_required_members(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [("a.txt", b"x"), ("b.txt", b"x"), ("b.jpg", b"x")])
    assert scan_shard(path).checksum != scan_shard(path, ["jpg"]).checksum
