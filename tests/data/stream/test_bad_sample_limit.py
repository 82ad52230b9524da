"""When bad samples stop a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.data_config import DataConfig, TextSource
from trainer.data.errors import TooManyBadSamplesError
from trainer.data.stream.bad_sample_limit import BadSampleLimit


def limit(fraction: float, window: int = 100) -> BadSampleLimit:
    sources = tuple(TextSource(name, Path("m.npz"), 8) for name in ("a", "b"))
    return BadSampleLimit(DataConfig(sources, max_bad_fraction=fraction, bad_window=window))


def stops_at(one: BadSampleLimit, bad_each: int, num_steps: int = 200, good_each: int = 10) -> int | None:
    for number in range(num_steps):
        try:
            one.record({"a": good_each, "b": good_each}, {("a", "corrupt_image"): bad_each})
        except TooManyBadSamplesError:
            return number
    return None


def test_a_share_below_the_limit_goes_on_for_ever() -> None:
    assert stops_at(limit(0.2), bad_each=1) is None
    assert stops_at(limit(0.2), bad_each=2) is None
    assert stops_at(limit(0.2), bad_each=3) is not None


def test_the_number_that_a_window_allows_counts_from_the_start() -> None:
    assert stops_at(limit(0.2), bad_each=5) == 4  # 20 of 100 are allowed, the fifth step makes 25
    assert stops_at(limit(0.0), bad_each=1) == 0
    assert stops_at(limit(0.0), bad_each=0) is None
    assert stops_at(limit(1.0), bad_each=500) is None


def test_old_updates_are_forgotten() -> None:
    one = limit(0.2)
    one.record({"a": 10}, {("a", "corrupt_image"): 20})
    for _ in range(20):
        one.record({"a": 10}, {})
    one.record({"a": 10}, {("a", "empty_text"): 20})
    with pytest.raises(TooManyBadSamplesError):
        one.record({"a": 10}, {("a", "empty_text"): 3})


def test_sources_are_judged_apart() -> None:
    one = limit(0.2)
    with pytest.raises(TooManyBadSamplesError, match="source 'b'"):
        for _ in range(3):
            one.record({"a": 1000, "b": 10}, {("b", "corrupt_image"): 8})


def test_the_message_has_reasons_counts_and_settings() -> None:
    one = limit(0.1)
    one.record({"a": 30}, {("a", "corrupt_image"): 4, ("a", "invalid_utf8"): 1})
    with pytest.raises(TooManyBadSamplesError) as caught:
        one.record({"a": 30}, {("a", "corrupt_image"): 5, ("a", "invalid_utf8"): 2})
    message = str(caught.value)
    assert "12 of the last 72 samples" in message
    assert "corrupt_image 9, invalid_utf8 3" in message
    assert "data.max_bad_fraction = 0.1 of data.bad_window = 100 allows 10" in message


def test_what_filters_leave_out_is_not_bad() -> None:
    one = limit(0.0)
    for _ in range(50):
        one.record({"a": 10}, {("a", "filtered_min_side"): 90})


def test_an_update_that_is_larger_than_the_window() -> None:
    one = limit(0.1, window=5)
    one.record({"a": 100}, {("a", "corrupt_image"): 10})
    with pytest.raises(TooManyBadSamplesError):
        one.record({"a": 100}, {("a", "corrupt_image"): 13})
