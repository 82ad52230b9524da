"""Build the task of ``trainer.train``: a Flamingo whose frozen parts are partitioned as they load under ZeRO-3."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

from model import ops
from model.factory import build_flamingo, build_tokenizer
from model.flamingo import Flamingo
from model.flops import UsefulFlops
from model.parameters import frozen_digests
from model.pretrained import start_from_export
from model.trainable_parts import part_of
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.batch import BatchFormat
from trainer.data.stream.step_plan import plan_step
from trainer.deepspeed_engine.engine import partitioned_loading
from trainer.loop import Task
from trainer.planning.activation_memory import ActivationMemory, recomputed_blocks
from trainer.planning.workload import largest_micro_batch
from trainer.runtime.distributed import World
from trainer.tasks.batch_flops import count_operations, data_sheet_tflops
from trainer.tasks.kl_penalty import accumulate_with, kl_weights
from trainer.tasks.language_model_fit import check_language_model
from trainer.tasks.row_builders import flamingo_builders
from trainer.tasks.storage_check import prepare_offload
from trainer.tasks.trained_parts import trained_parts_table

_log = logging.getLogger(__name__)


def build_flamingo_task(config: FlamingoRunConfig, world: World) -> Task:
    """Build the model and the way from samples to its input; a collective under ZeRO-3."""
    ops.set_backend(config.training.ops)
    tokenizer = build_tokenizer(config.model)
    settings = deepspeed_json(config)
    prepare_offload(config, settings, world)
    with partitioned_loading(settings) as build:
        model = build_flamingo(
            config.model,
            tokenizer,
            dtype=config.training.dtype,
            seed=config.training.seed,
            gather=build.gather,
            partition=build.partition,
            redraw=build.redraw,
        )
        if config.model.start_from is not None:
            start_from_export(model, config.model.start_from, build.overwrite)
    check_language_model(config.data, model.language_model.lm)
    config = _choose_checkpointing(config, model, world)
    if world.is_main:
        print(trained_parts_table(model, config), flush=True)
        if model.language_model.quantization_error is not None:
            print(model.language_model.quantization_error, flush=True)
    tower, sizes, penalties = model.vision_encoder, count_sizes(model), kl_weights(config.data)
    recomputed = config.training.activation_checkpointing
    return Task(
        module=model,
        builders=flamingo_builders(config.data, tokenizer, tower),
        batch_format=BatchFormat(tokenizer.pad_id, tower.image_size, tower.patch_size),
        deepspeed=settings,
        model=config.model.to_dict(),
        frozen=frozen_digests(model, build.gather),
        operations=None if sizes is None else partial(count_operations, sizes, recomputed),
        peak_tflops=config.logging.peak_tflops or data_sheet_tflops(world.device, config.training.dtype),
        accumulate=accumulate_with(penalties),
        penalties=penalties,
        measured_part=part_of if config.logging.part_grad_norms else None,
    )


def count_sizes(model: Flamingo) -> UsefulFlops | None:
    """Return what the FLOPs of a step depend on; None where a language model's config does not say it."""
    try:
        return UsefulFlops.of(model)
    except Exception as error:  # noqa: BLE001  counting must not prevent training
        name = type(model.language_model.lm).__name__
        _log.warning("the FLOPs of %s are not counted, so metrics have no mfu (%s)", name, error)
        return None


def _choose_checkpointing(config: FlamingoRunConfig, model: Flamingo, world: World) -> FlamingoRunConfig:
    """Set how many blocks the model recomputes, the same on every rank; return the configuration with that number."""
    memory, plans = ActivationMemory(config, model), plan_step(config.data, world.size)
    number = recomputed_blocks(config, memory, plans)
    model.set_activation_checkpointing(number)
    if config.training.activation_memory_gib is not None and world.is_main:
        peak = max(memory.count(largest_micro_batch(plan), number).peak for plan in plans)
        blocks = model.language_model.num_blocks
        print(
            f"activations take at most {peak / 2**30:.4g} GiB: {number} of {blocks} blocks are recomputed", flush=True
        )
    return replace(config, training=replace(config.training, activation_checkpointing=number))
