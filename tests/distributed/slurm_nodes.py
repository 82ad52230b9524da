"""Run Slurm on nodes made of namespaces: munge everywhere, slurmctld on the head, slurmd on the nodes.

Slurm uses no cgroups here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.distributed.nodes import Cluster, Node

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun")
_CONFIGURATION = """
ClusterName=test
SlurmctldHost=head({head})
AuthType=auth/munge
AuthInfo=socket=/run/munge/munge.socket
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,sched_min_interval=0
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """A running Slurm.

    Attributes:
        cluster: The nodes.
        environment: Variables that Slurm's commands need. They run on the head.
    """

    def __init__(self, cluster: Cluster, folder: Path, cpus: int = 2) -> None:
        self.cluster = cluster
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        folder.mkdir()
        (folder / "state").mkdir()
        (folder / "key").write_bytes(bytes(range(256)) * 4)
        (folder / "key").chmod(0o400)
        nodes = "\n".join(
            f"NodeName={node.name} NodeAddr={node.address} CPUs={cpus} State=UNKNOWN" for node in cluster.nodes
        )
        text = _CONFIGURATION.format(head=cluster.head.address, folder=folder, nodes=nodes)
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        for node in [cluster.head, *cluster.nodes]:
            munge = (
                "mkdir -m 755 /run/munge && mount -t tmpfs tmpfs /sys/fs/cgroup && "
                f"munged --force --key-file={folder}/key --socket=/run/munge/munge.socket --pid-file=/run/munge/pid "
                f"--log-file={folder}/munge-{node.name}.log --seed-file={folder}/seed-{node.name}"
            )
            code, output = cluster.run_on(node, "bash", "-c", munge)
            assert code == 0, output
        self._start_daemon(cluster.head, "slurmctld")
        for node in cluster.nodes:
            (folder / f"spool-{node.name}").mkdir()
            self._start_daemon(node, "slurmd")
        names = {node.name for node in cluster.nodes}
        self.wait_for(lambda: set(self.run("sinfo", "-hN", "-p", "low", "-t", "idle", "-o", "%N").split()) == names)

    def _start_daemon(self, node: Node, program: str) -> None:
        code, output = self.cluster.run_on(node, "bash", "-c", f"{program} </dev/null", environment=self.environment)
        assert code == 0, output

    def run(self, *command: str | Path, environment: dict[str, str] | None = None) -> str:
        """Run a Slurm command on the head and return its output."""
        given = {**self.environment, **(environment or {})}
        code, output = self.cluster.run_on(self.cluster.head, *command, environment=given)
        assert code == 0, output
        return output

    def state(self, job: str) -> str:
        """Return a job's state and how often it was restarted, such as "RUNNING 1"."""
        fields = dict(field.partition("=")[::2] for field in self.run("scontrol", "show", "job", "-o", job).split())
        return f"{fields['JobState']} {fields['Restarts']}"

    @staticmethod
    def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
        """Poll until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
            time.sleep(0.2)
