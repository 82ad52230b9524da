"""Spread a model for inference over the processes with ZeRO-3, for models that fit nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from trainer.config.deepspeed_json import offload_section
from trainer.config.run_config import OffloadConfig
from trainer.deepspeed_engine.engine import move_buffers
from trainer.deepspeed_engine.internals import is_partitioned


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


def copy_parameters(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into parameters, whether or not ZeRO-3 partitioned them; a collective if it did.

    Args:
        parameters: Parameters by name.
        state: A tensor for each of them; rank 0's are taken.
    """
    for name, parameter in parameters.items():
        if not is_partitioned(parameter):
            with torch.no_grad():
                parameter.copy_(state[name])
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if torch.distributed.get_rank() == 0:
                parameter.copy_(state[name])


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
