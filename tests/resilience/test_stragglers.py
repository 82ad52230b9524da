"""Test which ranks count as slow."""

from __future__ import annotations

import pytest

from trainer.config.resilience_config import StragglerConfig
from trainer.resilience.stragglers import RankSeconds, find_stragglers, spread

CONFIG = StragglerConfig(factor=2.0, least_seconds=0.1)


@pytest.mark.parametrize(
    ("data", "compute", "expected"),
    [
        ([0.1, 0.1, 0.1, 0.5], [1.0] * 4, [(3, "data")]),
        ([0.001, 0.001, 0.001, 0.05], [1.0] * 4, []),  # many times the median, but too short to matter
        ([0.1] * 4, [1.0, 2.5, 1.1, 0.9], [(1, "compute")]),
        ([0.0, 0.0, 0.9, 0.9], [1.0] * 4, [(2, "data"), (3, "data")]),
        ([0.1, 0.9], [1.0, 1.0], [(1, "data")]),
        ([0.1], [1.0], []),
    ],
)
def test_ranks_far_above_the_median_are_named(
    data: list[float], compute: list[float], expected: list[tuple[int, str]]
) -> None:
    ranks = [RankSeconds(f"node{n}", *times) for n, times in enumerate(zip(data, compute, strict=True))]
    assert [(rank, cause) for rank, _, cause, _ in find_stragglers(ranks, CONFIG)] == expected


def test_the_spread_names_the_slowest_rank() -> None:
    ranks = [RankSeconds(f"node{n}", data=seconds, compute=1.0) for n, seconds in enumerate([0.1, 0.7, 0.3])]
    assert spread(ranks, "data") == {"min": 0.1, "median": 0.3, "max": 0.7, "slowest_rank": 1, "host": "node1"}
