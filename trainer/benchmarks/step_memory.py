"""Whether a model can be measured on a machine at all, and within less memory than it has."""

from __future__ import annotations

import os

import psutil
import torch

from model.factory import torch_dtype
from trainer.config.schema import FlamingoRunConfig
from trainer.cost_model import build_without_weights
from trainer.distributed import World


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
    optimiser = 16 * trainable / world.size  # AdamW's copies and moments, and a gradient, in float32
    on_host = world.device.type == "cpu"
    if on_host:
        needed = (held + optimiser) * int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        there = float(psutil.virtual_memory().available)
    else:
        needed = held * (config.deepspeed.offload_param.device == "none")
        needed += optimiser * (config.deepspeed.offload_optimizer.device == "none")
        there = float(torch.cuda.mem_get_info(world.device)[0])
    if needed > there:
        raise ValueError(
            f"it does not fit: parameters, gradients and optimiser alone take {needed / 2**30:.1f} GiB "
            f"of {'the host' if on_host else 'a device'}, and {there / 2**30:.1f} GiB are free; "
            "python -m trainer.plan CONFIG --search looks for settings that fit"
        )
