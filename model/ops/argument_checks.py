"""Check the arguments of the ops, once for every backend; an error names the argument and the expected shape.

Values of index tensors are checked on the CPU only, where reading them waits for no device. The CUDA kernels check them
again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.internals import FakeTensor

LARGEST = 2**31  # queries and keys are numbered with 32 bits


def masked_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_index: Tensor,
    gate: Tensor | None,
    first_media: Tensor | None,
    scale: float | None,
) -> None:
    """Check that the arguments of ``model.ops.masked_cross_attention`` fit together.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument does not fit the others.
    """
    _check_shape("q", q, ("T", "H", "K"), {})
    sizes = {"T": q.shape[0], "H": q.shape[1], "K": q.shape[2]}
    _check_shape("k", k, ("M", "R", "U", "K"), sizes)
    _check_shape("v", v, ("M", "R", "U", "K"), sizes | dict(zip("MRU", k.shape[:3], strict=True)))
    if k.shape[2] == 0 or q.shape[1] % k.shape[2]:
        raise ValueError(f"k must have heads that divide those of q, {q.shape[1]}, it has {k.shape[2]}")
    _check_alike(q, k=k, v=v)
    if k.shape[1] == 0:
        raise ValueError("k must hold at least one latent of each medium, R is 0")
    if q.shape[0] >= LARGEST or k.shape[0] * k.shape[1] >= LARGEST:
        raise ValueError(f"q and k must have fewer than 2**31 rows, got {q.shape[0]} and {k.shape[0] * k.shape[1]}")
    _check_index("media_index", media_index, q, sizes, "T")
    if first_media is not None:
        _check_index("first_media", first_media, q, sizes, "T")
    if gate is not None and (gate.numel() != 1 or not gate.is_floating_point()):
        raise ValueError(f"gate must be one floating-point value, got {tuple(gate.shape)} of {gate.dtype}")
    if gate is not None and gate.device != q.device:
        raise ValueError(f"gate must be on the device of q, {q.device}, it is on {gate.device}")
    _check_scale(scale)
    if _has_values_at_hand(media_index):
        _check_media_range(media_index, first_media, k.shape[0])


def token_ranges(ranges: Tensor, k: Tensor) -> None:
    """Check the result of ``model.ops.find_token_ranges`` against the keys.

    Raises:
        TypeError: It has the wrong type.
        ValueError: It does not fit the keys.
    """
    if ranges.dtype != torch.int32:
        raise TypeError(f"token_ranges must be int32, got {ranges.dtype}")
    if ranges.shape != (2, k.shape[0]) or not ranges.is_contiguous():
        raise ValueError(f"token_ranges must be a contiguous [2, M] with M = {k.shape[0]}, got {list(ranges.shape)}")
    if ranges.device != k.device:
        raise ValueError(f"token_ranges must be on the device of k, {k.device}, it is on {ranges.device}")


def resampler_attention(
    q: Tensor,
    k_features: Tensor,
    v_features: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    cu_media: Tensor,
    scale: float | None,
) -> None:
    """Check that the arguments of ``model.ops.resampler_attention`` fit together.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument does not fit the others.
    """
    _check_shape("q", q, ("M", "R", "H", "K"), {})
    sizes = {"M": q.shape[0], "R": q.shape[1], "H": q.shape[2], "K": q.shape[3]}
    _check_shape("k_features", k_features, ("S", "H", "K"), sizes)
    _check_shape("v_features", v_features, ("S", "H", "K"), sizes | {"S": k_features.shape[0]})
    _check_shape("k_latents", k_latents, ("M", "R", "H", "K"), sizes)
    _check_shape("v_latents", v_latents, ("M", "R", "H", "K"), sizes)
    _check_alike(q, k_features=k_features, v_features=v_features, k_latents=k_latents, v_latents=v_latents)
    if q.shape[1] == 0:
        raise ValueError("q must hold at least one latent of each medium, R is 0")
    if k_features.shape[0] >= LARGEST or q.shape[0] * q.shape[1] >= LARGEST:
        raise ValueError("k_features and q must have fewer than 2**31 rows")
    _check_index("cu_media", cu_media, q, {"M + 1": q.shape[0] + 1}, "M + 1")
    _check_scale(scale)
    if _has_values_at_hand(cu_media):
        _check_offsets(cu_media, k_features.shape[0])


def _check_shape(name: str, x: Tensor, expected: tuple[str, ...], sizes: dict[str, int]) -> None:
    wrong = x.dim() != len(expected) or any(
        size != sizes.get(letter, size) for size, letter in zip(x.shape, expected, strict=True)
    )
    if wrong:
        known = ", ".join(f"{letter} = {sizes[letter]}" for letter in expected if letter in sizes)
        raise ValueError(
            f"{name} must be [{', '.join(expected)}]{' with ' + known if known else ''}, got {list(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def _check_alike(q: Tensor, **others: Tensor) -> None:
    for name, x in others.items():
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, it is on {x.device}")


def _check_index(name: str, x: Tensor, q: Tensor, sizes: dict[str, int], letter: str) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.dim() != 1 or x.shape[0] != sizes[letter]:
        raise ValueError(f"{name} must be [{letter}] with {letter} = {sizes[letter]}, got {list(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, it is on {x.device}")


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")


def _has_values_at_hand(x: Tensor) -> bool:
    fake = torch.compiler.is_compiling() or isinstance(x, FakeTensor)
    return x.device.type == "cpu" and x.numel() > 0 and not fake


def _check_media_range(media_index: Tensor, first_media: Tensor | None, num_media: int) -> None:
    low, high = (int(x) for x in media_index.aminmax())
    if low < -1 or high >= num_media:
        raise ValueError(
            f"media_index must be -1 (none) to {num_media - 1} (k has {num_media} media), got {low} to {high}"
        )
    if first_media is not None and bool(((media_index >= 0) & ((first_media < 0) | (first_media > media_index))).any()):
        raise ValueError("first_media must be 0 to media_index wherever media_index is not -1")


def _check_offsets(cu_media: Tensor, num_features: int) -> None:
    first, last = int(cu_media[0]), int(cu_media[-1])
    if first != 0 or last != num_features:
        raise ValueError(f"cu_media must go from 0 to S = {num_features}, it goes from {first} to {last}")
    if bool((cu_media.diff() < 0).any()):
        raise ValueError("cu_media must not decrease")
