"""Asked to stop (SIGTERM, SIGUSR1: Slurm's warning, a scheduler's preemption): leave at the end of an update.

A signal may reach one rank only, or each at another update. All ranks agree before anything is done about it, so that
they save the same checkpoint together.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.errors import TrainerError
from trainer.runtime.distributed import World, any_rank

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptedError(TrainerError):
    """The run was asked to stop, and did so with a checkpoint."""

    exit_code = EXIT_PREEMPTED


class Preemption:
    """Remembers that this process was asked to stop; ``agreed`` says whether any rank was."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked = False

    @property
    def asked(self) -> bool:
        """Whether this process was asked; the others may not have been."""
        return self._asked

    def agreed(self) -> bool:
        """Whether to stop now, the same on every rank; a collective."""
        return any_rank(self._asked, self._world)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals are noted instead of ending the process."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
