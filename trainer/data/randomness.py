"""Derive random numbers from what they are for, never from a process or the past.

All randomness of the data is ``Philox`` keyed by a hash of (version, seed, source, epoch, ...) and used through its raw
stream. numpy promises the stream of a bit generator for ever, but not that of ``Generator.permutation``.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

ORDER_VERSION = 1  # part of every key; a change of the order needs another number


def stable_key(*parts: object) -> int:
    """Hash the parts to 128 bits, the same on every machine and in every version.

    Args:
        parts: JSON values, such as a seed, a source's name and an epoch.

    Returns:
        128 bits of blake2b over the parts' canonical JSON.
    """
    text = json.dumps([ORDER_VERSION, *parts], separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def philox(*parts: object) -> np.random.Philox:
    """Return a counter-based generator whose key is ``stable_key(*parts)``."""
    return np.random.Philox(key=stable_key(*parts))
