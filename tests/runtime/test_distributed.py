"""Test how a process finds its group: with the variables of a launcher or of srun, and alone."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from trainer.runtime import distributed
from trainer.runtime.launch_environment import complete_environment


def initialize_alone(rounds: int) -> list[tuple[int, int, list[int]]]:
    """Join and leave a group of one process several times; return rank, size and a gathered value of each."""
    results = []
    for number in range(rounds):
        world = distributed.initialize(timeout_seconds=60, threads=1)
        results.append((world.rank, world.size, distributed.gather_objects(number, world)))
        distributed.shut_down()
    return results


def test_single_processes_at_the_same_time_need_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for results in pool.map(initialize_alone, [2, 2]):
            assert results == [(0, 1, [0]), (0, 1, [1])]


def test_variables_of_srun_become_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    }
    monkeypatch.setattr(os, "environ", dict(slurm))
    assert complete_environment()
    assert os.environ == slurm | {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "29500",
    }


@pytest.mark.parametrize("environment", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}])
def test_without_a_launcher_nothing_is_set(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    monkeypatch.setattr(os, "environ", dict(environment))
    assert not complete_environment()
    assert os.environ == environment


def test_a_launchers_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1"}
    monkeypatch.setattr(os, "environ", dict(given))
    assert complete_environment()
    assert os.environ == given
