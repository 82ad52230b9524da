"""The index of one shard: where every complete sample starts and ends, and what was rejected and why.

The sidecar is 64 bytes of header, 16 bytes a sample (start and end offset, uint64 little-endian) and a JSON tail with
what the scan asked for and what it rejected.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.errors import ShardError
from trainer.data.shards.tar_members import Member, TarDamageError, read_members, split_name
from trainer.runtime.files import write_atomically

_MAGIC = b"FLTARIDX"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQqQ16x")  # magic, version, tail bytes, samples, tar bytes, tar version, checksum
_READ_BUFFER = 1 << 17


@dataclass(frozen=True)
class Rejection:
    """Something that was left out: ``offset`` in bytes in the shard; ``key`` of the sample if it was one sample."""

    reason: str
    offset: int
    detail: str
    key: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """offsets: uint64 [samples, 2], start and end of each complete sample in the shard's order.

    version: the file's time of change in ns, or 63 bits of what remote storage calls its version (0: it does not).

    checksum: 64 bits over every header block and over the offsets; it changes when members are renamed, resized,
    added or moved, not when only a member's content changes (that is what costs nothing to check).
    """

    offsets: NDArray[np.uint64]
    tar_bytes: int
    version: int
    checksum: int
    required: tuple[str, ...] = ()
    rejected: tuple[Rejection, ...] = ()


@dataclass
class _Group:
    """A run of neighboring members with one key."""

    key: str
    start: int
    end: int
    extensions: set[str] = field(default_factory=set)
    problem: Rejection | None = None

    def add(self, member: Member, extension: str) -> None:
        if not member.is_file:
            self._reject("not_a_file", member, f"{member.name} is a link, device or sparse file")
        elif extension in self.extensions:
            self._reject("duplicate_member", member, f"{member.name} comes twice")
        self.extensions.add(extension)
        self.end = member.end

    def _reject(self, reason: str, member: Member, detail: str) -> None:
        self.problem = self.problem or Rejection(reason, member.start, detail, self.key)


def scan_shard(path: Path, required: Collection[str] = ()) -> ShardIndex:
    """``scan_tar`` of a local file. Raises ShardError when it cannot be opened at all."""
    try:
        with open(path, "rb", buffering=_READ_BUFFER) as file:
            status = os.fstat(file.fileno())

            def read(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            return scan_tar(read, status.st_size, status.st_mtime_ns, required)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}") from error


def scan_tar(read: Callable[[int, int], bytes], size: int, version: int, required: Collection[str] = ()) -> ShardIndex:
    """Reads the headers of a tar once.

    read: (offset, length) -> bytes. size: in bytes. version: kept in the index (a time, or what a store calls it).
    required: extensions that every sample must have ("jpg" or "jpg,png" for one of several). A key that comes back
    later in the shard is rejected in all places: whether it was two samples or one with its members apart is unknown.
    """
    digest = hashlib.blake2b(digest_size=8)
    groups: list[_Group] = []
    damage: TarDamageError | None = None
    try:
        for member in read_members(read, size, on_header=digest.update):
            _group(groups, member)
    except TarDamageError as error:
        damage = error
    good, rejected = _accept(groups, required, damage, size)
    offsets = np.array([(group.start, group.end) for group in good], dtype="<u8").reshape(-1, 2)
    digest.update(offsets.tobytes())
    checksum = int.from_bytes(digest.digest(), "little")
    return ShardIndex(offsets, size, version, checksum, tuple(sorted(required)), tuple(rejected))


def _group(groups: list[_Group], member: Member) -> None:
    parts = split_name(member.name)
    if parts is None:
        return
    key, extension = parts
    if not groups or groups[-1].key != key:
        groups.append(_Group(key, member.start, member.end))
    groups[-1].add(member, extension)


def _accept(
    groups: list[_Group], required: Collection[str], damage: TarDamageError | None, size: int
) -> tuple[list[_Group], list[Rejection]]:
    rejected: list[Rejection] = []
    first: dict[str, _Group] = {}
    for group in groups:
        other = first.setdefault(group.key, group)
        if other is not group:
            for one in (other, group):
                one.problem = one.problem or Rejection(
                    "duplicate_key", one.start, "the key stands in several places of the shard", one.key
                )
    if groups and damage is not None and damage.reason != "trailing_data":
        last = groups[-1]
        last.problem = last.problem or Rejection("partial", last.start, "the shard breaks off after it", last.key)
    for group in groups:
        missing = [wanted for wanted in required if not group.extensions & set(wanted.split(","))]
        if missing and group.problem is None:
            detail = f"no {', '.join(missing)}: it has {', '.join(sorted(group.extensions))}"
            group.problem = Rejection("missing_member", group.start, detail, group.key)
        if group.problem is not None:
            rejected.append(group.problem)
    if damage is not None:
        reason, detail = (damage.reason, damage.detail) if size else ("empty", "the file has no bytes")
        rejected.append(Rejection(reason, damage.offset, detail))
    elif not groups:
        rejected.append(Rejection("empty", 0, "the shard has no samples"))
    return [group for group in groups if group.problem is None], rejected


def sidecar_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_name(shard.name + ".index")


def collected_sidecar_path(manifest: Path, url: str) -> Path:
    """Where the index of a shard lies that cannot have it beside itself: in a folder beside the manifest.

    url: as it stands in the manifest. 4,096 folders keep 2 million indices apart.
    """
    digest = hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return manifest.with_name(manifest.name + ".index") / digest[:3] / f"{digest}.index"


def save_sidecar(index: ShardIndex, path: Path) -> None:
    """Writes a sidecar atomically: readers see the old one or the new one."""
    tail = json.dumps({"required": index.required, "rejected": [asdict(one) for one in index.rejected]}).encode()
    header = _HEADER.pack(
        _MAGIC, _VERSION, len(tail), len(index.offsets), index.tar_bytes, index.version, index.checksum
    )
    write_atomically(path, header + index.offsets.astype("<u8").tobytes() + tail)


def load_sidecar(path: Path) -> ShardIndex:
    """Reads and checks a sidecar. Raises ShardError (missing, damaged, another version)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}: run python -m trainer.index again") from error
    try:
        magic, version, tail, samples, tar_bytes, tar_version, checksum = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION or len(data) != _HEADER.size + 16 * samples + tail:
            raise ValueError("not an index of this version, or cut")
        offsets = np.frombuffer(data, "<u8", 2 * samples, _HEADER.size).reshape(-1, 2)
        facts = json.loads(data[_HEADER.size + 16 * samples :])
        rejected = tuple(Rejection(**one) for one in facts["rejected"])
        required = tuple(facts["required"])
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: damaged index ({error}): run python -m trainer.index again") from error
    return ShardIndex(offsets, tar_bytes, tar_version, checksum, required, rejected)
