"""Flip images and change their colors on the device, where a batch arrives, as the loader would have.

The loader draws the changes of each image, crops and resizes it. A batch carries the draws to the device, so pixels
depend on the sample alone, and every forward of a batch sees the same ones. Each pixel is computed by itself, from sums
that are exact, so they do not depend on the batch either.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_CHANGES = 15  # 9 entries of the map of colors, share of the mean's luma, flip, top, left, height, width
LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, whose sum is 1
_MEDIA_AT_A_TIME = 64  # their pixels are in memory as float32


def augment_media(media_MFCHW: Tensor, changes_MK: Tensor) -> Tensor:
    """Return changed media, uint8 [M, frames, 3, height, width].

    Args:
        media_MFCHW: uint8, RGB.
        changes_MK: float64 [M, ``NUM_CHANGES``], made by ``Augmentation.device_changes``.
    """
    chunks = zip(media_MFCHW.split(_MEDIA_AT_A_TIME), changes_MK.split(_MEDIA_AT_A_TIME), strict=True)
    return torch.cat([_augment(media, changes) for media, changes in chunks])


def _augment(media_MFCHW: Tensor, changes_MK: Tensor) -> Tensor:
    height, width = media_MFCHW.shape[-2:]
    flip_M1 = changes_MK[:, 10:11] > 0
    top_M1, left_M1, rows_M1, columns_M1 = changes_MK[:, 11:].long().split(1, dim=1)
    row_H, column_W = (torch.arange(side, device=media_MFCHW.device) for side in (height, width))
    in_rows_MH = (row_H >= top_M1) & (row_H < top_M1 + rows_M1)
    in_columns_MW = (column_W >= left_M1) & (column_W < left_M1 + columns_M1)
    from_MW = torch.where(flip_M1 & in_columns_MW, 2 * left_M1 + columns_M1 - 1 - column_W, column_W)
    media_MFCHW = media_MFCHW.gather(-1, from_MW[:, None, None, None].expand_as(media_MFCHW))
    # The padding keeps its color.
    inside_M11HW = (in_rows_MH[:, :, None] & in_columns_MW[:, None])[:, None, None]
    sum_MFC = (media_MFCHW * inside_M11HW).sum((-2, -1), dtype=torch.int64)
    mean_MFC = sum_MFC / (rows_M1 * columns_M1)[:, None].double()
    luma_MF = LUMA[0] * mean_MFC[..., 0] + LUMA[1] * mean_MFC[..., 1] + LUMA[2] * mean_MFC[..., 2]
    offset_MF11 = (changes_MK[:, 9:10] * luma_MF + 0.5).float()[..., None, None]
    matrix_MCC11 = changes_MK[:, :9].float().unflatten(1, (3, 3))[..., None, None]
    planes_MFCHW = media_MFCHW.float()
    channels = []
    for channel in range(3):
        total_MFHW = planes_MFCHW[:, :, 0] * matrix_MCC11[:, None, channel, 0]
        for other in (1, 2):
            total_MFHW += planes_MFCHW[:, :, other] * matrix_MCC11[:, None, channel, other]
        total_MFHW += offset_MF11
        channels.append(total_MFHW.clamp_(0, 255).to(torch.uint8))
    return torch.where(inside_M11HW, torch.stack(channels, dim=2), media_MFCHW)
