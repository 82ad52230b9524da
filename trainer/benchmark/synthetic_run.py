"""Build a run's model with random weights and full batches of its sizes, so that no weights and no data are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from model import ops
from model.factory import build_flamingo
from model.flamingo import Flamingo
from model.loss import find_target_positions
from model.media_inputs import media_inputs
from model.tower_patches import PatchLayout
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.batch import IGNORED_LABEL, Batch
from trainer.data.stream.step_plan import SourcePlan, plan_step
from trainer.deepspeed_engine.engine import partitioned_loading
from trainer.planning.activation_memory import ActivationMemory, recomputed_blocks
from trainer.planning.random_weights import synthetic_tokens, with_random_weights
from trainer.planning.workload import most_media, patch_grid
from trainer.runtime.distributed import World
from trainer.tasks.storage_check import prepare_offload


def random_model(config: FlamingoRunConfig, world: World) -> tuple[Flamingo, dict[str, Any]]:
    """Return the model of a run with random weights, partitioned as in the run, and DeepSpeed's settings."""
    ops.set_backend(config.training.ops)
    plans = plan_step(config.data, world.size)
    settings = deepspeed_json(config)
    prepare_offload(config, settings, world)
    model_config = with_random_weights(config.model)
    with partitioned_loading(settings) as build:
        model = build_flamingo(
            model_config,
            synthetic_tokens(model_config),
            dtype=config.training.dtype,
            gather=build.gather,
            partition=build.partition,
        )
    model.set_activation_checkpointing(recomputed_blocks(config, ActivationMemory(config, model), plans))
    return model, settings


def synthetic_step(config: FlamingoRunConfig, model: Flamingo, world: World) -> list[Batch]:
    """Return the micro-batches of a step on this rank: full rows, each one sample with as many media as allowed."""
    return [
        batch for plan in plan_step(config.data, world.size) for batch in _synthetic_batches(plan, model, world.rank)
    ]


def _synthetic_batches(plan: SourcePlan, model: Flamingo, rank: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(rank)
    tower, image_id = model.vision_encoder, model.tokens.image_id
    patch_size = tower.patch_size if plan.keeps_aspect else None
    height = width = tower.image_size
    if (grid := patch_grid(plan.source)) is not None and patch_size is not None:
        height, width = patch_size * grid[0], patch_size * grid[1]
    rows, length, media = plan.micro_batch_size, plan.source.max_tokens, most_media(plan.source)
    for _ in range(plan.num_micro_batches):
        ids = torch.randint(3, image_id, (rows, length), generator=generator)
        index = torch.full_like(ids, -1)
        if media:
            within_row = torch.arange(length) * media // length
            index = within_row + media * torch.arange(rows)[:, None]
            ids[:, [-(-medium * length // media) for medium in range(media)]] = image_id
        labels = ids.masked_fill(ids == image_id, IGNORED_LABEL)
        shape = (max(1, rows * media), plan.source.frames_in_medium, 3, height, width)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        inputs, grids = media_inputs(pixels.unbind(), patch_size)
        yield Batch(
            plan.source.name,
            ids,
            torch.ones_like(ids),
            labels,
            index,
            inputs,
            media_grids=grids,
            target_positions=find_target_positions(labels),
            patch_layout=None if grids is None else PatchLayout.of(grids),
        )
