"""What the model is fed: one sequence, and the batch that several are collated to.

Media are a flat list over the batch; ``media_index`` says which of them a token sees. There are no padding images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.loss import target_positions
from model.tower_patches import Grid
from trainer.data.stream.packing import LanePosition

IGNORED_LABEL = -100


@dataclass(frozen=True)
class SampleId:
    """Where a sample is: ``shard`` is the url as it stands in the manifest, ``index`` counts samples in the shard."""

    source: str
    epoch: int
    shard: str
    index: int
    key: str


class RejectedSample(NamedTuple):
    """A sample that could not be used, and why."""

    reason: str
    detail: str
    sample: SampleId


@dataclass(frozen=True)
class Row:
    """One row, before padding.

    input_ids, labels, media_index: int64 [L]. labels stand at their token's own position (the model shifts), with
        -100 where nothing is trained. media_index counts from 0 within this sequence, -1 = no medium.
    media: uint8 [frames, 3, height, width] each, in the order of media_index.
    samples: what this row was made of.
    position_ids: of a packed row, int64 [L], restarting at 0 with each document; None: the row is one document.
    """

    input_ids: Tensor
    labels: Tensor
    media_index: Tensor
    media: tuple[Tensor, ...]
    samples: tuple[SampleId, ...]
    position_ids: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one source on one rank.

    input_ids, labels, media_index: int64 [B, L], padded on the right. attention_mask: int64 [B, L], 1 = a real token.
    media: uint8 [M, frames, 3, height, width]; M >= 1 always, for every rank has to run the same modules: where no
        sequence has a medium, a black one stands there that no token refers to. Where media keep their aspect, the
        patches of all of them one after the other (``to_patches``): uint8 [P, 3, patch_size, patch_size].
    media_grids: of media that keep their aspect, frames, rows and columns of patches of each.
    rejected: why samples were replaced by their substitutes, counted by reason.
    position_ids: of packed rows, int64 [B, L], restarting at 0 with each document and with the padding, which is then a
        document of its own. Documents do not attend to one another (``model.flamingo``).
    lane_positions: where packed lanes stand after this batch.
    positions: ``model.loss.target_positions`` of the labels, found before a GPU has them: asking it would mean waiting.
    """

    source: str
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    media_index: Tensor
    media: Tensor
    samples: tuple[SampleId, ...] = ()
    rejected: Counter[str] = field(default_factory=Counter)
    position_ids: Tensor | None = None
    lane_positions: Mapping[int, LanePosition] = field(default_factory=dict)
    media_grids: tuple[Grid, ...] | None = None
    positions: Tensor | None = None

    @property
    def medium_count(self) -> int:
        """Media, the one that only stands there included."""
        return len(self.media if self.media_grids is None else self.media_grids)

    def medium(self, index: int) -> Tensor:
        """One medium as pixels, uint8 [frames, 3, height, width]."""
        if self.media_grids is None:
            return self.media[index]
        sizes = [math.prod(grid) for grid in self.media_grids]
        return from_patches(self.media.split(sizes)[index], self.media_grids[index])

    @property
    def trained_tokens(self) -> int:
        """Labels that enter the loss: the first position of a row is never predicted."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum())

    @property
    def num_documents(self) -> int:
        """Rows of the batch, or documents where rows are packed."""
        if self.position_ids is None:
            return len(self.input_ids)
        return int(((self.position_ids == 0) & (self.attention_mask == 1)).sum())

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model takes, by keyword."""
        # Hugging Face finds packed documents by their positions, and only where there is no attention mask.
        attention = "attention_mask" if self.position_ids is None else "position_ids"
        names = ("input_ids", attention, "labels", "media_index", "media")
        found = {name: getattr(self, name) for name in names}
        optional = {"media_grids": self.media_grids, "positions": self.positions}
        return found | {name: value for name, value in optional.items() if value is not None}

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
    sequences: Sequence[Row],
    *,
    source: str,
    pad_id: int,
    media_shape: tuple[int, int, int, int],
    rejected: Counter[str] | None = None,
    lane_positions: Mapping[int, LanePosition] | None = None,
    patch_size: int | None = None,
) -> Batch:
    """Rows of different lengths as one batch.

    media_shape: [frames, 3, height, width] of the dummy medium for a batch without media. patch_size: media have any
    shape of whole patches; None: all have the same.
    """
    rows = len(sequences)
    length = max(len(sequence.input_ids) for sequence in sequences)
    input_ids = torch.full((rows, length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((rows, length), dtype=torch.int64)
    labels = torch.full((rows, length), IGNORED_LABEL, dtype=torch.int64)
    media_index = torch.full((rows, length), -1, dtype=torch.int64)
    packed = any(sequence.position_ids is not None for sequence in sequences)
    position_ids = torch.zeros((rows, length), dtype=torch.int64) if packed else None
    media: list[Tensor] = []
    for row, sequence in enumerate(sequences):
        n = len(sequence.input_ids)
        input_ids[row, :n] = sequence.input_ids
        attention_mask[row, :n] = 1
        labels[row, :n] = sequence.labels
        local = sequence.media_index
        media_index[row, :n] = torch.where(local < 0, local, local + len(media))
        media.extend(sequence.media)
        if position_ids is not None:
            position_ids[row, :n] = torch.arange(n) if sequence.position_ids is None else sequence.position_ids
            position_ids[row, n:] = torch.arange(length - n)
    if not media:
        media = [torch.zeros(media_shape, dtype=torch.uint8)]
    pixels, media_grids = media_inputs(media, patch_size)
    samples = tuple(sample for sequence in sequences for sample in sequence.samples)
    return Batch(
        source,
        input_ids,
        attention_mask,
        labels,
        media_index,
        pixels,
        samples,
        rejected or Counter(),
        position_ids,
        lane_positions or {},
        media_grids,
        target_positions(labels),
    )


def media_inputs(media: Sequence[Tensor], patch_size: int | None) -> tuple[Tensor, tuple[Grid, ...] | None]:
    """``media`` and ``media_grids`` as the model takes them, of one medium and more.

    media: uint8 [frames, 3, height, width] each. patch_size: they have any shape of whole patches; None: all have the
    same, and there are no grids.
    """
    if patch_size is None:
        return torch.stack(list(media)), None
    patches = torch.cat([to_patches(one, patch_size) for one in media])
    return patches, tuple(_grid(one, patch_size) for one in media)


def to_patches(medium: Tensor, patch_size: int) -> Tensor:
    """[frames, 3, height, width] -> [frames * rows * columns, 3, patch_size, patch_size], row after row of a frame."""
    frames, rows, columns = _grid(medium, patch_size)
    split = medium.view(frames, 3, rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, patch_size, patch_size)


def from_patches(patches: Tensor, grid: Grid) -> Tensor:
    """What ``to_patches`` was given."""
    return patches.unflatten(0, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _grid(medium: Tensor, patch_size: int) -> Grid:
    frames, _, height, width = medium.shape
    return frames, height // patch_size, width // patch_size
