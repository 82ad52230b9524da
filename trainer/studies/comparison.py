"""Compare variants over seeds: means, and differences to the baseline that are paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

from trainer.studies.results import CellResult


@dataclass(frozen=True)
class Interval:
    """Hold a mean with its 95 % interval over seeds, from Student's t.

    Attributes:
        mean: Mean of the seeds.
        low: Lower end; equal to the mean with a single seed.
        high: Upper end.
        seeds: Number of seeds.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside of the interval of several seeds."""
        return self.seeds > 1 and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """Compare one score of one variant with the baseline's.

    Attributes:
        variant: Name of the variant.
        score: Name of the score.
        value: The variant's mean.
        difference: Mean of variant minus baseline over the seeds that both have; None for the baseline.
    """

    variant: str
    score: str
    value: Interval
    difference: Interval | None


def over_seeds(values: Sequence[float]) -> Interval:
    """Return the mean of one value a seed, with its interval."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, mean, mean, 1)
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def compare(results: Sequence[CellResult], baseline: str) -> list[Comparison]:
    """Compare every score of every variant, in the order of the results."""
    by_variant: dict[str, dict[int, CellResult]] = {}
    for result in results:
        by_variant.setdefault(result.variant, {})[result.seed] = result
    reference = by_variant.get(baseline, {})
    names = list(dict.fromkeys(name for result in results for name in result.scores))
    found = []
    for score in names:
        for variant, runs in by_variant.items():
            values = [run.scores[score] for run in runs.values() if score in run.scores]
            pairs = [
                run.scores[score] - reference[seed].scores[score]
                for seed, run in runs.items()
                if variant != baseline and seed in reference and score in run.scores and score in reference[seed].scores
            ]
            if values:
                found.append(Comparison(variant, score, over_seeds(values), over_seeds(pairs) if pairs else None))
    return found
