"""Measure how well a step used the devices: floating-point operations relative to the peak, and memory."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trainer.runtime.distributed import World

_GIB = 2.0**30


class Operations(NamedTuple):
    """Count floating-point operations.

    Attributes:
        useful: Operations on tokens and media; frozen layers count without weight gradients.
        executed: Useful operations plus those on padding and those that activation checkpointing repeats.
    """

    useful: float
    executed: float


@dataclass(frozen=True)
class Utilization:
    """Hold the use of the devices in one step.

    Attributes:
        step_seconds: Duration of the step, averaged over the ranks.
        tflops: Useful operations per second and process, in 10^12; None if not known.
        mfu: Useful operations as a share (0 to 1) of the device's peak (model FLOPs utilization); None if not known.
        hfu: Executed operations as a share of the peak (hardware FLOPs utilization); None if not known.
        device_memory_gib: Peak of torch's allocated memory on the worst rank so far, in GiB; None on a CPU.
        host_memory_gib: Peak resident memory of the worst rank's process so far, in GiB.
    """

    step_seconds: float
    tflops: float | None
    mfu: float | None
    hfu: float | None
    device_memory_gib: float | None
    host_memory_gib: float


class UtilizationMeter:
    """Combine the measurements of all ranks: each rank packs its own, and the sums over the ranks are unpacked.

    Args:
        world: Processes of the run.
        peak_tflops: Peak of one device, in 10^12 operations per second; None if not known.
    """

    def __init__(self, world: World, peak_tflops: float | None) -> None:
        self._world, self._peak_tflops = world, peak_tflops

    def pack(self, step_seconds: float, operations: Iterable[Operations]) -> dict[str, float]:
        """Return this rank's contribution to the sums over the ranks, with the same names on all ranks.

        Args:
            step_seconds: Duration of the step on this rank.
            operations: Operations of each micro-batch; empty if they are not counted.
        """
        useful, executed = (sum(each) for each in zip(Operations(0, 0), *operations, strict=True))
        packed = {"step_seconds": step_seconds, "useful_operations": useful, "executed_operations": executed}
        # A sum cannot express a maximum. Each rank therefore has its own name, and the sums hold all memories.
        for rank in range(self._world.size):
            mine = rank == self._world.rank
            packed[f"device_memory/{rank}"] = device_memory(self._world.device) if mine else 0.0
            packed[f"host_memory/{rank}"] = host_memory() if mine else 0.0
        return packed

    def unpack(self, summed: Mapping[str, float]) -> Utilization:
        """Return the utilization that the sums of all ranks' ``pack`` express."""
        seconds, ranks = summed["step_seconds"], range(self._world.size)
        useful = summed["useful_operations"]
        tflops, executed_tflops = useful / seconds / 1e12, summed["executed_operations"] / seconds / 1e12
        peak = self._peak_tflops if useful else None
        return Utilization(
            step_seconds=seconds / self._world.size,
            tflops=tflops if useful else None,
            mfu=tflops / peak if peak else None,
            hfu=executed_tflops / peak if peak else None,
            device_memory_gib=max(summed[f"device_memory/{rank}"] for rank in ranks) / _GIB or None,
            host_memory_gib=max(summed[f"host_memory/{rank}"] for rank in ranks) / _GIB,
        )


def device_memory(device: torch.device) -> float:
    """Return the peak of the bytes that torch allocated on the device; 0 on a CPU."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0


def host_memory() -> float:
    """Return the peak of the resident bytes of this process, without its loader processes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
