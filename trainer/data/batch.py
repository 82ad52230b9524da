"""What the model is fed: one sequence, and the batch that several are collated to.

Media are a flat list over the batch; ``media_index`` says which of them a token sees. There are no padding images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class SampleId:
    """Where a sample is: ``shard`` is the url as it stands in the manifest, ``index`` counts samples in the shard."""

    source: str
    epoch: int
    shard: str
    index: int
    key: str


@dataclass(frozen=True)
class Sequence:
    """One row, before padding.

    input_ids, labels, media_index: int64 [L]. labels stand at their token's own position (the model shifts), with
        -100 where nothing is trained. media_index counts from 0 within this sequence, -1 = no medium.
    media: uint8 [frames, 3, height, width] each, in the order of media_index.
    samples: what this row was made of.
    """

    input_ids: Tensor
    labels: Tensor
    media_index: Tensor
    media: tuple[Tensor, ...]
    samples: tuple[SampleId, ...]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one source on one rank.

    input_ids, labels, media_index: int64 [B, L], padded on the right. attention_mask: int64 [B, L], 1 = a real token.
    media: uint8 [M, frames, 3, height, width]; M >= 1 always, for every rank has to run the same modules: where no
        sequence has a medium, a black one stands there that no token refers to.
    skipped: why samples were replaced by their substitutes, counted by reason.
    """

    source: str
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    media_index: Tensor
    media: Tensor
    samples: tuple[SampleId, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def trained_tokens(self) -> int:
        """Labels that enter the loss: the first position of a row is never predicted."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum())

    @property
    def sequences(self) -> int:
        """Rows of the batch."""
        return len(self.input_ids)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model takes, by keyword."""
        names = ("input_ids", "attention_mask", "labels", "media_index", "media")
        return {name: getattr(self, name) for name in names}

    def map_tensors(self, name: str, *args: object, **kwargs: object) -> Batch:
        """The batch with a tensor method (``to``, ``pin_memory``) applied to each of its tensors."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{key: getattr(tensor, name)(*args, **kwargs) for key, tensor in tensors.items()})

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; pinned batches copy asynchronously."""
        return self.map_tensors("to", device, non_blocking=True)

    def pin_memory(self) -> Batch:
        """The batch in pinned host memory (torch's DataLoader calls this)."""
        return self.map_tensors("pin_memory")


def collate(
    sequences: SequenceOf[Sequence],
    *,
    source: str,
    pad_id: int,
    media_shape: tuple[int, int, int, int],
    skipped: Counter[str] | None = None,
) -> Batch:
    """Rows of different lengths as one batch.

    media_shape: [frames, 3, height, width] of the dummy medium for a batch without media.
    """
    rows = len(sequences)
    length = max(len(sequence.input_ids) for sequence in sequences)
    input_ids = torch.full((rows, length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((rows, length), dtype=torch.int64)
    labels = torch.full((rows, length), IGNORED_LABEL, dtype=torch.int64)
    media_index = torch.full((rows, length), -1, dtype=torch.int64)
    media: list[Tensor] = []
    for row, sequence in enumerate(sequences):
        n = len(sequence.input_ids)
        input_ids[row, :n] = sequence.input_ids
        attention_mask[row, :n] = 1
        labels[row, :n] = sequence.labels
        local = sequence.media_index
        media_index[row, :n] = torch.where(local < 0, local, local + len(media))
        media.extend(sequence.media)
    if not media:
        media = [torch.zeros(media_shape, dtype=torch.uint8)]
    samples = tuple(sample for sequence in sequences for sample in sequence.samples)
    return Batch(
        source, input_ids, attention_mask, labels, media_index, torch.stack(media), samples, skipped or Counter()
    )
