"""Count the samples, tokens and media of a step over all ranks, before it is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.batch import Batch
from trainer.runtime.distributed import World, sum_by_name, sum_counts

CountsByReason = Counter[tuple[str, str]]  # by source and reason


@dataclass(frozen=True)
class StepTotals:
    """Hold the counts of a global batch.

    Attributes:
        trained_tokens: Tokens in the loss, by source.
        documents: Documents (rows, where rows are not packed), by source.
        samples: Samples, by source.
        tokens: Tokens without padding.
        positions: Tokens with padding.
        images: Images and videos, without dummies.
        replaced: Samples that were rejected and replaced, by source and reason.
        dropped_images: Images that documents lost, by source and reason.
        data_seconds: Seconds that training waited for the data, mean over the ranks.
    """

    trained_tokens: dict[str, int]
    documents: dict[str, int]
    samples: dict[str, int]
    tokens: int
    positions: int
    images: int
    replaced: CountsByReason
    dropped_images: CountsByReason
    data_seconds: float

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        return 1 - self.tokens / self.positions


def step_totals(batches: Sequence[Batch], sources: Sequence[str], data_seconds: float, world: World) -> StepTotals:
    """Count this rank's micro-batches and sum over all ranks; a collective, or several.

    Args:
        batches: Micro-batches of this rank.
        sources: Names of all sources; every rank gives the same.
        data_seconds: Seconds that this rank waited for the batches.
        world: Processes of the run.
    """
    counts = {f"{kind}/{source}": 0.0 for kind in ("trained_tokens", "documents", "samples") for source in sources}
    counts |= {"tokens": 0.0, "positions": 0.0, "images": 0.0}
    replaced, dropped = CountsByReason(), CountsByReason()
    for batch in batches:
        counts[f"trained_tokens/{batch.source}"] += batch.num_trained_tokens
        counts[f"documents/{batch.source}"] += batch.num_documents
        counts[f"samples/{batch.source}"] += len(batch.samples)
        counts["tokens"] += int(batch.attention_mask.sum())
        counts["positions"] += batch.attention_mask.numel()
        counts["images"] += batch.num_seen_media
        replaced.update({(batch.source, reason): count for reason, count in batch.rejected.items()})
        dropped.update({(batch.source, reason): count for reason, count in batch.dropped_images.items()})
    counts |= {"replaced": replaced.total(), "dropped_images": dropped.total(), "data_seconds": data_seconds}
    summed = sum_by_name(counts, world)

    def by_source(kind: str) -> dict[str, int]:
        return {source: int(summed[f"{kind}/{source}"]) for source in sources}

    return StepTotals(
        trained_tokens=by_source("trained_tokens"),
        documents=by_source("documents"),
        samples=by_source("samples"),
        tokens=int(summed["tokens"]),
        positions=int(summed["positions"]),
        images=int(summed["images"]),
        # The reasons differ from rank to rank; that there are some, every rank knows now.
        replaced=sum_counts(replaced, world) if summed["replaced"] else replaced,
        dropped_images=sum_counts(dropped, world) if summed["dropped_images"] else dropped,
        data_seconds=summed["data_seconds"] / world.size,
    )
