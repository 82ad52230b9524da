"""Accumulate the steps of a Flamingo whose text sources keep it close to its language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from trainer.config.data_config import DataConfig, TextSource
from trainer.data.batch import Batch
from trainer.deepspeed_engine.engine import Engine
from trainer.loop import Accumulate, accumulate_micro_batches, sum_micro_steps
from trainer.step_losses import PENALTY


def kl_weights(data: DataConfig) -> dict[str, float]:
    """Return the weight of the penalty of each source that has one, by the source's name."""
    return {
        source.name: source.kl_weight for source in data.sources if isinstance(source, TextSource) and source.kl_weight
    }


def accumulate_with(weights: Mapping[str, float]) -> Accumulate:
    """Return how micro-batches are accumulated.

    Args:
        weights: Weight of the penalty of each source that has one. The divergence is summed over the trained tokens, as
            the loss is, so the number of processes and of micro-batches changes nothing.
    """
    if not weights:
        return accumulate_micro_batches

    def accumulate(engine: Engine, batches: Sequence[Batch], factors: Mapping[str, float]) -> dict[str, Tensor]:
        def micro_step(source: str, inputs: dict[str, Tensor], is_last: bool) -> dict[str, Tensor]:
            if source not in weights:
                return {source: engine.forward_backward(inputs, factors[source], is_last=is_last)}
            output = engine.forward({**inputs, "diverges": True})
            loss = output.loss + weights[source] * output.divergence
            engine.backward(loss * (factors[source] * engine.world.size), is_last=is_last)
            return {source: output.loss.detach(), PENALTY + source: output.divergence.detach()}

        return sum_micro_steps(engine, batches, micro_step)

    return accumulate
