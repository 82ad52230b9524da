"""What an update holds over all ranks, counted before it is trained on and added up in one all-reduce."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.batch import Batch
from trainer.runtime.distributed import World, sum_counts, sum_over_ranks

ReplacedSamples = Counter[tuple[str, str]]


@dataclass(frozen=True)
class StepTotals:
    """Counts of the global batch; those by source are in the order of ``data.sources``.

    trained_tokens, documents, samples: of each source. tokens, positions: without and with padding. images: real media
    (frames of a video are one), without the dummies. replaced: samples that could not be used, by (source, reason).
    data_seconds: waiting for the data, mean over the ranks.
    """

    trained_tokens: dict[str, int]
    documents: dict[str, int]
    samples: dict[str, int]
    tokens: int
    positions: int
    images: int
    replaced: ReplacedSamples
    data_seconds: float

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        return 1 - self.tokens / self.positions


def step_totals(batches: Sequence[Batch], sources: Sequence[str], data_seconds: float, world: World) -> StepTotals:
    """Counts this rank's micro-batches and adds up all ranks'; a collective, and a second one if any were replaced."""
    trained, documents, samples, replaced = Counter[str](), Counter[str](), Counter[str](), ReplacedSamples()
    for batch in batches:
        trained[batch.source] += batch.trained_tokens
        documents[batch.source] += batch.num_documents
        samples[batch.source] += len(batch.samples)
        replaced.update({(batch.source, reason): count for reason, count in batch.rejected.items()})
    by_source = [count[source] for count in (trained, documents, samples) for source in sources]
    summed = sum_over_ranks(
        [
            *by_source,
            sum(int(batch.attention_mask.sum()) for batch in batches),
            sum(batch.attention_mask.numel() for batch in batches),
            sum(batch.medium_count for batch in batches if int(batch.media_index.max()) >= 0),
            replaced.total(),
            data_seconds,
        ],
        world,
    )
    number = len(sources)
    counts = [int(total) for total in summed[:-1]]
    tokens, positions, images, any_replaced = counts[3 * number :]
    return StepTotals(
        trained_tokens=dict(zip(sources, counts[:number], strict=True)),
        documents=dict(zip(sources, counts[number : 2 * number], strict=True)),
        samples=dict(zip(sources, counts[2 * number : 3 * number], strict=True)),
        tokens=tokens,
        positions=positions,
        images=images,
        # The reasons differ from rank to rank; that there are some, every rank knows now.
        replaced=sum_counts(replaced, world) if any_replaced else replaced,
        data_seconds=summed[-1] / world.size,
    )
