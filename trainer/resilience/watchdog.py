"""A process that hangs is found, the stacks of all processes are written, and the job ends instead of idling.

Each process watches itself from a thread. When one hangs, the others soon wait for it in a collective, so all of them
find that nothing moves: each writes the stacks of all its threads to ``run_dir/stacks/START/rank-N.txt``, asks the
processes of its node that cannot do it themselves (stopped, or stuck with the interpreter's lock held) for theirs by a
signal that C code handles, and leaves with ``EXIT_HUNG``. ``kill -USR2 PID`` does that at any time, and ends nothing.
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
from trainer.runtime.distributed import (
    World,
    collective_records,
    gather_objects,
    set_collective_timeout,
)

EXIT_HUNG = 124  # what timeout(1) exits with
STACKS = "stacks"
# torch's record of the last collectives of each process: on, and written when a collective times out.
_FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_FR_DUMP_ON_TIMEOUT": "1"}
_STEPS_OF_STARTUP = 2  # the first ones compile, build and fill caches

_log = logging.getLogger(__name__)


def enable_flight_recorder(run_dir: Path) -> None:
    """Turn torch's record of collectives on, before the process group is made; what the user has set stays."""
    prefix = str(run_dir.resolve() / STACKS / "flight-recorder-")
    for name, value in (*_FLIGHT_RECORDER.items(), ("TORCH_FR_DUMP_TEMP_FILE", prefix)):
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class _Peer:
    """A process of the job. start: its clock, as the folder's name."""

    host: str
    pid: int
    start: str


class Watchdog:
    """Ends this process when it makes no progress for ``config.seconds``; a collective to build.

    timeout_seconds: of collectives while starting, resuming and saving; in between it is short, so that also what the
    watchdog does not see ends soon.
    """

    def __init__(
        self, run_dir: Path, config: WatchdogConfig, timeout_seconds: float, world: World, events: EventLog
    ) -> None:
        self._config, self._timeout_seconds, self._world, self._events = config, timeout_seconds, world, events
        me = _Peer(socket.gethostname(), os.getpid(), f"{datetime.now(UTC):%Y%m%d-%H%M%S}")
        self._peers: Sequence[_Peer] = gather_objects(me, world)
        self._folder = run_dir / STACKS / self._peers[0].start
        self._stop = threading.Event()
        self._updates = 0
        self._slow = True
        self._what, self._since, self._limit = "starting", time.monotonic(), config.startup_seconds

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, progress is expected. Without ``config.seconds`` nothing is watched."""
        if self._config.seconds is None:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._stacks_of(self._world.rank).open("w", encoding="utf-8")
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

    def starting(self) -> None:
        """Progress, with slow updates to come: after a start, and after a rewind."""
        self._updates = 0
        self.alive("resuming", slow=True)

    def updated(self, step: int) -> None:
        """Progress: update ``step`` is done and the next one is waited for."""
        self._updates += 1
        self.alive(f"waiting for the data of update {step + 1}")

    def alive(self, what: str, slow: bool = False) -> None:
        """Progress. what: the work that begins, for the report. slow: it may take ``config.startup_seconds``."""
        if self._config.seconds is None:
            return
        slow = slow or self._updates < _STEPS_OF_STARTUP
        if slow != self._slow:
            grace = 2 * self._config.grace_seconds
            set_collective_timeout(self._timeout_seconds if slow else self._config.seconds + grace)
            self._slow = slow
        self._limit = self._config.startup_seconds if slow else self._config.seconds
        self._what, self._since = what, time.monotonic()
        # In C, and so also when the interpreter's lock is held; later than the thread, which says more.
        later = self._limit + 2 * self._config.grace_seconds
        faulthandler.dump_traceback_later(later, exit=True, file=self._stacks)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._limit / 10)):
            if (silent := time.monotonic() - self._since) > self._limit:
                self._end(silent)

    def _end(self, silent: float) -> None:
        """Write what can be known and leave; this runs in the watchdog's thread."""
        me, rank = self._peers[self._world.rank], self._world.rank
        text = (
            f"rank {rank} of {self._world.size} (process {me.pid} on {me.host}) made no progress for {silent:.0f} s; "
        )
        text += f"last: {self._what}"
        self._stacks.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        _log.error("%s; stacks of all ranks: %s; exit code %d", text, self._folder, EXIT_HUNG)
        with suppress(OSError):  # the disk may be what hangs, or is full; the job has to end all the same
            self._events.write("hung", what=self._what, silent_seconds=round(silent, 1), stacks=str(self._folder))
            (self._folder / f"collectives-rank-{rank:05d}.json").write_text(collective_records(), encoding="utf-8")
        workers = psutil.Process().children(recursive=True)
        for worker in workers:  # loader processes are forks, and have the handler and the file of this one
            _signal(worker.pid, signal.SIGUSR2)
        time.sleep(self._config.grace_seconds)  # the others find out now, too
        for number, peer in enumerate(self._peers):
            if peer.host == me.host and peer.pid != me.pid and not self._stacks_of(number).stat().st_size:
                _signal(peer.pid, signal.SIGCONT)
                _signal(peer.pid, signal.SIGUSR2)
        time.sleep(min(1.0, self._config.grace_seconds))  # for what was just asked for
        for worker in workers:
            _signal(worker.pid, signal.SIGKILL)
        os._exit(EXIT_HUNG)

    def _stacks_of(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"

    def _remove_if_empty(self, file: TextIO) -> None:
        file.close()
        path = Path(file.name)
        if not path.stat().st_size:
            path.unlink()
        with suppress(OSError):  # not empty yet, or another rank removed it
            self._folder.rmdir()


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
