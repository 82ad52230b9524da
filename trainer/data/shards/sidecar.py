"""Store the index of one shard in a sidecar file.

The index says where every complete sample starts and ends, and which samples were rejected and why. A sidecar holds a
header of 64 bytes, 16 bytes for each sample (start and end offset, uint64 little-endian), and a JSON tail with the
required members and the rejections.
"""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.errors import ShardError
from trainer.data.shards.retries import RetryPolicy, repeat_disk
from trainer.runtime.files import write_atomically

_MAGIC = b"FLTARIDX"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQqQ16x")  # magic, version, tail bytes, samples, tar bytes, tar version, checksum


@dataclass(frozen=True)
class Rejection:
    """A sample, or a part of a shard, that is left out.

    Attributes:
        reason: Identifier, for counting.
        offset: First byte of it in the shard.
        detail: Explanation for a person.
        key: Key of the sample; None if it is not one sample.
    """

    reason: str
    offset: int
    detail: str
    key: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard.

    Attributes:
        offsets: uint64 [samples, 2], start and end of each complete sample in bytes, in the shard's order.
        tar_bytes: Size of the shard.
        version: Modification time of a local file in ns. For a remote file, 63 bits of the version that the storage
            names, or 0 if it names none.
        checksum: 64 bits over every header block and over the offsets. It changes when members are renamed, resized,
            added or moved. A member's content does not enter it, because the scan reads no content.
        required: Members that every sample must have, sorted.
        rejected: Samples and parts that were left out.
    """

    offsets: NDArray[np.uint64]
    tar_bytes: int
    version: int
    checksum: int
    required: tuple[str, ...] = ()
    rejected: tuple[Rejection, ...] = ()


def sidecar_path(shard: Path, required: Collection[str] = ()) -> Path:
    """Return the sidecar beside a local shard.

    Manifests with other required members have other sidecars, so that none of them changes another one's.

    Args:
        shard: The shard.
        required: Members that every sample must have.
    """
    return shard.with_name(f"{shard.name}{_suffix(required)}")


def collected_sidecar_path(manifest: Path, url: str, required: Collection[str] = ()) -> Path:
    """Return the sidecar of a shard that cannot have one beside it: a file in a folder beside the manifest.

    4,096 subfolders keep 2 million sidecars apart.

    Args:
        manifest: Path of the manifest.
        url: Url of the shard as the manifest holds it.
        required: Members that every sample must have.
    """
    digest = hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return manifest.with_name(manifest.name + ".index") / digest[:3] / f"{digest}{_suffix(required)}"


def is_sidecar(path: Path) -> bool:
    """Tell whether a file is an index that ``save_sidecar`` wrote."""
    if path.suffix != ".index":
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def _suffix(required: Collection[str]) -> str:
    if not required:
        return ".index"
    return f".{hashlib.blake2b(repr(sorted(required)).encode(), digest_size=4).hexdigest()}.index"


def save_sidecar(index: ShardIndex, path: Path) -> None:
    """Write a sidecar atomically: a reader sees the old one or the new one."""
    tail = json.dumps({"required": index.required, "rejected": [asdict(one) for one in index.rejected]}).encode()
    header = _HEADER.pack(
        _MAGIC, _VERSION, len(tail), len(index.offsets), index.tar_bytes, index.version, index.checksum
    )
    write_atomically(path, header + index.offsets.astype("<u8").tobytes() + tail)


def load_sidecar(path: Path, policy: RetryPolicy | None = None) -> ShardIndex:
    """Read and check a sidecar.

    Args:
        path: The file.
        policy: How failed reads are repeated; None takes the defaults of ``data``.

    Raises:
        FileNotFoundError: The sidecar is missing.
        ShardError: The sidecar cannot be read, is damaged or of another version.
    """
    try:
        data = repeat_disk(path.read_bytes, policy or RetryPolicy(), str(path))
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise FileNotFoundError(errno.ENOENT, error.strerror, str(path)) from error
        raise ShardError(f"{path}: {error.strerror}: run python -m trainer.index again") from error
    try:
        magic, version, tail, samples, tar_bytes, tar_version, checksum = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION or len(data) != _HEADER.size + 16 * samples + tail:
            raise ValueError("cut, or not an index of this version")
        offsets = np.frombuffer(data, "<u8", 2 * samples, _HEADER.size).reshape(-1, 2)
        facts = json.loads(data[_HEADER.size + 16 * samples :])
        rejected = tuple(Rejection(**one) for one in facts["rejected"])
        required = tuple(facts["required"])
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: damaged index ({error}): run python -m trainer.index again") from error
    return ShardIndex(offsets, tar_bytes, tar_version, checksum, required, rejected)
