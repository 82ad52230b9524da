"""``trainer.supervise`` on one machine handles kill -9, a bug, a request to stop and a wrong configuration."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launched import finish, kill_rank_1, start, wait_for_step
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, read_events, read_ledger, run_settings, write_settings
from tests.distributed.train_in_process import train_run

pytestmark = pytest.mark.distributed
STEPS = 40


def supervise(config: Path, *options: str) -> subprocess.Popen[str]:
    """Start ``trainer.supervise`` with two processes."""
    return start([sys.executable, "-m", "trainer.supervise", "--processes", "2", *options, "--", config])


def test_a_run_killed_then_stopped_then_started_again_is_the_same_run(assets: Path, tmp_path: Path) -> None:
    run_distributed(train_run, 2, run_settings(assets, tmp_path / "whole", steps=STEPS))
    settings = run_settings(assets, tmp_path / "run", steps=STEPS)
    config = write_settings(tmp_path / "run.yaml", settings)

    supervisor = supervise(config)
    wait_for_step(supervisor, tmp_path / "run", 5)
    kill_rank_1(supervisor)
    wait_for_step(supervisor, tmp_path / "run", 15)
    supervisor.send_signal(signal.SIGTERM)
    code, output = finish(supervisor)
    assert code == 75, output
    kinds = [event["event"] for event in read_events(tmp_path / "run")]
    assert kinds.count("restart") == 1
    assert kinds.index("restart") < kinds.index("resumed") < kinds.index("preempted")

    code, output = finish(supervise(config))
    assert code == 0, output
    assert losses(tmp_path / "run") == losses(tmp_path / "whole"), "bit for bit"
    assert read_ledger(tmp_path / "run") == read_ledger(tmp_path / "whole")


def test_the_same_error_twice_ends_the_supervisor(assets: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "run.yaml", run_settings(assets, tmp_path / "run"))
    code, output = finish(supervise(config, "--module", "tests.distributed.buggy_train"))
    assert code == 1, output
    assert "ValueError: a bug at step 4" in output
    assert len(read_events(tmp_path / "run", "restart")) == 1
    [gave_up] = read_events(tmp_path / "run", "gave_up")
    assert gave_up["step"] == 3


def test_a_wrong_configuration_is_not_started(assets: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run")
    settings["training"]["stepz"] = 3
    code, output = finish(supervise(write_settings(tmp_path / "run.yaml", settings)))
    assert code == 2 and "training.stepz" in output and "training.steps" in output.replace("training.stepz", "")
    assert not (tmp_path / "run").exists()
