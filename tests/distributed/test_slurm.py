"""launch_scripts/slurm.sbatch under a real Slurm: preempted, the job saves, queues again, and completes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.distributed import nodes, slurm_nodes
from tests.distributed.small_run import losses, make_assets, read_ledger, run_settings, write_settings

pytestmark = pytest.mark.distributed
SCRIPT = nodes.ROOT / "launch_scripts" / "slurm.sbatch"
STEPS = 30


def test_preempted_it_saves_queues_and_completes(tmp_path: Path) -> None:
    nodes.require(*slurm_nodes.PROGRAMS)
    make_assets(tmp_path / "assets")
    run_dir, log = tmp_path / "run", tmp_path / "log"
    config = write_settings(tmp_path / "run.yaml", run_settings(tmp_path / "assets", run_dir, steps=STEPS))
    with nodes.cluster(tmp_path / "nodes", count=2) as cluster:
        slurm = slurm_nodes.Slurm(cluster, tmp_path / "slurm")
        submit = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--exclusive"]
        job = slurm.run(
            *submit, "-p", "low", "-o", log, "-D", nodes.ROOT, SCRIPT, config, environment={"VENV": sys.prefix}
        ).strip()
        metrics = run_dir / "metrics.jsonl"

        def has_begun() -> bool:
            assert slurm.state(job).split()[0] in ("PENDING", "RUNNING"), log.read_text()
            return metrics.exists() and metrics.read_text().count("\n") >= 2

        slurm.wait_for(has_begun)
        first = slurm.run(*submit, "-p", "high", "-o", "/dev/null", "--wrap", "true").strip()
        slurm.wait_for(lambda: slurm.state(first) == "COMPLETED 0")
        assert len(losses(run_dir)) < STEPS
        slurm.wait_for(lambda: slurm.state(job) == "PENDING 1")
        slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm lets a requeued job wait two minutes
        slurm.wait_for(lambda: slurm.state(job) not in ("PENDING 1", "RUNNING 1"))
        output = log.read_text()
        assert slurm.state(job) == "COMPLETED 1", output
    assert "preflight: 2 of 2 nodes are ready" in output
    assert "asked to stop: saved update" in output and "resumed" in output
    assert (run_dir / "complete").exists()
    assert len(losses(run_dir)) == STEPS
    assert {step for step, *_ in read_ledger(run_dir)} == set(range(1, STEPS + 1))
