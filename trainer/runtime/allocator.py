"""Have the C library give memory back to the system."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Return all whole pages of freed memory to the system.

    glibc keeps freed tensors of up to 32 MiB. Where the weights of a language model come one by one from a drive and go
    again, the kept memory grows to a share of all weights. Where the C library has no such function, nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
