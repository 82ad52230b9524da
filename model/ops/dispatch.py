"""Choose the backend that computes an op.

An argument decides first, then ``set_backend``, then the environment variable ``FLAMINGO_OPS``, then the kernels that
this machine has.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from model.ops import cuda_limits, library, self_check

BACKENDS = ("auto", "fused", "reference")
OPS = ("masked_cross_attention", "resampler_attention")
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}

_configured: str | None = None


class OpStatus(NamedTuple):
    """Describe one backend of one op, for ``trainer.doctor``.

    Attributes:
        op: Name of the op.
        backend: "fused on cpu", "fused on cuda" or "reference".
        available: Whether it can be used.
        reason: Types that it covers, or why it is not available.
    """

    op: str
    backend: str
    available: bool
    reason: str


def set_backend(name: str) -> None:
    """Choose the backend of all ops in this process.

    Args:
        name: "fused", which is an error without kernels, "reference", or "auto", which takes the choice back.

    Raises:
        ValueError: No backend has this name.
    """
    global _configured
    if name not in BACKENDS:
        raise ValueError(f"the backend of model.ops must be one of {', '.join(BACKENDS)}, got {name!r}")
    _configured = None if name == "auto" else name


def get_backend() -> str:
    """Return the backend in force: that of ``set_backend``, else of ``FLAMINGO_OPS``, else "auto".

    Raises:
        ValueError: ``FLAMINGO_OPS`` names no backend.
    """
    if _configured is not None:
        return _configured
    name = os.environ.get("FLAMINGO_OPS", "auto")
    if name not in BACKENDS:
        raise ValueError(f"FLAMINGO_OPS must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def use_fused(op: str, q: Tensor, backend: str | None) -> bool:
    """Return whether the fused kernel computes ``op`` for queries like ``q``.

    Raises:
        RuntimeError: The fused backend was requested by name and cannot be used; the message says why.
        ValueError: No backend has this name.
    """
    name = get_backend() if backend is None else backend
    if name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "reference":
        return False
    reason = why_not_fused(q.device.type, q.device.index, q.dtype, q.shape[-1])
    if reason is not None and name == "fused":
        raise RuntimeError(f"{op} cannot be fused: {reason}")
    return reason is None


@torch.compiler.assume_constant_result
def why_not_fused(device: str, index: int | None, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return None if the kernels take this device, dtype and head_dim, forward and backward, else the reason.

    The first call for a GPU, a dtype and a head_dim compares the kernels with plain torch (``model.ops.self_check``).

    Args:
        device: Type of the device.
        index: Its number; None for the only one, or the current one.
        dtype: Type of the queries.
        head_dim: Dim of a head.
    """
    if device not in DTYPES:
        return f"no kernels for device {device}"
    error = library.load_errors()[device]
    if error is not None:
        return error
    if dtype not in DTYPES[device]:
        return f"no kernels for {dtype} on {device}"
    if device == "cuda" and head_dim not in cuda_limits.HEAD_DIMS:
        return f"no kernels for head_dim {head_dim} on cuda"
    if device == "cuda":
        return _card_obstacle(torch.cuda.current_device() if index is None else index, dtype, head_dim)
    if head_dim % 16:
        return f"head_dim must be a multiple of 16, not {head_dim}"
    return None


def status() -> list[OpStatus]:
    """Return every backend of every op, with the reasons why some are not available on this machine."""
    rows = []
    for op in OPS:
        for device, dtypes in DTYPES.items():
            error = library.load_errors()[device]
            covered = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            if error is None and device == "cpu":
                covered += f", instruction set {library.cpu_instruction_set()}"
            if error is None and device == "cuda":
                rows += [_card_status(op, index, covered) for index in range(torch.cuda.device_count())]
                continue
            rows.append(OpStatus(op, f"fused on {device}", error is None, covered if error is None else error))
        rows.append(OpStatus(op, "reference", True, f"plain torch; backend in force: {get_backend()}"))
    return rows


def _card_obstacle(index: int, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why a GPU cannot run the kernels of a type and width, or None."""
    obstacle = cuda_limits.obstacle(cuda_limits.card(index), head_dim, library.cuda_architectures())
    return obstacle or self_check.disagreement(torch.device("cuda", index), dtype, head_dim)


def _card_status(op: str, index: int, covered: str) -> OpStatus:
    """Return what a GPU can run of an op, by head_dim."""
    reasons = {
        head_dim: [_card_obstacle(index, dtype, head_dim) for dtype in DTYPES["cuda"]]
        for head_dim in cuda_limits.HEAD_DIMS
    }
    able = [str(head_dim) for head_dim, found in reasons.items() if not any(found)]
    text = f"{cuda_limits.card(index).name}: {covered}, head_dim {', '.join(able)}" if able else ""
    missing = "; ".join(dict.fromkeys(reason for found in reasons.values() for reason in found if reason is not None))
    return OpStatus(op, f"fused on cuda:{index}", bool(able), "; ".join(part for part in (text, missing) if part))
