"""A run's model with random weights and batches of its sizes, for measuring without weights or data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from model import ops
from model.factory import build_flamingo
from model.flamingo import Flamingo
from model.tokens import SpecialTokenIds
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.batch import IGNORED_LABEL, Batch, media_inputs
from trainer.data.stream.step_plan import SourcePlan, plan_step
from trainer.deepspeed_engine.engine import partitioned_loading
from trainer.planning.cost_model import (
    ActivationMemory,
    checkpointed_blocks,
    expected_media,
    synthetic_tokens,
    without_weights,
)
from trainer.runtime.distributed import World


def random_model(config: FlamingoRunConfig, world: World, micro_batches: int) -> tuple[Flamingo, dict[str, Any]]:
    """The model of a run with random weights, partitioned as the run asks, and DeepSpeed's settings."""
    ops.set_backend(config.training.ops)
    settings = deepspeed_json(config, world_size=world.size, micro_batches_per_step=micro_batches)
    model_config = without_weights(config.model)
    with partitioned_loading(settings) as placement:
        model = build_flamingo(
            model_config,
            synthetic_tokens(model_config),
            dtype=config.training.dtype,
            gather=placement.gather,
            partition=placement.partition,
        )
    plans = plan_step(config.data, world.size)
    model.activation_checkpointing(checkpointed_blocks(config, ActivationMemory(config, model), plans))
    return model, settings


def synthetic_batches(
    plan: SourcePlan, tokens: SpecialTokenIds, image_size: int, rank: int, patch_size: int | None = None
) -> Iterator[Batch]:
    """Full rows of one source, each a sample with as many media as the source allows; an update's micro-batches.

    patch_size: the tower's, for sources whose media keep their aspect.
    """
    generator = torch.Generator().manual_seed(rank)
    rows, length = plan.micro_batch_size, plan.source.max_tokens
    media, frames = expected_media(plan.source)
    height = width = image_size
    image_tokens: int | None = getattr(plan.source, "image_tokens", None)
    if image_tokens is not None and patch_size is not None:
        rows_of_patches = math.isqrt(image_tokens)
        height, width = patch_size * rows_of_patches, patch_size * (image_tokens // rows_of_patches)
    for _ in range(plan.micro_batches):
        ids = torch.randint(3, tokens.image_id, (rows, length), generator=generator)
        index = torch.full_like(ids, -1)
        if media:
            within = torch.arange(length) * media // length
            index = within + media * torch.arange(rows)[:, None]
            ids[:, [-(-medium * length // media) for medium in range(media)]] = tokens.image_id
        labels = ids.masked_fill(ids == tokens.image_id, IGNORED_LABEL)
        shape = (max(1, rows * media), frames, 3, height, width)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        inputs, grids = media_inputs(pixels.unbind(), patch_size if plan.keeps_aspect else None)
        yield Batch(plan.source.name, ids, torch.ones_like(ids), labels, index, inputs, media_grids=grids)
