"""Floating-point operations of a batch, as ``model.flops`` counts them, and what a device could do at most."""

from __future__ import annotations

import torch

from model.flops import UsefulFlops, Workload
from trainer.data.batch import Batch
from trainer.metrics.utilization import Operations
from trainer.planning.cost_model import DEVICES, Device, executed_flops

# Boards with a chip's name and less than its peak; an A100 has the same on all.
_SLOWER_BOARDS = {"pcie", "nvl", "laptop", "d"}


def count_operations(sizes: UsefulFlops, recompute: bool | int, batch: Batch) -> Operations:
    """Of one batch. recompute: whether, or how many of the language model's blocks are checkpointed."""
    rows, length = batch.input_ids.shape
    workload = Workload(rows, length, batch.medium_count / rows, frames_per_medium(sizes, batch))
    return Operations(useful_flops(sizes, batch), rows * executed_flops(sizes, workload, recompute))


def useful_flops(sizes: UsefulFlops, batch: Batch) -> float:
    """Of the batch's tokens and media, without padding and dummies; frozen layers count as frozen.

    Media that keep their aspect count as so many frames of the tower's own size as they have patches for.
    """
    rows, frames = len(batch.input_ids), frames_per_medium(sizes, batch)
    media = batch.medium_count / rows if int(batch.media_index.max()) >= 0 else 0.0
    lengths: list[int] = batch.attention_mask.sum(-1).tolist()
    return sum(sizes.sequence(Workload(1, length, media, frames)) for length in lengths)


def frames_per_medium(sizes: UsefulFlops, batch: Batch) -> float:
    """Frames of the tower's own size that a medium of the batch has, on average."""
    if batch.media_grids is None:
        return batch.media.shape[1]
    return len(batch.media) / sizes.features / batch.medium_count


def data_sheet_tflops(device: torch.device, dtype: str) -> float | None:
    """Peak of a device for the metrics; None for a CPU, for other types than bfloat16 and for what is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    found = device_named(torch.cuda.get_device_name(device))
    return None if found is None else found.tflops


def device_named(name: str) -> Device | None:
    """The device of ``cost_model.DEVICES`` that a driver calls so ("NVIDIA H100 80GB HBM3"), as far as TFLOP/s go."""
    words = set(name.lower().replace("-", " ").split())
    for known, device in DEVICES.items():
        chip = known.removeprefix("rtx-").split("-")[0]
        if chip in words and (chip == "a100" or not words & _SLOWER_BOARDS):
            return device
    return None
