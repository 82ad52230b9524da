"""What happens to files on disks."""

from __future__ import annotations

from pathlib import Path


def delete(path: Path) -> None:
    """As if it had never been written."""
    path.unlink()


def truncate(path: Path) -> None:
    """Its last byte is lost."""
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    """One in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
