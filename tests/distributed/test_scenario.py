"""A run of weeks in small: three nodes, one is lost, two go on, they are asked to stop, three finish it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import nodes
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import make_assets, read_ledger, run_settings, write_settings
from tests.distributed.test_resilience import train_plainly
from tests.distributed.test_supervisor import events, finish

pytestmark = pytest.mark.distributed
STEPS = 60


def wait_for(supervisor: subprocess.Popen[str], run_dir: Path, step: int, starts: int) -> None:
    """Until the job was started that many times and has come to an update."""
    deadline = time.monotonic() + 300
    metrics = run_dir / "metrics.jsonl"
    while (
        not metrics.exists()
        or metrics.read_text().count("\n") < step
        or count(run_dir, "start") < starts
        or count(run_dir, "resumed") < starts - 1
    ):
        assert supervisor.poll() is None and time.monotonic() < deadline, finish(supervisor)[1]
        time.sleep(0.1)


def count(run_dir: Path, kind: str) -> int:
    return sum(event["event"] == kind for event in events(run_dir))


def test_a_node_is_lost_two_go_on_and_three_finish(tmp_path: Path) -> None:
    nodes.require("pdsh")
    make_assets(tmp_path / "assets")

    def settings(run_dir: Path) -> dict[str, object]:
        values = run_settings(tmp_path / "assets", run_dir, steps=STEPS)
        for source in values["data"]["sources"]:
            source["batch_size"] = 12
        return values

    run_distributed(train_plainly, 1, settings(tmp_path / "one"))
    run_dir = tmp_path / "run"
    config = write_settings(tmp_path / "run.yaml", settings(run_dir))
    environment = {"VENV": sys.prefix, "PREFLIGHT": "0"}
    with nodes.cluster(tmp_path / "nodes", count=3, slots=2) as cluster:
        command = (sys.executable, "-m", "trainer.supervise", "--hostfile", cluster.hostfile, "--", config)
        supervisor = cluster.start_on(cluster.head, *command, environment=environment)
        wait_for(supervisor, run_dir, 5, starts=1)
        lost_at = time.monotonic()
        cluster.lose(cluster.nodes[2])
        wait_for(supervisor, run_dir, 12, starts=2)
        print(f"training again {time.monotonic() - lost_at:.0f} s after the loss of a node")
        cluster.send(supervisor, signal.SIGTERM)
        code, output = finish(supervisor)
        assert code == 75, output

        cluster.restore(cluster.nodes[2])
        code, output = cluster.run_on(cluster.head, *command, environment=environment)
        assert code == 0, output
    started = [event["processes"] for event in events(run_dir) if event["event"] == "start"]
    assert started == [6, 4, 6]
    assert read_ledger(run_dir) == read_ledger(tmp_path / "one")
