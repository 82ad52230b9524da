"""Slow ranks by name. In synchronous training all ranks take the same time an update: each waits for the slowest.

What is a rank's own is measured apart from the waiting: the seconds from the end of an update to its next collective
(its data, its host), and, every now and then, a fixed piece of arithmetic on its device. Both stand in events.jsonl as
``rank_times``, with the slowest rank of each.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.config.resilience_config import StragglerConfig
from trainer.resilience.events import EventLog
from trainer.runtime.distributed import World, gather_objects

_log = logging.getLogger(__name__)
_WIDTH, _REPETITIONS = 512, 5


@dataclass(frozen=True)
class RankSeconds:
    """A rank's own time. data: waiting for data, mean of the last updates. compute: the fixed arithmetic, the best."""

    host: str
    data: float
    compute: float


class Stragglers:
    """Collects the ranks' own times, and names those that are far above the others', every ``config.every`` updates."""

    def __init__(self, config: StragglerConfig, world: World, events: EventLog) -> None:
        self._config, self._world, self._events = config, world, events
        self._waited: list[float] = []

    def record(self, step: int, data_seconds: float) -> None:
        """Note an update; a collective every ``config.every`` of them."""
        self._waited.append(data_seconds)
        if len(self._waited) < self._config.every:
            return
        mine = RankSeconds(socket.gethostname(), statistics.mean(self._waited), _compute_seconds(self._world.device))
        self._waited.clear()
        ranks = gather_objects(mine, self._world)
        self._events.write("rank_times", step, data=spread(ranks, "data"), compute=spread(ranks, "compute"))
        for rank, seconds, what, times in find_stragglers(ranks, self._config):
            self._events.write("straggler", step, rank=rank, host=seconds.host, what=what, times_median=round(times, 2))
            if self._world.is_main:
                _log.warning("rank %d on %s is slow: its %s takes %.1f x the median", rank, seconds.host, what, times)


def spread(ranks: Sequence[RankSeconds], what: str) -> dict[str, Any]:
    """How the ranks' seconds of "data" or "compute" lie, and whose are the most."""
    seconds = [getattr(one, what) for one in ranks]
    slowest = seconds.index(max(seconds))
    figures = {"least": min(seconds), "median": statistics.median(seconds), "most": seconds[slowest]}
    rounded = {name: round(value, 6) for name, value in figures.items()}
    return {**rounded, "slowest_rank": slowest, "host": ranks[slowest].host}


def find_stragglers(ranks: Sequence[RankSeconds], config: StragglerConfig) -> list[tuple[int, RankSeconds, str, float]]:
    """(rank, its times, "data" or "compute", how many times the median) of every rank above ``config.factor``."""
    found = []
    for what, least in (("data", config.least_seconds), ("compute", 0.0)):
        # The lower of two middle ones: of two ranks the slow one is then compared with the other.
        median = statistics.median_low(getattr(seconds, what) for seconds in ranks)
        for rank, seconds in enumerate(ranks):
            own = getattr(seconds, what)
            if own > config.factor * median and own - median > least:
                found.append((rank, seconds, what, own / max(median, 1e-9)))
    return found


def _compute_seconds(device: torch.device) -> float:
    """The best of some products of two matrices; a slow or throttled device shows in it, and waiting for others not."""
    matrix = torch.ones(_WIDTH, _WIDTH, device=device)
    best = float("inf")
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # reading it waits for the device
        best = min(best, time.perf_counter() - start)
    return best
