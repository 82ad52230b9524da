"""Join the processes of a run into one group, and let all ranks agree.

Works under the deepspeed launcher, mpirun and srun, and with plain ``python`` as a single process.
"""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from trainer.errors import TrainerError
from trainer.runtime.deepspeed_internals import skip_shared_memory_op
from trainer.runtime.joining import wait_for_all
from trainer.runtime.launch_environment import LaunchError, complete_environment
from trainer.runtime.network import choose_interface
from trainer.runtime.torch_internals import flight_recorder_dump, set_all_timeouts

Key = TypeVar("Key", bound=Hashable)


class RankFailedError(TrainerError):
    """Report that another rank failed, with its message and its exit code."""

    def __init__(self, message: str, exit_code: int = TrainerError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class World:
    """Describe the processes of a run, as one of them sees it.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_rank: Number of this process among those of its node.
        device: Device of this process.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes all that is written once."""
        return self.rank == 0


def initialize(timeout_seconds: float, threads: int | None = None) -> World:
    """Join the process group: NCCL on GPUs, gloo on CPUs.

    Args:
        timeout_seconds: Longest time that a collective waits for a missing rank. Keep it short: when one rank raises,
            the others wait that long.
        threads: torch threads of this process; None keeps torch's choice.

    Raises:
        LaunchError: The environment does not describe a group of processes.
        JoinError: The port is in use, or a process is missing.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    skip_shared_memory_op()
    store: object = None
    if complete_environment():
        _check_device(int(os.environ.setdefault("LOCAL_RANK", "0")))
        choose_interface(os.environ["MASTER_ADDR"])
        store = wait_for_all(timeout_seconds)
    else:
        _initialize_single_process(timeout)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    del store  # torch has its own by now
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _check_device(local_rank: int) -> None:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu" or local_rank < accelerator.device_count():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    raise LaunchError(
        f"process {local_rank} of this node has no device: it sees {accelerator.device_count()}"
        + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else "")
        + "; start fewer processes"
    )


def _initialize_single_process(timeout: datetime.timedelta) -> None:
    """Make a process group of this process alone; DeepSpeed then uses it.

    The store chooses a free port itself and listens on it at once, so no other process can take the port in between.
    """
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it
    store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, but missing in torch's __all__
        "127.0.0.1", 0, world_size=1, is_master=True, timeout=timeout, wait_for_workers=False
    )
    backend = get_accelerator().communication_backend_name()
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def set_collective_timeout(seconds: float) -> None:
    """Set how long collectives that start from now on wait for a missing rank, in all process groups."""
    set_all_timeouts(datetime.timedelta(seconds=seconds))


def collective_records() -> str:
    """Return this process's last collectives as JSON; empty if torch recorded none."""
    return flight_recorder_dump()


def shut_down() -> None:
    """Leave the process group; does nothing if this process never joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Sum each value over all ranks, in one all-reduce, in float64 so that counts and losses stay exact."""
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def sum_by_name(values: Mapping[str, float], world: World) -> dict[str, float]:
    """Sum each value over all ranks, in one all-reduce; every rank gives the same names in the same order."""
    return dict(zip(values, sum_over_ranks(list(values.values()), world), strict=True))


def sum_counts(counts: Counter[Key], world: World) -> Counter[Key]:
    """Sum counts over all ranks; their keys may differ from rank to rank."""
    return sum(gather_objects(counts, world), Counter[Key]())


def any_rank(flag: bool, world: World) -> bool:
    """Return whether the flag is set on at least one rank, so that all ranks take the same decision."""
    value = torch.tensor([int(flag)], device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def broadcast(value: Any, world: World) -> Any:
    """Return rank 0's value on every rank. It is pickled, so it must be small."""
    box = [value if world.is_main else None]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def raise_on_all_ranks(error: Exception | None, world: World) -> None:
    """Raise on every rank if any rank failed, so that no rank waits in a collective for one that has left.

    Args:
        error: Error of this rank, or None. This rank raises it.
        world: Processes of the run.

    Raises:
        RankFailedError: Only other ranks failed; it holds the message of the first one.
    """
    mine = None
    if error is not None:
        mine = f"{type(error).__name__}: {error}", getattr(error, "exit_code", TrainerError.exit_code)
    failures = gather_objects(mine, world)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            message, exit_code = failure
            raise RankFailedError(f"rank {rank} failed: {message}", exit_code)


@contextmanager
def failing_together(world: World) -> Iterator[None]:
    """Run work of this rank, such as writing a file; errors as ``raise_on_all_ranks``. A collective at its end."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001  raised on all ranks
        error = caught
    raise_on_all_ranks(error, world)


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def gather_objects(value: Any, world: World) -> list[Any]:
    """Return the values of all ranks on every rank. They are pickled, so they must be small."""
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, value)
    return gathered
