"""Test the lock of a run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.resilience.run_lock import RunLockedError, run_lock
from trainer.runtime.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from trainer.resilience.run_lock import run_lock
from trainer.runtime.run_folder import RunFolder
with run_lock(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_job_is_refused_until_the_first_one_ends_even_by_kill_9(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=f"process {holder.pid} on"), run_lock(RunFolder(tmp_path)):
            pass
        holder.kill()
        holder.wait()
        with run_lock(RunFolder(tmp_path)):
            assert "process" in (tmp_path / "lock").read_text()


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), run_lock(RunFolder(tmp_path / "missing")):
        pass
