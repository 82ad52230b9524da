"""Spread a model for inference over the processes with ZeRO-3, for models that fit nowhere else."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from trainer.config.deepspeed_json import offload_section
from trainer.config.run_config import OffloadConfig
from trainer.deepspeed_engine.engine import move_buffers


def inference_json(offload_param: OffloadConfig, dtype: str) -> dict[str, Any]:
    """Return DeepSpeed's JSON of a model that is not trained.

    Args:
        offload_param: Offload of the partitioned parameters.
        dtype: Type of the parameters.
    """
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 100_000}
    if offload_param.device != "none":
        zero["offload_param"] = offload_section(offload_param)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
    }


def start_inference(module: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """Let ZeRO-3 gather the parameters of each module of a partitioned model as it runs.

    Args:
        module: Model that was built under ``partitioned_loading``.
        settings: ``inference_json``.
        device: Device of this process.
    """
    engine, *_ = deepspeed.initialize(model=module, config=settings)
    move_buffers(engine.module, device)
    engine.module.eval()
