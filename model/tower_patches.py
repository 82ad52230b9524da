"""Encode images of any shape in one call of an open_clip vision transformer.

Their patches are padded to the longest image, and no patch attends to padding. It is one call for a batch, whatever
shapes are in it, because under ZeRO-3 every rank has to run the same modules in the same order. NaViT (arXiv
2307.06304) packs patches for the same reason, that sizes differ. Q counts the tokens of the longest image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor

Grid = tuple[int, int, int]  # frames, rows and columns of patches of a medium


def find_patch_size(tower: Any) -> int | None:
    """Return the side in pixels of the patches that a tower takes; None where it takes whole squares only.

    Only open_clip's own vision transformers are known to pass an attention mask to all of their blocks.
    """
    if not isinstance(tower, VisionTransformer) or tower.patch_size[0] != tower.patch_size[1]:
        return None
    if any(type(block) is not ResidualAttentionBlock for block in tower.transformer.resblocks):
        return None
    return int(tower.patch_size[0])


def encode_patches(
    tower: Any, patches_PCyx: Tensor, grids: Sequence[Grid], *, block: int, feature_norm: bool
) -> Tensor:
    """Return the features of all patches, one medium after the other, [S, V].

    The features of a medium do not depend on the other media.

    Args:
        tower: open_clip's ``VisionTransformer``, whose call this is part of.
        patches_PCyx: Normalized pixels; frame after frame, and row after row in a frame.
        grids: Frames, rows and columns of patches of each medium.
        block: Block whose output is returned.
        feature_norm: Whether the final norm is applied to it.
    """
    images = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    lengths = [rows * columns for rows, columns in images]
    longest, device = 1 + max(lengths), patches_PCyx.device  # the class token comes first
    slots = torch.cat([torch.arange(length) + 1 + number * longest for number, length in enumerate(lengths)]).to(device)

    x_PV = tower.conv1(patches_PCyx).flatten(1)
    class_position_V, positions_PV = _positions(tower.positional_embedding, tower.grid_size, images)
    x_PV = x_PV + positions_PV.to(x_PV.dtype)
    first_V = tower.class_embedding.to(x_PV.dtype) + class_position_V.to(x_PV.dtype)
    x_IQV = x_PV.new_zeros(len(images) * longest, x_PV.shape[1]).index_copy(0, slots, x_PV).unflatten(0, (-1, longest))
    x_IQV[:, 0] = first_V

    x_IQV = tower.ln_pre(tower.patch_dropout(x_IQV))
    mask = _key_mask(lengths, longest, tower.transformer.resblocks[0].attn.num_heads, x_IQV)
    _, found = tower.transformer.forward_intermediates(x_IQV, attn_mask=mask, indices=[block], stop_early=True)
    features_IQV = tower.ln_post(found[-1]) if feature_norm else found[-1]
    features_SV: Tensor = features_IQV.flatten(0, 1)[slots]
    return features_SV


def feature_offsets(grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``cu_media`` and ``frame_of_feature`` of media that have one feature for each patch of each frame."""
    lengths = torch.tensor([0, *(frames * rows * columns for frames, rows, columns in grids)])
    frame_of_feature = torch.cat([torch.arange(f).repeat_interleave(rows * columns) for f, rows, columns in grids])
    return lengths.cumsum(0).to(device), frame_of_feature.to(device)


def resize_positions(table_PV: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Resize the position embeddings of the tower's own grid to another grid, [rows * columns, V].

    The resizing is bicubic with antialiasing, in float32, as in open_clip and timm when a tower is loaded at another
    size.

    Args:
        table_PV: Embeddings of the tower's own grid, row after row.
        native: Rows and columns of the tower's own grid.
        grid: Rows and columns to resize to.
    """
    if grid == native:
        return table_PV
    table_VYX = table_PV.float().T.unflatten(1, native)
    resized = F.interpolate(table_VYX[None], grid, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].flatten(1).T.to(table_PV.dtype)


def _positions(table: Tensor, native: tuple[int, int], images: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return the embeddings of the class token's position, [V], and of all patches' positions, [P, V].

    Each grid of the batch is resized once. Nothing is kept for the next call, because under ZeRO-3 the table is whole
    only inside a call.
    """
    resized = {grid: resize_positions(table[1:], native, grid) for grid in set(images)}
    return table[0], torch.cat([resized[grid] for grid in images])


def _key_mask(lengths: Sequence[int], longest: int, num_heads: int, like: Tensor) -> Tensor | None:
    """Return the mask that ``nn.MultiheadAttention`` adds to its scores, [I * H, Q, J]: -inf for padded keys.

    Without padding there is no mask.
    """
    if min(lengths) + 1 == longest:
        return None
    padding_IJ = torch.arange(longest) > torch.tensor(lengths)[:, None]
    mask_IJ = torch.zeros(padding_IJ.shape).masked_fill(padding_IJ, float("-inf")).to(like.device, like.dtype)
    return mask_IJ[:, None, None].expand(-1, num_heads, longest, -1).flatten(0, 1)
