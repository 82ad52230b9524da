"""Build AdamW in one of its three implementations, with its parameter groups and learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from model.parameters import full_shape
from model.trainable_parts import part_of
from trainer.config.run_config import OptimizerConfig, PartOptimizerConfig, PartsOptimizerConfig, ScheduleConfig

GATE, RESAMPLER = "gate", "resampler"


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and learning rate.

    These never decay: vectors (norms, biases), embeddings, gates and, with ``no_decay_resampler``, the whole resampler
    (paper, appendix B.1.2). Each group carries ``lr_multiplier``, which ``set_learning_rate`` applies. A part with
    settings of its own in ``optimizer.parts`` has groups of its own.
    """
    groups: dict[tuple[bool, bool, str], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        is_gate = name.rpartition(".")[2].endswith(GATE)
        # The gain of a weight-standardized convolution is a vector in four dimensions.
        is_matrix = len(full_shape(parameter)) > 1 and not name.endswith(".gain")
        decays = is_matrix and not is_gate and not _is_embedding(name)
        if config.no_decay_resampler and name.startswith(f"{RESAMPLER}."):
            decays = False
        groups[decays, is_gate, _part_with_settings(name, config)].append(parameter)
    return [_group(parameters, config, *key) for key, parameters in sorted(groups.items())]


def _part_with_settings(name: str, config: OptimizerConfig) -> str:
    """Return the part of a parameter if it has settings of its own, else ""."""
    if config.parts == PartsOptimizerConfig():  # also where the module is no Flamingo
        return ""
    part = part_of(name)
    return "" if getattr(config.parts, part) == PartOptimizerConfig() else part


def _group(
    parameters: list[nn.Parameter], config: OptimizerConfig, decays: bool, is_gate: bool, part: str
) -> dict[str, Any]:
    own = getattr(config.parts, part) if part else PartOptimizerConfig()
    decay = config.weight_decay if own.weight_decay is None else own.weight_decay
    return {
        "params": parameters,
        "lr": config.lr,
        "weight_decay": decay if decays else 0.0,
        "lr_multiplier": own.lr_multiplier * (config.gate_lr_multiplier if is_gate else 1.0),
    }


def _is_embedding(name: str) -> bool:
    return "rows" in name or "embed" in name


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer that ``optimizer.name`` selects; the configuration's checks found its package installed.

    It is torch's fused AdamW, DeepSpeedCPUAdam (for state offloaded to the host) or NVIDIA apex's FusedAdam.
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
    """Return the learning rate of a step as a factor of the peak learning rate.

    It warms up linearly (in the paper over 5,000 steps). Then it stays constant, or decays along a cosine, a line or an
    exponential to ``final_lr_ratio`` at the last step.

    Args:
        step: Step counted from 0.
        steps: Steps of the whole run.
        schedule: Settings of the schedule.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    decay_steps = max(1, steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    final = schedule.final_lr_ratio
    match schedule.decay:
        case "constant":
            return 1.0
        case "cosine":
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return final + (1.0 - final) * (1.0 - progress)
        case "exponential":
            return float(final**progress)


def set_type_of_steps(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Give the counted steps of a loaded state the type that this implementation of AdamW needs.

    Args:
        optimizer: Optimizer whose state was loaded, possibly from another implementation.
        name: ``optimizer.name``.
    """
    for parameter, state in optimizer.state.items():
        if "step" not in state:
            continue
        if name == "cpu_adam":
            state["step"] = int(state["step"])
        elif not isinstance(state["step"], torch.Tensor):
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device=parameter.device)


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Set the learning rate of every group, times the group's multiplier."""
    for group in groups:
        group["lr"] = learning_rate * group["lr_multiplier"]
