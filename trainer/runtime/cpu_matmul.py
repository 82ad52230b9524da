"""Choose the library that multiplies float32 matrices on the CPU: torch's own choice (MKL) or oneDNN.

MKL uses AVX-512 on Intel's processors only; oneDNN, which torch includes too, uses it on every processor that has it.
On a fifth-generation EPYC that makes 190 instead of 88 GFLOP/s per core. The results differ only by rounding. The
choice depends on the setting, the processor and the shapes, never on a measurement, so that a resumed run repeats the
first one.

oneDNN takes the place of ``aten::mm`` and ``aten::addmm`` below autograd, for the rest of the process. Importing this
module changes nothing.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import ConfigError, Problem
from trainer.runtime.torch_internals import onednn_linear, replace_cpu_op

CpuMatmul = Literal["auto", "onednn", "torch"]

_MIN_MULTIPLICATIONS = 2**21  # for fewer, the call from C++ into Python costs more than oneDNN saves


def use_cpu_matmul(choice: CpuMatmul) -> bool:
    """Multiply float32 matrices of this process with the chosen library, for the rest of the process.

    Args:
        choice: ``training.cpu_matmul``. "auto" uses oneDNN where it is faster.

    Returns:
        Whether this call selected oneDNN. An earlier selection of oneDNN stays in force.

    Raises:
        ConfigError: ``choice`` is "onednn", but this torch has no oneDNN.
    """
    if choice == "onednn" and (reason := why_no_onednn()) is not None:
        message = f'"onednn" cannot be used here: {reason}; set it to "auto" or "torch"'
        raise ConfigError([Problem("training.cpu_matmul", message)])
    if choice == "torch" or (choice == "auto" and why_onednn_is_not_faster() is not None):
        return False
    _install_onednn()
    return True


def why_no_onednn() -> str | None:
    """Return why oneDNN cannot be used here, or None if it can."""
    return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"


def why_onednn_is_not_faster() -> str | None:
    """Return why oneDNN would not be faster here than torch's own choice, or None if it is."""
    if (reason := why_no_onednn()) is not None:
        return reason
    if not torch.backends.mkl.is_available():
        return "this torch was built without MKL"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the processor has no AVX-512"
    if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        return "MKL uses AVX-512 on this processor"
    return None


@functools.cache
def _install_onednn() -> None:
    replace_cpu_op("mm", _mm)
    replace_cpu_op("addmm", _addmm)


def _suits_onednn(a_MK: Tensor, b_KN: Tensor) -> bool:
    shapes_fit = a_MK.ndim == b_KN.ndim == 2 and a_MK.shape[1] == b_KN.shape[0]  # torch has the better error message
    is_float32 = a_MK.dtype == b_KN.dtype == torch.float32
    return is_float32 and shapes_fit and a_MK.numel() * b_KN.shape[1] >= _MIN_MULTIPLICATIONS


def _mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    if _suits_onednn(a_MK, b_KN):
        return onednn_linear(a_MK, b_KN.t(), None)
    # The variant with `out` is not replaced, so this is torch's own product.
    return torch.mm(a_MK, b_KN, out=a_MK.new_empty(a_MK.shape[0], b_KN.shape[1]))


def _addmm(added: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == 1 and alpha == 1 and added.dtype == torch.float32 and _suits_onednn(a_MK, b_KN):
        if added.shape == (b_KN.shape[1],):
            return onednn_linear(a_MK, b_KN.t(), added)
        return onednn_linear(a_MK, b_KN.t(), None).add_(added)
    out = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    return torch.addmm(added, a_MK, b_KN, beta=beta, alpha=alpha, out=out)
