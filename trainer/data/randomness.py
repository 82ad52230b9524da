"""Derive random numbers from what they are for, never from a process or the past.

All randomness of the data is ``Philox`` keyed by a hash of (version, seed, source, epoch, ...) and used through its raw
stream. numpy promises the stream of a bit generator for ever, but not that of ``Generator.permutation``.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1  # part of every key; a change of the order needs another number
_FEW = 1 << 12  # keys that are sorted without the faster method


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


def permutation(generator: np.random.Philox, length: int) -> NDArray[np.int64]:
    """Permute 0 to ``length - 1`` by sorting random keys; equal keys (2^-64 a pair) keep their order."""
    keys = generator.random_raw(length)
    if length < _FEW:
        return np.argsort(keys, kind="stable")
    # The same result, several times faster: the low bits of each key give way to its position, and numbers are sorted
    # instead of being compared through an index. The few keys that agree in their high bits are put right afterwards.
    bits = np.uint64((length - 1).bit_length())
    low = (np.uint64(1) << bits) - np.uint64(1)
    packed = keys & ~low
    packed |= np.arange(length, dtype=np.uint64)
    packed.sort()
    tied = np.flatnonzero((packed[1:] ^ packed[:-1]) <= low)
    packed &= low
    order = packed.view(np.int64)
    for run in np.split(tied, np.flatnonzero(np.diff(tied) > 1) + 1) if len(tied) else []:
        span = slice(int(run[0]), int(run[-1]) + 2)
        order[span] = order[span][np.argsort(keys[order[span]], kind="stable")]
    return order
