"""The task of ``trainer.train``: a Flamingo, its frozen parts partitioned as they load under ZeRO-3."""

from __future__ import annotations

from functools import partial

from model import ops
from model.factory import build_flamingo, build_tokenizer
from model.flops import UsefulFlops
from model.parameters import frozen_digests
from trainer.config.deepspeed import deepspeed_json
from trainer.config.schema import FlamingoRunConfig
from trainer.data.loader import micro_batches_per_update
from trainer.distributed import World
from trainer.engine import partitioned_loading
from trainer.loop import Task
from trainer.tasks.builders import check_packing, flamingo_builders
from trainer.tasks.flops import count_operations, data_sheet_tflops


def build_flamingo_task(config: FlamingoRunConfig, world: World) -> Task:
    """The model and how samples become its input; a collective under ZeRO-3."""
    ops.set_backend(config.training.ops)
    tokenizer = build_tokenizer(config.model)
    settings = deepspeed_json(
        config, world_size=world.size, micro_batches_per_update=micro_batches_per_update(config.data, world.size)
    )
    with partitioned_loading(settings) as placement:
        model = build_flamingo(
            config.model,
            tokenizer,
            dtype=config.training.dtype,
            seed=config.training.seed,
            gather=placement.gather,
            partition=placement.partition,
        )
    check_packing(config.data, model.language_model.lm)
    if config.training.activation_checkpointing:
        model.activation_checkpointing()
    size, sizes = model.vision_encoder.image_size, UsefulFlops.of(model)
    return Task(
        module=model,
        builders=flamingo_builders(config.data, tokenizer, model.vision_encoder),
        pad_id=tokenizer.pad_id,
        media_shape=(1, 3, size, size),
        patch_size=model.vision_encoder.patch_size,
        deepspeed=settings,
        model=config.model.to_dict(),
        frozen=frozen_digests(model, placement.gather),
        operations=partial(count_operations, sizes, config.training.activation_checkpointing),
        peak_tflops=config.logging.peak_tflops or data_sheet_tflops(world.device, config.training.dtype),
    )
