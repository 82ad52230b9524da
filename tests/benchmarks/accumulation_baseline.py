"""Make a contrastive step as open_clip's trainer does with ``--accum-freq``: the baseline of the benchmark.

Features of all micro-batches are computed without a graph. Then each micro-batch runs again with a graph, takes its
place among the features of the others, and the whole loss is computed and differentiated for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn


def accumulate(clip: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Add the gradient of a step to the parameters' gradients; return the loss.

    Args:
        clip: open_clip's model.
        batches: Normalized images [B, 3, height, width] and captions int64 [B, context length].
    """
    loss_of = ClipLoss()
    images: list[Tensor] = []
    texts: list[Tensor] = []
    with torch.no_grad():
        for image, caption in batches:
            image_features, text_features, _ = clip(image, caption)
            images.append(image_features)
            texts.append(text_features)
    loss = torch.zeros(())
    for number, (image, caption) in enumerate(batches):
        image_features, text_features, scale = clip(image, caption)
        all_images = torch.cat([*images[:number], image_features, *images[number + 1 :]])
        all_texts = torch.cat([*texts[:number], text_features, *texts[number + 1 :]])
        loss = loss_of(all_images, all_texts, scale)
        loss.backward()
    return loss.detach()
