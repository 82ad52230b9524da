"""When a job that failed is started again, with which nodes, and when it is not: pure decisions, no processes."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.resilience.events import EVENTS
from trainer.resilience.hosts import Host

# What a process says when another one is gone: it tells nothing about the process that says it.
_OF_ANOTHER = re.compile(r"gloo|nccl|RankFailedError|connection (reset|closed|refused)|TCPStore|broken pipe", re.I)
_STRIKES = 2


@dataclass(frozen=True)
class Failure:
    """How an attempt ended. step: updates done. errors: (host, message) of processes that failed by themselves."""

    step: int
    errors: frozenset[tuple[str, str]]


def read_failure(run_dir: Path, events_before: int) -> Failure:
    """What the run folder says about the attempt that just ended.

    events_before: how many lines ``events.jsonl`` had when it began.
    """
    failed = [event for event in read_events(run_dir)[events_before:] if event["event"] == "failed"]
    errors = {(event["host"], event["error"]) for event in failed if not _OF_ANOTHER.search(event["error"])}
    return Failure(steps_done(run_dir), frozenset(errors))


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of ``events.jsonl``; none where there is no file yet."""
    return _read_lines(run_dir / EVENTS)


def steps_done(run_dir: Path) -> int:
    """The last update in metrics.jsonl."""
    return max((line["step"] for line in _read_lines(run_dir / "metrics.jsonl")[-1:]), default=0)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


class RestartPolicy:
    """Remembers failures, and says when to stop and whom to leave out.

    restarts, within_seconds: that many restarts after failures are allowed in any such time.
    """

    def __init__(self, restarts: int, within_seconds: float) -> None:
        self._restarts, self._within_seconds = restarts, within_seconds
        self._times: deque[float] = deque()
        self._last: Failure | None = None
        self._strikes: Counter[str] = Counter()

    def why_stop(self, failure: Failure, now: float) -> str | None:
        """Why the job is not started again after this failure; None when it is. now: a monotonic clock, seconds."""
        last, self._last = self._last, failure
        messages = {message for _, message in failure.errors}
        if last is not None and last.step == failure.step:
            same = messages & {message for _, message in last.errors}
            if same:
                return f"the same error twice after update {failure.step}, so a restart would not help: {min(same)}"
        hosts = {host for host, _ in failure.errors}
        if len(hosts) == 1:
            self._strikes.update(hosts)
        while self._times and now - self._times[0] > self._within_seconds:
            self._times.popleft()
        if len(self._times) >= self._restarts:
            minutes = self._within_seconds / 60
            return f"{len(self._times)} restarts in {minutes:g} minutes did not help (--restarts, --within)"
        self._times.append(now)
        return None

    @property
    def suspects(self) -> frozenset[str]:
        """Hosts that failed alone, at different updates, so often that the fault is theirs."""
        return frozenset(host for host, count in self._strikes.items() if count >= _STRIKES)


def choose_hosts(
    hosts: Sequence[Host], excluded: Collection[str], suspects: Collection[str], allowed: Iterable[int]
) -> tuple[Host, ...]:
    """The hosts, and processes on each, that make the largest world that the batches allow; none where there is none.

    excluded: hosts that do not answer. suspects: left out as long as others remain. allowed: possible world sizes.
    """
    answering = [host for host in hosts if host.name not in excluded]
    usable = [host for host in answering if host.name not in suspects] or answering
    sizes, best = set(allowed), (0, 0)
    for count in range(1, len(usable) + 1):
        # DeepSpeed wants the same number on each.
        for slots in range(1, min(host.slots for host in usable[:count]) + 1):
            if count * slots in sizes and count * slots > best[0] * best[1]:
                best = (count, slots)
    return tuple(Host(host.name, best[1]) for host in usable[: best[0]])
