"""Reach into the part of DeepSpeed that keeps parameters on a drive (ZeRO-Infinity, arXiv:2104.07857).

As in ``internals``, every function says why it is needed and which upstream issue would make it unnecessary. Checked
with DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero import partition_parameters

__all__ = ["shared_parameter_swapper"]


@contextmanager
def shared_parameter_swapper() -> Iterator[None]:
    """Let several ``zero.Init`` in this context share one swapper of parameters, with its folder and its buffers.

    Reason: every ``zero.Init`` makes a swapper, and a swapper begins by deleting this rank's swap folder. A model needs
    several ``zero.Init``, so the second would delete the weights of the first. Each would also lock buffers of its own.
    Upstream issue: huggingface/transformers #31800 has the same cause with two models; none found for one model.
    """
    create = partition_parameters.AsyncPartitionedParameterSwapper
    made: dict[torch.dtype, Any] = {}

    def create_once(settings: Any, dtype: torch.dtype) -> Any:
        if dtype not in made:
            made[dtype] = create(settings, dtype)
        return made[dtype]

    partition_parameters.AsyncPartitionedParameterSwapper = create_once
    try:
        yield
    finally:
        partition_parameters.AsyncPartitionedParameterSwapper = create
