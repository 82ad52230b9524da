"""Load the libraries built from csrc/, and tell torch about their ops: shapes, gradients, autocast.

Nothing is compiled here. A library that is missing or cannot be loaded leaves a reason in ``load_errors``, and
``model.ops`` computes with plain torch instead.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.internals import disable_autocast_key

FOLDER = Path(__file__).parent
LIBRARIES = {"cpu": "_C.abi3.so", "cuda": "_C_cuda.abi3.so"}
BUILD_REPORT = "_build_report.json"  # written by setup.py: why a library was not built, and what for
ARCHITECTURES = "cuda architectures"  # key of the report


@functools.cache
def load_errors() -> dict[str, str | None]:
    """Load the libraries that can be loaded, once a process.

    Returns:
        None, or the reason why the ops are absent, by device type.
    """
    errors: dict[str, str | None] = {"cpu": _load("cpu"), "cuda": None}
    if errors["cpu"] is None:
        _register()
    if not torch.cuda.is_available():
        errors["cuda"] = "no CUDA device"
    elif errors["cpu"] is not None:
        errors["cuda"] = f"the schemas are in the CPU library: {errors['cpu']}"
    else:
        errors["cuda"] = _load("cuda")
    return errors


def cpu_instruction_set(level: str | None = None) -> str:
    """Return the instruction set of the CPU kernels, or select ``level``, which the processor must have."""
    names = ("generic", "avx2", "avx512", "avx512_bf16")
    return names[torch.ops.flamingo.cpu_isa(-1 if level is None else names.index(level))]


@functools.cache
def cuda_architectures() -> tuple[str, ...]:
    """Return what the CUDA library was built for, such as "8.0+PTX" and "9.0a"."""
    return tuple(_build_report().get(ARCHITECTURES, "").split())


def _load(device: str) -> str | None:
    if os.environ.get("FLAMINGO_OPS_LIBRARY") == "none":
        return "FLAMINGO_OPS_LIBRARY=none"
    path = FOLDER / LIBRARIES[device]
    if not path.exists():
        return _build_report().get(device, "not built; run `pip install -e .`")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    return None


def _build_report() -> dict[str, str]:
    try:
        report: dict[str, str] = json.loads((FOLDER / BUILD_REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return report


def _register() -> None:
    """Register fake tensors and gradients for every op, and autocast for the two forwards."""
    torch.library.register_fake("flamingo::masked_cross_attention", _cross_fake)
    torch.library.register_fake("flamingo::masked_cross_attention_backward", _cross_backward_fake)
    torch.library.register_fake("flamingo::media_token_ranges", _token_ranges_fake)
    torch.library.register_fake("flamingo::resampler_attention", _resampler_fake)
    torch.library.register_fake("flamingo::resampler_attention_backward", _resampler_backward_fake)
    torch.library.register_autograd(
        "flamingo::masked_cross_attention", _cross_backward, setup_context=_save_cross_attention
    )
    torch.library.register_autograd(
        "flamingo::resampler_attention", _resampler_backward, setup_context=_save_resampler_attention
    )
    for key in ("AutocastCPU", "AutocastCUDA"):
        device = key.removeprefix("Autocast").lower()
        _AUTOCAST.impl("masked_cross_attention", functools.partial(_autocast_cross, device), key)
        _AUTOCAST.impl("resampler_attention", functools.partial(_autocast_resampler, device), key)


_AUTOCAST = torch.library.Library("flamingo", "FRAGMENT")


@torch.compiler.assume_constant_result  # torch.compile of torch 2.11 cannot look into it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_inputs(device_type: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the type that autocast asks for on this device, unchanged where it is off."""
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _autocast_cross(
    device: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_index: Tensor,
    first_media: Tensor | None,
    out_scale: Tensor | None,
    scale: float,
    token_ranges: Tensor | None = None,
) -> Tensor:
    q, k, v = autocast_inputs(device, q, k, v)
    rest = (media_index, first_media, out_scale, scale, token_ranges)
    with disable_autocast_key(device):
        return torch.ops.flamingo.masked_cross_attention(q, k, v, *rest)


def _autocast_resampler(
    device: str,
    q: Tensor,
    k_features: Tensor,
    v_features: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    cu_media: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    inputs = autocast_inputs(device, q, k_features, v_features, k_latents, v_latents)
    with disable_autocast_key(device):
        return torch.ops.flamingo.resampler_attention(*inputs, cu_media, scale)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _cross_fake(q: Tensor, *_: Any) -> Tensor:
    return _like(q)


def _cross_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v), q.new_empty(1, dtype=torch.float32)


def _token_ranges_fake(media_index: Tensor, first_media: Tensor | None, media: int) -> Tensor:
    return media_index.new_empty(2, media, dtype=torch.int32)


def _resampler_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _resampler_backward_fake(grad: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(_like(x) for x in inputs[:5])


def _save_cross_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, media_index, first_media, out_scale, scale, token_ranges = inputs
    ctx.save_for_backward(q, k, v, media_index, first_media, out_scale, token_ranges)
    ctx.scale = scale


def _cross_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, media_index, first_media, out_scale, token_ranges = ctx.saved_tensors
    dq, dk, dv, d_out_scale = torch.ops.flamingo.masked_cross_attention_backward(
        unit_last_stride(grad), q, k, v, media_index, first_media, out_scale, ctx.scale, token_ranges
    )
    return dq, dk, dv, None, None, None if out_scale is None else d_out_scale.view_as(out_scale), None, None


def _save_resampler_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(out, lse, *tensors)
    ctx.scale = scale


def _resampler_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    grads = torch.ops.flamingo.resampler_attention_backward(unit_last_stride(grad), out, lse, *tensors, ctx.scale)
    return (*grads, None, None)


def unit_last_stride(x: Tensor) -> Tensor:
    """Return ``x``, copied only if its last dimension is not contiguous, which the kernels need."""
    return x if x.stride(-1) == 1 else x.contiguous()
