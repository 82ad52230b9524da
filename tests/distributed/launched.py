"""Commands that tests start, watch and wait for."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path


def finish(process: subprocess.Popen[str], timeout: float = 400) -> tuple[int, str]:
    """Exit code and output of a command, once it has ended. timeout: seconds."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Until the run that the process trains has logged that many steps."""
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, f"it ended before:\n{finish(process)[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.05)
