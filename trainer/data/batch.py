"""Define a row, and the batch that rows are collated to.

Media are a flat list over the batch; ``media_index`` says which of them a token sees. There are no padding images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.loss import find_target_positions
from model.media_index import find_documents
from model.media_inputs import from_patches, media_inputs
from model.tower_patches import Grid, PatchLayout
from trainer.data.device_augmentation import augment_media

IGNORED_LABEL = -100
_MODEL_INPUTS = (
    "input_ids",
    "labels",
    "media_index",
    "media",
    "position_ids",
    "media_grids",
    "target_positions",
    "patch_layout",
    "document_offsets",
    "longest_document",
)


@dataclass(frozen=True)
class SampleId:
    """Identify a sample.

    Attributes:
        source: Name of the source.
        epoch: Epoch of the source, counted from 0.
        shard: URL of the shard, as in the manifest.
        index: Place in the shard, counted from 0.
        key: Key in the shard.
    """

    source: str
    epoch: int
    shard: str
    index: int
    key: str


class RejectedSample(NamedTuple):
    """Name a sample that cannot be used, with the reason (an identifier) and a detail for people."""

    reason: str
    detail: str
    sample: SampleId


@dataclass(frozen=True)
class Row:
    """Hold one row before padding.

    Attributes:
        input_ids: int64 [L].
        labels: int64 [L] at their token's own position (the model shifts), -100 where nothing is trained.
        media_index: int64 [L], the medium that each token sees, counted from 0 within this row; -1 for none.
        media: uint8 [frames, 3, height, width] each, in the order of ``media_index``.
        samples: Samples that the row was made of.
        position_ids: int64 [L] of a packed row, restarting at 0 with each document; None where the row is one document.
        dropped_images: Images that documents of the row lost: unusable ones, and those beyond ``max_images``.
        device_changes: What the device changes in each medium, float64 [15] each; empty if the loader changed them.
    """

    input_ids: Tensor
    labels: Tensor
    media_index: Tensor
    media: tuple[Tensor, ...]
    samples: tuple[SampleId, ...]
    position_ids: Tensor | None = None
    dropped_images: tuple[RejectedSample, ...] = ()
    device_changes: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class BatchFormat:
    """Describe what a model takes, for collating.

    Attributes:
        pad_id: Token that fills rows up to the longest one.
        image_size: Side of the vision tower's square input, in pixels.
        patch_size: Side of the tower's patches, in pixels; None where it takes squares only.
    """

    pad_id: int
    image_size: int
    patch_size: int | None = None

    def dummy_medium(self, num_frames: int, keeps_aspect: bool) -> Tensor:
        """Return a black medium, uint8 [frames, 3, height, width]: one patch where media keep their aspect."""
        size = self.patch_size if keeps_aspect else self.image_size
        assert size is not None, "a source keeps aspects, and the tower takes squares only"
        return torch.zeros((num_frames, 3, size, size), dtype=torch.uint8)


@dataclass(frozen=True)
class Batch:
    """Hold one micro-batch of one source on one rank.

    Every rank has to run the same modules, so a batch has at least one medium. Where no row has one, a black dummy
    stands there that no token sees.

    Attributes:
        source: Name of the source.
        input_ids: int64 [B, L], padded on the right.
        attention_mask: int64 [B, L], 1 for a token, 0 for padding.
        labels: int64 [B, L].
        media_index: int64 [B, L], counted over the batch; -1 for no medium.
        media: uint8 [M, frames, 3, height, width]; or, where media keep their aspect, the patches of all media, one
            medium after the other: uint8 [P, 3, patch_size, patch_size].
        samples: Samples that the batch was made of.
        rejected: Number of rejected samples that others replaced, by reason.
        dropped_images: Number of images that documents lost, by reason.
        position_ids: int64 [B, L] of packed rows, restarting at 0 with each document and with the padding, which is
            then a document of its own. Documents do not attend to one another. None where each row is one document that
            fills it, or rows are not packed.
        media_grids: Frames, rows and columns of patches of each medium, where media keep their aspect.
        target_positions: ``model.loss.find_target_positions`` of the labels. The following fields, too, are found on
            the CPU, because asking a GPU for them would wait for it.
        patch_layout: Layout of ``media_grids``.
        document_offsets: ``model.media_index.find_documents`` of packed rows.
        longest_document: Tokens of the longest document of packed rows.
        device_changes: What the device changes in each medium, float64 [M, 15]; None once that is done, or if the
            loader did it.
    """

    source: str
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    media_index: Tensor
    media: Tensor
    samples: tuple[SampleId, ...] = ()
    rejected: Counter[str] = field(default_factory=Counter)
    dropped_images: Counter[str] = field(default_factory=Counter)
    position_ids: Tensor | None = None
    media_grids: tuple[Grid, ...] | None = None
    target_positions: Tensor | None = None
    patch_layout: PatchLayout | None = None
    document_offsets: Tensor | None = None
    longest_document: int | None = None
    device_changes: Tensor | None = None

    @property
    def num_media(self) -> int:
        """Number of media, including the dummy of a batch without any."""
        return len(self.media if self.media_grids is None else self.media_grids)

    @property
    def num_seen_media(self) -> int:
        """Number of media without the dummy."""
        return self.num_media if int(self.media_index.max()) >= 0 else 0

    @property
    def num_trained_tokens(self) -> int:
        """Number of labels in the loss. Nothing predicts the first token of a row."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum())

    @property
    def num_documents(self) -> int:
        """Number of documents: rows, or what packed rows hold."""
        if self.position_ids is None:
            return len(self.input_ids)
        return int(((self.position_ids == 0) & (self.attention_mask == 1)).sum())

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model, by keyword.

        There is no attention mask: padding comes last, so no token sees it in a causal model, and a mask would keep a
        GPU from its fastest attention.
        """
        return {name: value for name in _MODEL_INPUTS if (value := getattr(self, name)) is not None}

    def medium(self, index: int) -> Tensor:
        """Return one medium as pixels, uint8 [frames, 3, height, width]."""
        if self.media_grids is None:
            return self.media[index]
        sizes = [math.prod(grid) for grid in self.media_grids]
        return from_patches(self.media.split(sizes)[index], self.media_grids[index])

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device, with augmented media; a pinned batch is copied asynchronously."""
        moved = self._map_tensors("to", device, non_blocking=True)
        if moved.device_changes is None:
            return moved
        return replace(moved, media=augment_media(moved.media, moved.device_changes), device_changes=None)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned host memory. torch's DataLoader calls this."""
        return self._map_tensors("pin_memory")

    def _map_tensors(self, method: str, *args: object, **kwargs: object) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor | PatchLayout)}
        return replace(self, **{name: getattr(value, method)(*args, **kwargs) for name, value in tensors.items()})


