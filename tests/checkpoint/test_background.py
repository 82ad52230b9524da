"""Test that work in threads needs no longer timeout, and that the error of one rank reaches all ranks."""

from __future__ import annotations

import time

import pytest

from tests.distributed.processes import run_distributed
from trainer.checkpoint.background import BackgroundWork
from trainer.checkpoint.errors import CheckpointError
from trainer.runtime.distributed import World, barrier, set_collective_timeout


def long_work_of_one_rank(world: World, in_background: bool) -> str:
    """Work for three seconds on rank 1, with a collective timeout of one second."""
    set_collective_timeout(1)
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
    """Fail on rank 1 while rank 0 works for a minute; return the error and whether it came before that minute ended."""

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
        "without the thread the timeout must strike, or this test shows nothing"
    )


@pytest.mark.distributed
def test_an_error_reaches_all_ranks_before_their_work_is_done() -> None:
    expected = ("cannot work: rank 1: PermissionError: locked. Unlock it", True)
    assert run_distributed(failing_work_of_one_rank, 2) == [expected, expected]
