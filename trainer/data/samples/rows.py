"""Make, join and pack rows; define the interface of the row builders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.media_index import preceding
from trainer.data.batch import IGNORED_LABEL, RejectedSample, Row, SampleId
from trainer.data.randomness import philox


class RowBuilder(Protocol):
    """Build a row from the members of one sample (extension -> bytes).

    ``rng`` belongs to the sample alone (``sample_rng``), so no draw depends on ranks, loader processes or other
    samples. Builders are sent to loader processes, so they have to pickle.
    """

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Build the row.

        Raises:
            SampleError: The sample cannot be used.
        """
        ...

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Return the number of tokens of the row without decoding any medium; packing needs it.

        ``rng`` starts anew, as for the row.

        Raises:
            SampleError: As for the row, except that damaged media are not noticed.
        """
        ...


def sample_rng(seed: int, sample: SampleId) -> np.random.Generator:
    """Return the generator of a sample, a function of (seed, source, epoch, shard, index) and of nothing else."""
    return np.random.Generator(philox(seed, sample.source, sample.epoch, sample.shard, sample.index, "sample"))


def make_row(
    ids: Sequence[int],
    untrained: Sequence[bool],
    media: tuple[Tensor, ...],
    sample: SampleId,
    *,
    image_id: int | None,
    media_index: Tensor | None = None,
    dropped_images: tuple[RejectedSample, ...] = (),
) -> Row:
    """Make the row of one sample.

    Args:
        ids: Token ids.
        untrained: For each token, whether the loss leaves it out.
        media: uint8 [frames, 3, height, width] each, in the order of their ``<image>`` tokens.
        sample: Sample that the row is made of.
        image_id: Id of ``<image>``; None for a row without media.
        media_index: Medium that each token sees; None takes the medium before it.
        dropped_images: Images that the sample lost.
    """
    input_ids = torch.tensor(ids, dtype=torch.int64)
    labels = input_ids.masked_fill(torch.tensor(untrained, dtype=torch.bool), IGNORED_LABEL)
    if media_index is None:
        media_index = torch.full_like(input_ids, -1) if image_id is None else preceding(input_ids, image_id)
    return Row(input_ids, labels, media_index, media, (sample,), dropped_images=dropped_images)


def join(rows: Sequence[Row], max_tokens: int) -> Row:
    """Concatenate rows to one document, cut to ``max_tokens``; attention spans all of it.

    The first token of a row is never predicted, so its label is ignored.
    """
    joined = _concatenate(rows)
    labels = joined.labels[:max_tokens].clone()
    labels[:1] = IGNORED_LABEL
    return replace(
        joined, input_ids=joined.input_ids[:max_tokens], labels=labels, media_index=joined.media_index[:max_tokens]
    )


def pack(rows: Sequence[Row]) -> Row:
    """Concatenate rows to the documents of one row, which do not see one another.

    The first token of a document is never predicted, so its label is ignored.
    """
    joined = _concatenate(rows)
    position_ids = torch.cat([torch.arange(len(row.input_ids)) for row in rows])
    return replace(
        joined, labels=joined.labels.masked_fill(position_ids == 0, IGNORED_LABEL), position_ids=position_ids
    )


def _concatenate(rows: Sequence[Row]) -> Row:
    """Concatenate rows; each ``media_index`` is raised by the number of media before its row."""
    media_indices, num_media = [], 0
    for row in rows:
        index = row.media_index
        media_indices.append(torch.where(index < 0, index, index + num_media))
        num_media += len(row.media)
    return Row(
        torch.cat([row.input_ids for row in rows]),
        torch.cat([row.labels for row in rows]),
        torch.cat(media_indices),
        tuple(medium for row in rows for medium in row.media),
        tuple(sample for row in rows for sample in row.samples),
        dropped_images=tuple(image for row in rows for image in row.dropped_images),
        device_changes=tuple(changes for row in rows for changes in row.device_changes),
    )
