"""Test how a process finds its group: with the variables of a launcher or of srun, and alone."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from trainer.runtime import distributed


def initialize_alone(rounds: int) -> list[tuple[int, int, list[int]]]:
    """Join and leave a group of one process several times; return rank, size and a gathered value of each."""
    results = []
    for number in range(rounds):
        world = distributed.initialize(timeout_seconds=60, threads=1)
        results.append((world.rank, world.size, distributed.gather_objects(number, world)))
        distributed.shut_down()
    return results


@pytest.mark.slow
def test_single_processes_at_the_same_time_need_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for results in pool.map(initialize_alone, [2, 2]):
            assert results == [(0, 1, [0]), (0, 1, [1])]
