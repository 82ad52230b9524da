"""AdamW in its three implementations, its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainer.config.run_config import OptimizerConfig, ScheduleConfig

GATE, RESAMPLER = "gate", "resampler"


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of trainable parameters: matrices that decay, what never decays, and the gates.

    Never decayed: vectors (norms, biases), the rows of new tokens, the gates, and with ``no_decay_resampler`` the whole
    resampler (paper, appendix B.1.2). Each group carries ``lr_multiplier``, which ``set_learning_rate`` applies.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        is_gate = name.rpartition(".")[2].endswith(GATE)
        decays = not is_gate and _is_matrix(parameter) and not _is_embedding(name)
        if config.no_decay_resampler and name.startswith(f"{RESAMPLER}."):
            decays = False
        groups[decays, is_gate].append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_multiplier": config.gate_lr_multiplier if is_gate else 1.0,
        }
        for (decays, is_gate), parameters in sorted(groups.items())
    ]


def _is_matrix(parameter: nn.Parameter) -> bool:
    # A parameter that ZeRO-3 partitioned has an empty local tensor; its own shape stands in ds_shape.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1


def _is_embedding(name: str) -> bool:
    return "rows" in name or "embed" in name


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names; what is missing was reported before anything loaded.

    torch's fused AdamW (default), DeepSpeedCPUAdam (optimizer state offloaded to the host) or NVIDIA apex's FusedAdam.
    """
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, fused=True, **settings)
        case "cpu_adam":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        case "apex_fused_adam":
            from apex.optimizers import FusedAdam

            return FusedAdam(groups, adam_w_mode=True, **settings)


def learning_rate_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """The schedule at update ``step`` (counted from 0) of ``steps``, as a factor of the peak learning rate.

    Linear warm-up (the paper: from 0 over 5,000 steps), then constant, or cosine or linear down to
    ``final_lr_ratio`` at the last update.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    decaying = max(1, steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decaying)
    final = schedule.final_lr_ratio
    match schedule.decay:
        case "constant":
            return 1.0
        case "cosine":
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return final + (1.0 - final) * (1.0 - progress)


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Put a learning rate into every group, times the group's own multiplier."""
    for group in groups:
        group["lr"] = learning_rate * group["lr_multiplier"]
