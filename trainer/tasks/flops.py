"""Useful floating-point operations of a batch, as ``model.flops`` counts them."""

from __future__ import annotations

from model.flops import UsefulFlops, Workload
from trainer.data.batch import Batch


def useful_flops(sizes: UsefulFlops, batch: Batch) -> float:
    """Of the batch's tokens and media, without padding and dummies; frozen layers count as frozen.

    Media that keep their aspect count as so many frames of the tower's own size as they have patches for.
    """
    rows, frames = len(batch.input_ids), frames_per_medium(sizes, batch)
    media = batch.medium_count / rows if int(batch.media_index.max()) >= 0 else 0.0
    lengths: list[int] = batch.attention_mask.sum(-1).tolist()
    return sum(sizes.sequence(Workload(1, length, media, frames)) for length in lengths)


def frames_per_medium(sizes: UsefulFlops, batch: Batch) -> float:
    """Frames of the tower's own size that a medium of the batch has, on average."""
    if batch.media_grids is None:
        return batch.media.shape[1]
    return len(batch.media) / sizes.features / batch.medium_count
