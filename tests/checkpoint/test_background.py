"""Work in threads that all ranks agree on: no timeout has to cover it, and no error stays with one rank."""

from __future__ import annotations

import datetime
import time

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from tests.distributed.processes import run_distributed
from trainer.checkpoint.background import BackgroundWork
from trainer.checkpoint.training_state import CheckpointError
from trainer.runtime.distributed import World, barrier


def long_work_of_one_rank(world: World, in_background: bool) -> str:
    """Three seconds, where collectives may wait for one."""
    _set_pg_timeout(datetime.timedelta(seconds=1), dist.group.WORLD)
    barrier()

    def work() -> str:
        time.sleep(3 * world.rank)
        return f"done by {world.rank}"

    if in_background:
        return BackgroundWork(work, world, purpose="cannot work", remedy="Rest").wait()
    result = work()
    try:
        barrier()
    except RuntimeError:
        return "timed out"
    return result


def failing_work_of_one_rank(world: World) -> tuple[str, bool]:
    def work() -> None:
        if world.rank == 1:
            raise PermissionError("locked")
        time.sleep(60)

    start = time.monotonic()
    try:
        BackgroundWork(work, world, purpose="cannot work", remedy="Unlock it").wait()
    except CheckpointError as error:
        return str(error), time.monotonic() - start < 30
    return "no error", False


@pytest.mark.distributed
def test_long_work_outlasts_the_timeout_of_collectives() -> None:
    assert run_distributed(long_work_of_one_rank, 2, True) == ["done by 0", "done by 1"]
    assert "timed out" in run_distributed(long_work_of_one_rank, 2, False), (
        "the timeout was none: the test shows nothing"
    )


@pytest.mark.distributed
def test_an_error_reaches_all_ranks_before_the_others_are_done() -> None:
    expected = ("cannot work: rank 1: PermissionError: locked. Unlock it", True)
    assert run_distributed(failing_work_of_one_rank, 2) == [expected, expected]
