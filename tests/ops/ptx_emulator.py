"""Run the PTX that nvcc makes of the CUDA kernels on the emulator of csrc.

The grids and the shared memory are those of csrc/cuda/launch.cuh. What was compiled is kept in a folder of the user's
cache, under a hash of the sources, so that only changed kernels are compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.ops.cuda_limits import shared_bytes
from tests.ops.emulator import COPIES, CSRC, TYPES, EmulationError, Emulator
from tests.ops.ptx_translation import translate
from tests.ops.test_cuda_source import find_nvcc

OPS = ("masked_cross_attention", "resampler_attention")
_THREADS, _PLAN_THREADS, _TILE = 128, 256, 64
_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
Change = Callable[[str], str]
_Grid = tuple[int, int, int, int, int]  # blocks, heads, splits, threads, bytes of shared memory


def cache_folder() -> Path:
    """Return the folder of compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flamingo-trainer" / "ptx"


def make_ptx(op: str, head_dim: int, dtype: torch.dtype, architecture: str) -> str:
    """Return nvcc's PTX of an instantiation, compiled for an architecture such as "sm_90a"."""
    return compile_to_ptx(f"{op}_{head_dim}_{_TYPE_NAMES[dtype]}", architecture)


def compile_to_ptx(name: str, architecture: str) -> str:
    """Return nvcc's PTX of a source file of csrc/cuda."""
    path = cache_folder() / f"{name}.{architecture}.{_digest()}.ptx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        virtual = architecture.replace("sm_", "compute_")
        command = [find_nvcc(), "-std=c++17", "-O3", f"-arch={virtual}", "-ptx", "-o", str(temporary)]
        _run([*command, str(CSRC / "cuda" / f"{name}.cu")])
        temporary.rename(path)
    return path.read_text()


def build(ptx: str) -> Path:
    """Return the library of translated PTX."""
    source = translate(ptx)
    digest = hashlib.sha256((source + _digest()).encode()).hexdigest()[:16]
    library = cache_folder() / f"{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}.cpp")
        temporary.write_text(source)
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-DFLAMINGO_EMULATOR"]
        command += [f"-I{CSRC / 'emulator'}", "-o", f"{temporary}.so", str(temporary)]
        _run([*command, str(CSRC / "emulator" / "simt.cpp")])
        Path(f"{temporary}.so").rename(library)
        temporary.unlink()
    return library


def _digest() -> str:
    """Return a hash of all sources of the kernels and of the emulator."""
    digest = hashlib.sha256()
    for path in sorted(file for folder in ("cuda", "emulator") for file in (CSRC / folder).iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]} failed: {done.stderr[-2000:]}"


class PtxEmulator(Emulator):
    """Call kernels that were compiled to PTX; the methods are those of ``Emulator``."""

    def __init__(self, head_dim: int, dtype: torch.dtype, architecture: str, change: Change = lambda ptx: ptx) -> None:
        """Compile both ops; ``change`` edits their PTX, but not that of the row ranges, before it is translated."""
        self._head_dim, self._dtype = head_dim, dtype
        self._libraries = {op: _Library(build(change(make_ptx(op, head_dim, dtype, architecture)))) for op in OPS}
        self._ranges = _Library(build(compile_to_ptx("row_ranges", architecture)))
        self.seed, self.copies, self.skipped_site = 0, "by chance", -1

    def _run(self, function: str, q: Tensor, p: Any) -> None:
        row_tiles, split = _tiles(p.rows), p.splits > 1
        backward = (p.splits, _THREADS, shared_bytes(self._head_dim))
        if function == "emulate_cross_attention":
            op, key_blocks = self._libraries[OPS[0]], p.media * _tiles(p.latents)
            launches = [("attention_forward", (row_tiles, p.heads, 1, _THREADS, self._forward_bytes()))]
            self._find_ranges(p)
            alone = not p.first_media.data and p.latents <= _TILE
            if alone:
                launches += [("clear_blind_rows", (max(row_tiles, 1), 1, 1, _THREADS, 0))]
            else:
                launches += [("backward_rows", (row_tiles, p.heads, 1, *backward[1:]))]
            longest_first = alone and self._head_dim == 64
            keys = (p.key_heads, key_blocks) if longest_first else (key_blocks, p.key_heads)
            launches += [(self._keys_kernel(alone=alone, split=split), (*keys, *backward))]
            if split:
                launches += [("sum_key_parts", self._chunks(p.media * p.latents * p.key_heads, 2))]
        else:
            op, row_tiles = self._libraries[OPS[1]], p.media * _tiles(p.latents)
            alone = p.latents <= _TILE
            forward = (row_tiles, p.heads, p.splits, _THREADS, self._forward_bytes())
            launches = [(f"attention_forward.*Lb{int(split)}E", forward)]
            if split:
                launches += [("combine_parts", self._chunks(p.rows * p.heads))]
            launches += [(f"backward_rows.*Lb{int(alone)}ELb{int(split)}E", (row_tiles, p.heads, *backward))]
            if split:
                launches += [("sum_row_parts", self._chunks(p.rows * p.heads))]
            if not alone:
                slots = p.features // _TILE + p.media + row_tiles
                launches += [("resampler_backward_keys", (slots, p.heads, 1, *backward[1:]))]
        for kernel, grid in launches:
            op.launch(kernel, grid, p, self.seed, COPIES[self.copies])

    def _find_ranges(self, p: Any) -> None:
        for kernel, threads in (("empty_ranges", p.media), ("plan_rows", p.rows)):
            grid = (-(-threads // _PLAN_THREADS), 1, 1, _PLAN_THREADS, 0)
            self._ranges.launch(kernel, grid, p, self.seed, COPIES[self.copies])

    def _chunks(self, rows: int, outputs: int = 1) -> _Grid:
        """Return the grid of a sum of parts, whose threads have eight columns of a row."""
        return (-(-rows * self._head_dim // 8 // _THREADS), outputs, 1, _THREADS, 0)

    def _forward_bytes(self) -> int:
        pitch = 128 if self._head_dim == 96 else self._head_dim
        return (5 if self._head_dim == 64 else 4) * pitch * _TILE * 2

    def _chunk_blocks(self, rows: int) -> int:
        return -(-rows * self._head_dim // 8 // _THREADS)

    def _keys_kernel(self, *, alone: bool, split: bool) -> str:
        flags = f"Lb{int(alone)}ELb{int(split)}E"
        return f"backward_keysILNS0_4TypeE{TYPES[self._dtype]}ELi{self._head_dim}E{flags}"


class _Library:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.ptx_kernel_name.restype = self._library.ptx_failure.restype = ctypes.c_char_p
        self._library.ptx_configure.argtypes = [ctypes.c_uint64, ctypes.c_int]
        self._names: list[str] = []
        while name := self._library.ptx_kernel_name(len(self._names)):
            self._names.append(name.decode())

    def launch(self, kernel: str, grid: _Grid, params: Any, seed: int, copies: int) -> None:
        [number] = [i for i, name in enumerate(self._names) if re.search(kernel, name)]
        self._library.ptx_configure(seed, copies)
        if grid[0] and self._library.ptx_launch(number, *grid, ctypes.byref(params)):
            raise EmulationError(self._library.ptx_failure().decode())


def _tiles(count: int) -> int:
    return -(-count // _TILE)
