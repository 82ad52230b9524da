"""Encode images of any shape in one call of an open_clip vision transformer.

Their patches are padded to the longest image, and no patch attends to padding. It is one call for a batch, whatever
shapes are in it, because under ZeRO-3 every rank has to run the same modules in the same order. NaViT (arXiv
2307.06304) packs patches for the same reason, that sizes differ. Q counts the tokens of the longest image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor

Grid = tuple[int, int, int]  # frames, rows and columns of patches of a medium


@dataclass(frozen=True)
class PatchLayout:
    """Hold where each patch of a batch belongs.

    The collator computes it on the CPU, because a GPU waits for a tensor that is made of Python's numbers.

    Attributes:
        cu_media: int64 [M + 1], offsets of the media in the patches.
        frame_of_patch: int64 [P], frame of its medium that each patch belongs to.
        slots: int64 [P], place of each patch among the images' tokens, where each image is padded to the longest one.
        patches_per_image: int64 [I].
        rows_per_image: int64 [I], rows of patches.
    """

    cu_media: Tensor
    frame_of_patch: Tensor
    slots: Tensor
    patches_per_image: Tensor
    rows_per_image: Tensor

    @staticmethod
    def of(grids: Sequence[Grid]) -> PatchLayout:
        """Return the layout of media, on the CPU.

        Args:
            grids: Frames, rows and columns of patches of each medium.
        """
        images = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
        media = [frames * rows * columns for frames, rows, columns in grids]
        longest = tokens_of_longest_image(grids)
        return PatchLayout(
            torch.tensor([0, *media]).cumsum(0),
            torch.cat([torch.arange(frames).repeat_interleave(rows * columns) for frames, rows, columns in grids]),
            torch.cat([torch.arange(patches) + 1 + image * longest for image, patches in enumerate(images)]),
            torch.tensor(images),
            torch.tensor([rows for frames, rows, _ in grids for _ in range(frames)]),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PatchLayout:
        """Return the layout on a device."""
        return self._map("to", device, non_blocking=non_blocking)

    def pin_memory(self) -> PatchLayout:
        """Return the layout in pinned host memory."""
        return self._map("pin_memory")

    def _map(self, method: str, *args: object, **kwargs: object) -> PatchLayout:
        return PatchLayout(*(getattr(getattr(self, f.name), method)(*args, **kwargs) for f in fields(self)))


def tokens_of_longest_image(grids: Sequence[Grid]) -> int:
    """Return the tokens of the image with the most patches, its class token included."""
    return 1 + max(rows * columns for _, rows, columns in grids)


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
    tower: Any, patches_PCyx: Tensor, grids: Sequence[Grid], layout: PatchLayout, *, block: int, feature_norm: bool
) -> Tensor:
    """Return the features of all patches, one medium after the other, [S, V].

    The features of a medium do not depend on the other media.

    Args:
        tower: open_clip's ``VisionTransformer``, whose call this is part of.
        patches_PCyx: Normalized pixels; frame after frame, and row after row in a frame.
        grids: Frames, rows and columns of patches of each medium.
        layout: ``PatchLayout.of(grids)``, on the device of the patches.
        block: Block whose output is returned.
        feature_norm: Whether the final norm is applied to it.
    """
    images = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    longest = tokens_of_longest_image(grids)

    x_PV = tower.conv1(patches_PCyx).flatten(1)
    class_position_V, positions_PV = _positions(tower.positional_embedding, tower.grid_size, images)
    x_PV = x_PV + positions_PV.to(x_PV.dtype)
    first_V = tower.class_embedding.to(x_PV.dtype) + class_position_V.to(x_PV.dtype)
    padded_V = x_PV.new_zeros(len(images) * longest, x_PV.shape[1])
    x_IQV = padded_V.index_copy(0, layout.slots, x_PV).unflatten(0, (-1, longest))
    x_IQV[:, 0] = first_V

    x_IQV = tower.ln_pre(tower.patch_dropout(x_IQV))
    mask = None
    if len({rows * columns for rows, columns in images}) > 1:
        mask = _key_mask(layout.patches_per_image, longest, tower.transformer.resblocks[0].attn.num_heads, x_IQV.dtype)
    _, found = tower.transformer.forward_intermediates(x_IQV, attn_mask=mask, indices=[block], stop_early=True)
    features_IQV = tower.ln_post(found[-1]) if feature_norm else found[-1]
    features_SV: Tensor = features_IQV.flatten(0, 1)[layout.slots]
    return features_SV


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


def _key_mask(patches_per_image: Tensor, longest: int, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Return the mask that ``nn.MultiheadAttention`` adds to its scores, [I * H, Q, J]: -inf for padded keys."""
    device = patches_per_image.device
    padding_IJ = torch.arange(longest, device=device) > patches_per_image[:, None]
    mask_IJ = torch.zeros(padding_IJ.shape, dtype=dtype, device=device).masked_fill(padding_IJ, float("-inf"))
    return mask_IJ[:, None, None].expand(-1, num_heads, longest, -1).flatten(0, 1)
