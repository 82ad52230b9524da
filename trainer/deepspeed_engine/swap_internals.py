"""Reach into the part of DeepSpeed that keeps parameters on a drive (ZeRO-Infinity, arXiv:2104.07857).

As in ``internals``, every function says why it is needed and which upstream issue would make it unnecessary. Checked
with DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import (
    AsyncPartitionedParameterSwapper,
    PartitionedParamStatus,
)
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from trainer.runtime.allocator import return_freed_memory

__all__ = ["shared_parameter_swapper"]

_PRIVATE = "_PartitionedParameterCoordinator__"  # Python's prefix for the coordinator's private names
# Of released weights. To return each tensor at once took half as long as the step itself, in page faults.
_MOST_KEPT_BYTES = 2**26


@contextmanager
def shared_parameter_swapper() -> Iterator[None]:
    """Let several ``zero.Init`` in this context share one swapper of parameters, with its folder and its buffers.

    Reason: every ``zero.Init`` makes a swapper, and a swapper begins by deleting this rank's swap folder. A model needs
    several ``zero.Init``, so the second would delete the weights of the first. Each would also lock buffers of its own.
    Upstream issue: huggingface/transformers #31800 has the same cause with two models; none found for one model.
    """
    create = partition_parameters.AsyncPartitionedParameterSwapper
    made: dict[torch.dtype, Any] = {}

    def create_once(settings: Any, dtype: torch.dtype) -> Any:
        if dtype not in made:
            setattr(PartitionedParameterCoordinator, f"{_PRIVATE}prefetch_nvme_param_partitions", _read_ahead)
            made[dtype] = _Swapper(settings, dtype)
        return made[dtype]

    partition_parameters.AsyncPartitionedParameterSwapper = create_once
    try:
        yield
    finally:
        partition_parameters.AsyncPartitionedParameterSwapper = create


class _Swapper(AsyncPartitionedParameterSwapper):
    """Read parameters into buffers, and give up what was read ahead where a parameter that is needed finds no buffer.

    Reason: DeepSpeed reads ahead into every free buffer. Where another parameter is needed next, such as in a
    generation between two steps, it fails. The C library keeps the memory of weights that were released.
    Upstream issue: none found.
    """

    def __init__(self, settings: Any, dtype: torch.dtype) -> None:
        super().__init__(settings, dtype)
        self._read: dict[int, Any] = {}  # the last one that was read stands last
        self._released_bytes = 0  # since memory was returned to the system

    def swap_in(
        self, params: Sequence[Any], async_op: bool = True, swap_in_buffers: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Read parameters; ``async_op`` reads ahead, and waits for nothing."""
        if swap_in_buffers is None and not async_op:
            self._make_room(len(params))
        for param in params:
            self._read.pop(param.ds_id, None)
            self._read[param.ds_id] = param
        super().swap_in(params, async_op, swap_in_buffers)

    def remove_partition_and_release_buffers(self, params: Sequence[Any]) -> None:
        """Release parameters; return freed memory to the system now and then."""
        super().remove_partition_and_release_buffers(params)
        self._released_bytes += sum(param.ds_numel * param.element_size() for param in params)
        if self._released_bytes > _MOST_KEPT_BYTES:
            return_freed_memory()
            self._released_bytes = 0

    def _make_room(self, count: int) -> None:
        missing = count - len(self.available_buffer_ids)
        if missing <= 0:
            return
        self.synchronize_reads()
        read = [self._read[key] for key in reversed(self._read) if key in self.available_params]
        unused = [param for param in read if param.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        self.remove_partition_and_release_buffers(unused[:missing])


def _read_ahead(coordinator: Any) -> None:
    """Read the parameters that are used next into the free buffers, up to ``stage3_prefetch_bucket_size`` elements.

    Reason: DeepSpeed reads twice as many as are being gathered just then, or a single one where none is. On one process
    that is always so, and the weights of a block come one by one while nothing computes.
    Upstream issue: none found.
    """
    if not coordinator.is_complete_trace():
        return
    most = getattr(coordinator, f"{_PRIVATE}prefetch_bucket_sz")
    ahead: dict[int, Any] = {}
    elements = 0
    for entry in getattr(coordinator, f"{_PRIVATE}param_queue"):
        param = entry.param
        if param.nvme_swapper is None or param.ds_id in ahead or not _is_on_drive(param):
            continue
        if elements >= most or len(ahead) >= param.nvme_swapper.available_swap_in_buffers():
            break
        ahead[param.ds_id] = param
        elements += param.ds_numel
    if ahead:
        params = list(ahead.values())
        params[0].nvme_swapper.swap_in(params, async_op=True)


def _is_on_drive(param: Any) -> bool:
    location, status = param.ds_tensor.final_location, param.ds_tensor.status
    return location == OffloadDeviceEnum.nvme and status == PartitionedParamStatus.NOT_AVAILABLE
