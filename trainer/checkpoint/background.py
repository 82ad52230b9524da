"""Work that goes on in a thread while the ranks agree, by short collectives, whether it is finished or has failed.

No rank ever waits in one collective for another's long work, so no collective's timeout has to cover it; and an error
of one rank reaches all of them at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from trainer.checkpoint.training_state import CheckpointError
from trainer.runtime.distributed import World, gather_objects, sum_over_ranks

Result = TypeVar("Result")
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.001, 0.25

_log = logging.getLogger(__name__)


class BackgroundWork(Generic[Result]):
    """``work`` of this rank in a thread; every rank of ``world`` makes one at the same place. It uses no collectives.

    purpose: begins the message when it fails ("cannot write ..."). remedy: ends it, saying what to do.
    """

    def __init__(self, work: Callable[[], Result], world: World, *, purpose: str, remedy: str) -> None:
        self._work, self._world = work, world
        self._purpose, self._remedy = purpose, remedy
        self._result: Result
        self._error: Exception | None = None
        self._finished = threading.Event()
        # A daemon: a rank that fails elsewhere does not stay for it.
        threading.Thread(target=self._run, name=purpose, daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:  # noqa: BLE001  raised on all ranks by finished_everywhere
            self._error = error
        self._finished.set()

    def finished_everywhere(self) -> bool:
        """Whether all ranks' work is done; a short collective.

        Raises: CheckpointError on every rank, with the same message, as soon as one rank's work has failed.
        """
        finished = self._finished.is_set()
        failed = finished and self._error is not None
        all_finished, any_failed = sum_over_ranks([finished, failed], self._world)
        if any_failed:
            raise CheckpointError(self._failure()) from self._error
        return all_finished == self._world.size

    def wait(self) -> Result:
        """This rank's result, when all ranks have theirs. Raises: CheckpointError as ``finished_everywhere``."""
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
