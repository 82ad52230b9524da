"""Compute intervals of scores whose queries share images, and of differences between two runs.

Queries about one image are not independent, so a cluster is an image. A score is a mean of values, or a ROC-AUC, whose
first-order influence of each query is known. Both have the cluster-robust variance G / (G - 1) * sum of the squared
influences of G clusters, with Student's t of G - 1 degrees of freedom. Everything is deterministic.

Sources: Miller, "Adding Error Bars to Evals" (2024), clustered standard errors; Obuchowski, "Nonparametric Analysis of
Clustered ROC Curve Data" (Biometrics 1997); Korn and Graubard (Survey Methodology 1998), shares of clustered samples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as students_t

from trainer.evaluation.metrics.rankings import roc_auc


@dataclass(frozen=True)
class Interval:
    """Hold a score with its bounds.

    Attributes:
        mean: Score, or difference of two scores.
        low: Lower bound; nan where all queries are of one cluster.
        high: Upper bound; nan where all queries are of one cluster.
    """

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], clusters: Sequence[str], level: float = 0.95) -> Interval:
    """Return the mean of values with an interval.

    Values that are all 0 or 1 get Wilson's interval of the effective number of queries, which has a width also where
    all answers are right.

    Args:
        values: Value of each query.
        clusters: Image of each query.
        level: Share of such intervals that hold the true mean.

    Raises:
        ValueError: There is no value, or one is not a number.
    """
    mean = _mean(values)
    influences = [(value - mean) / len(values) for value in values]
    error, factor = _spread(influences, clusters, level)
    if set(values) <= {0, 1} and not math.isnan(error):
        number = len(set(clusters)) if error == 0 else min(float(len(values)), mean * (1 - mean) / error**2)
        return _wilson(mean, number, factor)
    return Interval(mean, mean - factor * error, mean + factor * error)


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], clusters: Mapping[str, str], level: float = 0.95
) -> Interval:
    """Return the mean of ``a - b`` over queries, paired by id, with an interval.

    Args:
        a: Value of each query by its id.
        b: The same of another run.
        clusters: Image of each query by its id.
        level: As for ``interval``.

    Raises:
        ValueError: The queries differ, there are none, or a value is not a number.
    """
    require_same_queries(a, b)
    differences = [a[name] - b[name] for name in a]
    mean = _mean(differences)
    influences = [(value - mean) / len(differences) for value in differences]
    error, factor = _spread(influences, [clusters[name] for name in a], level)
    return Interval(mean, mean - factor * error, mean + factor * error)


def auc_interval(
    scores: Sequence[float], labels: Sequence[bool], clusters: Sequence[str], level: float = 0.95
) -> Interval:
    """Return the ROC-AUC with an interval, which is cut at 0 and 1.

    Args:
        scores: Score of each query, higher for True.
        labels: Label of each query.
        clusters: Image of each query.
        level: As for ``interval``.

    Raises:
        ValueError: All labels are equal, or a score is not a number.
    """
    auc, influences = _auc_influences(scores, labels)
    error, factor = _spread(influences, clusters, level)
    low, high = auc - factor * error, auc + factor * error
    return Interval(auc, low if math.isnan(low) else max(0.0, low), high if math.isnan(high) else min(1.0, high))


def paired_auc_difference(
    a: Mapping[str, float],
    b: Mapping[str, float],
    labels: Mapping[str, bool],
    clusters: Mapping[str, str],
    level: float = 0.95,
) -> Interval:
    """Return the ROC-AUC of ``a`` minus that of ``b``, paired by id, with an interval.

    Args:
        a: Score of each query by its id.
        b: The same of another run.
        labels: Label of each query by its id.
        clusters: Image of each query by its id.
        level: As for ``interval``.

    Raises:
        ValueError: The queries differ, all labels are equal, or a score is not a number.
    """
    require_same_queries(a, b)
    names = list(a)
    true = [labels[name] for name in names]
    (auc_a, influences_a), (auc_b, influences_b) = (
        _auc_influences([one[name] for name in names], true) for one in (a, b)
    )
    influences = [x - y for x, y in zip(influences_a, influences_b, strict=True)]
    error, factor = _spread(influences, [clusters[name] for name in names], level)
    mean = auc_a - auc_b
    return Interval(mean, mean - factor * error, mean + factor * error)


def require_same_queries(a: Mapping[str, float], b: Mapping[str, float]) -> None:
    """Check that two runs answered the same queries.

    Raises:
        ValueError: A query is missing in one of them.
    """
    for name, missing in (("first", a.keys() - b.keys()), ("second", b.keys() - a.keys())):
        if missing:
            raise ValueError(
                f"{len(missing)} queries are in the {name} run only, such as {min(missing)!r}: "
                "compare runs of the same files, num_queries and seed"
            )


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("a score of no queries: the task is empty")
    bad = sum(math.isnan(value) for value in values)
    if bad:
        raise ValueError(f"{bad} of {len(values)} values are no number (nan): they cannot be averaged")
    return math.fsum(values) / len(values)


def _spread(influences: Sequence[float], clusters: Sequence[str], level: float) -> tuple[float, float]:
    """Return the standard error and the factor of the interval; nan for a single cluster."""
    if not 0 < level < 1:
        raise ValueError(f"confidence {level}: set a number between 0 and 1, such as 0.95")
    by_cluster: dict[str, list[float]] = defaultdict(list)
    for influence, cluster in zip(influences, clusters, strict=True):
        by_cluster[cluster].append(influence)
    number = len(by_cluster)
    if number < 2:
        return math.nan, math.nan
    variance = math.fsum(math.fsum(own) ** 2 for own in by_cluster.values()) * number / (number - 1)
    return math.sqrt(variance), float(students_t.ppf((1 + level) / 2, number - 1))


def _wilson(share: float, number: float, factor: float) -> Interval:
    """Return Wilson's interval of a share of ``number`` independent queries."""
    weight = factor**2 / number
    center = (share + weight / 2) / (1 + weight)
    half = factor / (1 + weight) * math.sqrt(share * (1 - share) / number + weight / (4 * number))
    # At 0 and 1 a bound is the share itself, which rounding would miss.
    low = 0.0 if share == 0 else max(0.0, center - half)
    return Interval(share, low, 1.0 if share == 1 else min(1.0, center + half))


def _auc_influences(scores: Sequence[float], labels: Sequence[bool]) -> tuple[float, list[float]]:
    """Return the ROC-AUC and the first-order influence of each query.

    That of a positive is how much more negatives than on average it beats, divided by the number of positives.
    """
    auc = roc_auc(scores, labels)
    values_S, true_S = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    among_all_S = rankdata(values_S)
    influences_S = np.empty(len(values_S))
    for own_S, sign in ((true_S, 1), (~true_S, -1)):
        number, others = int(own_S.sum()), int((~own_S).sum())
        below = (among_all_S[own_S] - rankdata(values_S[own_S])) / others  # share of the others below, ties half
        beats = below if sign > 0 else 1 - below
        influences_S[own_S] = (beats - auc) / number
    return auc, influences_S.tolist()
