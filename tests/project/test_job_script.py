"""A request to stop reaches the ranks through launch_scripts/local.sh; stand-ins play the launcher and its rank."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.project.test_scripts import Clone

pytestmark = pytest.mark.slow

# Both survive SIGUSR1 as Python does: the launcher never handles it, the rank does once it has started.
RANK = """
import os, signal, sys, time
time.sleep(0.5)
def save(number, frame):
    time.sleep(float(sys.argv[1]))
    open("saved", "w").close()
    os._exit(75)
signal.signal(signal.SIGUSR1, save)
print("training", flush=True)
time.sleep(60)
"""
LAUNCHER = 'echo $$ >"$PWD/launcher"; {python} rank.py {seconds}; code=$?; [ $code = 0 ] || exit $code'


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts local.sh, whose rank takes some seconds to save."""
    clone = Clone(tmp_path)
    (tmp_path / "rank.py").write_text(RANK)

    def start(seconds: float = 0.1, *wrapper: str) -> subprocess.Popen[str]:
        clone.stand_in("deepspeed", LAUNCHER.format(python=clone.bin / "python", seconds=seconds))
        command = [*wrapper, str(tmp_path / "launch_scripts" / "local.sh"), "run.yaml"]
        environment = {**os.environ, "PROCESSES": "2", "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(
            command,
            env={key: value for key, value in environment.items() if key != "VENV"},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    return start


def wait_until_training(script: subprocess.Popen[str]) -> None:
    assert script.stdout is not None
    while (line := script.stdout.readline()) != "training\n":
        assert line, "it ended before it trained"


def is_running(folder: Path) -> bool:
    return Path(f"/proc/{(folder / 'launcher').read_text().strip()}").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["process", "group"])
def test_a_signal_lets_the_ranks_save(
    tmp_path: Path,
    started: Callable[..., subprocess.Popen[str]],
    number: int,
    send: Callable[[int, int], None],
) -> None:
    script = started()
    wait_until_training(script)
    send(script.pid, number)
    assert script.wait(timeout=30) == 75
    assert (tmp_path / "saved").exists() and not is_running(tmp_path)


def test_a_request_before_the_ranks_can_handle_it_is_repeated(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    script = started()
    while not (tmp_path / "launcher").exists():
        time.sleep(0.01)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 75
    assert (tmp_path / "saved").exists()


def test_a_second_ctrl_c_ends_the_job_at_once(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    script = started(60)
    wait_until_training(script)
    script.send_signal(signal.SIGINT)
    script.send_signal(signal.SIGINT)  # the same one, passed on by a wrapper
    time.sleep(2.5)
    assert script.poll() is None
    script.send_signal(signal.SIGINT)
    assert script.wait(timeout=30) == 130
    assert not (tmp_path / "saved").exists() and not is_running(tmp_path)


def test_nohup_keeps_the_job_running(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    script = started(0.1, "nohup")
    wait_until_training(script)
    os.killpg(script.pid, signal.SIGHUP)
    time.sleep(1.5)
    assert script.poll() is None and is_running(tmp_path)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 75


def test_a_console_that_is_gone_does_not_end_the_job(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    script = started()
    wait_until_training(script)
    assert script.stdout is not None
    script.stdout.close()
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 75
    assert (tmp_path / "saved").exists()
