"""Run the CUDA kernels on the CPU: build csrc/emulator and call it with tensors, like the CUDA binding."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"
COPIES = {"at once": 0, "as late as allowed": 1, "by chance": 2}
TYPES = {torch.bfloat16: 0, torch.float16: 1}

_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class _Index(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("wide", _INT)]


class _AttentionParams(ctypes.Structure):  # the fields of csrc/cuda/params.h, here and below
    _fields_ = [
        *((name, _POINTER) for name in ("q", "grad", "o", "out", "dq", "lse", "delta", "partial", "out_scale")),
        *((name, _INT64) for name in ("q_row", "q_head", "grad_row", "grad_head")),
        ("rows", _INT),
        ("heads", _INT),
        ("scale", ctypes.c_float),
    ]


class _CrossAttentionParams(_AttentionParams):
    _fields_ = [
        *((name, _POINTER) for name in ("k", "v", "dk", "dv")),
        *((name, _INT64) for name in ("k_medium", "k_latent", "k_head", "v_medium", "v_latent", "v_head")),
        ("media", _INT),
        ("latents", _INT),
        ("key_heads", _INT),
        ("shared_by", _INT),
        ("last_media", _Index),
        ("first_media", _Index),
        ("row_begin", _POINTER),
        ("row_end", _POINTER),
        ("order", _POINTER),
        ("splits", _INT),
        ("parts", _POINTER),
    ]


class _ResamplerParams(_AttentionParams):
    _fields_ = [
        *((name, _POINTER) for name in ("k_features", "v_features", "k_latents", "v_latents")),
        *((name, _POINTER) for name in ("dk_features", "dv_features", "dk_latents", "dv_latents")),
        *((f"{x}_features_{y}", _INT64) for x in "kv" for y in ("row", "head")),
        *((f"{x}_latents_{y}", _INT64) for x in "kv" for y in ("row", "head")),
        ("media", _INT),
        ("latents", _INT),
        ("features", _INT),
        ("cu_media", _Index),
        ("splits", _INT),
        ("parts", _POINTER),
        ("part_lse", _POINTER),
    ]


class Site(NamedTuple):
    """Locate a barrier, a wait or a fence in the kernels' source.

    Attributes:
        number: Number in the order of first use.
        kind: "barrier", "wait", "publication", or "start", "commit" or "wait" with "of products" or "for products".
        file: Name of the source file.
        line: Line in the file.
    """

    number: int
    kind: str
    file: str
    line: int


class EmulationError(Exception):
    """Report a kernel that hung, failed an assertion or used a wrong address."""


def why_unavailable() -> str | None:
    """Return None if the emulator can be built here, else the reason."""
    if not CSRC.exists():
        return "csrc/ is not part of this tree"
    import platform

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "the emulator switches stacks in x86-64 assembly"
    return None if shutil.which("g++") else "no g++ to build the emulator"


def build(folder: Path, csrc: Path = CSRC, *, only: int | None = None, warpgroups: bool = False) -> Emulator:
    """Compile the emulator and the kernels into ``folder``.

    Args:
        folder: Folder for the library.
        csrc: Folder of the sources.
        only: The only head_dim to compile, in bfloat16; None compiles all, and float16.
        warpgroups: Whether to compile the kernels of sm_90a, whose warpgroups multiply tiles.
    """
    library = folder / "libemulator.so"
    command = ["g++", "-std=c++17", "-O1" if only else "-O2", "-shared", "-fPIC", "-DFLAMINGO_EMULATOR", "-w"]
    command += [f"-DFLAMINGO_EMULATE_ONE={only}"] if only else []
    command += ["-DFLAMINGO_WARPGROUPS"] if warpgroups else []
    sources = [str(csrc / "emulator" / name) for name in ("simt.cpp", "run_kernels.cpp")]
    result = subprocess.run([*command, "-o", str(library), *sources], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the emulator does not compile: {result.stderr[-2000:]}")
    return Emulator(library)


class Emulator:
    """Call the compiled kernels.

    Attributes:
        seed: Seed of the order of warps.
        copies: Name of a policy in ``COPIES`` for when copies land.
        skipped_site: Number of the barrier or wait to switch off; -1 for none.
        splits: Thread blocks that share the keys of a row tile (resampler), or the rows of a key block (backward of the
            cross-attention by one kernel).
        token_ranges: int32 [2, M], what the last call found, as ``flamingo::media_token_ranges`` returns it.
        order: int32 [M], the media of the last call, longest first (backward by one kernel of head_dim 64).
    """

    token_ranges: Tensor
    order: Tensor
    splits: int = 1

    def __init__(self, library: Path) -> None:
        """Load the compiled emulator."""
        self._library = ctypes.CDLL(str(library))
        for name in ("emulator_failure", "emulator_site_kind", "emulator_site_file"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.emulator_configure.argtypes = [ctypes.c_uint64, _INT, _INT]
        for resampler, params in enumerate((_CrossAttentionParams, _ResamplerParams)):
            assert self._library.emulator_params_bytes(resampler) == ctypes.sizeof(params)
        self.seed, self.copies, self.skipped_site = 0, "by chance", -1

    def sites(self) -> list[Site]:
        """Return the barriers and waits that have run so far, in the order of their first use."""
        library = self._library
        return [
            Site(
                i,
                library.emulator_site_kind(i).decode(),
                Path(library.emulator_site_file(i).decode()).name,
                library.emulator_site_line(i),
            )
            for i in range(library.emulator_site_count())
        ]

    def cross_splits(self, rows: int, num_media: int, num_latents: int, num_heads: int, num_kv_heads: int) -> int:
        """Return the splits that the CUDA binding chooses for a cross-attention of one medium a row."""
        shared_by = num_heads // num_kv_heads
        p = _CrossAttentionParams(rows=rows, media=num_media, latents=num_latents, heads=num_heads)
        p.key_heads, p.shared_by = num_kv_heads, shared_by
        return int(self._library.emulator_cross_splits(ctypes.byref(p)))

    def resampler_splits(self, num_media: int, num_latents: int, num_features: int, num_heads: int) -> int:
        """Return the splits that the CUDA binding chooses for a resampler."""
        p = _ResamplerParams(media=num_media, latents=num_latents, features=num_features, heads=num_heads)
        return int(self._library.emulator_resampler_splits(ctypes.byref(p)))

    def cross_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        media_index: Tensor,
        first_media: Tensor | None,
        out_scale: Tensor | None,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return output, dq, dk, dv and the gradient of out_scale, like ``model.ops.masked_cross_attention``.

        The ranges of tokens are kept in ``token_ranges``, the order of the media in ``order``.
        """
        rows, num_heads, head_dim = q.shape
        num_media, num_latents = k.shape[:2]
        blocks = max(-(-rows // 64), num_media * -(-num_latents // 64) * self.splits)
        out, dq, dk, dv = (_garbage(x.shape, q.dtype) for x in (q, q, k, v))
        partial = torch.zeros(blocks * num_heads, 4)
        parts = _garbage((self.splits, 2, *k.shape), torch.float32)
        order = torch.full((num_media,), -7, dtype=torch.int32)
        begin, end = torch.full((num_media,), -7, dtype=torch.int32), torch.full((num_media,), -7, dtype=torch.int32)
        p = _CrossAttentionParams(
            media=num_media,
            latents=num_latents,
            key_heads=k.shape[2],
            shared_by=num_heads // k.shape[2],
            last_media=_index(media_index),
            first_media=_index(first_media),
            row_begin=begin.data_ptr(),
            row_end=end.data_ptr(),
            order=order.data_ptr(),
            splits=self.splits,
            parts=parts.data_ptr(),
            partial=partial.data_ptr(),
            out_scale=None if out_scale is None else out_scale.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            dk=dk.data_ptr(),
            dv=dv.data_ptr(),
            **{f"{n}_{d}": x.stride(i) for n, x in (("k", k), ("v", v)) for i, d in enumerate(_KEY_STRIDES)},
        )
        keep = _fill_rows(p, q, grad, out, dq, rows)
        p.scale = head_dim**-0.5
        self._run("emulate_cross_attention", q, p)
        del keep
        self.token_ranges, self.order = torch.stack([begin, end]), order
        return out, dq, dk, dv, partial.sum()

    def resampler(
        self,
        q: Tensor,
        k_features: Tensor,
        v_features: Tensor,
        k_latents: Tensor,
        v_latents: Tensor,
        cu_media: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return output and the gradients of the five tensors; shapes as in ``model.ops.resampler_attention``."""
        num_media, num_latents, _, head_dim = q.shape
        inputs = {"k_features": k_features, "v_features": v_features, "k_latents": k_latents, "v_latents": v_latents}
        grads = {name: _garbage(x.shape, q.dtype) for name, x in inputs.items()}
        out, dq = _garbage(q.shape, q.dtype), _garbage(q.shape, q.dtype)
        parts = _garbage((self.splits, num_media, num_latents, *q.shape[2:]), torch.float32)
        part_lse = _garbage(parts.shape[:-1], torch.float32)
        p = _ResamplerParams(
            media=num_media,
            latents=num_latents,
            features=k_features.shape[0],
            cu_media=_index(cu_media),
            o=out.data_ptr(),
            splits=self.splits,
            parts=parts.data_ptr(),
            part_lse=part_lse.data_ptr(),
        )
        for name, x in inputs.items():
            setattr(p, name, x.data_ptr())
            setattr(p, f"d{name}", grads[name].data_ptr())
            setattr(p, f"{name}_row", x.stride(-3))
            setattr(p, f"{name}_head", x.stride(-2))
        keep = _fill_rows(p, q.flatten(0, 1), grad.flatten(0, 1), out, dq, num_media * num_latents)
        p.scale = head_dim**-0.5
        self._run("emulate_resampler", q, p)
        del keep
        return out, dq, *grads.values()

    def _run(self, function: str, q: Tensor, p: ctypes.Structure) -> None:
        self._library.emulator_configure(self.seed, COPIES[self.copies], self.skipped_site)
        for backward in (0, 1):
            failed = getattr(self._library, function)(TYPES[q.dtype], q.shape[-1], backward, ctypes.byref(p))
            if not backward and not failed and isinstance(p, _CrossAttentionParams):
                failed = self._library.emulate_row_ranges(ctypes.byref(p))
            if failed:
                raise EmulationError(self._library.emulator_failure().decode())


_KEY_STRIDES = ("medium", "latent", "head")


def _garbage(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def _index(x: Tensor | None) -> _Index:
    return _Index(None, 0) if x is None else _Index(x.data_ptr(), int(x.dtype == torch.int64))


def _fill_rows(p: Any, q: Tensor, grad: Tensor, out: Tensor, dq: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Fill the fields of AttentionParams; return the buffers that must outlive the call."""
    lse, delta = (torch.full((rows, q.shape[-2]), float("nan")) for _ in range(2))
    p.q, p.grad, p.out, p.dq, p.lse, p.delta = (x.data_ptr() for x in (q, grad, out, dq, lse, delta))
    p.q_row, p.q_head = q.stride(0), q.stride(1)
    p.grad_row, p.grad_head = grad.stride(0), grad.stride(1)
    p.rows, p.heads = rows, q.shape[-2]
    return lse, delta
