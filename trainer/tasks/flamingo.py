"""The task of ``trainer.train``: a Flamingo, its frozen parts partitioned as they load under ZeRO-3."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from model import ops
from model.factory import build_flamingo, build_tokenizer
from model.flamingo import Flamingo
from model.flops import UsefulFlops
from model.parameters import frozen_digests
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.stream.loader import micro_batches_per_step
from trainer.data.stream.step_plan import plan_step
from trainer.deepspeed_engine.engine import partitioned_loading
from trainer.loop import Task
from trainer.planning.cost_model import ActivationMemory, checkpointed_blocks, micro_batch
from trainer.runtime.distributed import World
from trainer.tasks.batch_flops import count_operations, data_sheet_tflops
from trainer.tasks.row_builders import check_packing, flamingo_builders


def build_flamingo_task(config: FlamingoRunConfig, world: World) -> Task:
    """The model and how samples become its input; a collective under ZeRO-3."""
    ops.set_backend(config.training.ops)
    tokenizer = build_tokenizer(config.model)
    settings = deepspeed_json(
        config, world_size=world.size, micro_batches_per_step=micro_batches_per_step(config.data, world.size)
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
    config = _choose_checkpointing(config, model, world)
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


def _choose_checkpointing(config: FlamingoRunConfig, model: Flamingo, world: World) -> FlamingoRunConfig:
    """Sets the model, and returns the configuration with the number of blocks in it. Every rank counts the same."""
    memory, plans = ActivationMemory(config, model), plan_step(config.data, world.size)
    number = checkpointed_blocks(config, memory, plans)
    model.activation_checkpointing(number)
    if config.training.activation_memory_gib is not None and world.is_main:
        peak = max(memory.count(micro_batch(plan), number).peak for plan in plans)
        blocks = model.language_model.blocks
        print(f"activations: {peak / 2**30:.4g} GiB at most, with {number} of {blocks} blocks recomputed", flush=True)
    return replace(config, training=replace(config.training, activation_checkpointing=number))
