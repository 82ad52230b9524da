"""Tell whether a GPU can run the CUDA kernels: its architecture, and the shared memory of forward and backward.

A card that runs a forward but not its backward would fail in the middle of the first step, so both count.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

HEAD_DIMS = (64, 96, 128)
_TILE, _BYTES = 64, 2  # rows of a tile, and bytes of a number (csrc/cuda/tile.cuh)
_OLDEST = (8, 0)  # cp.async and bfloat16's mma.sync


class Card(NamedTuple):
    """Describe a GPU.

    Attributes:
        name: Name that its driver gives it.
        capability: Compute capability, such as (8, 9).
        shared_memory: Bytes of shared memory that a block can ask for.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int


@functools.cache
def card(index: int) -> Card:
    """Return the GPU with this number; it is asked once."""
    found = torch.cuda.get_device_properties(index)
    return Card(found.name, (found.major, found.minor), found.shared_memory_per_block_optin)


def shared_bytes(head_dim: int) -> int:
    """Return the shared memory that the kernels of a head_dim need, which is that of the backward.

    csrc/cuda/attention_backward.cuh: six tiles of the head_dim and two of 64 columns; 96 columns take the room of 128.
    """
    pitch = 128 if head_dim == 96 else head_dim
    return (6 * pitch + 2 * 64) * _TILE * _BYTES


def obstacle(found: Card, head_dim: int, architectures: Sequence[str]) -> str | None:
    """Return why a GPU cannot run the kernels of a head_dim, or None.

    Args:
        found: The GPU.
        head_dim: Dim of a head; one of ``HEAD_DIMS``.
        architectures: What the library was built for, such as "8.0+PTX" and "9.0a".
    """
    here = f"{found.name} (sm_{found.capability[0]}{found.capability[1]})"
    if found.capability < _OLDEST:
        return f"the kernels need compute capability 8.0, and {here} is older"
    if not any(_runs(name, found.capability) for name in architectures):
        built = " ".join(architectures) or "no known architecture"
        return f"the kernels were built for {built}, not for {here}; set TORCH_CUDA_ARCH_LIST and build them again"
    needed = shared_bytes(head_dim)
    if needed > found.shared_memory:
        return (
            f"head_dim {head_dim} needs {needed // 1024} KB of shared memory in the backward, and {here} has "
            f"{found.shared_memory // 1024}"
        )
    return None


def _runs(name: str, capability: tuple[int, int]) -> bool:
    """Return whether code for an architecture runs on a card: machine code on its major version, PTX on later ones."""
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
    if match is None:
        return False
    built = (int(match[1]), int(match[2]))
    if match[3] == "a":
        return capability == built
    return (built[0] == capability[0] and built <= capability) or (match[4] is not None and built <= capability)
