"""Processes: who am I, how do all ranks agree. Works under the deepspeed launcher, mpirun, srun, and without any."""

from __future__ import annotations

import datetime
import os
import socket
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from trainer.errors import TrainerError
from trainer.runtime.network import choose_interface

Key = TypeVar("Key", bound=Hashable)
# srun sets none of the variables that torch reads.
_SLURM_VARIABLES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


class RankFailedError(TrainerError):
    """Another rank failed; its own message is in this one's."""


@dataclass(frozen=True)
class World:
    """The processes of this run. ``device`` is this process's own."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def initialize(timeout_seconds: float, threads: int | None = None) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and say who we are.

    timeout_seconds: how long a collective may wait for a rank that does not come; keep it short, for when one rank
        raises the others wait that long.
    threads: torch threads of this process; None leaves torch's own choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    _complete_environment()
    # DeepSpeed builds this op for minutes at its first initialization on CPU, and only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=datetime.timedelta(seconds=timeout_seconds), verbose=False)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _complete_environment() -> None:
    """Fill in what torch.distributed needs and the launcher did not set; plain ``python`` becomes a world of 1."""
    environment = os.environ
    launched_by_mpi = "OMPI_COMM_WORLD_SIZE" in environment or "PMI_SIZE" in environment
    if "SLURM_PROCID" in environment and "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        for name, slurm_name in _SLURM_VARIABLES.items():
            environment.setdefault(name, environment[slurm_name])
        environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        environment.setdefault("MASTER_PORT", "29500")
    elif "RANK" not in environment and launched_by_mpi:
        _ask_mpi()
    elif "RANK" not in environment:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    choose_interface(environment["MASTER_ADDR"])


def _ask_mpi() -> None:
    """Rank, size and master from mpi4py, through DeepSpeed; what somebody set stays."""
    given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    deepspeed.comm.mpi_discovery(verbose=False)
    os.environ.update(given)
    from mpi4py import MPI

    MPI.Finalize()  # nothing else uses MPI, and mpirun calls a process failed that ends without this


def set_collective_timeout(seconds: float) -> None:
    """How long collectives that start from now on may wait for a rank that does not come, in all groups."""
    timeout = datetime.timedelta(seconds=seconds)
    # torch 2.15 gave it a public name and deprecated the old one.
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in distributed_c10d._world.pg_map:
        set_timeout(timeout, group)


def collective_records() -> str:
    """This process's last collectives, as JSON, from torch's flight recorder; empty where torch keeps none."""
    nccl = dist.get_backend() == "nccl"
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json" if nccl else "_dump_fr_trace_json", None)
    return "" if dump is None else bytes(dump()).decode()


def shut_down() -> None:
    """Leave the process group; safe to call when it was never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """The sums over all ranks, in one all-reduce, in float64 so that counts and losses stay exact."""
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def sum_counts(counts: Counter[Key], world: World) -> Counter[Key]:
    """The sums over all ranks of counts whose keys may differ from rank to rank."""
    return sum(gather_objects(counts, world), Counter[Key]())


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on at least one rank: every rank-dependent decision is agreed with this first."""
    value = torch.tensor([int(flag)], device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def broadcast(value: Any, world: World) -> Any:
    """Rank 0's value on every rank (small picklable objects between our own processes)."""
    box = [value if world.is_main else None]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def raise_together(error: Exception | None, world: World) -> None:
    """Raise on every rank if any rank failed, so that nobody waits in a collective for one that is gone.

    Raises: the rank's own error, or RankFailedError naming the first rank that failed.
    """
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}", world)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RankFailedError(f"rank {rank} failed: {message}")


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def gather_objects(value: Any, world: World) -> list[Any]:
    """Each rank's value, on every rank (small picklable objects between our own processes)."""
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, value)
    return gathered
