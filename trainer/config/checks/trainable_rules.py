"""Check what trains, and the optimizer's settings for parts of a Flamingo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from model.config import LoraConfig
from trainer.config.run_config import FlamingoRunConfig, PartOptimizerConfig, PartsOptimizerConfig, RunConfig
from trainer.errors import Problem


def trainable_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of ``optimizer.parts`` and of the adapters."""
    trainable = config.model.trainable if isinstance(config, FlamingoRunConfig) else None
    for entry in fields(PartsOptimizerConfig):
        path, own = f"optimizer.parts.{entry.name}", getattr(config.optimizer.parts, entry.name)
        if own == PartOptimizerConfig():
            continue
        if trainable is None:
            yield Problem(path, "only trainer.train has these parts; leave it out")
        elif getattr(trainable, entry.name) == "frozen":
            message = f"is for a part that trains, but model.trainable.{entry.name} is frozen; leave it out"
            yield Problem(path, message, related=(f"model.trainable.{entry.name}",))
    if not isinstance(config, FlamingoRunConfig) or trainable is None:
        if config.logging.part_grad_norms:
            yield Problem("logging.part_grad_norms", "only trainer.train has parts; leave it out")
        return
    adapters = {"language_model": config.model.language_model_lora, "vision": config.model.vision_lora}
    for part, lora in adapters.items():
        path, mode = f"model.{part}_lora", getattr(config.model.trainable, part)
        if mode != "lora" and lora != LoraConfig():
            yield Problem(path, f"is for model.trainable.{part}: lora, not {mode}; leave it out")
        if lora.rank < 1:
            yield Problem(f"{path}.rank", f"must be 1 or more, not {lora.rank}")
        if not 0 <= lora.dropout < 1:
            yield Problem(f"{path}.dropout", f"must be at least 0 and below 1, not {lora.dropout}")
    yield from _quantization_problems(config)
    if trainable.language_model in ("full", "from_random") and (method := _quantization(config)) is not None:
        message = f"the weights are quantized ({method}) and cannot train; take lora, or weights that are not quantized"
        yield Problem("model.trainable.language_model", message, related=("model.language_model.name",))


def _quantization_problems(config: FlamingoRunConfig) -> Iterator[Problem]:
    setting, value = "model.language_model.quantization", config.model.language_model.quantization
    if value == "none":
        return
    mode = config.model.trainable.language_model
    if mode != "frozen":
        message = f"{value} is for a language model that is frozen, not {mode}; set it to none"
        yield Problem(setting, message, related=("model.trainable.language_model",))
    if (method := _quantization(config)) is not None:
        message = f"{value}: the weights are quantized already ({method}); set it to none"
        yield Problem(setting, message, related=("model.language_model.name",))
    if config.deepspeed.offload_param.device == "nvme":
        message = f"{value} cannot lie on a drive: DeepSpeed's buffers hold one type of numbers; offload to cpu or none"
        yield Problem(setting, message, related=("deepspeed.offload_param.device",))


def _quantization(config: FlamingoRunConfig) -> str | None:
    """Return how the weights of a language model in a local folder are quantized, or None."""
    path = Path(config.model.language_model.name or "", "config.json")
    try:
        settings = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None  # other checks report such a file
    return None if settings is None else str(settings.get("quant_method", "unknown method"))
