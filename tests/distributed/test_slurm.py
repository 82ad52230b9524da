"""A job of launch_scripts/slurm.sbatch that is preempted or out of time saves, queues again, and completes.

Slurm is real; its nodes are made of namespaces (``nodes``, ``slurm_nodes``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.distributed import nodes, slurm_nodes
from tests.distributed.launched import steps_logged
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, read_events, read_ledger, run_settings, write_settings
from tests.distributed.train_in_process import train_run

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
    """Return the folder of the same run on one machine, never interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    run_distributed(train_run, 2, run_settings(assets, folder / "run", steps=STEPS))
    return folder / "run"


@dataclass(frozen=True)
class Job:
    """A job of slurm.sbatch on both nodes."""

    slurm: slurm_nodes.Slurm
    number: str
    run_dir: Path
    log: Path

    @classmethod
    def submit(cls, slurm: slurm_nodes.Slurm, assets: Path, folder: Path, **environment: str) -> Job:
        """Submit the job as a user would, to the partition whose jobs can be preempted."""
        config = write_settings(folder / "run.yaml", run_settings(assets, folder / "run", steps=STEPS))
        command = [*SUBMIT, "-p", "low", "-o", folder / "log", "-D", nodes.ROOT, SCRIPT, config]
        number = slurm.run(*command, environment={"VENV": sys.prefix, **environment}).strip()
        return cls(slurm, number, folder / "run", folder / "log")

    def has_begun(self) -> bool:
        """Return whether two steps are logged; fail if the job has ended."""
        assert self.slurm.state(self.number).split()[0] in ("PENDING", "RUNNING"), self.log.read_text()
        return steps_logged(self.run_dir) >= 2

    def finish_after_requeue(self, *changes: str) -> str:
        """Wait until the job is back in the queue, start it soon, and return its log when it is complete.

        Args:
            *changes: Further settings of the job (``scontrol update``) to make before it starts.
        """
        self.slurm.wait_for(lambda: self.slurm.state(self.number) == "PENDING 1")
        assert len(losses(self.run_dir)) < STEPS
        # Slurm would let a requeued job wait two minutes. Three seconds are needed: a node that sees the job again
        # within the second in which it ended takes it for dead.
        self.slurm.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+3", *changes)
        self.slurm.wait_for(lambda: self.slurm.state(self.number) not in ("PENDING 1", "RUNNING 1"))
        assert self.slurm.state(self.number) == "COMPLETED 1", self.log.read_text()
        return self.log.read_text()

    def assert_like(self, alone: Path) -> None:
        """Check that the run is complete, with the losses and samples of the run on one machine."""
        assert (self.run_dir / "complete").exists()
        assert losses(self.run_dir) == losses(alone), "bit for bit"
        assert read_ledger(self.run_dir) == read_ledger(alone)


def test_a_preempted_job_saves_queues_and_completes(
    slurm: slurm_nodes.Slurm, assets: Path, alone: Path, tmp_path: Path
) -> None:
    job = Job.submit(slurm, assets, tmp_path)
    slurm.wait_for(job.has_begun)
    first = slurm.run(*SUBMIT, "-p", "high", "-o", "/dev/null", "--wrap", "true").strip()
    slurm.wait_for(lambda: slurm.state(first) == "COMPLETED 0")
    output = job.finish_after_requeue()
    assert "2 of 2 nodes" in output
    assert read_events(job.run_dir, "preempted") and read_events(job.run_dir, "resumed")
    job.assert_like(alone)


@pytest.mark.long
def test_a_job_warned_before_its_time_is_over_saves_queues_and_completes(
    slurm: slurm_nodes.Slurm, assets: Path, alone: Path, tmp_path: Path
) -> None:
    """The warning is the script's own ``#SBATCH --signal``.

    Slurm checks time limits twice a minute, so the ranks are suspended meanwhile; Slurm continues a process before it
    signals it.
    """
    job = Job.submit(slurm, assets, tmp_path, PREFLIGHT="0")
    slurm.wait_for(job.has_begun)
    for node in slurm.cluster.nodes:
        for rank in trainers(node):
            rank.suspend()
    slurm.run("scontrol", "update", f"JobId={job.number}", "EndTime=now+120")
    job.finish_after_requeue("TimeLimit=60")
    assert read_events(job.run_dir, "preempted")
    job.assert_like(alone)


def trainers(node: nodes.Node) -> list[psutil.Process]:
    """Return the ranks on a node, without srun and without loader processes, which are forks of the ranks."""
    processes = psutil.Process(node.pid).children(recursive=True)
    ranks = [process for process in processes if process.cmdline()[1:4] == ["-u", "-m", "trainer.train"]]
    return [rank for rank in ranks if rank.parent() not in ranks]
