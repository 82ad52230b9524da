"""Find slow ranks.

In synchronous training every rank waits for the slowest one, so all ranks measure the same duration of a step. This
module compares times that belong to a single rank: its wait for data, and now and then a fixed computation on its
device. ``events.jsonl`` gets both as ``rank_times``, with the slowest rank of each.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trainer.config.resilience_config import StragglerConfig
from trainer.resilience.events import EventLog
from trainer.runtime.distributed import World, gather_objects

Cause = Literal["data", "compute"]
_MATRIX_SIZE, _REPETITIONS = 512, 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankSeconds:
    """Hold the times of one rank.

    Attributes:
        host: Name of its node.
        data: Wait for data, averaged over the last steps, in seconds.
        compute: Best time of the fixed computation, in seconds.
    """

    host: str
    data: float
    compute: float


class Stragglers:
    """Compare the ranks every ``config.every`` steps, and report those far above the median."""

    def __init__(self, config: StragglerConfig, world: World, events: EventLog) -> None:
        self._config, self._world, self._events = config, world, events
        self._waited: list[float] = []

    def record(self, step: int, data_seconds: float) -> None:
        """Record this rank's wait for the data of a step; a collective every ``config.every`` steps."""
        self._waited.append(data_seconds)
        if len(self._waited) < self._config.every:
            return
        mine = RankSeconds(socket.gethostname(), statistics.mean(self._waited), _compute_seconds(self._world.device))
        self._waited.clear()
        ranks = gather_objects(mine, self._world)
        self._events.write("rank_times", step, data=spread(ranks, "data"), compute=spread(ranks, "compute"))
        for rank, seconds, cause, ratio in find_stragglers(ranks, self._config):
            host = seconds.host
            self._events.write("straggler", step, rank=rank, host=host, cause=cause, times_median=round(ratio, 2))
            if self._world.is_main:
                _log.warning("rank %d on %s is slow: its %s takes %.1f x the median", rank, host, cause, ratio)


def spread(ranks: Sequence[RankSeconds], cause: Cause) -> dict[str, Any]:
    """Return minimum, median and maximum of the ranks' seconds, and the slowest rank with its host."""
    seconds = [getattr(rank, cause) for rank in ranks]
    slowest = seconds.index(max(seconds))
    values = {"min": min(seconds), "median": statistics.median(seconds), "max": seconds[slowest]}
    rounded = {name: round(value, 6) for name, value in values.items()}
    return {**rounded, "slowest_rank": slowest, "host": ranks[slowest].host}


def find_stragglers(
    ranks: Sequence[RankSeconds], config: StragglerConfig
) -> list[tuple[int, RankSeconds, Cause, float]]:
    """Return every rank above ``config.factor`` times the median: rank, its times, the cause, and that ratio."""
    found = []
    causes: tuple[tuple[Cause, float], ...] = (("data", config.least_seconds), ("compute", 0.0))
    for cause, least in causes:
        # The lower of two middle values: of two ranks, the slow one is then compared with the other.
        median = statistics.median_low(getattr(rank, cause) for rank in ranks)
        for number, rank in enumerate(ranks):
            own = getattr(rank, cause)
            if own > config.factor * median and own - median > least:
                found.append((number, rank, cause, own / max(median, 1e-9)))
    return found


def _compute_seconds(device: torch.device) -> float:
    """Return the best time of several matrix products, which a slow device prolongs and a slow peer does not."""
    matrix = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, device=device)
    best = float("inf")
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # reading the value waits for the device
        best = min(best, time.perf_counter() - start)
    return best