def collate(
    rows: Sequence[Row],
    batch_format: BatchFormat,
    *,
    source: str,
    num_frames: int = 1,
    keeps_aspect: bool = False,
    rejected: Counter[str] | None = None,
) -> Batch:
    """Pad rows of different lengths to one batch.

    Args:
        rows: One row or more.
        batch_format: What the model takes.
        source: Name of the source.
        num_frames: Frames of the dummy medium of a batch without media.
        keeps_aspect: Whether media have any shape of whole patches; otherwise all have the same shape.
        rejected: Number of rejected samples, by reason.
    """
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids = torch.full(shape, batch_format.pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
    media_index = torch.full(shape, -1, dtype=torch.int64)
    packed = any(row.position_ids is not None for row in rows)
    position_ids = torch.zeros(shape, dtype=torch.int64) if packed else None
    media: list[Tensor] = []
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[number, :length] = row.input_ids
        attention_mask[number, :length] = 1
        labels[number, :length] = row.labels
        media_index[number, :length] = torch.where(row.media_index < 0, row.media_index, row.media_index + len(media))
        media.extend(row.media)
        if position_ids is not None:
            position_ids[number, :length] = torch.arange(length) if row.position_ids is None else row.position_ids
            position_ids[number, length:] = torch.arange(shape[1] - length)
    if not media:
        media = [batch_format.dummy_medium(num_frames, keeps_aspect)]
    changes = [one for row in rows for one in row.device_changes]
    pixels, media_grids = media_inputs(media, batch_format.patch_size if keeps_aspect else None)
    document_offsets = longest_document = None
    if position_ids is not None:
        document_offsets, longest_document = find_documents(position_ids)
        if len(document_offsets) == 1 + len(rows):  # a mask that separates documents would mask nothing
            position_ids = document_offsets = longest_document = None
    return Batch(
        source=source,
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        media_index=media_index,
        media=pixels,
        samples=tuple(sample for row in rows for sample in row.samples),
        rejected=rejected or Counter(),
        dropped_images=Counter(image.reason for row in rows for image in row.dropped_images),
        position_ids=position_ids,
        media_grids=media_grids,
        target_positions=find_target_positions(labels),
        patch_layout=None if media_grids is None else PatchLayout.of(media_grids),
        document_offsets=document_offsets,
        longest_document=longest_document,
        device_changes=torch.stack(changes) if changes else None,
    )
