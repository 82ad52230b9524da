"""Open MPI on nodes made of namespaces, two ranks on each: ranks come from mpi4py, under DeepSpeed's launcher and under
plain mpirun; asked to stop, the run saves, and started again it is what it is on one machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import nodes
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, make_assets, read_ledger, run_settings, train_here, write_settings

pytestmark = pytest.mark.distributed
ENVIRONMENT = {"VENV": sys.prefix, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
STEPS, RANKS = 30, 4


def test_both_ways_over_mpi_train_as_one_machine_does(tmp_path: Path) -> None:
    nodes.require("mpirun", "orted")
    # Asked in another process: importing it starts an MPI job here, whose environment mpirun would inherit.
    if subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, check=False).returncode:
        pytest.skip("no mpi4py, or it finds no MPI library")
    make_assets(tmp_path / "assets")
    names = ("alone", "launcher", "mpirun")
    configs = {
        name: write_settings(tmp_path / f"{name}.yaml", run_settings(tmp_path / "assets", tmp_path / name, steps=STEPS))
        for name in names
    }
    run_distributed(train_here, RANKS, configs["alone"])
    with nodes.cluster(tmp_path / "nodes", count=2, slots=2) as cluster:
        launcher = (nodes.ROOT / "launch_scripts" / "multinode.sh", cluster.hostfile, configs["launcher"])
        environment = {**ENVIRONMENT, "LAUNCHER": "openmpi", "PREFLIGHT": "0"}
        stop_in_the_middle(cluster, cluster.start_on(cluster.head, *launcher, environment=environment), tmp_path)
        code, output = cluster.run_on(cluster.head, *launcher, environment=environment)
        assert code == 0 and "resumed" in output, output

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


def stop_in_the_middle(cluster: nodes.Cluster, launched: subprocess.Popen[str], folder: Path) -> None:
    """Ask the run to stop when it has begun, by a SIGTERM to multinode.sh."""
    metrics, deadline = folder / "launcher" / "metrics.jsonl", time.monotonic() + 180
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert launched.poll() is None and time.monotonic() < deadline, launched.communicate()[0]
        time.sleep(0.05)
    cluster.send(launched, signal.SIGTERM)
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 75, output
    assert "asked to stop: saved update" in output
    assert len(losses(folder / "launcher")) < STEPS
