"""Name the settings that the layout of a checkpoint's shards depends on, besides the number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_RAW_ZERO_KEYS = ("sub_group_size", "parameter_alignment")
_RAW_SECTIONS = ("bf16", "data_types", "torch_autocast")


def shard_layout(
    module: nn.Module, groups: Sequence[Mapping[str, Any]], optimizer: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings by dotted name. Two runs with equal ones can read each other's shards.

    Args:
        module: Module that is trained.
        groups: Parameter groups of the optimizer.
        optimizer: ``optimizer.name``.
        settings: DeepSpeed's JSON.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    order = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    zero = settings["zero_optimization"]
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    layout = {
        "training.dtype": "bfloat16" if settings.get("bf16", {}).get("enabled") else "float32",
        "deepspeed.zero_stage": zero["stage"],
        "deepspeed.offload_optimizer.device": "nvme" if offload == "nvme" else "none or cpu",
        # Only apex keeps the number of steps apart from the moments.
        "optimizer.name": "apex_fused_adam" if optimizer == "apex_fused_adam" else "adamw or cpu_adam",
        "optimizer.no_decay_resampler (groups of parameters)": hashlib.sha256(repr(order).encode()).hexdigest()[:16],
    }
    layout |= {f"deepspeed.raw.zero_optimization.{key}": zero[key] for key in _RAW_ZERO_KEYS if key in zero}
    for section in _RAW_SECTIONS:
        values = {key: value for key, value in settings.get(section, {}).items() if key != "enabled"}
        layout |= {f"deepspeed.raw.{section}.{key}": value for key, value in values.items()}
    return layout
