"""How well an update used the devices: floating-point operations against their peak, and memory."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trainer.runtime.distributed import World

_GIB = 2.0**30


class Operations(NamedTuple):
    """Floating-point operations. useful: of tokens and media, with frozen layers counted as frozen. executed: with
    padding, and with what activation checkpointing computes again."""

    useful: float
    executed: float


@dataclass(frozen=True)
class Utilization:
    """Of one update.

    step_seconds: mean over the ranks. tflops: useful 10^12 operations a second and process. mfu, hfu: useful and
    executed operations as shares (0 to 1) of the device's peak. None: not known. device_memory, host_memory: GiB, the
    most that the worst rank has had so far, allocated by torch and resident; no device memory on a CPU.
    """

    step_seconds: float
    tflops: float | None
    mfu: float | None
    hfu: float | None
    device_memory: float | None
    host_memory: float


class UtilizationMeter:
    """Each rank's numbers of an update, in a form whose sum over the ranks holds everybody's.

    peak_tflops: of one device, None where it is not known.
    """

    def __init__(self, world: World, peak_tflops: float | None) -> None:
        self._world, self._peak_tflops = world, peak_tflops

    def own(self, step_seconds: float, operations: Iterable[Operations]) -> list[float]:
        """This rank's numbers, always as many. operations: of each micro-batch; none where they are not counted."""
        counted = list(operations)
        # A sum over ranks has no maximum; but with a place for each rank it brings everybody's memory.
        memory = [0.0] * (2 * self._world.size)
        memory[2 * self._world.rank] = device_memory(self._world.device)
        memory[2 * self._world.rank + 1] = host_memory()
        return [step_seconds, *(sum(each) for each in zip(Operations(0, 0), *counted, strict=True)), *memory]

    def unpack(self, summed: list[float]) -> Utilization:
        """What the sums over the ranks of ``own`` say."""
        seconds, useful, executed, *memory = summed
        tflops, executed_tflops = useful / seconds / 1e12, executed / seconds / 1e12
        peak = self._peak_tflops if useful else None
        return Utilization(
            step_seconds=seconds / self._world.size,
            tflops=tflops if useful else None,
            mfu=tflops / peak if peak else None,
            hfu=executed_tflops / peak if peak else None,
            device_memory=max(memory[::2]) / _GIB or None,
            host_memory=max(memory[1::2]) / _GIB,
        )


def device_memory(device: torch.device) -> float:
    """Bytes that torch had allocated on the device at its peak; 0 on a CPU."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0


def host_memory() -> float:
    """Bytes of this process that were resident at its peak; loader processes have their own."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
