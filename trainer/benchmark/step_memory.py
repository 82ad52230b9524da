"""Limit and check the memory of ``trainer.benchmark step``, and measure it on a CPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor, nn

from model.activations import AllocatedMemory
from model.factory import torch_dtype
from trainer.config.run_config import RunConfig
from trainer.planning.peak_memory import ADAMW_STATE_BYTES
from trainer.runtime.distributed import World

_GRADIENT_BYTES = 4  # float32


def limit_memory(gib: float | None, world: World) -> None:
    """Limit what torch may allocate on this process's GPU; None sets no limit.

    Raises:
        ValueError: There is no GPU, or it has less memory.
    """
    if gib is None:
        return
    if world.device.type != "cuda":
        raise ValueError("--device-memory-gib limits a GPU's memory; there is none here")
    available = torch.cuda.get_device_properties(world.device).total_memory / 2**30
    if not 0 < gib <= available:
        raise ValueError(
            f"--device-memory-gib {gib:g}: the GPU has {available:.1f} GiB; set a number above 0 and up to that"
        )
    torch.cuda.set_per_process_memory_fraction(gib / available, world.device)


def check_memory(config: RunConfig, model: nn.Module, world: World) -> None:
    """Check that parameters, gradients and optimizer state fit into the free memory, as a lower bound of a step's need.

    Without this check, the operating system would kill the processes without a message.

    Args:
        config: The run.
        model: Its model, which may be on the meta device.
        world: The processes.

    Raises:
        ValueError: They do not fit.
    """
    dtype = torch_dtype(config.training.dtype)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(_num_bytes(parameter, dtype) for parameter in model.parameters() if not parameter.requires_grad)
    whole = frozen if config.deepspeed.replicates_frozen else 0
    shared = dtype.itemsize * trainable + frozen - whole
    held = whole + shared / (world.size if config.deepspeed.zero_stage == 3 else 1)
    optimizer = (ADAMW_STATE_BYTES + _GRADIENT_BYTES) * trainable / world.size
    on_host = world.device.type == "cpu"
    if on_host:
        held *= config.deepspeed.offload_param.device != "nvme"
        optimizer *= config.deepspeed.offload_optimizer.device != "nvme"
        needed = (held + optimizer) * int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        available = float(psutil.virtual_memory().available)
    else:
        needed = held * (config.deepspeed.offload_param.device == "none")
        needed += optimizer * (config.deepspeed.offload_optimizer.device == "none")
        available = float(torch.cuda.mem_get_info(world.device)[0])
    if needed > available:
        raise ValueError(
            f"it does not fit: parameters, gradients and optimizer alone take {needed / 2**30:.1f} GiB "
            f"of {'the host' if on_host else 'a device'}, and {available / 2**30:.1f} GiB are free; "
            "python -m trainer.plan CONFIG --search looks for settings that fit"
        )


def _num_bytes(parameter: nn.Parameter, dtype: torch.dtype) -> int:
    """Return the bytes of a parameter in a run of a type, which leaves quantized codes as they are."""
    return parameter.numel() * (dtype.itemsize if parameter.is_floating_point() else parameter.element_size())


def tensor_memory() -> AllocatedMemory:
    """Return a context that counts the CPU memory of all tensors, those that exist already included.

    It does for a CPU what ``torch.cuda``'s allocator does for a GPU. The resident set would count libraries too, and
    leave out pages that nothing has touched yet.
    """
    gc.collect()  # tensors that only wait to be collected are not in use
    return AllocatedMemory(_living_tensors())


def _living_tensors() -> Iterator[Tensor]:
    for found in gc.get_objects():
        # isinstance would run the code of lazily imported modules.
        if issubclass(type(found), Tensor) and found.layout == torch.strided and found.device.type == "cpu":
            yield found
            if found.is_leaf and found.grad is not None:
                yield found.grad
