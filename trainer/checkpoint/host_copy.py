"""Copy a state dict to host memory that is reused from one save to the next.

Memory that was touched before takes a copy faster than fresh memory, and far faster than memory that must be pinned
first. A thread therefore touches the memory of the first save in advance, as far as its sizes are known.
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


class HostCopier:
    """Copy tensors to host memory; ``recycle`` frees the copies for the next save.

    Args:
        device: Device of the tensors. For a GPU, the host memory is pinned.
        expected: Type and length of tensors that will be copied. Other memory is allocated when it is needed.
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
        """Reuse the memory of all copies made so far; they must not be read any more."""
        for buffer in self._used:
            self._free[buffer.dtype, buffer.numel()].append(buffer)
        self._used = []

    def copy(self, value: Any) -> Any:
        """Copy a value with all its tensors, without the parts of their storages that they do not show."""
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
