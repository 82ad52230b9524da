"""Damage files as faulty disks do."""

from __future__ import annotations

from pathlib import Path


def delete(path: Path) -> None:
    """Delete the file."""
    path.unlink()


def truncate(path: Path) -> None:
    """Remove the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    """Flip a bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
