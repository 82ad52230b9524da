"""Bring pixels into the form that the vision encoder takes: squares of one size, or patches of any shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.tower_patches import Grid


def media_inputs(media: Sequence[Tensor], patch_size: int | None) -> tuple[Tensor, tuple[Grid, ...] | None]:
    """Return ``media`` and ``media_grids`` for ``Flamingo.forward``.

    Args:
        media: One medium or more, each uint8 [F, 3, Y, X].
        patch_size: Side of a patch in pixels, where media have any shape of whole patches. None where all media have
            one shape; then there are no grids.

    Returns:
        uint8 [M, F, 3, Y, X] and None, or uint8 [P, 3, patch_size, patch_size] and the grid of each medium.
    """
    if patch_size is None:
        return torch.stack(list(media)), None
    patches = torch.cat([to_patches(medium, patch_size) for medium in media])
    return patches, tuple(_grid(medium, patch_size) for medium in media)


def prompt_inputs(
    media: Sequence[Tensor], patch_size: int | None, keeps_aspect: bool
) -> tuple[Tensor, tuple[Grid, ...] | None]:
    """Return ``media`` and ``media_grids`` of images and videos together; squares where all of them are equal.

    Args:
        media: As for ``media_inputs``.
        patch_size: Side of a patch in pixels, where the tower takes media of any shape; else None.
        keeps_aspect: Whether media keep their aspect (``image_tokens``).

    Raises:
        ValueError: Media differ in shape, and the tower takes squares only.
    """
    if not keeps_aspect and len({medium.shape for medium in media}) == 1:
        return media_inputs(media, None)
    if patch_size is None:
        raise ValueError("images and videos together: the model's tower takes media of one shape only")
    return media_inputs(media, patch_size)


def to_patches(medium: Tensor, patch_size: int) -> Tensor:
    """Cut a medium [F, 3, Y, X] into patches [P, 3, patch_size, patch_size], frame by frame, row by row."""
    num_frames, rows, columns = _grid(medium, patch_size)
    split = medium.view(num_frames, 3, rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, patch_size, patch_size)


def from_patches(patches: Tensor, grid: Grid) -> Tensor:
    """Join the patches of one medium, the inverse of ``to_patches``."""
    return patches.unflatten(0, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _grid(medium: Tensor, patch_size: int) -> Grid:
    num_frames, _, height, width = medium.shape
    return num_frames, height // patch_size, width // patch_size
