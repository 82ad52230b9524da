"""Normalize the summed losses of a step over its global batch, weight them, and add penalties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.config.run_config import RunConfig
from trainer.data.stream.step_totals import StepTotals

PENALTY = "kl/"  # before the name of a source, whose divergence it is


@dataclass(frozen=True)
class StepLosses:
    """Hold what a step lost.

    Attributes:
        total: Weighted sum of the sources' losses and penalties, which the step made smaller.
        by_source: Loss of each source, before its weight and without its penalty.
        divergences: Divergence of each source with a penalty, before its weight, by name in metrics.jsonl.
    """

    total: float
    by_source: Mapping[str, float]
    divergences: Mapping[str, float]


class LossScales:
    """Hold the divisor and the weight of each source's summed loss in one step.

    Args:
        totals: Counts of the global batch.
        config: Settings of the run.
        unit: What ``token_mean`` counts.

    Attributes:
        factors: Factor of each source's summed loss in the gradient.
    """

    def __init__(self, totals: StepTotals, config: RunConfig, unit: Literal["token", "document"]) -> None:
        per_document = unit == "document" or config.training.loss_normalization == "token_sum"
        counts = totals.documents if per_document else totals.trained_tokens
        # A global batch without one trained token has the loss 0, not 0 / 0.
        self._normalizers = {source: max(1, count) for source, count in counts.items()}
        if config.training.combine == "merged":  # the weight of each source is its share of the batch
            total = sum(self._normalizers.values())
            self._weights = {name: count / total for name, count in self._normalizers.items()}
        else:
            self._weights = {source.name: source.weight for source in config.data.sources}
        self.factors: Mapping[str, float] = {
            source.name: self._weights[source.name] / self._normalizers[source.name] for source in config.data.sources
        }

    def read(self, summed: Mapping[str, float], penalties: Mapping[str, float]) -> StepLosses:
        """Return the losses of a step.

        Args:
            summed: Loss of each source that the step has, and its divergence where it has a penalty, over all ranks.
            penalties: Weight of the divergence of each source that has a penalty.
        """
        losses = {name: value / self._normalizers[name] for name, value in summed.items() if name in self._normalizers}
        divergences = {
            name: summed[PENALTY + name] / self._normalizers[name] for name in losses if PENALTY + name in summed
        }
        total = sum(self._weights[name] * losses[name] for name in losses)
        total += sum(self._weights[name] * penalties[name] * value for name, value in divergences.items())
        return StepLosses(total, losses, {PENALTY + name: value for name, value in divergences.items()})
