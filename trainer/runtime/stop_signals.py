"""Handle the signals that ask a process to stop, without torch.

SIGTERM and SIGUSR1 (Slurm's warning) ask to stop; so do Ctrl-C (SIGINT) and the end of a terminal (SIGHUP). SIGHUP
stays ignored where the starter of this process ignored it, as nohup does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
# Programs such as ``uv run`` pass on a Ctrl-C that the terminal has sent to this process already.
_SAME_CTRL_C_SECONDS = 1.0

Handler = Callable[[int, FrameType | None], None]


class StoppedError(BaseException):
    """Unwind a process that was asked to stop while it had nothing to save; like SystemExit, no library catches it."""


class CtrlC:
    """Tell a second Ctrl-C from a first one that arrives twice."""

    def __init__(self) -> None:
        """Begin without a Ctrl-C."""
        self._first: float | None = None

    def is_second(self, number: int) -> bool:
        """Note a signal, and return whether it is a Ctrl-C after the first one."""
        if number != signal.SIGINT:
            return False
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first > _SAME_CTRL_C_SECONDS


def handled_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask this process to stop."""
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (under_nohup and number == signal.SIGHUP))


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Pass the signals that ask to stop to ``handler`` while the context is open; only the main thread may enter it."""
    before = {number: signal.signal(number, handler) for number in handled_signals()}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Raise StoppedError; the handler for times at which there is nothing to save."""
    raise StoppedError(f"{signal.Signals(number).name} arrived while there was nothing to save")


def follow_parent() -> None:
    """Leave the decision to stop to the parent: ignore its signals, and end when it ends, however that happens.

    Linux sends SIGKILL to this process when the thread that started it ends. Other systems have no such request.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def write_to_terminal(text: str) -> None:
    """Write a line to standard error from a signal handler, where ``print`` might interrupt itself."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"{text}\n".encode())
