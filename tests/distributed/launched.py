"""Start commands as a user would, wait for them, and watch the runs that they train."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.distributed.processes import start_fork

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def start(command: Sequence[str | Path]) -> subprocess.Popen[str]:
    """Start a command in the clone, in a session of its own; errors go to its output."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def python(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE ARGUMENTS`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def forked(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run what ``python -m MODULE ARGUMENTS`` runs, in a fork of a process that has torch loaded.

    It takes a second or two instead of ten.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = start_fork(_call_main, module, arguments, folder)
        process.join(timeout=180)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{module} takes too long")
        output, errors = ((Path(folder) / name).read_text() for name in ("output", "errors"))
        return subprocess.CompletedProcess([module, *arguments], process.exitcode, output, errors)


def _call_main(module: str, arguments: Sequence[str], folder: str) -> None:
    """Call a command's ``main``; its output and errors go to files in a folder."""
    os.chdir(ROOT)
    os.environ.update(ENVIRONMENT)
    for name, stream in (("output", sys.stdout), ("errors", sys.stderr)):
        with (Path(folder) / name).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    code = importlib.import_module(module).main(list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def finish(process: subprocess.Popen[str], timeout_seconds: float = 400) -> tuple[int, str]:
    """Wait for a command to end; return its exit code and output."""
    output, _ = process.communicate(timeout=timeout_seconds)
    return process.returncode, output


def steps_logged(run_dir: Path) -> int:
    """Return how many steps the run's metrics.jsonl holds."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Wait until the process has logged that many steps of the run."""
    wait_until(process, lambda: steps_logged(run_dir) >= step)


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool], timeout_seconds: float = 300) -> None:
    """Wait until the process has made a condition true."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert process.poll() is None, f"it ended too early:\n{finish(process)[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_rank_1(launcher: subprocess.Popen[str]) -> None:
    """Send SIGKILL to the training process of rank 1 under a launcher; its loader workers end with it."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if "--local_rank=1" in child.cmdline():
            child.send_signal(signal.SIGKILL)
            return
    raise AssertionError("rank 1 is not running")
