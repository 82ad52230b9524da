"""Explain to the user what to change when the memory of a device is too small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.errors import TrainerError


class OutOfDeviceMemoryError(TrainerError):
    """Report that the run needs more memory than a device has."""


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Replace torch's out-of-memory error by one that names the settings to change.

    Raises:
        OutOfDeviceMemoryError: The memory of a device was exhausted in this context.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = str(error).split(" If reserved but unallocated")[0]
        raise OutOfDeviceMemoryError(
            f"{message} Set a smaller data.sources.*.micro_batch_size, training.activation_memory_gib, or "
            "deepspeed.offload_param and offload_optimizer to cpu; "
            "python -m trainer.plan CONFIG --search looks for settings that fit"
        ) from error
