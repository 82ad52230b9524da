"""Reach into torch's internals; outside ``model``, no other file does.

Every function says why it is needed and which upstream issue would make it unnecessary. All were checked with torch
2.15.0. ``tests/runtime/test_torch_internals.py`` fails when a name disappears or changes its signature.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

_aten_cpu = torch.library.Library("aten", "IMPL")


def set_all_timeouts(timeout: datetime.timedelta) -> None:
    """Set the timeout of the collectives that start from now on, in all process groups of this process.

    Reason: torch has no public list of process groups, and DeepSpeed makes several. torch 2.15 made the setter public
    as ``torch.distributed.set_timeout`` and deprecated the private one, which older versions need.
    Upstream issue: pytorch #187387 for the setter; none found for the list.
    """
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in distributed_c10d._world.pg_map:
        set_timeout(timeout, group)


def flight_recorder_dump() -> str:
    """Return this process's last collectives from torch's flight recorder, as JSON.

    Reason: the recorder writes its file only when NCCL itself times out, but a hung process needs it earlier.
    Upstream issue: pytorch #117883 collects requests for the recorder; none found for a public name.

    Returns:
        JSON text; empty if this torch records no collectives of the backend in use.
    """
    name = "_dump_nccl_trace_json" if dist.get_backend() == "nccl" else "_dump_fr_trace_json"
    dump = getattr(torch._C._distributed_c10d, name, None)
    return "" if dump is None else bytes(dump()).decode()


def torch_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """Compute torch's own linear function, even after ``torch.nn.functional.linear`` was replaced.

    Reason: DeepSpeed replaces the public name under ZeRO-3 and never puts it back (DeepSpeed #952).

    Args:
        input: [..., I].
        weight: [O, I].
        bias: [O], or None.

    Returns:
        [..., O].
    """
    output: Tensor = torch._C._nn.linear(input, weight, bias)
    return output


def onednn_linear(input_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Compute ``input_MK @ weight_NK.T + bias_N`` with oneDNN; returns [M, N].

    Reason: torch computes float32 products with MKL and has no setting for it. This op is meant for torch.compile.
    Upstream issue: pytorch/builder #504 asks for kernels that suit AMD's processors.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input_MK, weight_NK, bias_N, "none", [], "")
    return product


def replace_cpu_op(name: str, function: Callable[..., Tensor]) -> None:
    """Replace an op of torch on CPU tensors for the rest of the process, below autograd.

    The function needs the op's signature. It can call the op's variant with ``out``, which is not replaced.

    Reason: gradient formulas, layers of other libraries and DeepSpeed's linear function all end in these ops.
    ``torch.library.Library`` is public, but its documentation does not mention kernels that torch has already.
    Upstream issue: none found.

    Args:
        name: Name in the namespace ``aten``, such as "mm".
        function: The kernel.
    """
    _aten_cpu.impl(name, function, "CPU")
