"""Matrix products in float32 on AMD's processors: with oneDNN's AVX-512 kernels instead of MKL's.

torch computes float32 products on the CPU with MKL, which uses AVX-512 on Intel's processors only; oneDNN, which torch
brings too, uses it wherever it is. On an EPYC of the fifth generation that is 88 against 190 GFLOP/s a core. Results
differ by rounding alone, and which library computes depends on the processor and the shape alone, never on a timing: a
resumed run repeats what the first did.

The products are replaced below autograd, for `aten::mm` and `aten::addmm`: torch's own formulas of gradients, Hugging
Face's layers, open_clip's and DeepSpeed's `linear` of ZeRO-3 all end there. Nothing happens on import.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

_LEAST_PRODUCT = 2**21  # multiplications; below, a call from C++ into Python costs more than it saves


@functools.cache
def use_onednn() -> bool:
    """Compute this process's float32 products with oneDNN from now on, where that is faster than what torch uses.

    Returns whether it is: on AMD's processors with AVX-512, with a torch that has both libraries.
    """
    if why_not_onednn() is not None:
        return False
    _KERNELS.impl("mm", _mm, "CPU")
    _KERNELS.impl("addmm", _addmm, "CPU")
    return True


def why_not_onednn() -> str | None:
    """None where oneDNN is faster than what torch uses by itself, else the reason why not."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return "this torch was built without oneDNN or without MKL"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the processor has no AVX-512"
    if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        return "MKL uses AVX-512 on this processor"
    return None


_KERNELS = torch.library.Library("aten", "IMPL")


def _suits(a_MK: Tensor, b_KN: Tensor) -> bool:
    fits = a_MK.ndim == b_KN.ndim == 2 and a_MK.shape[1] == b_KN.shape[0]  # else torch has the better message
    floats = a_MK.dtype == b_KN.dtype == torch.float32
    return floats and fits and a_MK.numel() * b_KN.shape[1] >= _LEAST_PRODUCT


def _onednn(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), bias_N, "none", [], "")
    return product


def _mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    if _suits(a_MK, b_KN):
        return _onednn(a_MK, b_KN, None)
    # The variant with `out` is not replaced: it is MKL's.
    return torch.mm(a_MK, b_KN, out=a_MK.new_empty(a_MK.shape[0], b_KN.shape[1]))


def _addmm(added: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == 1 and alpha == 1 and added.dtype == torch.float32 and _suits(a_MK, b_KN):
        if added.shape == (b_KN.shape[1],):
            return _onednn(a_MK, b_KN, added)
        return _onednn(a_MK, b_KN, None).add_(added)
    out = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    return torch.addmm(added, a_MK, b_KN, beta=beta, alpha=alpha, out=out)
