"""Test that the clock of parts gives each moment to one part."""

from __future__ import annotations

import pytest

from trainer.benchmark.part_clock import PartClock


class Time:
    """A time that the test sets."""

    def __init__(self) -> None:
        self.now = 5

    def __call__(self) -> int:
        return self.now


def test_each_moment_belongs_to_the_innermost_part() -> None:
    time = Time()
    clock = PartClock(time, "outside")
    time.now += 1
    with clock.part("backward"):
        time.now += 10
        with clock.part("gather"):
            time.now += 100
        time.now += 1000
    with clock.part("gather"):
        time.now += 10_000
    time.now += 100_000
    assert clock.lap() == {"outside": 100_001, "backward": 1010, "gather": 10_100}
    time.now += 7
    assert clock.lap() == {"outside": 7}


def test_a_failing_part_is_closed() -> None:
    time = Time()
    clock = PartClock(time, "outside")
    with pytest.raises(KeyError), clock.part("forward"):
        time.now += 1
        raise KeyError
    time.now += 2
    assert clock.lap() == {"outside": 2, "forward": 1}
