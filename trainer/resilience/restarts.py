"""Decide whether a failed job is started again, and on which nodes; this module starts no processes."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.resilience.hostfile import Host
from trainer.runtime.run_folder import RunFolder

# Messages of a process whose peer is gone. They say nothing about the process that reports them.
_PEER_LOST = re.compile(r"gloo|nccl|RankFailedError|connection (reset|closed|refused)|TCPStore|broken pipe", re.I)
_SUSPECT_AFTER = 2


@dataclass(frozen=True)
class Failure:
    """Describe how an attempt ended.

    Attributes:
        step: Steps done.
        errors: (host, message) of each process that failed by itself.
    """

    step: int
    errors: frozenset[tuple[str, str]]


def read_failure(run_folder: RunFolder, num_events_before: int) -> Failure:
    """Read from the run folder how the last attempt ended.

    Args:
        run_folder: Folder of the run.
        num_events_before: Number of events when the attempt began.
    """
    failed = [event for event in read_events(run_folder)[num_events_before:] if event["event"] == "failed"]
    errors = {(event["host"], event["error"]) for event in failed if not _PEER_LOST.search(event["error"])}
    return Failure(steps_done(run_folder), frozenset(errors))


def cause_on_another_rank(run_folder: RunFolder, error: Exception, rank: int, since: str) -> str | None:
    """Return which other rank failed first, and how, if ``error`` only tells that a peer is gone; else None.

    Args:
        run_folder: Folder of the run.
        error: Error of this rank.
        rank: This rank.
        since: Start of this attempt, as the events write it.
    """
    if not _PEER_LOST.search(str(error)):
        return None
    for event in read_events(run_folder):
        if event["event"] == "failed" and event["time"] >= since and event["rank"] != rank:
            if not _PEER_LOST.search(event["error"]):
                return f"rank {event['rank']} on {event['host']} failed: {event['error']}"
    return None


def read_events(run_folder: RunFolder) -> list[dict[str, Any]]:
    """Read the events of a run; none if there is no file yet."""
    return _read_lines(run_folder.events)


def steps_done(run_folder: RunFolder) -> int:
    """Return the last step in metrics.jsonl; 0 if there is none."""
    return max((line["step"] for line in _read_lines(run_folder.metrics)[-1:]), default=0)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of all lines that a kill or a full disk did not cut off."""
    if not path.exists():
        return []
    objects = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                objects.append(json.loads(line))
    return [value for value in objects if isinstance(value, dict)]


class RestartPolicy:
    """Remember failures, and decide when to stop restarting and which hosts to leave out.

    Args:
        restarts: Restarts after failures that are allowed in any period of ``within_seconds``.
        within_seconds: Length of that period.
    """

    def __init__(self, restarts: int, within_seconds: float) -> None:
        self._restarts, self._within_seconds = restarts, within_seconds
        self._times: deque[float] = deque()
        self._last: Failure | None = None
        self._failed_alone: Counter[str] = Counter()

    def reason_to_stop(self, failure: Failure, now: float) -> str | None:
        """Record a failure and return why the job should not start again; None if it should.

        Args:
            failure: How the last attempt ended.
            now: Time of a monotonic clock, in seconds.
        """
        last, self._last = self._last, failure
        messages = {message for _, message in failure.errors}
        if last is not None and last.step == failure.step:
            same = messages & {message for _, message in last.errors}
            if same:
                return f"the same error twice after step {failure.step}, so a restart would not help: {min(same)}"
        hosts = {host for host, _ in failure.errors}
        if len(hosts) == 1:
            self._failed_alone.update(hosts)
        while self._times and now - self._times[0] > self._within_seconds:
            self._times.popleft()
        if len(self._times) >= self._restarts:
            minutes = self._within_seconds / 60
            return f"{len(self._times)} restarts in {minutes:g} minutes did not help (--restarts, --within)"
        self._times.append(now)
        return None

    @property
    def suspects(self) -> frozenset[str]:
        """Hosts that failed alone more than once, so that the fault is probably theirs."""
        return frozenset(host for host, count in self._failed_alone.items() if count >= _SUSPECT_AFTER)


def choose_hosts(
    hosts: Sequence[Host], excluded: Collection[str], suspects: Collection[str], allowed: Iterable[int]
) -> tuple[Host, ...]:
    """Choose hosts and processes per host for the largest possible world; empty if none is possible.

    Args:
        hosts: Hosts of the hostfile.
        excluded: Hosts that do not answer.
        suspects: Hosts to leave out as long as others remain.
        allowed: World sizes that the batch sizes allow.
    """
    answering = [host for host in hosts if host.name not in excluded]
    usable = [host for host in answering if host.name not in suspects] or answering
    sizes, best = set(allowed), (0, 0)
    for count in range(1, len(usable) + 1):
        # DeepSpeed needs the same number of processes on each host.
        for slots in range(1, min(host.slots for host in usable[:count]) + 1):
            if count * slots in sizes and count * slots > best[0] * best[1]:
                best = (count, slots)
    return tuple(Host(host.name, best[1]) for host in usable[: best[0]])
