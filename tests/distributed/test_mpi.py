"""Open MPI on nodes made of namespaces: ranks come from mpi4py, under DeepSpeed's launcher and under plain mpirun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import nodes
from tests.distributed.small_run import losses, make_assets, run_settings, write_settings

pytestmark = pytest.mark.distributed
ENVIRONMENT = {"VENV": sys.prefix, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
STEPS = 3


def test_both_ways_over_mpi_train_the_same(tmp_path: Path) -> None:
    nodes.require("mpirun", "orted")
    # Asked in another process: importing it starts an MPI job here, whose environment mpirun would inherit.
    if subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, check=False).returncode:
        pytest.skip("no mpi4py, or it finds no MPI library")
    make_assets(tmp_path / "assets")
    paths = {}
    for name in ("launcher", "mpirun"):
        settings = run_settings(tmp_path / "assets", tmp_path / name, steps=STEPS)
        paths[name] = write_settings(tmp_path / f"{name}.yaml", settings)
    with nodes.cluster(tmp_path / "nodes", count=2) as cluster:
        code, output = cluster.run_on(
            cluster.head,
            nodes.ROOT / "launch_scripts" / "multinode.sh",
            cluster.hostfile,
            paths["launcher"],
            environment={**ENVIRONMENT, "LAUNCHER": "openmpi", "PREFLIGHT": "0"},
        )
        assert code == 0, output
        interfaces = ["--mca", "btl_tcp_if_include", nodes.INTERFACE, "--mca", "oob_tcp_if_include", nodes.INTERFACE]
        command = [
            "mpirun",
            "-n",
            "2",
            "--hostfile",
            cluster.hostfile,
            *interfaces,
            "-x",
            "DS_ACCELERATOR",
            "-x",
            "PATH",
        ]
        trainer = [sys.executable, "-m", "trainer.train", paths["mpirun"]]
        code, output = cluster.run_on(cluster.head, *command, *trainer, environment=ENVIRONMENT)
        assert code == 0, output
    for name in paths:
        assert (tmp_path / name / "complete").exists()
        assert sorted(path.name for path in (tmp_path / name / "ledger").iterdir()) == ["rank-0.jsonl", "rank-1.jsonl"]
    assert len(losses(tmp_path / "launcher")) == STEPS
    assert losses(tmp_path / "launcher") == losses(tmp_path / "mpirun")
