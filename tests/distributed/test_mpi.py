"""Training over Open MPI on two nodes of two ranks equals training on one machine.

Both ways to start it are tested: DeepSpeed's openmpi launcher, with a stop in the middle, and plain mpirun.
The nodes are made of namespaces (``nodes``).
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import nodes
from tests.distributed.launched import finish, wait_for_step
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import (
    losses,
    make_assets,
    read_events,
    read_ledger,
    run_settings,
    write_settings,
)
from tests.distributed.train_in_process import train_run

pytestmark = pytest.mark.distributed
ENVIRONMENT = {"VENV": sys.prefix, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
STEPS, RANKS = 30, 4


def test_both_ways_to_start_over_mpi_train_as_one_machine_does(tmp_path: Path) -> None:
    nodes.require("mpirun", "orted")
    # Another process imports it, because the import sets MPI variables that mpirun would inherit.
    if subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, check=False).returncode:
        pytest.skip("no mpi4py, or it finds no MPI library")
    make_assets(tmp_path / "assets")
    names = ("alone", "launcher", "mpirun")
    settings = {name: run_settings(tmp_path / "assets", tmp_path / name, steps=STEPS) for name in names}
    configs = {name: write_settings(tmp_path / f"{name}.yaml", settings[name]) for name in names}
    run_distributed(train_run, RANKS, settings["alone"])
    with nodes.cluster(tmp_path / "nodes", count=2, slots=2) as cluster:
        launcher = (nodes.ROOT / "launch_scripts" / "multinode.sh", cluster.hostfile, configs["launcher"])
        environment = {**ENVIRONMENT, "LAUNCHER": "openmpi", "PREFLIGHT": "0"}
        launched = cluster.start_on(cluster.head, *launcher, environment=environment)
        stop_in_the_middle(cluster, launched, tmp_path / "launcher")
        code, output = cluster.run_on(cluster.head, *launcher, environment=environment)
        assert code == 0 and read_events(tmp_path / "launcher", "resumed"), output

        interfaces = ["--mca", "btl_tcp_if_include", nodes.INTERFACE, "--mca", "oob_tcp_if_include", nodes.INTERFACE]
        forwarded = ["-x", "DS_ACCELERATOR", "-x", "PATH"]
        mpirun = ["mpirun", "-n", str(RANKS), "--hostfile", cluster.hostfile, *interfaces, *forwarded]
        trainer = [sys.executable, "-m", "trainer.train", configs["mpirun"]]
        code, output = cluster.run_on(cluster.head, *mpirun, *trainer, environment=ENVIRONMENT)
        assert code == 0, output
    for name in names[1:]:
        assert (tmp_path / name / "complete").exists()
        ledgers = sorted(path.name for path in (tmp_path / name / "ledger").iterdir())
        assert ledgers == [f"rank-{rank}.jsonl" for rank in range(RANKS)]
        assert losses(tmp_path / name) == losses(tmp_path / "alone"), "bit for bit"
        assert read_ledger(tmp_path / name) == read_ledger(tmp_path / "alone")


def stop_in_the_middle(cluster: nodes.Cluster, launched: subprocess.Popen[str], run_dir: Path) -> None:
    """Send SIGTERM to multinode.sh after two steps; expect a checkpoint and exit code 75."""
    wait_for_step(launched, run_dir, 2)
    cluster.send(launched, signal.SIGTERM)
    code, output = finish(launched, timeout_seconds=120)
    assert code == 75, output
    assert read_events(run_dir, "preempted")
    assert len(losses(run_dir)) < STEPS
