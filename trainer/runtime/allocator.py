"""Choose how the C library allocates host memory."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_LEAST_MAPPED_BYTES = 2**20


def return_freed_memory() -> None:
    """Have the C library return tensors of 1 MiB or more to the system as soon as they are freed.

    By itself, glibc raises the size from which it does so up to 32 MiB, and keeps smaller ones. Where the weights of a
    language model come one by one from a drive and go again, the kept memory grows to a share of all weights. Other C
    libraries have no such setting, and nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LEAST_MAPPED_BYTES)
