"""Run work in a thread of each rank, and let the ranks agree on whether it has finished or failed.

A rank never waits inside one collective for the long work of another rank, so the timeout of collectives can stay
short. An error of one rank reaches all ranks at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from trainer.checkpoint.errors import CheckpointError
from trainer.runtime.distributed import World, gather_objects, sum_over_ranks

Result = TypeVar("Result")
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.001, 0.25

_log = logging.getLogger(__name__)


class BackgroundWork(Generic[Result]):
    """Run this rank's ``work`` in a thread; all ranks create theirs at the same point of the program.

    Args:
        work: Function to run; it must not call collectives.
        world: Ranks that take part.
        purpose: Start of the error message ("cannot write ...").
        remedy: End of the error message, which says what to do.
    """

    def __init__(self, work: Callable[[], Result], world: World, *, purpose: str, remedy: str) -> None:
        self._work, self._world = work, world
        self._purpose, self._remedy = purpose, remedy
        self._result: Result
        self._error: Exception | None = None
        self._finished = threading.Event()
        # A daemon thread does not keep a rank alive that fails elsewhere.
        threading.Thread(target=self._run, name=purpose, daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:  # noqa: BLE001  finished_everywhere raises it on all ranks
            self._error = error
        self._finished.set()

    def finished_everywhere(self) -> bool:
        """Return whether the work of all ranks has finished; a short collective.

        Raises:
            CheckpointError: The work of a rank failed. All ranks raise it with the same message.
        """
        finished = self._finished.is_set()
        failed = finished and self._error is not None
        all_finished, any_failed = sum_over_ranks([finished, failed], self._world)
        if any_failed:
            raise CheckpointError(self._failure()) from self._error
        return all_finished == self._world.size

    def wait(self) -> Result:
        """Wait for all ranks and return this rank's result; errors as ``finished_everywhere``."""
        pause = _FIRST_PAUSE_SECONDS
        while not self.finished_everywhere():
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return self._result

    def _failure(self) -> str:
        if self._error is not None and not isinstance(self._error, OSError):
            _log.error("%s", self._purpose, exc_info=self._error)
        mine = None if self._error is None else f"{type(self._error).__name__}: {self._error}"
        messages = gather_objects(mine, self._world)
        named = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
        return f"{self._purpose}: {'; '.join(named)}. {self._remedy}"
