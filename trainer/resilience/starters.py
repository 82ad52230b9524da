"""Notice that the command that started this process is gone, so that no process trains on without it.

DeepSpeed's command passes no signal on to its launcher, and nobody can after ``kill -9``. The launcher and its ranks
would then train on, unseen, with the run folder locked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

# Programs and modules that start ranks on this machine. A shell, mpirun or srun may end before the run does.
_STARTERS = frozenset({"deepspeed", "deepspeed.launcher.launch", "local.sh", "trainer.supervise"})


class Starters:
    """Watch the chain of starters above this process: local.sh, trainer.supervise, deepspeed, its launcher."""

    def __init__(self) -> None:
        self._links = tuple(_links())

    def gone(self) -> bool:
        """Return whether one of them has ended. Linux then gives the process that it started another parent."""
        return any(_parent_of(child) != parent for child, parent in self._links)


def _links() -> Iterator[tuple[int, int]]:
    """Yield (process, its starter), from this process upwards."""
    try:
        process = psutil.Process()
        while (parent := process.parent()) is not None and _is_starter(parent.cmdline()):
            yield process.pid, parent.pid
            process = parent
    except psutil.Error:  # it belongs to another user, or ended just now
        return


def _is_starter(command: list[str]) -> bool:
    return any(Path(word).name in _STARTERS for word in command)


def _parent_of(process: int) -> int | None:
    if process == os.getpid():
        return os.getppid()
    try:
        return psutil.Process(process).ppid()
    except psutil.Error:
        return None
