"""Test intervals against a simulation, a bootstrap and hand computations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.evaluation.metrics import roc_auc
from trainer.evaluation.statistics import (
    Interval,
    auc_interval,
    interval,
    paired_auc_difference,
    paired_difference,
)


def test_the_interval_of_a_mean_is_cluster_robust() -> None:
    found = interval([1.0, 3.0, 5.0, 7.0], ["a", "b", "c", "d"])
    error = math.sqrt(20 / 3 / 4)  # the sample variance of 4 values
    assert (found.mean, found.high - found.mean) == pytest.approx((4.0, 3.182446 * error), abs=1e-5)
    twice = interval([1.0, 3.0, 5.0, 7.0] * 2, ["a", "b", "c", "d"] * 2)
    assert (twice.low, twice.high) == pytest.approx((found.low, found.high))  # copies of an image tell nothing new


def test_intervals_cover_the_true_mean_of_clustered_answers() -> None:
    generator, inside = np.random.default_rng(0), 0
    for _ in range(400):
        skill = generator.beta(3, 2, 40).repeat(5)  # five questions about each of 40 images
        answers = (generator.random(200) < skill).astype(float)
        found = interval(answers.tolist(), [str(number // 5) for number in range(200)])
        inside += found.low <= 0.6 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_answers_that_are_all_right_have_a_width() -> None:
    found = interval([1.0] * 300, [str(number) for number in range(300)])
    assert found.mean == found.high == 1.0
    assert 0.985 < found.low < 0.99
    none = interval([0.0] * 300, [str(number) for number in range(300)])
    assert none == Interval(0.0, 0.0, pytest.approx(1 - found.low))


def test_one_cluster_has_no_bounds() -> None:
    for values in ([0.5], [1.0], [1.0, 0.0, 1.0]):
        found = interval(values, ["image"] * len(values))
        assert found.mean == pytest.approx(sum(values) / len(values))
        assert math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(auc_interval([1.0, 0.0], [True, False], ["a", "a"]).low)


def test_bad_values_are_errors() -> None:
    with pytest.raises(ValueError, match="no queries"):
        interval([], [])
    with pytest.raises(ValueError, match="nan"):
        interval([1.0, math.nan], ["a", "b"])
    with pytest.raises(ValueError, match="confidence 95"):
        interval([1.0, 0.0], ["a", "b"], level=95)
    with pytest.raises(ValueError, match="first run only, such as 'y'"):
        paired_difference({"x": 1.0, "y": 1.0}, {"x": 1.0}, {"x": "x", "y": "y"})


def test_pairing_removes_the_difficulty_of_the_queries() -> None:
    generator = np.random.default_rng(1)
    names = [str(number) for number in range(200)]
    difficulty = generator.normal(size=200)
    a = dict(zip(names, (difficulty + 0.1 + 0.05 * generator.normal(size=200)).tolist(), strict=True))
    b = dict(zip(reversed(names), difficulty[::-1].tolist(), strict=True))  # pairs are found by id
    found = paired_difference(a, b, {name: name for name in names})
    assert found.mean == pytest.approx(0.1, abs=0.02)
    assert 0.05 < found.low < found.high < 0.15
    assert paired_difference(a, a, {name: name for name in names}) == Interval(0.0, 0.0, 0.0)


def _scores(seed: int, clusters: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    generator = np.random.default_rng(seed)
    labels = generator.random(2 * clusters) < 0.4
    shared = generator.normal(size=clusters).repeat(2)
    scores = np.round(labels * 1.0 + shared + generator.normal(size=2 * clusters), 1)  # rounding makes ties
    return scores, labels, [str(number // 2) for number in range(2 * clusters)]


def test_the_interval_of_an_auc_is_that_of_a_clustered_bootstrap() -> None:
    scores, labels, clusters = _scores(0, 150)
    found = auc_interval(scores.tolist(), labels.tolist(), clusters)
    assert found.mean == pytest.approx(roc_auc(scores.tolist(), labels.tolist()))
    generator, drawn = np.random.default_rng(2), []
    for _ in range(400):
        images = generator.integers(0, 150, 150)
        rows = np.stack([2 * images, 2 * images + 1], 1).ravel()
        drawn.append(roc_auc(scores[rows].tolist(), labels[rows].tolist()))
    assert (found.high - found.low) / 2 / 1.976 == pytest.approx(np.std(drawn), rel=0.12)


def test_a_perfect_auc_and_ties() -> None:
    found = auc_interval([0.0, 1.0, 0.0, 1.0], [False, True, False, True], ["a", "b", "c", "d"])
    assert found == Interval(1.0, 1.0, 1.0)
    assert auc_interval([1.0] * 4, [False, True, False, True], ["a", "b", "c", "d"]).mean == 0.5
    with pytest.raises(ValueError, match="both labels"):
        auc_interval([1.0, 2.0], [True, True], ["a", "b"])


def test_paired_differences_of_aucs() -> None:
    scores, labels, clusters = _scores(3, 100)
    names = [f"q{number}" for number in range(200)]
    a = dict(zip(names, scores.tolist(), strict=True))
    labels_of, clusters_of = dict(zip(names, labels.tolist(), strict=True)), dict(zip(names, clusters, strict=True))
    assert paired_auc_difference(a, a, labels_of, clusters_of) == Interval(0.0, 0.0, 0.0)
    worse = {name: value if number % 3 else 0.0 for number, (name, value) in enumerate(a.items())}
    found = paired_auc_difference(a, worse, labels_of, clusters_of)
    assert found.mean == pytest.approx(
        roc_auc(list(a.values()), labels.tolist()) - roc_auc(list(worse.values()), labels.tolist())
    )
    assert found.low < found.mean < found.high
