"""``trainer.supervise`` on one machine: real kill -9, a real bug, a request to stop, a wrong configuration."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.launched import finish, wait_for_step
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, read_ledger, run_settings, write_settings
from tests.distributed.test_resilience import train_plainly

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
STEPS = 40


def supervise(config: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer.supervise", "--processes", "2", *options, "--", str(config)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_killed_then_stopped_then_started_again_is_the_same_run(assets: Path, tmp_path: Path) -> None:
    run_distributed(train_plainly, 2, run_settings(assets, tmp_path / "whole", steps=STEPS))
    settings = run_settings(assets, tmp_path / "run", steps=STEPS)
    config = write_settings(tmp_path / "run.yaml", settings)

    supervisor = supervise(config)
    wait_for_step(supervisor, tmp_path / "run", 5)
    for child in psutil.Process(supervisor.pid).children(recursive=True):
        if "--local_rank=1" in child.cmdline():
            child.send_signal(signal.SIGKILL)
            break
    wait_for_step(supervisor, tmp_path / "run", 15)
    supervisor.send_signal(signal.SIGTERM)
    code, output = finish(supervisor)
    assert code == 75, output
    assert output.count("supervisor: the job ended") == 1 and "starting again" in output
    kinds = [event["event"] for event in events(tmp_path / "run")]
    assert kinds.index("restart") < kinds.index("resumed") < kinds.index("preempted")

    code, output = finish(supervise(config))
    assert code == 0, output
    assert losses(tmp_path / "run") == losses(tmp_path / "whole"), "bit for bit"
    assert read_ledger(tmp_path / "run") == read_ledger(tmp_path / "whole")


def test_a_bug_ends_it_at_its_second_time(assets: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "run.yaml", run_settings(assets, tmp_path / "run"))
    code, output = finish(supervise(config, "--module", "tests.distributed.buggy_train"))
    assert code == 1, output
    assert "the same error twice after update 3" in output and "a bug at update 4" in output
    assert [event["event"] for event in events(tmp_path / "run")].count("restart") == 1


def test_a_wrong_configuration_is_not_tried(assets: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run")
    settings["training"]["stepz"] = 3
    code, output = finish(supervise(write_settings(tmp_path / "run.yaml", settings)))
    assert code == 2 and "did you mean training.steps" in output
    assert not (tmp_path / "run").exists()
