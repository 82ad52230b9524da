"""Read the parts of weights and optimizer that DeepSpeed keeps on one rank; only tests need them."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor

from trainer.deepspeed_engine.engine import Engine
from trainer.deepspeed_engine.internals import is_partitioned


def local_part(parameter: Any) -> Tensor:
    """Return this rank's flat part of a parameter that ZeRO-3 partitioned, with its padding."""
    part: Tensor = parameter.ds_tensor
    return part


def whole_moment(engine: Engine, parameter: Any, key: str) -> Tensor | None:
    """Gather a moment of Adam; a collective.

    Under ZeRO-1 and 2, DeepSpeed's own function finds no moments before a resume.

    Args:
        engine: Engine that trains the parameter.
        parameter: A trainable parameter.
        key: "exp_avg" or "exp_avg_sq".
    """
    if is_partitioned(parameter):
        return safe_get_full_optimizer_state(parameter, key)
    whole = torch.zeros(parameter.numel())
    mapping = parameter._hp_mapping
    if mapping is not None:
        here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        optimizer = engine._deepspeed.optimizer
        [group] = [i for i, group in enumerate(optimizer.bit16_groups) if any(p is parameter for p in group)]
        [flat] = optimizer.optimizer.param_groups[group]["params"]
        part = optimizer.optimizer.state[flat][key].narrow(0, there.start, there.numel)
        whole.narrow(0, here.start, here.numel).copy_(part)
    torch.distributed.all_reduce(whole)
    return whole.view(parameter.shape)
