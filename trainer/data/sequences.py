"""What the builders share: their interface, the randomness of a sample, and tokens to a ``Sequence``."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.media_index import preceding
from trainer.data.batch import IGNORED_LABEL, SampleId, Sequence
from trainer.data.order import philox


class Builder(Protocol):
    """Members of one sample (extension -> bytes) to one row.

    rng belongs to the sample alone, so that what is drawn never depends on ranks, workers or other samples. Raises
    SampleError for what cannot be used. Builders are sent to loader processes: they have to pickle.
    """

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Sequence:
        """One row."""
        ...

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Tokens of that row, with no medium decoded: what packing asks for. rng starts anew, as for the row."""
        ...


def sample_rng(seed: int, sample: SampleId) -> np.random.Generator:
    """The generator of a sample: a function of (seed, source, epoch, shard, index) and of nothing else."""
    return np.random.Generator(philox(seed, sample.source, sample.epoch, sample.shard, sample.index, "sample"))


def make_sequence(
    ids: SequenceOf[int],
    untrained: SequenceOf[bool],
    media: tuple[Tensor, ...],
    sample: SampleId,
    *,
    image_id: int | None,
    media_index: Tensor | None = None,
) -> Sequence:
    """A row from token ids and which of them are not trained on; each token sees the medium before it by default."""
    input_ids = torch.tensor(ids, dtype=torch.int64)
    labels = input_ids.masked_fill(torch.tensor(untrained, dtype=torch.bool), IGNORED_LABEL)
    if media_index is None:
        media_index = torch.full_like(input_ids, -1) if image_id is None else preceding(input_ids, image_id)
    return Sequence(input_ids, labels, media_index, media, (sample,))


def join(sequences: SequenceOf[Sequence], max_tokens: int) -> Sequence:
    """Rows one after the other as one row, cut to max_tokens; attention spans all of it.

    The first token of a row is never predicted, so its label is ignored.
    """
    row = _concatenated(sequences)
    labels = row.labels[:max_tokens].clone()
    labels[:1] = IGNORED_LABEL
    return replace(row, input_ids=row.input_ids[:max_tokens], labels=labels, media_index=row.media_index[:max_tokens])


def pack(sequences: SequenceOf[Sequence]) -> Sequence:
    """Rows one after the other as the documents of one row, which do not see one another.

    Nothing predicts the first token of a document, so its label is ignored.
    """
    row = _concatenated(sequences)
    position_ids = torch.cat([torch.arange(len(sequence.input_ids)) for sequence in sequences])
    return replace(row, labels=row.labels.masked_fill(position_ids == 0, IGNORED_LABEL), position_ids=position_ids)


def _concatenated(sequences: SequenceOf[Sequence]) -> Sequence:
    """The media_index of each counts on after the media of those before it."""
    pieces, media = [], 0
    for sequence in sequences:
        index = sequence.media_index
        pieces.append(torch.where(index < 0, index, index + media))
        media += len(sequence.media)
    return Sequence(
        torch.cat([sequence.input_ids for sequence in sequences]),
        torch.cat([sequence.labels for sequence in sequences]),
        torch.cat(pieces),
        tuple(medium for sequence in sequences for medium in sequence.media),
        tuple(sample for sequence in sequences for sample in sequence.samples),
    )
