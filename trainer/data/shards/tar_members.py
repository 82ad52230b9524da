"""Tar headers, read without unpacking: ustar, pax and GNU long names, and bases of 256 for large sizes.

Python's own ``tarfile`` stops silently at a damaged header and reads through a file object; here every header's
checksum counts, every stop has a reason, and the same code reads a whole shard or the few bytes of one sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from zlib import adler32

BLOCK = 512
_MAX_EXTENSION = 1 << 20  # a name of more than a megabyte is damage, not a name
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
_END = bytes(BLOCK)
_FILE, _PAX = ord("0"), ord("x")
_COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")  # how gzip, bzip2, xz and zstd files begin


class TarDamageError(Exception):
    """The tar cannot be read beyond ``offset`` (in bytes); ``reason`` is an identifier."""

    def __init__(self, reason: str, offset: int, detail: str) -> None:
        super().__init__(f"{reason} at byte {offset}: {detail}")
        self.reason = reason
        self.offset = offset
        self.detail = detail


class Member(NamedTuple):
    """One entry: ``start`` is its first header (extension headers included), ``end`` the next entry's start."""

    name: str
    is_file: bool
    start: int
    data: int
    size: int
    end: int


def split_name(name: str) -> tuple[str, str] | None:
    """webdataset's grouping: key (path up to the basename's first dot) and lower-case extension, or None.

    ``a/b.left.JPG`` is ``("a/b", "left.jpg")``. Names without a dot, hidden files and webdataset's ``__meta__`` files
    belong to no sample.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or (not slash and base.startswith("__") and base.endswith("__")):
        return None
    return folder + slash + stem, extension.lower()


def sample_members(data: bytes) -> tuple[str, dict[str, bytes]]:
    """The key and the members (lower-case extension -> bytes) of one sample's byte range.

    The common headers (ustar, and pax records that give neither name nor size) are read in a tight loop, since this
    runs for every sample; anything else goes through ``read_members``. Every header's checksum counts either way.
    Raises TarDamageError.
    """
    key, members, offset, end = "", {}, 0, len(data)
    try:
        while offset < end:
            header = data[offset : offset + BLOCK]
            kind, length, body = header[156], int(header[124:135], 8), offset + BLOCK
            found = adler32(header[156:], adler32(header[:148])) & 0xFFFF  # see _check_sum
            if found != (int(header[148:154], 8) - 255) % 65521 or body + length > end:
                return _sample_members(data)
            offset = body + -(-length // BLOCK) * BLOCK
            if kind == _PAX:
                records = data[body : body + length]
                if b"path=" in records or b"size=" in records or b"GNU" in records:
                    return _sample_members(data)
            elif kind == _FILE and not header[345] and header[135] <= 32:
                parts = split_name(header[: header.index(0, 0, 100)].decode())
                if parts is not None:
                    key = parts[0]
                    members[parts[1]] = data[body : body + length]
            else:
                return _sample_members(data)
    except (ValueError, IndexError):  # a number or a name that is written in another way
        return _sample_members(data)
    return key, members


def _sample_members(data: bytes) -> tuple[str, dict[str, bytes]]:
    key, members = "", {}
    for member in read_members(lambda offset, n: data[offset : offset + n], len(data), whole=False):
        parts = split_name(member.name)
        if parts is not None:
            key, extension = parts
            members[extension] = data[member.data : member.data + member.size]
    return key, members


def read_members(
    read: Callable[[int, int], bytes],
    size: int,
    *,
    whole: bool = True,
    on_header: Callable[[bytes], object] | None = None,
) -> Iterator[Member]:
    """The members of a tar in their order.

    read: (offset, length) -> bytes. size: bytes in all. whole: whether an end-of-archive mark is required (False for
    the byte range of one sample). on_header: called with every header block, for a digest.
    Raises TarDamageError where the tar stops making sense.
    """
    offset = start = 0
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    while offset + BLOCK <= size:
        header = read(offset, BLOCK)
        if header == _END:
            if start != offset:
                raise TarDamageError("truncated", offset, "an extended header without its member")
            _check_end(read, offset, size)
            return
        _check_sum(header, offset)
        if on_header is not None:
            on_header(header)
        kind = header[156:157]
        length = _number(header[124:136], offset) if kind not in b"123456" else 0
        if b"size" in pax and kind in b"\x0007":
            length = _decimal(pax[b"size"], offset)
        data, end = offset + BLOCK, offset + BLOCK + -(-length // BLOCK) * BLOCK
        if data + length > size:
            missing = data + length - size
            raise TarDamageError("truncated", offset, f"the file ends {missing} bytes before the member's end")
        if kind in b"LKxg":
            if length > _MAX_EXTENSION:
                raise TarDamageError("bad_header", offset, f"an extended header of {length} bytes")
            content = read(data, length)
            if kind == b"L":
                long_name = content.split(b"\0", 1)[0]
            elif kind in b"xg":
                pax = _pax_records(content, offset, pax if kind == b"x" else {})
        else:
            name = (pax.get(b"path") or long_name or _short_name(header)).decode("utf-8", "surrogateescape")
            is_file = kind in b"\x0007" and not any(key.startswith(b"GNU.sparse") for key in pax)
            # Folders say nothing about samples; version 7 tars mark one by the slash alone.
            if kind != b"5" and not (kind == b"\0" and name.endswith("/")):
                yield Member(name, is_file, start, data, length, end)
            long_name, pax, start = None, {}, end
        offset = end
    if whole:
        raise TarDamageError("truncated", min(offset, size), "no end-of-archive mark: the file was cut")


def _check_sum(header: bytes, offset: int) -> None:
    try:
        expected = int(header[148:156].replace(b"\0", b" ").strip() or b"-1", 8)
    except ValueError:
        expected = -1
    rest = header[:148] + header[156:]
    # The low half of Adler-32 is the bytes' sum modulo 65521 (plus 1), thirty times as fast as summing in Python. A
    # sum of 504 bytes is below twice that, so only one other sum is taken for the right one, and nothing makes it.
    if 0 <= expected - 256 <= 255 * len(rest) and adler32(rest) & 0xFFFF == (expected - 256 + 1) % 65521:
        return
    # Old tars summed signed characters.
    if sum(rest) + 256 != expected and sum(b - 256 if b > 127 else b for b in rest) + 256 != expected:
        if offset == 0 and header[:2] in _COMPRESSED:
            raise TarDamageError("compressed", 0, "a compressed tar has no random access: store it uncompressed")
        raise TarDamageError("bad_checksum", offset, "the header's checksum does not match")


def _number(raw: bytes, offset: int) -> int:
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big", signed=False) - (0x80 << (8 * (len(raw) - 1)))
        if raw[0] == 0xFF:
            raise TarDamageError("bad_header", offset, "a negative size")
        return value
    try:
        return int(raw.replace(b"\0", b" ").strip() or b"0", 8)
    except ValueError:
        raise TarDamageError("bad_header", offset, f"the size {raw!r} is not octal") from None


def _decimal(raw: bytes, offset: int) -> int:
    if not raw.isdigit() or len(raw) > 20:
        raise TarDamageError("bad_header", offset, f"the pax size {raw[:40]!r} is not a number")
    return int(raw)


def _short_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # Only POSIX has the prefix; old GNU tars keep times in its place.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_records(content: bytes, offset: int, known: dict[bytes, bytes]) -> dict[bytes, bytes]:
    records = dict(known)
    position = 0
    while position < len(content) and content[position]:
        match = _PAX_RECORD.match(content, position)
        length = int(match[1]) if match else 0
        if match is None or content[position + length - 1 : position + length] != b"\n":
            raise TarDamageError("bad_header", offset, "a malformed pax record")
        records[match[2]] = content[match.end() : position + length - 1]
        position += length
    return records


def _check_end(read: Callable[[int, int], bytes], offset: int, size: int) -> None:
    """After the end mark only zeros may follow: anything else is a second archive that readers would ignore."""
    while offset < size:
        length = min(1 << 20, size - offset)
        if any(read(offset, length)):
            raise TarDamageError("trailing_data", offset, "data after the end-of-archive mark would be ignored")
        offset += length
