"""A supervised run survives the loss of a node, a request to stop, and the return of the node."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import nodes
from tests.distributed.launched import finish, steps_logged
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import make_assets, read_events, read_ledger, run_settings, write_settings
from tests.distributed.train_in_process import train_run

pytestmark = pytest.mark.distributed
STEPS = 60


def wait_for(supervisor: subprocess.Popen[str], run_dir: Path, step: int, starts: int) -> None:
    """Wait until the run has logged that many steps, and the job has started (and resumed) as often as expected."""
    deadline = time.monotonic() + 300
    while (
        steps_logged(run_dir) < step
        or len(read_events(run_dir, "start")) < starts
        or len(read_events(run_dir, "resumed")) < starts - 1
    ):
        assert supervisor.poll() is None and time.monotonic() < deadline, finish(supervisor)[1]
        time.sleep(0.1)


@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_nodes_go_on_without_a_lost_third_and_all_three_finish(tmp_path: Path, slots: int) -> None:
    nodes.require("pdsh")
    make_assets(tmp_path / "assets")

    def settings(run_dir: Path) -> dict[str, object]:
        values = run_settings(tmp_path / "assets", run_dir, steps=STEPS)
        for source in values["data"]["sources"]:
            source["batch_size"] = 12
        return values

    run_distributed(train_run, 1, settings(tmp_path / "one"))
    run_dir = tmp_path / "run"
    config = write_settings(tmp_path / "run.yaml", settings(run_dir))
    environment = {"VENV": sys.prefix, "PREFLIGHT": "0"}
    with nodes.cluster(tmp_path / "nodes", count=3, slots=slots) as cluster:
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
    assert [event["processes"] for event in read_events(run_dir, "start")] == [3 * slots, 2 * slots, 3 * slots]
    assert read_ledger(run_dir) == read_ledger(tmp_path / "one")
