"""Reach into DeepSpeed's internals; no other file of the trainer does, apart from ``checkpoint_internals``.

Every function says why it is needed and which upstream issue would make it unnecessary. All were checked with
DeepSpeed 0.19.8. ``tests/deepspeed_engine/test_internals.py`` fails when a name disappears or changes its signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import deepspeed.comm.comm
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3 as Zero3LinearFunction
from deepspeed.utils import groups, safe_get_local_grad
from torch import Tensor, nn

__all__ = [
    "Zero3LinearFunction",
    "is_partitioned",
    "local_gradient",
    "omit_recovery_scripts",
    "replaced_backend",
    "replicate",
    "set_zero3_linear",
    "shared_hpz_group",
]

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Backend = TypeVar("Backend")


def set_zero3_linear(linear: Linear) -> None:
    """Choose the function that DeepSpeed puts in the place of ``torch.nn.functional.linear`` under ZeRO-3.

    DeepSpeed replaces torch's function once, at the first ``zero.Init`` or at ``deepspeed.initialize`` with ZeRO-3
    (DeepSpeed #8189), and never puts it back (#952). The name must be set before that.

    Reason: DeepSpeed's own function also keeps the input of a frozen weight (see ``partitioned_linear``).
    Upstream issue: none found.
    """
    partition_parameters.zero3_linear_wrap = linear


@contextmanager
def shared_hpz_group() -> Iterator[None]:
    """Let several ``zero.Init`` in this context share one process group of hpZ (ZeRO++).

    Reason: every ``zero.Init`` creates the group and fails if it exists, but a model needs several ``zero.Init``: one
    for each part that transformers loads, and one for the new modules.
    Upstream issue: DeepSpeed #4901 and #7066; the open pull request #8361 does the same as this function.
    """
    create = groups._create_zero_param_parallel_group

    def create_once(group_size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            create(group_size)

    groups._create_zero_param_parallel_group = create_once
    try:
        yield
    finally:
        groups._create_zero_param_parallel_group = create


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 has partitioned a parameter.

    Reason: ``zero.GatheredParameters`` accepts no other parameters, and DeepSpeed has no public test for them. The
    attribute ``ds_shape`` of the same parameters is read in ``model.parameters.full_shape``.
    Upstream issue: none found.
    """
    return hasattr(parameter, "ds_id")


def replicate(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Keep parameters whole on every process under ZeRO-3, so that no use gathers them; a collective.

    DeepSpeed partitions each parameter among a process group. Here the group becomes the process alone: its partition
    is the whole parameter, and a gather hands it out without a copy. The parameters must not train, because their
    gradients would be reduced in the same group. ``deepspeed.initialize`` partitions those that are not partitioned
    yet, such as a vision tower's, and asks them for their group.

    Reason: ``stage3_param_persistence_threshold`` also applies to parameters that train, and DeepSpeed partitions
    persistent parameters at every step all the same.
    Upstream issue: none found.
    """
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for parameter in parameters:
        partitioned: Any = parameter
        if not is_partitioned(parameter):
            parameter.data = parameter.data.to(device)
            dist.broadcast(parameter.data, 0)
            partitioned.ds_zero_partition_process_group = alone
            continue
        partitioned.all_gather()
        partitioned.ds_tensor = None
        partitioned.ds_process_group = alone
        partitioned.ds_zero_partition_rank, partitioned.ds_zero_partition_world_size = 0, 1
        partitioned.partition()


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return this rank's part of the gradient that the next step applies, of a parameter that trains.

    It is there between the last backward of a step and the step. None where this rank has no part, or no micro-batch
    reached the parameter. The parts of all ranks together are the gradient, under each stage of ZeRO.

    Reason: DeepSpeed's ``safe_get_full_grad`` makes the gradient whole, with a collective for each parameter, and
    ``safe_get_local_grad`` knows ZeRO-3 only.
    Upstream issue: none found.
    """
    if is_partitioned(parameter):
        gradient: Tensor | None = safe_get_local_grad(parameter)
        return gradient
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed adds it
    if mapping is None:
        return None
    fragment: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
    address = mapping.lp_fragment_address
    return fragment.narrow(0, address.start, address.numel) if fragment.numel() > address.numel else fragment


def omit_recovery_scripts(engine: Any) -> None:
    """Make ``engine.save_checkpoint`` write no copies of ``zero_to_fp32.py`` and ``zero_to_torch.py``.

    Reason: rank 0 alone copies the scripts. If it cannot write, it raises while all other ranks wait in a collective.
    Upstream issue: none found.
    """
    engine._copy_recovery_script = lambda save_path: None


@contextmanager
def replaced_backend(replace: Callable[[Any], Backend]) -> Iterator[Backend]:
    """Route DeepSpeed's collectives in this context through another object, such as one that measures them.

    Reason: DeepSpeed has no public hook around its collectives.
    Upstream issue: none found.

    Args:
        replace: Receives the present backend and returns the object that takes its place.
    """
    backend = deepspeed.comm.comm.cdb
    replacement = replace(backend)
    deepspeed.comm.comm.cdb = replacement
    try:
        yield replacement
    finally:
        deepspeed.comm.comm.cdb = backend
