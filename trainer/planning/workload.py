"""Derive the shapes of a source's micro-batches, and the operations that a row takes."""

from __future__ import annotations

import math

from model.activations import MicroBatch
from model.flops import UsefulFlops, Workload
from trainer.config.data_config import InterleavedSource, MediaSource, Source, TextSource
from trainer.data.stream.step_plan import SourcePlan


def most_media(source: Source) -> int:
    """Return the most media that a row of the source can have."""
    match source:
        case InterleavedSource():
            return source.max_images
        case TextSource():
            return 0
    return 1


def patch_grid(source: Source) -> tuple[int, int] | None:
    """Return rows and columns of a medium with the most patches, or None where media become squares."""
    if not isinstance(source, MediaSource) or source.image_tokens is None:
        return None
    rows = math.isqrt(source.image_tokens)
    return rows, source.image_tokens // rows


def largest_micro_batch(plan: SourcePlan) -> MicroBatch:
    """Return the shapes of the largest micro-batch that the source's settings allow."""
    source = plan.source
    return MicroBatch(
        plan.micro_batch_size,
        source.max_tokens,
        plan.micro_batch_size * most_media(source),
        source.frames_in_medium,
        patch_grid(source),
        source.packing,
    )


def executed_flops(sizes: UsefulFlops, workload: Workload, recompute: bool | int) -> float:
    """Return the FLOPs that the devices execute for one row, recomputation included.

    A forward of what stands in a block is 2 of the 4 FLOPs per frozen weight and token, and 2 of the 6 per trained
    one (``model.flops``).

    Args:
        sizes: Sizes of the model.
        workload: Tokens and media of the row.
        recompute: Whether all blocks of the language model are recomputed in the backward, or how many.
    """
    parts = sizes.parts(workload)
    share = float(recompute) if isinstance(recompute, bool) else recompute / sizes.num_blocks
    forward = (
        parts["language_model"] * 2 / sizes.lm_factor
        + (parts["cross_attention_text"] + parts["cross_attention_media"]) / 3
    )
    return sum(parts.values()) + share * forward
