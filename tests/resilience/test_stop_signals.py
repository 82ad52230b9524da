"""Signals that ask to stop: who handles them, who ignores them, and what ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trainer.resilience.preemption import Preemption
from trainer.runtime.distributed import World
from trainer.runtime.stop_signals import STOP_SIGNALS, StoppedError, handled_signals, handling, stop_at_once

ROOT = Path(__file__).parents[2]
WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def start(program: str) -> subprocess.Popen[str]:
    """Start a Python program in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ends(process: int, seconds: float = 10) -> bool:
    """Return whether a process ends within some seconds; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_outside_of_training_a_signal_unwinds_the_process_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in STOP_SIGNALS:
        with pytest.raises(StoppedError, match=number.name), handling(stop_at_once):
            signal.raise_signal(number)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("ignored", STOP_SIGNALS)
def test_only_the_signal_that_nohup_ignores_stays_ignored(ignored: signal.Signals) -> None:
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        assert (ignored not in handled_signals()) == (ignored == signal.SIGHUP)
    finally:
        signal.signal(ignored, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_during_training_a_signal_is_remembered(number: signal.Signals) -> None:
    preemption = Preemption(WORLD)
    with preemption.listening():
        assert not preemption.requested
        signal.raise_signal(number)
        signal.raise_signal(number)  # the same Ctrl-C, passed on by a wrapper
        assert preemption.requested


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_process() -> None:
    program = """
import time
import torch
from trainer.resilience.preemption import Preemption
from trainer.runtime.distributed import World
with Preemption(World(0, 1, 0, torch.device("cpu"))).listening():
    print("listening", flush=True)
    time.sleep(60)
    time.sleep(60)
"""
    process = start(program)
    while (line := line_of(process)) != "listening":
        assert line, "it ended too early"
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


FOLLOWER = """
import os, time
from trainer.runtime.stop_signals import follow_parent
if os.fork() == 0:
    follow_parent()
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_loader_process_ignores_the_signals_of_its_rank_and_ends_with_it() -> None:
    rank = start(FOLLOWER)
    follower = int(line_of(rank))
    for number in STOP_SIGNALS:
        os.kill(follower, number)
    assert not ends(follower, seconds=0.3)
    rank.kill()
    assert ends(follower)
    rank.wait()


def test_a_rank_notices_that_its_launcher_is_gone(tmp_path: Path) -> None:
    """``deepspeed`` starts the launcher, which starts the rank; the first of them is killed."""
    (tmp_path / "rank.py").write_text(
        "import os, sys, time\n"
        "from trainer.resilience.starters import Starters\n"
        "starters = Starters()\n"
        "print(os.getpid(), starters.gone(), flush=True)\n"
        "while not starters.gone(): time.sleep(0.05)\n"
        "print('gone', flush=True)\n"
    )
    for name, then in (("deepspeed", "local.sh"), ("local.sh", "rank.py")):
        (tmp_path / name).write_text(
            f"import subprocess, sys\nsubprocess.run([sys.executable, {str(tmp_path / then)!r}])"
        )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "deepspeed")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        rank, gone = line_of(process).split()
        assert gone == "False"
        process.kill()
        assert line_of(process) == "gone"
        assert ends(int(rank))
