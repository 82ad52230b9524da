"""Find out how a process was launched, from variables that are complete, missing, left over or Slurm's."""

from __future__ import annotations

import os

import pytest

from trainer.runtime import launch_environment
from trainer.runtime.launch_environment import LaunchError, complete_environment, job_step
from trainer.runtime.network import choose_interface

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
TASK = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
STEP = TASK | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
BATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replace the environment by an empty one."""
    replacement: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", replacement)
    return replacement


def own(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables without those of pytest."""
    return {name: value for name, value in environment.items() if not name.startswith("PYTEST")}


def test_variables_of_srun_become_torchs(environment: dict[str, str]) -> None:
    environment.update(STEP)
    assert complete_environment()
    assert own(environment) == STEP | {
        "RANK": "3",
        "WORLD_SIZE": "4",  # the step's, not the job's
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "29500",
    }


@pytest.mark.parametrize(
    "variables",
    [{}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}],
)
def test_without_a_launcher_nothing_is_set(
    environment: dict[str, str], variables: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    environment.update(variables)
    assert not complete_environment()
    assert own(environment) == variables
    assert caplog.text == ""


@pytest.mark.parametrize(
    "variables",
    [
        BATCH_SHELL,
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # the shell of salloc
        BATCH_SHELL | {"SLURM_STEP_ID": "4294967291"},
        BATCH_SHELL | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # an interactive step
    ],
)
def test_a_shell_of_slurm_trains_alone_and_says_so(
    environment: dict[str, str], variables: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    environment.update(variables)
    assert not complete_environment()
    assert own(environment) == variables
    assert "SLURM_NTASKS is 8" in caplog.text and "srun" in caplog.text
    assert job_step(environment) is None


def test_a_world_size_alone_is_noticed(environment: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    environment["WORLD_SIZE"] = "8"
    assert not complete_environment()
    assert "WORLD_SIZE is 8" in caplog.text


def test_mpirun_inside_a_job_of_slurm_is_mpirun(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(launch_environment, "_read_mpi_environment", lambda: called.append(True))
    environment.update(STEP | {"OMPI_COMM_WORLD_SIZE": "2"})
    assert complete_environment()
    assert called == [True]
    assert "RANK" not in environment


@pytest.mark.parametrize("variables", [LAUNCHED, STEP | LAUNCHED])
def test_a_launchers_variables_stay(environment: dict[str, str], variables: dict[str, str]) -> None:
    environment.update(variables)
    assert complete_environment()
    assert own(environment) == variables


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"MASTER_PORT": ""}, ["RANK=0", "not MASTER_PORT"]),
        ({"WORLD_SIZE": "", "MASTER_ADDR": "", "MASTER_PORT": ""}, ["not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"]),
        ({"LOCAL_RANK": ""}, ["not LOCAL_RANK"]),
        ({"RANK": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
        ({"RANK": "-1"}, ["RANK=-1"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE=two"]),
        ({"MASTER_PORT": "99999"}, ["MASTER_PORT=99999"]),
    ],
)
def test_variables_that_are_left_over_are_refused(
    environment: dict[str, str], change: dict[str, str], words: list[str]
) -> None:
    environment.update({name: value for name, value in (LAUNCHED | change).items() if value})
    with pytest.raises(LaunchError) as caught:
        complete_environment()
    assert caught.value.exit_code == 2
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_master_and_interface_are_named(environment: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=no-such-host\.invalid"):
        choose_interface("no-such-host.invalid")
    environment["GLOO_SOCKET_IFNAME"] = "eth77"
    with pytest.raises(LaunchError, match=r"GLOO_SOCKET_IFNAME=eth77 is not an interface.*lo"):
        choose_interface("127.0.0.1")
