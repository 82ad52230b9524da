"""Stop at the end of a step when a signal requests it, or when the command that started this process is gone.

A signal may reach a single rank, or each rank in another step. All ranks therefore agree before any of them stops, and
save the same checkpoint together. A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.errors import TrainerError
from trainer.resilience.starters import Starters
from trainer.runtime.distributed import World
from trainer.runtime.stop_signals import EXIT_STOPPED, CtrlC, handling, write_to_terminal


class PreemptedError(TrainerError):
    """Report that the run stopped on request, after saving a checkpoint."""

    exit_code = EXIT_STOPPED


class Preemption:
    """Remember whether this process was requested to stop."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._starters = Starters()
        self._signaled = False
        self._ctrl_c = CtrlC()

    @property
    def requested(self) -> bool:
        """Whether this process was requested to stop; other ranks may differ."""
        return self._signaled or self._starters.gone()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._signaled and self._world.is_main:
            again = "; press Ctrl-C again to end without saving" if number == signal.SIGINT else ""
            write_to_terminal(f"{signal.Signals(number).name}: saving at the end of this step{again}")
        self._signaled = True
        if self._ctrl_c.is_second(number):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remember the signals, instead of ending the process, while the context is open."""
        with handling(self._note):
            yield
