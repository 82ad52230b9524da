"""``python -m trainer.benchmark kernels --device model``: estimate the kernels' times on an H100, without a GPU.

nvcc compiles the kernels, and ``multiprocessor_model`` plays their machine code for the busiest multiprocessor. The
rows say "modeled", because nothing is measured. ``ratio`` is the share of the floor: the least bytes at an H100's
3.35 TB/s, or the products at its 989 TFLOP/s if they take longer, over the modeled time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.ops.cuda_limits import shared_bytes
from trainer.benchmark import multiprocessor_model, sass, sass_paths
from trainer.benchmark.attention_baselines import CrossShape, ResamplerShape
from trainer.benchmark.result_file import Measurement

FLOOR = "floor of an H100"
ARCHITECTURE = "sm_90a"
_BYTES_PER_SECOND, _COPY_BYTES_PER_SECOND, _FLOPS_PER_SECOND = 3.35e12, 3.0e12, 989e12
_L2_BYTES_PER_SECOND = 5.5e12
_PRODUCTS = {"forward": 2, "backward": 5}  # of matrices, for each tile
_FIRST_LAUNCH, _NEXT_LAUNCH = 3e-6, 1e-6  # seconds: launching and draining kernels
_TILE, _BYTES = sass_paths.TILE, 2  # rows of a tile, bytes of a number
_MOST_VISITS, _MOST_WAVES = 10, 3  # of a played sample; longer work is scaled by its instructions
FORWARD, COMBINE, ROWS, KEYS = "attention_forward", "combine_parts", "backward_rows", "backward_keys"
_ENOUGH_BLOCKS, _FEWEST_VISITS = 384, 4  # wanted_splits of csrc/cuda/params.h


@dataclass(frozen=True)
class Launch:
    """Describe the launch of a kernel.

    Attributes:
        op: Op, such as "masked_cross_attention".
        kernel: Part of the kernel's name.
        flag: Its last template argument: whether it is the whole backward, or a forward with splits; None for others.
        head_dim: Width of a head.
        visits: Tiles that each block visits, for the blocks of one head.
        heads: Heads of the grid.
        owned: Tiles that a block copies once.
        passes: How often a block visits its tiles.
        input_bytes: Bytes of all inputs, each once.
    """

    op: str
    kernel: str
    flag: bool | None
    head_dim: int
    visits: tuple[int, ...]
    heads: int
    owned: int
    passes: int
    input_bytes: int


def run(cross: Sequence[CrossShape], resampler: Sequence[ResamplerShape]) -> list[Measurement]:
    """Return the modeled times of all shapes in bfloat16.

    Raises:
        ToolMissingError: The sources of the kernels, nvcc or the disassembler are missing.
    """
    rows: list[Measurement] = []
    shapes: list[CrossShape | ResamplerShape] = [*cross, *resampler]
    for shape in shapes:
        launches = cross_launches(shape) if isinstance(shape, CrossShape) else resampler_launches(shape)
        for measure, kernels, least in zip(("forward", "backward"), launches, shape.min_bytes(_BYTES), strict=True):
            seconds = max(sum(_seconds(x) for x in kernels), least / _COPY_BYTES_PER_SECOND)
            seconds += _FIRST_LAUNCH + _NEXT_LAUNCH * (len(kernels) - 1)
            flops = 2 * _PRODUCTS[measure] * _scores(shape) * shape.head_dim
            floor = max(least / _BYTES_PER_SECOND, flops / _FLOPS_PER_SECOND)
            target = _target(shape, measure)
            measured = ("kernels", _case(shape), f"{measure}, modeled", "ms", seconds * 1e3)
            rows.append(Measurement.compared(*measured, FLOOR, floor * 1e3, target))
    return rows


def _scores(shape: CrossShape | ResamplerShape) -> int:
    """Return how many scores an attention has, over all heads."""
    if isinstance(shape, CrossShape):
        return shape.rows * shape.length * shape.num_latents * shape.num_heads
    return shape.num_media * shape.num_latents * (shape.num_features + shape.num_latents) * shape.num_heads


def cross_launches(shape: CrossShape) -> tuple[list[Launch], list[Launch]]:
    """Return the launches of forward and backward."""
    key_heads = shape.num_kv_heads or shape.num_heads
    blocks_of_medium = -(-shape.num_latents // _TILE)
    index = shape.media_index("cpu")
    tiles = index.split(_TILE)
    rows = tuple(max(1, int(x.max() - x.clamp(min=0).min() + 1)) * blocks_of_medium for x in tiles)
    counts = torch.bincount(index[index >= 0], minlength=shape.rows * shape.num_media)
    tiles_of_medium = [max(1, -(-int(n) // _TILE)) * shape.num_heads // key_heads for n in counts]
    keys = tuple(n for n in tiles_of_medium for _ in range(blocks_of_medium))
    op = "masked_cross_attention"
    least = shape.min_bytes(_BYTES)[0]
    output = _BYTES * shape.rows * shape.length * shape.num_heads * shape.head_dim
    read = (least - output, least)  # the backward also reads the output's gradient
    forward = Launch(op, FORWARD, False, shape.head_dim, rows, shape.num_heads, 1, 1, read[0])
    alone = blocks_of_medium == 1
    by_keys = Launch(op, KEYS, alone, shape.head_dim, keys, key_heads, 2, 1, read[1])
    by_rows = Launch(op, ROWS, False, shape.head_dim, rows, shape.num_heads, 2, 2, read[1])
    return [forward], [by_keys] if alone else [by_rows, by_keys]


def resampler_launches(shape: ResamplerShape) -> tuple[list[Launch], list[Launch]]:
    """Return the launches of forward and backward of a resampler with up to 64 latents."""
    op, read, count = "resampler_attention", shape.min_bytes(_BYTES)[0], -(-shape.num_features // _TILE) + 1
    visits, splits = (count,) * shape.num_media, wanted_splits(shape)
    shares = tuple(count * (i + 1) // splits - count * i // splits for i in range(splits)) * shape.num_media
    forward = [Launch(op, FORWARD, splits > 1, shape.head_dim, shares, shape.num_heads, 1, 1, read)]
    if splits > 1:
        columns = shape.num_media * shape.num_latents * shape.num_heads * shape.head_dim
        blocks, part_bytes = -(-columns // 8 // sass_paths.THREADS), 4 * splits * columns
        forward.append(Launch(op, COMBINE, None, shape.head_dim, (1,) * blocks, 1, 0, 0, part_bytes))
    return forward, [Launch(op, ROWS, True, shape.head_dim, visits, shape.num_heads, 2, 1, read)]


def wanted_splits(shape: ResamplerShape) -> int:
    """Return how many thread blocks share the keys of a row tile in a forward, as csrc/cuda/params.h decides."""
    tiles = -(-shape.num_latents // _TILE)
    blocks = shape.num_media * tiles * shape.num_heads
    if blocks == 0 or blocks >= _ENOUGH_BLOCKS:
        return 1
    return max(1, min(-(-_ENOUGH_BLOCKS // blocks), (shape.num_features // _TILE + tiles) // _FEWEST_VISITS))


def find_kernel(launch: Launch, kernels: Sequence[sass.Kernel]) -> sass.Kernel:
    """Return the kernel of a launch."""
    flag = "" if launch.flag is None else f"Lb{int(launch.flag)}E"
    [found] = [kernel for kernel in kernels if launch.kernel in kernel.name and flag in kernel.name]
    return found


def _seconds(launch: Launch) -> float:
    kernel = find_kernel(launch, _kernels(launch.op, launch.head_dim))
    shared = block_bytes(launch.kernel, launch.head_dim)
    resident = multiprocessor_model.resident_blocks(kernel, shared, ARCHITECTURE)
    visits = (launch.visits * launch.heads)[:: multiprocessor_model.MULTIPROCESSORS]  # the busiest one's
    slots = {n: len(_path(launch.op, kernel, launch.head_dim, n)) for n in (1, 2)}
    sample = [min(n, _MOST_VISITS) for n in visits[: _MOST_WAVES * resident]]
    paths = [_path(launch.op, kernel, launch.head_dim, n) for n in sample]
    copied = (
        sum(launch.owned + 2 * launch.passes * n for n in launch.visits)
        * launch.heads
        * _TILE
        * launch.head_dim
        * _BYTES
    )
    share = min(1.0, launch.input_bytes / copied) if copied else 0.0
    seconds = multiprocessor_model.seconds(kernel, paths, resident, share)
    total, played = (sum(slots[1] + (n - 1) * (slots[2] - slots[1]) for n in counts) for counts in (visits, sample))
    # Combining reads the parts from the L2 cache, where they have just been written.
    least = launch.input_bytes / _L2_BYTES_PER_SECOND if launch.kernel == COMBINE else 0.0
    return max(seconds * total / played, least)


def block_bytes(kernel: str, head_dim: int) -> int:
    """Return the shared memory of a block: csrc/cuda/attention_forward.cuh and attention_backward.cuh."""
    pitch = 128 if head_dim == 96 else head_dim
    if kernel == COMBINE:
        return 0
    return 5 * pitch * _TILE * _BYTES if kernel.startswith(FORWARD) else shared_bytes(head_dim)


@functools.cache
def _kernels(op: str, head_dim: int) -> list[sass.Kernel]:
    return sass.compiled(f"{op}_{head_dim}_bf16", ARCHITECTURE)


@functools.cache
def _path(op: str, kernel: sass.Kernel, head_dim: int, visits: int) -> list[int]:
    return sass_paths.issued(kernel, head_dim, visits)


def _target(shape: CrossShape | ResamplerShape, measure: str) -> float:
    """Return the lowest wanted share of the floor."""
    if shape.num_media == 5:
        return 0.55
    if shape.num_media == 1 or (isinstance(shape, ResamplerShape) and shape.num_media < 16):
        return 0.5
    return 0.7 if measure == "forward" else 0.6


def _case(shape: CrossShape | ResamplerShape) -> str:
    heads = f"{shape.num_heads}x{shape.head_dim}"
    if isinstance(shape, ResamplerShape):
        return f"resampler {shape.num_media} media, {shape.num_features} features, {heads}, bfloat16"
    return f"cross {shape.rows}x{shape.length}, {shape.kind}, bfloat16"
