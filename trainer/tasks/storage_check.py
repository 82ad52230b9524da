"""Refuse a run whose offloaded or replicated tensors do not fit, before anything is loaded."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from model.factory import torch_dtype
from model.flamingo import Flamingo
from trainer.config.run_config import FlamingoRunConfig
from trainer.errors import ConfigError, Problem
from trainer.planning.peak_memory import Sizes, host_memory
from trainer.planning.random_weights import build_on_meta_device
from trainer.planning.storage import DriveNeed, drive_need, size_buffers
from trainer.planning.traffic import ModelSizes
from trainer.resilience.swap_folders import swapped_bytes
from trainer.runtime.distributed import World, failing_together

_log = logging.getLogger(__name__)

_GIB = 2.0**30
_CAP_IPC_LOCK = 14  # linux/capability.h: may lock any amount of memory


def prepare_offload(config: FlamingoRunConfig, settings: Mapping[str, Any], world: World) -> None:
    """Check that offloaded and replicated tensors fit, and prepare for weights on a drive; a collective.

    The buffers between drive and device get a size, and freed memory goes back to the system.

    The sizes come from the model on the meta device. Where the hub alone knows the language model's config,
    nothing is checked.

    Args:
        config: The run.
        settings: DeepSpeed's JSON, whose buffers are set where they have no size.
        world: Processes of the run.

    Raises:
        ConfigError: The tensors do not fit; the message says how many bytes are needed and how many are there.
    """
    zero = settings["zero_optimization"]
    is_replicated = config.deepspeed.replicates_frozen
    if not is_replicated and not any(zero.get(f"offload_{what}") for what in ("param", "optimizer")):
        return
    try:
        model = build_on_meta_device(config.model, config.training.dtype)
    except Exception as error:  # noqa: BLE001  a family's own code may fail; its sizes are then known too late
        _log.info("whether the offloaded or replicated tensors fit is not checked: %s", error)
        return
    itemsize = torch_dtype(config.training.dtype).itemsize
    need = drive_need(model.parameters(), model.blocks(), zero, world.size, itemsize)
    with failing_together(world):
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        problems = [*_host_problems(model, zero, world.size, local, itemsize), *_buffer_problems(config, need)]
        problems += _drive_problems(config, need, local)
        if is_replicated:
            problems += _replica_problems(model, itemsize, device_memory_limit(world, local))
        if problems:
            raise ConfigError(problems)
    size_buffers(zero, need)


def _host_problems(
    model: Flamingo, zero: Mapping[str, Any], ranks: int, local: int, itemsize: int
) -> Iterator[Problem]:
    counted = ModelSizes(model)
    sizes = Sizes(counted.held, counted.trainable, counted.vision, itemsize, ranks)
    needed, available = sum(host_memory(sizes, zero, local).values()), host_memory_limit()
    if needed > available:
        message = (
            f"parameters and optimizer state that are offloaded to the host take {needed / _GIB:.2f} GiB of a node "
            f"that has {available / _GIB:.2f} GiB; take more nodes, or device: nvme"
        )
        yield Problem("deepspeed.offload_param.device", message, related=("deepspeed.offload_optimizer.device",))


def _replica_problems(model: Flamingo, itemsize: int, available: float) -> Iterator[Problem]:
    counted = ModelSizes(model)
    needed = itemsize * (counted.held - counted.trainable)
    if needed > available:
        message = (
            f"replicated: the frozen weights take {needed / _GIB:.2f} GiB of each device, which has "
            f"{available / _GIB:.2f} GiB; take partitioned or host, or model.language_model.quantization int8 or nf4"
        )
        yield Problem("deepspeed.frozen", message)


def device_memory_limit(world: World, local: int) -> float:
    """Return the bytes of a process's device: a GPU's memory, or a share of the host's.

    Args:
        world: Processes of the run.
        local: Processes of this node.
    """
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return host_memory_limit() / local


def host_memory_limit() -> float:
    """Return the bytes of host memory that this process may use: the machine's, or its cgroup's."""
    limits = [float(psutil.virtual_memory().total)]
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        names = {"": ("", "memory.max"), "memory": ("memory", "memory.limit_in_bytes")}
        if controllers in names:
            root, name = names[controllers]
            path = Path("/sys/fs/cgroup", root, group.lstrip("/"), name)
            text = path.read_text(encoding="utf-8").strip() if path.is_file() else "max"
            limits += [] if text == "max" else [float(text)]
    return min(limits)


def _buffer_problems(config: FlamingoRunConfig, need: DriveNeed) -> Iterator[Problem]:
    if need.buffer_elements < need.largest:
        yield Problem(
            "deepspeed.raw.zero_optimization.offload_param.buffer_size",
            f"{need.buffer_elements} elements are fewer than the {need.largest} of the largest partition of a "
            "parameter; raise it, or leave it out",
        )
    limit = _lockable_bytes()
    if need.buffers > limit:
        yield Problem(
            "deepspeed.offload_param.device",
            f"nvme: the {need.buffer_count} buffers of a process lock {need.buffers / _GIB:.2f} GiB of memory, and "
            f"the limit is {limit / _GIB:.3f} GiB; raise it with ulimit -l (in a container: --ulimit memlock=-1)",
        )


def _lockable_bytes() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_free = int(status["CapEff"], 16) >> _CAP_IPC_LOCK & 1 or soft == resource.RLIM_INFINITY
    return float("inf") if is_free else float(soft)


def _drive_problems(config: FlamingoRunConfig, need: DriveNeed, local: int) -> Iterator[Problem]:
    """Yield a problem for each folder with too little space for all processes of this node."""
    deepspeed = config.deepspeed
    needed: dict[Path, tuple[str, float]] = {}
    for name, offload, size in (
        ("offload_param", deepspeed.offload_param, need.parameters),
        ("offload_optimizer", deepspeed.offload_optimizer, need.optimizer),
    ):
        if offload.path is not None:
            first, before = needed.get(offload.path, (name, 0.0))
            needed[offload.path] = (first, before + size * local)
    for folder, (name, size) in needed.items():
        free = shutil.disk_usage(folder).free + swapped_bytes(folder)
        if size > free:
            message = f"{folder} has {free / _GIB:.2f} GiB free, and this node needs {size / _GIB:.2f} GiB there"
            yield Problem(f"deepspeed.{name}.path", f"{message}; free some, take another folder, or more nodes")
