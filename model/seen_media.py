"""Derive which blocks of keys each token attends to, from the medium that it sees.

A block is what one medium gives to the cross-attention: the latents of a resampler. A linear projector gives a block
for each frame or tile, so that a medium is a run of blocks. Groups of media are runs as well, and so is everything in
a row. The fused op takes such runs as ``first_media`` and ``media_index``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import CrossAttentionConfig
from model.media_index import first_media


@dataclass(frozen=True)
class MediaBlocks:
    """Say how the blocks of a batch belong to its media.

    Attributes:
        cu_blocks: int64 [M + 1], offsets of the media in the blocks.
        number_M: int64 [M], blocks of each medium that are no padding; None where there is no padding. Padding comes
            last in a medium.
    """

    cu_blocks: Tensor
    number_M: Tensor | None = None


@dataclass(frozen=True)
class SeenMedia:
    """Say which blocks each token attends to.

    Attributes:
        last: int64 [B, L], last block; -1 for none.
        first: int64 [B, L], first block; None where every token attends to one block.
        has_media: bool [B, L], whether the feed-forward acts on a token; None for all tokens.
        order: int64 [blocks], order that the blocks have to be put into; None where they keep theirs.
    """

    last: Tensor
    first: Tensor | None = None
    has_media: Tensor | None = None
    order: Tensor | None = None

    def of_rows(self, rows: list[int], length: int) -> SeenMedia:
        """Return the last ``length`` tokens of some rows."""
        index = torch.tensor(rows, device=self.last.device)
        parts = (None if x is None else x[index, -length:] for x in (self.last, self.first, self.has_media))
        last, first, has_media = parts
        assert last is not None
        return SeenMedia(last, first, has_media)

    def to(self, device: torch.device | str) -> SeenMedia:
        """Return the same on a device."""
        parts = (None if x is None else x.to(device) for x in (self.last, self.first, self.has_media, self.order))
        last, first, has_media, order = parts
        assert last is not None
        return SeenMedia(last, first, has_media, order)


def find_seen_media(
    config: CrossAttentionConfig,
    media_index: Tensor,
    is_image: Tensor,
    document_ids: Tensor | None = None,
    blocks: MediaBlocks | None = None,
) -> SeenMedia:
    """Return the blocks that each token attends to.

    Args:
        config: Settings of the cross-attention.
        media_index: int64 [B, L], medium that each token sees, -1 for none.
        is_image: bool [B, L], tokens that stand for a medium.
        document_ids: Packed documents, as in ``model.media_index``.
        blocks: Blocks of the media; None where each medium has one.
    """
    first = None
    if config.attend == "all":
        first = first_media(media_index, document_ids)
    elif config.media_groups:
        first = _first_of_group(media_index, is_image, document_ids)
    has_media = None if config.without_media == "feed_forward" else media_index >= 0
    if config.without_media == "all_media":
        return _with_leak(media_index, first, is_image, blocks)
    if blocks is None:
        return SeenMedia(media_index, first, has_media)
    start = media_index if first is None else first
    last_block = blocks.cu_blocks[media_index + 1] - 1
    first_block = blocks.cu_blocks[start.clamp(min=0)]
    sees = media_index >= 0
    return SeenMedia(torch.where(sees, last_block, -1), torch.where(sees, first_block, -1), has_media)


def _first_of_group(media_index: Tensor, is_image: Tensor, document_ids: Tensor | None) -> Tensor:
    """Return the first medium of the group of each token's medium: media whose tokens follow each other directly."""
    follows = torch.zeros_like(is_image)
    follows[..., 1:] = is_image[..., 1:] & is_image[..., :-1]
    if document_ids is not None:
        follows[..., 1:] &= document_ids[..., 1:] == document_ids[..., :-1]
    number_T = is_image.flatten().cumsum(0) - 1  # of the medium, at its token
    start_T = torch.where(is_image.flatten() & ~follows.flatten(), number_T, -1).cummax(0).values
    # Tokens that are no images write to an entry behind the last medium.
    slots = torch.where(is_image.flatten(), number_T, is_image.numel())
    start_of_medium = torch.zeros_like(start_T, memory_format=torch.contiguous_format).new_zeros(is_image.numel() + 1)
    start_of_medium = start_of_medium.scatter(0, slots, start_T)
    return torch.where(media_index < 0, media_index, start_of_medium[media_index.clamp(min=0)])


def _with_leak(media_index: Tensor, first: Tensor | None, is_image: Tensor, blocks: MediaBlocks | None) -> SeenMedia:
    """Let tokens before all media attend to all blocks of their row, padding included, as transformers' mllama does.

    The blocks of a row are ordered so that padding comes last. Then both the real blocks of a group and all blocks of
    the row are runs.
    """
    counts_B = is_image.sum(-1)
    if not counts_B.any():  # a batch without media has a black medium, which no token sees
        return SeenMedia(media_index, has_media=media_index >= 0)
    rows = torch.arange(len(counts_B), device=counts_B.device)
    row_M = torch.repeat_interleave(rows, counts_B)
    cu_media = torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)])
    cu_blocks = torch.arange(len(row_M) + 1, device=row_M.device) if blocks is None else blocks.cu_blocks
    each_M = cu_blocks.diff()
    medium_S = torch.repeat_interleave(torch.arange(len(row_M), device=row_M.device), each_M)
    real_M = each_M if blocks is None or blocks.number_M is None else blocks.number_M
    inside_S = torch.arange(len(medium_S), device=row_M.device) - cu_blocks[medium_S]
    is_padding_S = inside_S >= real_M[medium_S]
    order = torch.argsort(2 * row_M[medium_S] + is_padding_S, stable=True)
    place_S = torch.argsort(order)
    sees = media_index >= 0
    known = media_index.clamp(min=0)
    start = known if first is None else first.clamp(min=0)
    last_block = place_S[cu_blocks[known] + real_M[known] - 1]
    first_block = place_S[cu_blocks[start]]
    row_first, row_last = cu_blocks[cu_media[:-1]][:, None], cu_blocks[cu_media[1:]][:, None] - 1
    row_has_media = (counts_B > 0)[:, None]
    return SeenMedia(
        last=torch.where(sees, last_block, torch.where(row_has_media, row_last, -1)),
        first=torch.where(sees, first_block, torch.where(row_has_media, row_first, -1)),
        has_media=sees,
        order=order,
    )
