"""What the builders share: their interface, the randomness of a sample, and tokens to a ``Row``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.media_index import preceding
from trainer.data.batch import IGNORED_LABEL, Row, SampleId
from trainer.data.randomness import philox


class Builder(Protocol):
    """Members of one sample (extension -> bytes) to one row.

    rng belongs to the sample alone, so that what is drawn never depends on ranks, workers or other samples. Raises
    SampleError for what cannot be used. Builders are sent to loader processes: they have to pickle.
    """

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """One row."""
        ...

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Tokens of that row, with no medium decoded: what packing asks for. rng starts anew, as for the row."""
        ...


def sample_rng(seed: int, sample: SampleId) -> np.random.Generator:
    """The generator of a sample: a function of (seed, source, epoch, shard, index) and of nothing else."""
    return np.random.Generator(philox(seed, sample.source, sample.epoch, sample.shard, sample.index, "sample"))


def make_row(
    ids: Sequence[int],
    untrained: Sequence[bool],
    media: tuple[Tensor, ...],
    sample: SampleId,
    *,
    image_id: int | None,
    media_index: Tensor | None = None,
) -> Row:
    """A row from token ids and which of them are not trained on; each token sees the medium before it by default."""
    input_ids = torch.tensor(ids, dtype=torch.int64)
    labels = input_ids.masked_fill(torch.tensor(untrained, dtype=torch.bool), IGNORED_LABEL)
    if media_index is None:
        media_index = torch.full_like(input_ids, -1) if image_id is None else preceding(input_ids, image_id)
    return Row(input_ids, labels, media_index, media, (sample,))


def join(rows: Sequence[Row], max_tokens: int) -> Row:
    """Rows one after the other as one row, cut to max_tokens; attention spans all of it.

    The first token of a row is never predicted, so its label is ignored.
    """
    joined = _concatenated(rows)
    labels = joined.labels[:max_tokens].clone()
    labels[:1] = IGNORED_LABEL
    return replace(
        joined, input_ids=joined.input_ids[:max_tokens], labels=labels, media_index=joined.media_index[:max_tokens]
    )


def pack(rows: Sequence[Row]) -> Row:
    """Rows one after the other as the documents of one row, which do not see one another.

    Nothing predicts the first token of a document, so its label is ignored.
    """
    joined = _concatenated(rows)
    position_ids = torch.cat([torch.arange(len(row.input_ids)) for row in rows])
    return replace(
        joined, labels=joined.labels.masked_fill(position_ids == 0, IGNORED_LABEL), position_ids=position_ids
    )


def _concatenated(rows: Sequence[Row]) -> Row:
    """The media_index of each counts on after the media of those before it."""
    pieces, media = [], 0
    for row in rows:
        index = row.media_index
        pieces.append(torch.where(index < 0, index, index + media))
        media += len(row.media)
    return Row(
        torch.cat([row.input_ids for row in rows]),
        torch.cat([row.labels for row in rows]),
        torch.cat(pieces),
        tuple(medium for row in rows for medium in row.media),
        tuple(sample for row in rows for sample in row.samples),
    )
