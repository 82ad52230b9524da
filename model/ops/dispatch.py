"""Which backend computes an op: an argument, `set_backend`, `FLAMINGO_OPS`, or what this machine has."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from model.ops import library

BACKENDS = ("auto", "fused", "reference")
OPS = ("masked_cross_attention", "resampler_attention")
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
CUDA_WIDTHS = (64, 96, 128)

_configured: str | None = None


class OpStatus(NamedTuple):
    """One line of what `trainer.doctor` shows about the ops."""

    op: str
    backend: str  # "fused on cpu", "fused on cuda", "reference"
    available: bool
    reason: str  # why it is not available, or what it covers


def set_backend(name: str) -> None:
    """Choose the backend of all ops in this process: "fused" (an error where there is none) or "reference".

    "auto" takes the choice back: then FLAMINGO_OPS decides, or what this machine has.
    """
    global _configured
    if name not in BACKENDS:
        raise ValueError(f"the backend of model.ops must be one of {', '.join(BACKENDS)}, got {name!r}")
    _configured = None if name == "auto" else name


def get_backend() -> str:
    """The backend in force: that of `set_backend`, else of the environment variable FLAMINGO_OPS, else "auto"."""
    if _configured is not None:
        return _configured
    name = os.environ.get("FLAMINGO_OPS", "auto")
    if name not in BACKENDS:
        raise ValueError(f"FLAMINGO_OPS must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def use_fused(op: str, q: Tensor, backend: str | None) -> bool:
    """Whether the fused kernel computes `op` for queries like `q`.

    Raises:
        RuntimeError: the fused backend was asked for by name and cannot be used; says why.
        ValueError: no backend has this name.
    """
    name = get_backend() if backend is None else backend
    if name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "reference":
        return False
    reason = why_not_fused(q.device.type, q.dtype, q.shape[-1])
    if reason is not None and name == "fused":
        raise RuntimeError(f"{op} cannot be fused: {reason}")
    return reason is None


@torch.compiler.assume_constant_result
def why_not_fused(device: str, dtype: torch.dtype, width: int) -> str | None:
    """None if the kernels take this device, dtype and head width, else the reason."""
    if device not in DTYPES:
        return f"no kernels for device {device}"
    error = library.load_errors()[device]
    if error is not None:
        return error
    if dtype not in DTYPES[device]:
        return f"no kernels for {dtype} on {device}"
    if device == "cuda" and width not in CUDA_WIDTHS:
        return f"no kernels for head width {width} on cuda"
    if width % 16:
        return f"the head width must be a multiple of 16, not {width}"
    return None


def status() -> list[OpStatus]:
    """What can compute each op on this machine, and why the rest cannot."""
    rows = []
    for op in OPS:
        for device, dtypes in DTYPES.items():
            error = library.load_errors()[device]
            covered = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            if error is None and device == "cpu":
                covered += f", instruction set {library.cpu_instruction_set()}"
            rows.append(OpStatus(op, f"fused on {device}", error is None, covered if error is None else error))
        rows.append(OpStatus(op, "reference", True, f"plain torch; backend in force: {get_backend()}"))
    return rows
