"""Test which losses count as a spike."""

from __future__ import annotations

import json
import math
import random

import pytest

from trainer.config.resilience_config import SpikeConfig
from trainer.resilience.spikes import SpikeDetector, robust_score

CONFIG = SpikeConfig(window=32, min_steps=16, patience=2, threshold=8.0)


def falling(count: int, seed: int = 0) -> list[float]:
    """Return a noisy loss that falls from 5 to 3."""
    rng = random.Random(seed)
    return [3 + 2 * 0.97**step + rng.gauss(0, 0.05) for step in range(count)]


def windows_of(losses: list[float], config: SpikeConfig = CONFIG, norms: list[float] | None = None) -> list[object]:
    """Return (first, last) of every window that a detector finds."""
    detector = SpikeDetector(config)
    pairs = zip(losses, norms or [1.0] * len(losses), strict=True)
    found = [detector.record(step, loss, norm) for step, (loss, norm) in enumerate(pairs, start=1)]
    return [(window.first, window.last) for window in found if window is not None]


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_falling_loss_has_no_spike(seed: int) -> None:
    assert windows_of(falling(400, seed)) == []


def test_a_spike_is_found_with_the_step_before_it() -> None:
    losses = falling(60)
    losses[40:42] = [9.0, 8.0]  # steps 41 and 42
    assert windows_of(losses) == [(40, 42)]


def test_one_high_step_is_not_a_spike() -> None:
    losses = falling(60)
    losses[40] = 50.0
    assert windows_of(losses) == []


def test_no_step_is_judged_before_min_steps() -> None:
    losses = falling(60)
    losses[14:16] = [90.0, 80.0]
    assert windows_of(losses) == []


def test_a_small_change_of_a_constant_loss_is_not_a_spike() -> None:
    assert windows_of([1.0] * 40 + [1.05, 1.05]) == []
    assert windows_of([1.0] * 40 + [1.5, 1.5]) == [(40, 42)]


def test_wrong_answers_of_a_model_that_is_nearly_always_right_are_not_a_spike() -> None:
    losses = [0.002 + 0.0002 * (step % 5) for step in range(40)]
    assert windows_of([*losses, 0.09, 0.06]) == []
    assert windows_of([*losses, 0.15, 0.2]) == [(40, 42)]
    assert windows_of([*losses, math.nan, math.nan]) == [(40, 42)]


def test_the_gradient_norm_counts_only_with_its_setting() -> None:
    losses, norms = falling(60), [1.0 + 0.01 * (step % 7) for step in range(60)]
    norms[40:42] = [40.0, 50.0]
    assert windows_of(losses, CONFIG, norms) == []
    with_norm = SpikeConfig(window=32, min_steps=16, patience=2, threshold=8.0, grad_norm=True)
    assert windows_of(losses, with_norm, norms) == [(40, 42)]


def test_an_accepted_level_becomes_typical() -> None:
    detector = SpikeDetector(CONFIG)
    for step in range(20):
        detector.record(step, 1.0, 1.0)
    spikes = 0
    for step in range(20, 80):
        if detector.record(step, 9.0, 1.0) is not None:
            spikes += 1
            detector.accept()
    assert 0 < spikes <= 10


def test_a_detector_continues_from_a_saved_history() -> None:
    losses = falling(60)
    losses[40:42] = [9.0, 8.0]
    first = SpikeDetector(CONFIG)
    for step, loss in enumerate(losses[:30], start=1):
        first.record(step, loss, 1.0)
    history = json.loads(json.dumps(first.history()))
    second = SpikeDetector(CONFIG, [(loss, norm) for loss, norm in history])
    found = [second.record(step, loss, 1.0) for step, loss in enumerate(losses[30:], start=31)]
    assert [(window.first, window.last) for window in found if window] == [(40, 42)]


def test_the_score_counts_robust_deviations() -> None:
    past = [-1.0, 0.0, 1.0, 100.0]  # median 0.5, median absolute deviation 1
    assert robust_score(0.5 + 1.4826 * 3, past) == pytest.approx(3.0)
    assert robust_score(float("nan"), past) == float("inf")
