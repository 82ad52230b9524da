"""Load an export for an evaluation: whole in each process, or partitioned over all of them by ZeRO-3."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from model.config import LanguageModelConfig
from model.factory import build_flamingo
from model.flamingo import Flamingo
from model.parameters import explain_difference, frozen_digests, trainable_parameters
from model.pretrained import describe_export, from_pretrained, read_trained
from trainer.config.evaluation_config import EvaluationConfig
from trainer.deepspeed_engine.engine import copy_parameters, partitioned_loading
from trainer.deepspeed_engine.inference import inference_json, start_inference
from trainer.evaluation.ranks import Ranks
from trainer.hub.weights_digest import weights_digest

_log = logging.getLogger(__name__)


def describe_model(folder: Path) -> dict[str, Any]:
    """Return what the scores depend on: digests of trained and frozen weights.

    Raises:
        ValueError: The folder is no export.
    """
    return {**weights_digest(folder), "trained_in": describe_export(folder).dtype}


def language_model_positions(config: LanguageModelConfig) -> int | None:
    """Return the number of positions of a language model, from its config alone; None where it says none."""
    if config.name is not None:
        found = AutoConfig.from_pretrained(config.name, revision=config.revision)
    else:
        found = AutoConfig.for_model(**(config.architecture or {}))
    number = getattr(found.get_text_config(), "max_position_embeddings", None)
    return number if isinstance(number, int) and number > 0 else None


def load_model(config: EvaluationConfig, ranks: Ranks) -> Flamingo:
    """Load the model of an evaluation, in evaluation mode; a collective with ZeRO-3.

    Raises:
        ValueError: The folder is no export, or the frozen weights are not those of the training.
    """
    if config.deepspeed.zero_stage == 3:
        assert ranks.world is not None, "ZeRO-3 needs a group, even of one process"
        return _load_partitioned(config, ranks.world.device)
    if ranks.world is not None and config.device is None:
        device = str(ranks.world.device)
    else:
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return from_pretrained(config.model, dtype=config.dtype, device=device)


def _load_partitioned(config: EvaluationConfig, device: torch.device) -> Flamingo:
    description = describe_export(config.model)
    if config.dtype not in (None, description.dtype):
        raise ValueError(
            f"dtype {config.dtype}: with deepspeed.zero_stage 3 the model keeps the type of its training "
            f"({description.dtype}); leave dtype out"
        )
    settings = inference_json(config.deepspeed.offload_param, description.dtype)
    with partitioned_loading(settings) as build:
        model = build_flamingo(
            description.config,
            description.tokens,
            dtype=description.dtype,
            seed=description.seed,
            gather=build.gather,
            partition=build.partition,
            redraw=build.redraw,
        )
    difference = explain_difference(description.frozen, frozen_digests(model, build.gather))
    if difference:
        raise ValueError(f"the frozen weights are not those that {config.model} was trained with ({difference})")
    trained = read_trained(config.model)
    parameters = trainable_parameters(model)
    if parameters.keys() != trained.keys():
        raise ValueError(
            f"{config.model}: the names of its trained tensors do not fit its config; export the run again"
        )
    copy_parameters(parameters, trained)
    start_inference(model, settings, device)
    # In a forward of the whole model, DeepSpeed finds the parameters that are read without the forward of their module,
    # such as the output projection of torch's MultiheadAttention. Generation runs parts of the model only.
    size = model.vision_encoder.image_size
    media = torch.zeros(1, 1, 3, size, size, dtype=torch.uint8, device=device)
    with torch.no_grad():
        model(torch.tensor([[model.tokens.bos_id, model.tokens.image_id]], device=device), media=media)
    return model
