"""Training over Open MPI on two nodes of two ranks equals training on one machine.

Both ways to start it are tested: plain mpirun, and DeepSpeed's openmpi launcher with a stop in the middle.
The nodes are made of namespaces (``nodes``).
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import nodes
from tests.distributed.launched import finish, wait_for_step
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import (
    losses,
    read_events,
    read_ledger,
    run_settings,
    write_settings,
)
from tests.distributed.train_in_process import train_run

pytestmark = pytest.mark.distributed
ENVIRONMENT = {"VENV": sys.prefix, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
STEPS, RANKS = 30, 4


@pytest.fixture(scope="module")
def alone(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run on one machine."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    run_distributed(train_run, RANKS, run_settings(assets, run_dir, steps=STEPS))
    return run_dir


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nodes.Cluster]:
    nodes.require("mpirun", "orted")
    # Another process imports it, because the import sets MPI variables that mpirun would inherit.
    if subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, check=False).returncode:
        pytest.skip("no mpi4py, or it finds no MPI library")
    with nodes.cluster(tmp_path_factory.mktemp("nodes"), count=2, slots=2) as made:
        yield made


def test_mpirun_trains_as_one_machine_does(assets: Path, cluster: nodes.Cluster, alone: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "run.yaml", run_settings(assets, tmp_path / "run", steps=STEPS))
    interfaces = ["--mca", "btl_tcp_if_include", nodes.INTERFACE, "--mca", "oob_tcp_if_include", nodes.INTERFACE]
    forwarded = ["-x", "DS_ACCELERATOR", "-x", "PATH"]
    mpirun = ["mpirun", "-n", str(RANKS), "--hostfile", cluster.hostfile, *interfaces, *forwarded]
    trainer = [sys.executable, "-m", "trainer.train", config]
    code, output = cluster.run_on(cluster.head, *mpirun, *trainer, environment=ENVIRONMENT)
    assert code == 0, output
    check_like(tmp_path / "run", alone)


@pytest.mark.long
def test_the_openmpi_launcher_stops_resumes_and_trains_as_one_machine_does(
    assets: Path, cluster: nodes.Cluster, alone: Path, tmp_path: Path
) -> None:
    config = write_settings(tmp_path / "run.yaml", run_settings(assets, tmp_path / "run", steps=STEPS))
    launcher = (nodes.ROOT / "launch_scripts" / "multinode.sh", cluster.hostfile, config)
    environment = {**ENVIRONMENT, "LAUNCHER": "openmpi", "PREFLIGHT": "0"}
    launched = cluster.start_on(cluster.head, *launcher, environment=environment)
    stop_in_the_middle(cluster, launched, tmp_path / "run")
    code, output = cluster.run_on(cluster.head, *launcher, environment=environment)
    assert code == 0 and read_events(tmp_path / "run", "resumed"), output
    check_like(tmp_path / "run", alone)


def check_like(run_dir: Path, alone: Path) -> None:
    """Check that the run is complete, with the losses and samples of the run on one machine."""
    assert (run_dir / "complete").exists()
    ledgers = sorted(path.name for path in (run_dir / "ledger").iterdir())
    assert ledgers == [f"rank-{rank}.jsonl" for rank in range(RANKS)]
    assert losses(run_dir) == losses(alone), "bit for bit"
    assert read_ledger(run_dir) == read_ledger(alone)


def stop_in_the_middle(cluster: nodes.Cluster, launched: subprocess.Popen[str], run_dir: Path) -> None:
    """Send SIGTERM to multinode.sh after two steps; expect a checkpoint and exit code 75."""
    wait_for_step(launched, run_dir, 2)
    cluster.send(launched, signal.SIGTERM)
    code, output = finish(launched, timeout_seconds=120)
    assert code == 75, output
    assert read_events(run_dir, "preempted")
    assert len(losses(run_dir)) < STEPS
