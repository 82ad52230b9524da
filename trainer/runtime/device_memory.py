"""What a user is told when a device's memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.errors import TrainerError


class OutOfDeviceMemoryError(TrainerError):
    """The run needs more memory than a device has."""


@contextmanager
def exhaustion_explained() -> Iterator[None]:
    """Around what computes on a device. Raises: OutOfDeviceMemoryError in place of torch's error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).split(" If reserved but unallocated")[0]
        raise OutOfDeviceMemoryError(
            f"{said} Set a smaller data.sources.*.micro_batch_size, training.activation_memory_gib, or "
            "deepspeed.offload_param and offload_optimizer to cpu; "
            "python -m trainer.plan CONFIG --search looks for settings that fit"
        ) from error
