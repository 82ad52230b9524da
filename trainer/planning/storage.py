"""Count the bytes that a run with ``device: nvme`` keeps on a drive, and the buffers through which they pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.parameters import full_shape
from trainer.planning.peak_memory import ADAMW_STATE_BYTES

# DeepSpeed keeps a smaller partition on the host (deepspeed/runtime/swap_tensor/utils.py: MIN_AIO_BYTES).
LEAST_BYTES_ON_DRIVE = 2**20
_GRADIENT_BYTES = 4  # float32; a drive holds the gradients beside weights and moments
_DEFAULT_BUFFERS = 5  # deepspeed/runtime/zero/offload_config.py: buffer_count


@dataclass(frozen=True)
class DriveNeed:
    """Describe what one process needs of a drive.

    Attributes:
        parameters: Bytes of its partitions of parameters on the drive.
        optimizer: Bytes of its optimizer state on the drive.
        largest: Elements of the largest partition on the drive; 0 where there is none.
        buffer_elements: Elements of a buffer: those of the JSON, or ``largest``.
        buffer_count: Buffers: those of the JSON, or twice as many as the module with most parameters needs, so that the
            next one's weights arrive while it computes.
        itemsize: Bytes of one element.
    """

    parameters: float
    optimizer: float
    largest: int
    buffer_elements: int
    buffer_count: int
    itemsize: int

    @property
    def buffers(self) -> float:
        """Bytes of locked host memory."""
        return float(self.buffer_count * self.buffer_elements * self.itemsize)


def drive_need(
    parameters: Iterable[nn.Parameter],
    modules: Iterable[nn.Module],
    zero: Mapping[str, Any],
    ranks: int,
    itemsize: int,
) -> DriveNeed:
    """Return what one process needs of a drive.

    Args:
        parameters: Parameters of the model, which may be on the meta device.
        modules: Modules whose parameters are gathered together.
        zero: ``zero_optimization`` of DeepSpeed's JSON.
        ranks: Number of processes.
        itemsize: Bytes of a parameter.
    """
    parameters = list(parameters)
    on_drive = {id(one): -(-_count(one) // ranks) for one in parameters}
    on_drive = {key: size for key, size in on_drive.items() if size * itemsize >= LEAST_BYTES_ON_DRIVE}
    if _device(zero, "param") != "nvme":
        on_drive = {}
    trained = sum(_count(one) for one in parameters if one.requires_grad) if _device(zero, "optimizer") == "nvme" else 0
    together = (sum(id(one) in on_drive for one in module.parameters()) for module in modules)
    offload = zero.get("offload_param", {})
    largest = max(on_drive.values(), default=0)
    return DriveNeed(
        float(itemsize * sum(on_drive.values())),
        (ADAMW_STATE_BYTES + _GRADIENT_BYTES) * trained / ranks,
        largest,
        offload.get("buffer_size", largest),
        offload.get("buffer_count", max(_DEFAULT_BUFFERS, *(2 * count for count in together))) if on_drive else 0,
        itemsize,
    )


def size_buffers(zero: Mapping[str, Any], need: DriveNeed) -> None:
    """Give DeepSpeed as many and as large buffers as the model needs, where its JSON says nothing of them.

    Args:
        zero: ``zero_optimization`` of the JSON; it is changed.
        need: What a process needs.
    """
    if need.largest:
        zero["offload_param"].setdefault("buffer_size", need.buffer_elements)
        zero["offload_param"].setdefault("buffer_count", need.buffer_count)


def _device(zero: Mapping[str, Any], what: str) -> str:
    return str(zero.get(f"offload_{what}", {}).get("device", "none"))


def _count(parameter: nn.Parameter) -> int:
    return math.prod(full_shape(parameter))
