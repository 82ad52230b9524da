"""A copy of a state dict in host memory that is kept from one save to the next.

Touching fresh memory costs more than copying into memory that is there already, and pinning it costs more still. What
is known of the first save is therefore touched ahead, in a thread.
"""

from __future__ import annotations

import copy
import mmap
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """Copies tensors (and what they stand in) to host memory; ``recycle`` before the next save.

    device: where the tensors are; with a GPU the memory is pinned, and the copies run at the bus's speed.
    expected: type and length of tensors that are going to be copied; all other memory is made when it is needed.
    """

    def __init__(self, device: torch.device, expected: Sequence[tuple[torch.dtype, int]] = ()) -> None:
        self._device = device
        self._free: defaultdict[tuple[torch.dtype, int], list[Tensor]] = defaultdict(list)
        self._used: list[Tensor] = []
        self._preparing = threading.Thread(target=self._prepare, args=(expected,), name="host memory", daemon=True)
        self._preparing.start()

    def _prepare(self, expected: Sequence[tuple[torch.dtype, int]]) -> None:
        for dtype, numel in expected:
            buffer = self._buffer(dtype, numel)
            buffer.view(torch.uint8)[:: mmap.PAGESIZE].zero_()
            self._free[dtype, numel].append(buffer)

    def recycle(self) -> None:
        """What was copied so far is no longer needed."""
        for buffer in self._used:
            self._free[buffer.dtype, buffer.numel()].append(buffer)
        self._used = []

    def copy(self, value: Any) -> Any:
        """``value`` with every tensor copied, and only what the tensor shows of its storage."""
        self._preparing.join()
        copied = self._copy(value)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, dict):
            return {key: self._copy(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy(item) for item in value)
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        free = self._free[tensor.dtype, tensor.numel()]
        buffer = free.pop() if free else self._buffer(tensor.dtype, tensor.numel())
        self._used.append(buffer)
        return buffer.view(tensor.shape).copy_(tensor, non_blocking=True)

    def _buffer(self, dtype: torch.dtype, numel: int) -> Tensor:
        return torch.empty(numel, dtype=dtype, pin_memory=self._device.type == "cuda")
