"""Whether a model can be measured on a machine at all, within less memory than it has, and what it takes on a CPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor

from model.activations import AllocatedMemory
from model.factory import torch_dtype
from trainer.config.run_config import FlamingoRunConfig
from trainer.planning.cost_model import build_without_weights
from trainer.runtime.distributed import World


def limit_memory(gib: float | None, world: World) -> None:
    """Let torch allocate so much of this process's GPU and no more; None: all of it.

    Raises: ValueError where there is no GPU, or not so much.
    """
    if gib is None:
        return
    if world.device.type != "cuda":
        raise ValueError("--device-memory-gib limits a GPU's memory; there is none here")
    there = torch.cuda.get_device_properties(world.device).total_memory / 2**30
    if not 0 < gib <= there:
        raise ValueError(
            f"--device-memory-gib {gib:g}: the GPU has {there:.1f} GiB; give more than 0 and no more than it"
        )
    torch.cuda.set_per_process_memory_fraction(gib / there, world.device)


def check_memory(config: FlamingoRunConfig, world: World) -> None:
    """Whether the states of the model alone fit: the system would end the processes without a word.

    Raises: ValueError when they do not, whatever else an update needs.
    """
    model = build_without_weights(config.model)
    total, trainable = (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or every)
        for every in (True, False)
    )
    width = torch_dtype(config.training.dtype).itemsize
    held = width * total / (world.size if config.deepspeed.zero_stage == 3 else 1)
    optimizer = 16 * trainable / world.size  # AdamW's copies and moments, and a gradient, in float32
    on_host = world.device.type == "cpu"
    if on_host:
        needed = (held + optimizer) * int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        there = float(psutil.virtual_memory().available)
    else:
        needed = held * (config.deepspeed.offload_param.device == "none")
        needed += optimizer * (config.deepspeed.offload_optimizer.device == "none")
        there = float(torch.cuda.mem_get_info(world.device)[0])
    if needed > there:
        raise ValueError(
            f"it does not fit: parameters, gradients and optimizer alone take {needed / 2**30:.1f} GiB "
            f"of {'the host' if on_host else 'a device'}, and {there / 2**30:.1f} GiB are free; "
            "python -m trainer.plan CONFIG --search looks for settings that fit"
        )


def tensor_memory() -> AllocatedMemory:
    """Counts the process's tensors, those that exist already too, while it is open: of a CPU, what ``torch.cuda``'s
    allocator says of a GPU. The resident set would count libraries, and leave out pages that nothing has touched."""
    gc.collect()  # what only waits for that is not in use
    return AllocatedMemory(_living_tensors())


def _living_tensors() -> Iterator[Tensor]:
    for found in gc.get_objects():
        # By type: asking the object itself would run the code of lazily imported modules.
        if issubclass(type(found), Tensor) and found.layout == torch.strided and found.device.type == "cpu":
            yield found
            if found.is_leaf and found.grad is not None:
                yield found.grad
