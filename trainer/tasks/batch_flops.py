"""Count the floating-point operations of a batch, and look up the peak of a device."""

from __future__ import annotations

import torch

from model.flops import UsefulFlops, Workload
from trainer.data.batch import Batch
from trainer.metrics.utilization import Operations
from trainer.planning.devices import DEVICES, Device
from trainer.planning.workload import executed_flops

# Boards with a chip's name and less than its peak; an A100 has the same on all.
_SLOWER_BOARDS = {"pcie", "nvl", "laptop", "d"}


def count_operations(sizes: UsefulFlops, recompute: bool | int, batch: Batch) -> Operations:
    """Count the operations of a batch.

    Args:
        sizes: Sizes of the model.
        recompute: Number of the language model's blocks that are recomputed; a bool stands for all or none.
        batch: Batch of one source.
    """
    rows, length = batch.input_ids.shape
    workload = Workload(rows, length, batch.num_media / rows, frames_per_medium(sizes, batch))
    return Operations(useful_flops(sizes, batch), rows * executed_flops(sizes, workload, recompute))


def useful_flops(sizes: UsefulFlops, batch: Batch) -> float:
    """Count the operations on tokens and media, without padding and dummies; frozen layers have no weight gradients.

    Media that keep their aspect count as frames of the tower's own size with as many patches.
    """
    rows, frames = len(batch.input_ids), frames_per_medium(sizes, batch)
    media = batch.num_seen_media / rows
    lengths: list[int] = batch.attention_mask.sum(-1).tolist()
    return sum(sizes.row(Workload(1, length, media, frames)) for length in lengths)


def frames_per_medium(sizes: UsefulFlops, batch: Batch) -> float:
    """Return the mean number of frames of a medium, in frames of the tower's own size."""
    if batch.media_grids is None:
        return batch.media.shape[1]
    return len(batch.media) * sizes.features_per_patch / sizes.num_features / batch.num_media


def data_sheet_tflops(device: torch.device, dtype: str) -> float | None:
    """Return the peak of a GPU in 10^12 operations per second; None where it or ``dtype`` is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    found = device_named(torch.cuda.get_device_name(device))
    return None if found is None else found.tflops


def device_named(name: str) -> Device | None:
    """Find the device of ``devices.DEVICES`` by its driver's name ("NVIDIA H100 80GB HBM3"); None if unknown."""
    words = set(name.lower().replace("-", " ").split())
    for known, device in DEVICES.items():
        chip = known.removeprefix("rtx-").split("-")[0]
        if chip in words and (chip == "a100" or not words & _SLOWER_BOARDS):
            return device
    return None
