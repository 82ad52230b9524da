"""Derive which medium each token sees from the token ids, by pure functions (paper, sections 2.4 and A.3.1).

The media of a batch are one flat list, in the order of their ``<image>`` tokens. A media index counts in it; -1 is no
medium. ``document_ids`` marks packed documents: a run of equal numbers is a document, and no token sees media of
another one. All tensors are int64, [L] or [B, L].
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_MEDIUM = -1


def preceding(input_ids: Tensor, image_id: int, document_ids: Tensor | None = None) -> Tensor:
    """Return the last medium at or before each token of its document; an ``<image>`` sees its own (the paper's phi)."""
    at_or_before, offset, _ = _count(input_ids, image_id)
    before_document = _before_document(input_ids, image_id, document_ids)
    return torch.where(at_or_before > before_document, offset + at_or_before - 1, NO_MEDIUM)


def following(input_ids: Tensor, image_id: int, document_ids: Tensor | None = None) -> Tensor:
    """Return the next medium strictly after each token of its document (the paper's ``p_next``), or none."""
    at_or_before, offset, total = _count(input_ids, image_id)
    until_end = total.expand_as(at_or_before)
    if document_ids is not None:
        ends = torch.ones_like(input_ids, dtype=torch.bool)
        ends[..., :-1] = document_ids[..., 1:] != document_ids[..., :-1]
        at_ends = torch.where(ends, at_or_before, torch.iinfo(torch.int64).max)
        until_end = at_ends.flip(-1).cummin(-1).values.flip(-1)
    return torch.where(at_or_before < until_end, offset + at_or_before, NO_MEDIUM)


def first_media(media_index: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Return the first medium that each token sees when it sees all of its document up to ``media_index``."""
    none = torch.iinfo(torch.int64).max
    seen = torch.where(media_index < 0, none, media_index)
    if document_ids is None:
        lowest = seen.amin(-1, keepdim=True).expand_as(seen)
    else:
        number = torch.zeros_like(media_index)
        number[..., 1:] = (document_ids[..., 1:] != document_ids[..., :-1]).cumsum(-1)
        lowest = torch.full_like(seen, none).scatter_reduce(-1, number, seen, "amin").gather(-1, number)
    return torch.where(media_index < 0, NO_MEDIUM, lowest)


def documents_from_positions(position_ids: Tensor) -> Tensor:
    """Return the ``document_ids`` of packed rows from position ids that restart at 0 with each document."""
    return (position_ids == 0).cumsum(-1)


def find_documents(position_ids: Tensor) -> tuple[Tensor, int]:
    """Return where packed documents start in the flattened rows, int32 [N + 1], and the tokens of the longest one.

    It is the form that variable-length attention takes. On a GPU the host waits to learn N, so the collator calls this
    before the batch goes there.
    """
    starts = (position_ids == 0).flatten().nonzero().squeeze(1)
    offsets = torch.cat([starts, starts.new_full((1,), position_ids.numel())])
    return offsets.int(), int(offsets.diff().max())


def _count(input_ids: Tensor, image_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count the media at or before each token of its row, those in the rows before, and those in the row.

    The last two have shape [..., 1].
    """
    at_or_before = (input_ids == image_id).cumsum(-1)
    total = at_or_before[..., -1:]
    offset = total.flatten().cumsum(0).view_as(total) - total
    return at_or_before, offset, total


def _before_document(input_ids: Tensor, image_id: int, document_ids: Tensor | None) -> Tensor:
    """Count the media of its row that stand before each token's document."""
    if document_ids is None:
        return torch.zeros_like(input_ids)
    is_image = (input_ids == image_id).long()
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    starts[..., 1:] = document_ids[..., 1:] != document_ids[..., :-1]
    before = is_image.cumsum(-1) - is_image
    return torch.where(starts, before, 0).cummax(-1).values
