"""Measure where the time of a step goes, by a clock that gives each moment to one part."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from trainer.runtime.distributed import World

DATA_WAIT, GATHER, REDUCE = "data wait", "gather", "reduce"
PARTS = (DATA_WAIT, "vision", "resampler", "language model", "backward", GATHER, REDUCE, "optimizer")
CONTRASTIVE_PARTS = (DATA_WAIT, "vision", "text tower", "backward", GATHER, REDUCE, "optimizer")


class PartClock:
    """Give each moment to the innermost open part, so that the parts add up exactly to the whole.

    Threads may open and close parts, as autograd's do, but only one after the other.
    """

    def __init__(self, now: Callable[[], int], outermost: str) -> None:
        """Start the clock.

        Args:
            now: Returns the time in nanoseconds.
            outermost: Part that gets the time while no other part is open.
        """
        self._now = now
        self._open = [outermost]
        self._spent: Counter[str] = Counter()
        self._since = now()

    def enter(self, name: str) -> None:
        """Open a part inside the innermost open one."""
        self._charge()
        self._open.append(name)

    def leave(self) -> None:
        """Close the innermost part."""
        self._charge()
        self._open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Keep a part open while the context is open."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def lap(self) -> Counter[str]:
        """Return the nanoseconds of each part since the last lap, or since the start."""
        self._charge()
        spent, self._spent = self._spent, Counter()
        return spent

    def _charge(self) -> None:
        now = self._now()
        self._spent[self._open[-1]] += now - self._since
        self._since = now


def device_clock(world: World) -> Callable[[], int]:
    """Return a wall clock in nanoseconds, which on a GPU first waits for all queued work."""

    def synchronized() -> int:
        torch.cuda.synchronize(world.device)
        return time.perf_counter_ns()

    return synchronized if world.device.type == "cuda" else time.perf_counter_ns
