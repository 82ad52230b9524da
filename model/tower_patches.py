"""Images of any shape in one call of an open_clip vision transformer: their patches, padded to the longest image.

One call for a batch, whatever shapes are in it: under ZeRO-3 every rank has to run the same modules in the same order
(NaViT, arXiv 2307.06304, packs patches for the same reason that sizes differ). Padding is never attended to.

Shape suffixes: P patches of all images, B images (frames), T tokens of the longest image, V width of the tower,
H heads, y and x pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor

Grid = tuple[int, int, int]  # of a medium: frames, rows and columns of patches


def patch_size_of(tower: Any) -> int | None:
    """Side in pixels of the patches that a tower takes; None where it takes whole squares only.

    Only open_clip's own vision transformers are known to pass an attention mask to all of their blocks.
    """
    if not isinstance(tower, VisionTransformer) or tower.patch_size[0] != tower.patch_size[1]:
        return None
    if any(type(block) is not ResidualAttentionBlock for block in tower.transformer.resblocks):
        return None
    return int(tower.patch_size[0])


def features_of_patches(
    tower: Any, patches_P3yx: Tensor, grids: Sequence[Grid], *, block: int, feature_norm: bool
) -> Tensor:
    """Features of all patches, one medium after the other.

    Args:
        tower: open_clip's ``VisionTransformer``, on whose call this is entered.
        patches_P3yx: normalized pixels; frame after frame, and row after row in a frame.
        grids: of each medium. Its features do not depend on which others there are.
        block: whose output is taken. feature_norm: whether the final norm is applied to it.

    Returns:
        [P, V].
    """
    images = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    lengths = [rows * columns for rows, columns in images]
    longest, device = 1 + max(lengths), patches_P3yx.device  # the class token stands first
    slots = torch.cat([torch.arange(length) + 1 + number * longest for number, length in enumerate(lengths)]).to(device)

    x_PV = tower.conv1(patches_P3yx).flatten(1)
    class_position_V, positions_PV = _positions(tower.positional_embedding, tower.grid_size, images)
    x_PV = x_PV + positions_PV.to(x_PV.dtype)
    first_V = tower.class_embedding.to(x_PV.dtype) + class_position_V.to(x_PV.dtype)
    x_BTV = x_PV.new_zeros(len(images) * longest, x_PV.shape[1]).index_copy(0, slots, x_PV).unflatten(0, (-1, longest))
    x_BTV[:, 0] = first_V

    x_BTV = tower.ln_pre(tower.patch_dropout(x_BTV))
    mask = _key_mask(lengths, longest, tower.transformer.resblocks[0].attn.num_heads, x_BTV)
    _, found = tower.transformer.forward_intermediates(x_BTV, attn_mask=mask, indices=[block], stop_early=True)
    features_BTV = tower.ln_post(found[-1]) if feature_norm else found[-1]
    features_PV: Tensor = features_BTV.flatten(0, 1)[slots]
    return features_PV


def feature_offsets(grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor]:
    """``cu_media`` and ``frame_of_feature`` of media that each have a feature for each patch of each frame."""
    lengths = torch.tensor([0, *(frames * rows * columns for frames, rows, columns in grids)])
    frame_of_feature = torch.cat([torch.arange(f).repeat_interleave(rows * columns) for f, rows, columns in grids])
    return lengths.cumsum(0).to(device), frame_of_feature.to(device)


def resize_positions(table_NV: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Position embeddings of the patches of a grid, from those of the tower's own: [rows * columns, V].

    Bicubic with antialiasing, in float32, as open_clip and timm do when a tower is loaded at another size.
    """
    if grid == native:
        return table_NV
    table_VYX = table_NV.float().T.unflatten(1, native)
    resized = F.interpolate(table_VYX[None], grid, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].flatten(1).T.to(table_NV.dtype)


def _positions(table: Tensor, native: tuple[int, int], images: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Embedding of the class token's position, [V], and of all patches' positions, [P, V].

    Nothing is kept for the next call: under ZeRO-3 the table is whole inside of a call only, and each grid of the
    batch is resized once.
    """
    resized = {grid: resize_positions(table[1:], native, grid) for grid in set(images)}
    return table[0], torch.cat([resized[grid] for grid in images])


def _key_mask(lengths: Sequence[int], longest: int, heads: int, like: Tensor) -> Tensor | None:
    """What ``nn.MultiheadAttention`` adds to its scores, [B * H, T, T]: -inf for padding; None where there is none."""
    if min(lengths) + 1 == longest:
        return None
    padding_BT = torch.arange(longest) > torch.tensor(lengths)[:, None]
    mask_BT = torch.zeros(padding_BT.shape).masked_fill(padding_BT, float("-inf")).to(like.device, like.dtype)
    return mask_BT[:, None, None].expand(-1, heads, longest, -1).flatten(0, 1)
