"""Name the kind of a file by its first bytes, for files that somebody gave by mistake."""

from __future__ import annotations

PROBE_BYTES = 512  # bytes that ``kind_of`` looks at

_STARTS = (
    (b"PAR1", "a parquet file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"\x04\x22\x4d\x18", "an lz4 file"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a rar archive"),
    (b"ARROW1", "an Arrow file"),
    (b"ORC", "an ORC file"),
    (b"Obj\x01", "an Avro file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x93NUMPY", "a numpy array"),
    (b"FLTARIDX", "an index that trainer.index wrote"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: run git lfs pull"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"%PDF", "a PDF"),
    (b"\xff\xfe", "a text in UTF-16"),
    (b"\xfe\xff", "a text in UTF-16"),
)
TAR_KIND = "a tar archive"
COMPRESSED = ("a gzip file", "a bzip2 file", "an xz file", "a zstd file", "an lz4 file")


def kind_of(start: bytes) -> str | None:
    """Return what a file is ("a parquet file"), or None if its first bytes say nothing.

    Args:
        start: First bytes of the file.
    """
    for first, kind in _STARTS:
        if start.startswith(first):
            return kind
    if start[4:8] == b"ftyp":
        return "an MP4 video"
    if start[257:262] == b"ustar":
        return TAR_KIND
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] in (b"{", b"["):
        return "a JSON file"
    lower = text[:15].lower()
    if lower.startswith((b"<!doctype", b"<html")):
        return "an HTML page, as servers send it in place of a file"
    if lower.startswith(b"<?xml"):
        return "an XML text, as object stores send it in place of a file"
    # A header of a tar has zeros after its name; only a text has none.
    if start and 0 not in start and all(byte >= 32 or byte in b"\t\r\n\f" for byte in start):
        return "a text file"
    return None
