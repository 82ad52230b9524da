"""launch_scripts/slurm.sbatch under a real Slurm: preempted or out of time, the job saves, queues again, and completes
as if it had run on one machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.distributed import nodes, slurm_nodes
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, read_ledger, run_settings, train_here, write_settings

pytestmark = pytest.mark.distributed
SCRIPT = nodes.ROOT / "launch_scripts" / "slurm.sbatch"
SUBMIT = ("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--exclusive")
STEPS = 30


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_nodes.Slurm]:
    nodes.require(*slurm_nodes.PROGRAMS)
    with nodes.cluster(tmp_path_factory.mktemp("nodes"), count=2) as cluster:
        yield slurm_nodes.Slurm(cluster, tmp_path_factory.mktemp("slurm") / "slurm")


@pytest.fixture(scope="module")
def alone(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run on one machine, never interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    settings = run_settings(assets, folder / "run", steps=STEPS)
    run_distributed(train_here, 2, write_settings(folder / "run.yaml", settings))
    return folder / "run"


@dataclass(frozen=True)
class Job:
    """A run of slurm.sbatch on both nodes."""

    slurm: slurm_nodes.Slurm
    number: str
    run_dir: Path
    log: Path

    @classmethod
    def submit(cls, slurm: slurm_nodes.Slurm, assets: Path, folder: Path, **environment: str) -> Job:
        """As a user would, in the partition that others preempt."""
        config = write_settings(folder / "run.yaml", run_settings(assets, folder / "run", steps=STEPS))
        command = [*SUBMIT, "-p", "low", "-o", folder / "log", "-D", nodes.ROOT, SCRIPT, config]
        number = slurm.run(*command, environment={"VENV": sys.prefix, **environment}).strip()
        return cls(slurm, number, folder / "run", folder / "log")

    def has_begun(self) -> bool:
        """Whether it trains; an error when it ended."""
        assert self.slurm.state(self.number).split()[0] in ("PENDING", "RUNNING"), self.log.read_text()
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") >= 2

    def finish_after_requeue(self, *changes: str) -> str:
        """Wait until it is back in the queue, start it soon, and return its log when it is complete.

        changes: what else to set of the job (``scontrol update``) before it starts.
        """
        self.slurm.wait_for(lambda: self.slurm.state(self.number) == "PENDING 1")
        assert len(losses(self.run_dir)) < STEPS
        # Slurm lets a requeued job wait two minutes; within the second it was ended in, a node would take it for dead.
        self.slurm.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+3", *changes)
        self.slurm.wait_for(lambda: self.slurm.state(self.number) not in ("PENDING 1", "RUNNING 1"))
        assert self.slurm.state(self.number) == "COMPLETED 1", self.log.read_text()
        return self.log.read_text()

    def assert_like(self, alone: Path) -> None:
        """Complete, and in losses and samples the same as a run on one machine."""
        assert (self.run_dir / "complete").exists()
        assert losses(self.run_dir) == losses(alone), "bit for bit"
        assert read_ledger(self.run_dir) == read_ledger(alone)


def test_preempted_it_saves_queues_and_completes(
    slurm: slurm_nodes.Slurm, assets: Path, alone: Path, tmp_path: Path
) -> None:
    job = Job.submit(slurm, assets, tmp_path)
    slurm.wait_for(job.has_begun)
    first = slurm.run(*SUBMIT, "-p", "high", "-o", "/dev/null", "--wrap", "true").strip()
    slurm.wait_for(lambda: slurm.state(first) == "COMPLETED 0")
    output = job.finish_after_requeue()
    assert "preflight: 2 of 2 nodes are ready" in output
    assert "asked to stop: saved update" in output and "resumed" in output
    job.assert_like(alone)


def test_warned_before_its_time_is_over_it_saves_queues_and_completes(
    slurm: slurm_nodes.Slurm, assets: Path, alone: Path, tmp_path: Path
) -> None:
    """By the script's own ``#SBATCH --signal``. Slurm looks at time limits twice a minute; the ranks stand still until
    then, for Slurm continues a process before it signals it."""
    job = Job.submit(slurm, assets, tmp_path, PREFLIGHT="0")
    slurm.wait_for(job.has_begun)
    for node in slurm.cluster.nodes:
        for rank in trainers(node):
            rank.suspend()
    slurm.run("scontrol", "update", f"JobId={job.number}", "EndTime=now+120")
    output = job.finish_after_requeue("TimeLimit=60")
    assert "asked to stop: saved update" in output and "going back into the queue" in output
    job.assert_like(alone)


def trainers(node: nodes.Node) -> list[psutil.Process]:
    """The ranks on a node, without their loader processes, which are forks of them, and without srun."""
    processes = psutil.Process(node.pid).children(recursive=True)
    ranks = [process for process in processes if process.cmdline()[1:4] == ["-u", "-m", "trainer.train"]]
    return [rank for rank in ranks if rank.parent() not in ranks]
