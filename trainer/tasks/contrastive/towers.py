"""Wrap an open_clip model: it takes pixels and tokens as they come from the loader, and returns features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

IMAGE_TOWER = "clip.visual."  # how the names of the image tower's parameters begin


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ContrastiveTowers(nn.Module):
    """Return the features of images and captions.

    Args:
        clip: open_clip's model.

    Attributes:
        mean_color: Mean of the input for each channel, for values in 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Any) -> None:
        super().__init__()
        flatten_scalars(clip)
        self.clip: Any = clip
        self.mean_color, std = normalization(clip)
        self.register_buffer("mean", torch.tensor(self.mean_color).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(
        self, input_ids: Tensor | None = None, media: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, ...]:
        """Return the fields of ``Features``: those of a missing input are empty, and the temperature has no limit yet.

        They are a tuple, because ZeRO-3 finds tensors in no class of ours.

        Args:
            input_ids: int64 [B, context length], captions.
            media: uint8 [B, 1, 3, height, width], images.
            unused: Other fields of a batch.
        """
        images = None
        if media is not None:
            images = (media[:, 0].to(self.mean.dtype) / 255.0 - self.mean) / self.std
        # Called as a module, not through encode_image and encode_text: ZeRO-3 gathers parameters as modules are called.
        image_BD, text_BD, scale, *bias = self.clip(images, input_ids)
        empty = scale.new_empty((0, 0))
        return (empty if image_BD is None else image_BD, empty if text_BD is None else text_BD, scale, *bias)


def normalization(clip: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the tower's input, for each channel, for values in 0..1."""
    settings = open_clip.get_model_preprocess_cfg(clip)
    return tuple(settings["mean"]), tuple(settings["std"])


def flatten_scalars(module: nn.Module) -> None:
    """Give every parameter without dimensions one: DeepSpeed cannot flatten it."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() == 0:
                setattr(owner, name, nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad))


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch norms at the end, for a forward pass that is made twice."""
    norms = [owner for owner in module.modules() if isinstance(owner, _NORMS)]
    saved = [(buffer, buffer.clone()) for owner in norms for buffer in owner.buffers(recurse=False)]
    yield
    for buffer, value in saved:
        buffer.copy_(value)
