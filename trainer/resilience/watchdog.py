"""Find a hung process, write the stacks of all processes and end the job instead of letting it idle.

A thread of each process watches its progress. When one process hangs, the others soon wait for it in a collective, so
all of them see that nothing moves. Each writes the stacks of its threads to ``stacks/START/rank-N.txt`` of the run
folder. It also sends a signal to processes of its node that cannot do so themselves (stopped, or stuck while they hold
the interpreter's lock); C code handles that signal. Then it exits with ``EXIT_HUNG``. ``kill -USR2 PID`` writes the
stacks of a process at any time without ending it.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import psutil

from trainer.config.resilience_config import WatchdogConfig
from trainer.resilience.events import EventLog
from trainer.runtime.distributed import World, collective_records, gather_objects, set_collective_timeout
from trainer.runtime.run_folder import RunFolder

EXIT_HUNG = 124  # as timeout(1)
# torch records the last collectives of each process, and writes the record when a collective times out.
_FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_FR_DUMP_ON_TIMEOUT": "1"}
_STARTUP_STEPS = 2  # the first steps compile, build and fill caches

_log = logging.getLogger(__name__)


def enable_flight_recorder(run_folder: RunFolder) -> None:
    """Enable torch's record of collectives; call this before the process group exists. Variables already set stay."""
    prefix = str(run_folder.stacks.resolve() / "flight-recorder-")
    for name, value in (*_FLIGHT_RECORDER.items(), ("TORCH_FR_DUMP_TEMP_FILE", prefix)):
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class _Peer:
    """Identify a process of the job.

    Attributes:
        host: Name of its node.
        pid: Process id.
        start: Time of its start, as the name of a folder.
    """

    host: str
    pid: int
    start: str


class Watchdog:
    """End this process when it makes no progress for ``config.seconds``; the constructor is a collective.

    Args:
        run_folder: Folder of the run.
        config: Time limits.
        timeout_seconds: Timeout of collectives during start, resume and saves. At other times the timeout is short, so
            that a hang which the watchdog does not see also ends soon.
        world: Processes of the run.
        events: Where to log that this process hung.
    """

    def __init__(
        self, run_folder: RunFolder, config: WatchdogConfig, timeout_seconds: float, world: World, events: EventLog
    ) -> None:
        self._config, self._timeout_seconds, self._world, self._events = config, timeout_seconds, world, events
        me = _Peer(socket.gethostname(), os.getpid(), f"{datetime.now(UTC):%Y%m%d-%H%M%S}")
        self._peers: Sequence[_Peer] = gather_objects(me, world)
        self._folder = run_folder.stacks / self._peers[0].start
        self._stop = threading.Event()
        self._steps = 0
        self._slow = True
        self._activity, self._since, self._limit = "starting", time.monotonic(), config.startup_seconds

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Expect progress while the context is open; without ``config.seconds`` nothing is watched."""
        if self._config.seconds is None:
            yield
            return
        self._stacks = self._open_stacks()
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self.starting()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGUSR2)
            self._remove_if_empty(self._stacks)

    def _open_stacks(self) -> TextIO:
        """Return the file for the stacks of this process; standard error where the run folder takes no file."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return self._stacks_of(self._world.rank).open("w", encoding="utf-8")
        except OSError as error:
            _log.warning("cannot write stacks to %s: %s; if this rank hangs, they go to stderr", self._folder, error)
            return os.fdopen(os.dup(2), "w", encoding="utf-8")

    def starting(self) -> None:
        """Report progress and expect slow steps next, as after a start or a rewind."""
        self._steps = 0
        self.alive("resuming", slow=True)

    def step_done(self, step: int) -> None:
        """Report that a step is done; the wait for the data of the next one begins."""
        self._steps += 1
        self.alive(f"waiting for the data of step {step + 1}")

    def alive(self, activity: str, slow: bool = False) -> None:
        """Report progress.

        Args:
            activity: Work that begins now; named if the process hangs in it.
            slow: Whether the work may take ``config.startup_seconds``.
        """
        if self._config.seconds is None:
            return
        slow = slow or self._steps < _STARTUP_STEPS
        if slow != self._slow:
            grace = 2 * self._config.grace_seconds
            set_collective_timeout(self._timeout_seconds if slow else self._config.seconds + grace)
            self._slow = slow
        self._limit = self._config.startup_seconds if slow else self._config.seconds
        self._activity, self._since = activity, time.monotonic()
        # This dump runs in C, so it also works when the interpreter's lock is held. It comes later than the thread's
        # report, which says more.
        later = self._limit + 2 * self._config.grace_seconds
        faulthandler.dump_traceback_later(later, exit=True, file=self._stacks)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._limit / 10)):
            if (silent := time.monotonic() - self._since) > self._limit:
                self._end(silent)

    def _end(self, silent: float) -> None:
        """Write the report and exit; runs in the watchdog's thread."""
        workers = psutil.Process().children(recursive=True)
        try:
            with suppress(OSError):  # the disk may be full, but the job must end
                self._report(silent, workers)
            for worker in workers:
                _signal(worker.pid, signal.SIGKILL)
        finally:
            os._exit(EXIT_HUNG)

    def _report(self, silent: float, workers: Sequence[psutil.Process]) -> None:
        me, rank = self._peers[self._world.rank], self._world.rank
        text = (
            f"rank {rank} of {self._world.size} (process {me.pid} on {me.host}) made no progress for {silent:.0f} s; "
        )
        text += f"last activity: {self._activity}"
        self._stacks.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        _log.error("%s; stacks of all ranks: %s; exit code %d", text, self._folder, EXIT_HUNG)
        self._events.write("hung", activity=self._activity, silent_seconds=round(silent, 1), stacks=str(self._folder))
        with suppress(OSError):
            (self._folder / f"collectives-rank-{rank:05d}.json").write_text(collective_records(), encoding="utf-8")
        for worker in workers:  # loader processes are forks, so they have the handler and the file of this process
            _signal(worker.pid, signal.SIGUSR2)
        time.sleep(self._config.grace_seconds)  # the other processes notice the hang now, too
        for number, peer in enumerate(self._peers):
            if peer.host == me.host and peer.pid != me.pid and not _size(self._stacks_of(number)):
                _signal(peer.pid, signal.SIGCONT)
                _signal(peer.pid, signal.SIGUSR2)
        time.sleep(min(1.0, self._config.grace_seconds))  # the signaled processes write their stacks

    def _stacks_of(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"

    def _remove_if_empty(self, file: TextIO) -> None:
        with suppress(OSError):  # the disk is full
            file.close()
        path = self._stacks_of(self._world.rank)
        with suppress(OSError):  # it was never made
            if not _size(path):
                path.unlink()
        with suppress(OSError):  # not empty, or another rank removed it
            self._folder.rmdir()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
