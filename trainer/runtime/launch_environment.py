"""Find out how this process was launched, and set the variables that torch.distributed reads.

The deepspeed launcher and torchrun set all of them, mpirun and srun none. Variables may also be left over from another
launcher, or belong to a Slurm job whose shell runs this process without ``srun``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from trainer.errors import TrainerError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# srun sets none of the variables that torch reads.
_SLURM_VARIABLES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
_FIRST_SPECIAL_STEP = 0xFFFF_FFF0  # Slurm numbers the steps of batch scripts and interactive shells from here on
ADVICE = "If no launcher started this process, its variables are left over from another one: unset " + " ".join(
    _VARIABLES
)

_log = logging.getLogger(__name__)


class LaunchError(TrainerError):
    """Report environment variables that do not describe a group of processes."""

    exit_code = 2


def complete_environment() -> bool:
    """Set the variables that torch.distributed needs and the launcher left out; return False without a launcher.

    Raises:
        LaunchError: The variables are incomplete or contradict each other.
    """
    environment = os.environ
    if "RANK" in environment:
        check_variables(environment)
        return True
    if "OMPI_COMM_WORLD_SIZE" in environment:
        _read_mpi_environment()
        return True
    step = job_step(environment)
    if step is not None and step[1] > 1:
        environment["WORLD_SIZE"] = str(step[1])
        for name, slurm_name in _SLURM_VARIABLES.items():
            environment.setdefault(name, environment[slurm_name])
        environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        # Every process must know the port before any of them starts, so nobody can hand over an open one.
        environment.setdefault("MASTER_PORT", "29500")
        return True
    if step is None and "PMI_SIZE" in environment:
        _read_mpi_environment()
        return True
    _warn_of_unused_processes(environment, step)
    return False


def check_variables(environment: Mapping[str, str]) -> None:
    """Check the variables that a launcher sets.

    Raises:
        LaunchError: One is missing, no number, or out of its range.
    """
    needed = [name for name in _VARIABLES if name != "LOCAL_RANK" or environment.get("WORLD_SIZE") != "1"]
    missing = [name for name in needed if not environment.get(name)]
    shown = ", ".join(f"{name}={environment[name]}" for name in _VARIABLES if environment.get(name))
    if missing:
        raise LaunchError(f"the environment has {shown}, but not {', '.join(missing)}. {ADVICE}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise LaunchError(f"{name}={environment[name]} is not a number. {ADVICE}")
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        raise LaunchError(f"RANK is not below WORLD_SIZE ({shown}). {ADVICE}")
    if not 0 < int(environment["MASTER_PORT"]) < 2**16:
        raise LaunchError(f"MASTER_PORT={environment['MASTER_PORT']} is no port; set one from 1024 to 65535")


def job_step(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the rank and the number of tasks of the Slurm job step that this process belongs to.

    None outside a step: in the shell of ``sbatch`` or ``salloc``, SLURM_NTASKS is the size of the whole job, but this
    process is alone.
    """
    number = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    if not number.isdecimal() or int(number) >= _FIRST_SPECIAL_STEP or "SLURM_PROCID" not in environment:
        return None
    size = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    return int(environment["SLURM_PROCID"]), int(size)


def _warn_of_unused_processes(environment: Mapping[str, str], step: tuple[int, int] | None) -> None:
    """Say so where variables promise more processes than this one."""
    if step is not None:
        return
    for name, program in (("SLURM_NTASKS", "srun"), ("WORLD_SIZE", "a launcher, which sets RANK too")):
        size = environment.get(name, "")
        if size.isdecimal() and int(size) > 1:
            message = "%s is %s, but nothing started this process as one of them: it trains alone. For more, use %s"
            _log.warning(message, name, size, program)


def _read_mpi_environment() -> None:
    """Take rank, size and master from mpi4py, through DeepSpeed; an address and port that are set already stay."""
    import deepspeed

    given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    deepspeed.comm.mpi_discovery(verbose=False)
    os.environ.update(given)
    from mpi4py import MPI

    MPI.Finalize()  # nothing else uses MPI, and mpirun takes a process for failed that ends without this
