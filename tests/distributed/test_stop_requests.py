"""Real commands that are asked to stop, or lose their starter, save and leave no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.launched import ENVIRONMENT, ROOT, finish, start, steps_logged, wait_for_step
from tests.distributed.small_run import losses, read_events, run_settings, write_settings

pytestmark = pytest.mark.distributed


def settings_of(assets: Path, run_dir: Path) -> dict[str, Any]:
    """Return settings of a run that nobody waits for to end, with loader processes."""
    settings = run_settings(assets, run_dir, steps=100_000)
    settings["checkpoint"]["every"] = 100_000
    settings["data"]["num_workers"] = 1
    return settings


def check_saved(run_dir: Path) -> None:
    """Check that every process of the run ends, and that the last step is saved."""
    deadline = time.monotonic() + 60
    while running := [p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in (p.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, running
        time.sleep(0.2)
    assert read_events(run_dir, "preempted")
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{len(losses(run_dir)):08d}"


def run_of(assets: Path, tmp_path: Path, *command: str | Path) -> subprocess.Popen[str]:
    config = write_settings(tmp_path / "run.yaml", settings_of(assets, tmp_path / "run"))
    process = start([*command, config, "--run_dir", tmp_path / "run"])
    wait_for_step(process, tmp_path / "run", 3)
    return process


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, marks=pytest.mark.long),
    ],
)
def test_a_group_with_loader_processes_saves(assets: Path, tmp_path: Path, number: int) -> None:
    process = run_of(assets, tmp_path, sys.executable, "-m", "trainer.train")
    os.killpg(process.pid, number)
    code, output = finish(process)
    assert code == 75, output
    check_saved(tmp_path / "run")


@pytest.mark.parametrize("send", [os.kill, pytest.param(os.killpg, marks=pytest.mark.long)], ids=["process", "group"])
def test_local_sh_saves(assets: Path, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, send: Any) -> None:
    for name, value in {
        "PROCESSES": "2",
        "MASTER_PORT": str(port),
        "VENV": str(Path(sys.executable).parents[1]),
    }.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    process = run_of(assets, tmp_path, ROOT / "launch_scripts" / "local.sh")
    send(process.pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    check_saved(tmp_path / "run")


@pytest.mark.parametrize("killed", [pytest.param("deepspeed", marks=pytest.mark.long), "deepspeed.launcher.launch"])
def test_ranks_whose_starter_is_killed_save_and_end(assets: Path, tmp_path: Path, port: int, killed: str) -> None:
    process = run_of(
        assets,
        tmp_path,
        "deepspeed",
        "--num_accelerators",
        "2",
        "--master_port",
        str(port),
        "--module",
        "trainer.train",
    )
    for starter in (psutil.Process(process.pid), *psutil.Process(process.pid).children()):
        if killed in {Path(word).name for word in starter.cmdline()}:
            starter.kill()
            break
    process.wait(timeout=60)
    check_saved(tmp_path / "run")


def test_a_console_that_goes_away_does_not_end_a_run(assets: Path, tmp_path: Path) -> None:
    process = run_of(assets, tmp_path, sys.executable, "-m", "trainer.train")
    assert process.stdout is not None
    process.stdout.close()
    before = steps_logged(tmp_path / "run")
    while steps_logged(tmp_path / "run") < before + 5:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    check_saved(tmp_path / "run")


def test_supervise_saves_when_its_terminal_goes_away(assets: Path, tmp_path: Path) -> None:
    process = run_of(assets, tmp_path, sys.executable, "-m", "trainer.supervise", "--processes", "2", "--")
    os.killpg(process.pid, signal.SIGHUP)
    code, output = finish(process)
    assert code == 75, output
    check_saved(tmp_path / "run")
