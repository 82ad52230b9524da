"""Scan the headers of a shard once and build its index."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainer.data.errors import ShardError
from trainer.data.shards.retries import RetryPolicy, repeat_disk
from trainer.data.shards.sidecar import Rejection, ShardIndex
from trainer.data.shards.tar_members import Member, TarDamageError, read_members, split_name

_READ_BUFFER = 1 << 17  # bytes
_POLICY = RetryPolicy(retries=4)  # one bad disk must not hold up the scan of thousands of shards


@dataclass
class _Group:
    """A run of neighboring members with one key.

    Attributes:
        key: The sample's key.
        start: Offset of the first member in bytes.
        end: End of the last member in bytes.
        extensions: Extensions seen so far.
        problem: The first reason to reject the sample, if any.
    """

    key: str
    start: int
    end: int
    extensions: set[str] = field(default_factory=set)
    problem: Rejection | None = None

    def add(self, member: Member, extension: str) -> None:
        if not member.is_file:
            self.reject("not_a_file", f"{member.name} is a link, device or sparse file", member.start)
        elif extension in self.extensions:
            self.reject("duplicate_member", f"{member.name} comes twice", member.start)
        self.extensions.add(extension)
        self.end = member.end

    def stands_apart_from(self, other: _Group) -> bool:
        """Tell whether the two are parts of one sample rather than two samples."""
        return not self.extensions & other.extensions

    def reject(self, reason: str, detail: str, offset: int | None = None) -> None:
        """Record a problem unless there is one already; ``offset`` is the sample's start by default."""
        if self.problem is None:
            self.problem = Rejection(reason, self.start if offset is None else offset, detail, self.key)


def scan_shard(path: Path, required: Collection[str] = ()) -> ShardIndex:
    """Scan a local file; see ``scan_tar``. A failed read begins the scan again.

    Raises:
        ShardError: The file cannot be opened or read.
    """

    def scan() -> ShardIndex:
        with open(path, "rb", buffering=_READ_BUFFER) as file:
            status = os.fstat(file.fileno())

            def read(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            return scan_tar(read, status.st_size, status.st_mtime_ns, required)

    try:
        return repeat_disk(scan, _POLICY, str(path))
    except IsADirectoryError as error:
        raise ShardError(f"{path} is a folder: name its shards, {path}/*.tar") from error
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}") from error


def scan_tar(read: Callable[[int, int], bytes], size: int, version: int, required: Collection[str] = ()) -> ShardIndex:
    """Read the headers of a tar once and index its samples.

    A key that comes back later in the shard is rejected everywhere: nobody knows whether it stands for two samples or
    for one sample with scattered members.

    Args:
        read: Returns the bytes at (offset, length).
        size: Bytes of the tar.
        version: Goes into the index; see ``ShardIndex``.
        required: Extensions that every sample must have. "jpg" means this one, "jpg,png" one of the two.
    """
    digest = hashlib.blake2b(digest_size=8)
    groups: list[_Group] = []
    damage: TarDamageError | None = None
    try:
        for member in read_members(read, size, on_header=digest.update):
            _add_member(groups, member)
    except TarDamageError as error:
        damage = error
    accepted, rejected = _accept(groups, required, damage, size)
    # The end of a member's padding may be cut off; its content is whole.
    offsets = np.array([(group.start, min(group.end, size)) for group in accepted], dtype="<u8").reshape(-1, 2)
    digest.update(offsets.tobytes())
    checksum = int.from_bytes(digest.digest(), "little")
    return ShardIndex(offsets, size, version, checksum, tuple(sorted(required)), tuple(rejected))


def _add_member(groups: list[_Group], member: Member) -> None:
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
    """Return the complete samples, and what is rejected in the shard's order."""
    _reject_scattered(groups)
    if groups and damage is not None and damage.reason != "trailing_data" and _may_be_partial(groups, damage, required):
        groups[-1].reject("partial", "the shard breaks off after it")
    folders = _extensions_by_name(groups) if required else {}
    for group in groups:
        missing = [wanted for wanted in required if not group.extensions & set(wanted.split(","))]
        if missing:
            group.reject("missing_member", _missing_detail(group, missing, folders))
    rejected = [group.problem for group in groups if group.problem is not None]
    if damage is not None:
        reason, detail = (damage.reason, damage.detail) if size else ("empty", "the file has no bytes")
        rejected.append(Rejection(reason, damage.offset, detail))
    elif not groups:
        rejected.append(Rejection("empty", 0, "the shard has no samples"))
    return [group for group in groups if group.problem is None], rejected


def _reject_scattered(groups: list[_Group]) -> None:
    """Reject every part of a sample whose key stands in several places."""
    first: dict[str, _Group] = {}
    for group in groups:
        earlier = first.setdefault(group.key, group)
        if earlier is group:
            continue
        detail = f"the key stands in several places of the shard, at bytes {earlier.start} and {group.start}"
        if group.stands_apart_from(earlier):
            detail = (
                f"its members stand apart ({_listed(earlier)} at byte {earlier.start}, {_listed(group)} at byte "
                f"{group.start}): sort the tar by name, for instance unpack it and run tar --sort=name -cf NEW.tar *"
            )
        for one in (earlier, group):
            one.reject("duplicate_key", detail)


def _may_be_partial(groups: list[_Group], damage: TarDamageError, required: Collection[str]) -> bool:
    """Tell whether the last sample before damage may have had further members.

    The member that is cut off shows it, or else an earlier sample that has more than the same members. A lone member
    shows nothing.
    """
    last = groups[-1]
    if damage.member is not None:
        parts = split_name(damage.member)
        return parts is not None and parts[0] == last.key
    if len(groups) == len(last.extensions) == 1 and not required:
        return True
    return any(group.extensions > last.extensions for group in groups)


def _extensions_by_name(groups: list[_Group]) -> dict[str, dict[str, str]]:
    """Return, for the last part of each key, the extensions below it and a key that has each of them."""
    found: dict[str, dict[str, str]] = {}
    for group in groups:
        for extension in group.extensions:
            found.setdefault(group.key.rpartition("/")[2], {}).setdefault(extension, group.key)
    return found


def _missing_detail(group: _Group, missing: list[str], folders: dict[str, dict[str, str]]) -> str:
    detail = f"no {', '.join(missing)}: it has {_listed(group)}"
    elsewhere = folders[group.key.rpartition("/")[2]]
    for extension in ",".join(missing).split(","):
        if extension in elsewhere:
            return f"{detail}; {elsewhere[extension]}.{extension} is another key: give both the same folder in the tar"
    return detail


def _listed(group: _Group) -> str:
    return ", ".join(sorted(group.extensions))
