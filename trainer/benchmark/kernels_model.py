"""``python -m trainer.benchmark kernels --device model``: estimate the kernels' times on an H100, without a GPU.

nvcc compiles the kernels, and ``multiprocessor_model`` plays their machine code for the busiest multiprocessor. The
rows say "modeled", because nothing is measured. ``ratio`` is the share of the floor: the least bytes at an H100's
3.35 TB/s, or the products at its 989 TFLOP/s if they take longer, over the modeled time.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Sequence
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
FORWARD, ROWS, KEYS = "attention_forward", "backward_rows", "backward_keys"
COMBINE, SUM_ROWS, SUM_KEYS = "combine_parts", "sum_row_parts", "sum_key_parts"
_ENOUGH_BLOCKS, _FEWEST_VISITS = 384, 4  # wanted_splits of csrc/cuda/params.h


@dataclass(frozen=True)
class Launch:
    """Describe the launch of a kernel.

    Attributes:
        op: Op, such as "masked_cross_attention".
        kernel: Part of the kernel's name.
        flags: Its last template arguments: whether it is the whole backward (of a backward), and whether it has splits.
        head_dim: Width of a head.
        visits: Tiles of each block of one head.
        heads: Heads of the grid.
        owned: Tiles that a block copies once.
        passes: How often a block visits its tiles.
        input_bytes: Bytes of all inputs, each once.
        splits: Thread blocks that share the tiles of one.
        longest_first: Whether the blocks with the most tiles start first.
    """

    op: str
    kernel: str
    flags: tuple[bool, ...]
    head_dim: int
    visits: tuple[int, ...]
    heads: int
    owned: int
    passes: int
    input_bytes: int
    splits: int = 1
    longest_first: bool = False

    def block_visits(self) -> list[int]:
        """Return the tiles that each block visits, in the order of the grid."""
        shares = [[_share(n, split, self.splits) for n in self.visits] for split in range(self.splits)]
        if self.longest_first:
            return [n for visits in shares for n in sorted(visits, reverse=True) for _ in range(self.heads)]
        return [n for visits in shares for n in visits * self.heads]


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
    forward = Launch(op, FORWARD, (False,), shape.head_dim, rows, shape.num_heads, 1, 1, read[0])
    alone = blocks_of_medium == 1
    splits = cross_splits(shape)
    flags, ordered = (alone, splits > 1), alone and shape.head_dim == 64
    by_keys = Launch(op, KEYS, flags, shape.head_dim, keys, key_heads, 2, 1, read[1], splits, ordered)
    by_rows = Launch(op, ROWS, (False, False), shape.head_dim, rows, shape.num_heads, 2, 2, read[1])
    k_and_v = 2 * shape.rows * shape.num_media * shape.num_latents * key_heads * shape.head_dim
    backward = [by_keys] if alone else [by_rows, by_keys]
    return [forward], backward + ([_sum(op, SUM_KEYS, shape.head_dim, k_and_v, splits)] if splits > 1 else [])


def resampler_launches(shape: ResamplerShape) -> tuple[list[Launch], list[Launch]]:
    """Return the launches of forward and backward of a resampler with up to 64 latents."""
    op, read, count = "resampler_attention", shape.min_bytes(_BYTES)[0], -(-shape.num_features // _TILE) + 1
    splits = resampler_splits(shape)
    visits, has_splits = (count,) * shape.num_media, splits > 1
    forward = [Launch(op, FORWARD, (has_splits,), shape.head_dim, visits, shape.num_heads, 1, 1, read, splits)]
    backward = [Launch(op, ROWS, (True, has_splits), shape.head_dim, visits, shape.num_heads, 2, 1, read, splits)]
    if has_splits:
        numbers = shape.num_media * shape.num_latents * shape.num_heads * shape.head_dim
        forward.append(_sum(op, COMBINE, shape.head_dim, numbers, splits))
        backward.append(_sum(op, SUM_ROWS, shape.head_dim, numbers, splits))
    return forward, backward


def _sum(op: str, kernel: str, head_dim: int, numbers: int, splits: int) -> Launch:
    """Return the launch that adds the parts of a kernel with splits. A thread computes eight numbers."""
    blocks = -(-numbers // 8 // sass_paths.THREADS)
    return Launch(op, kernel, (), head_dim, (1,) * blocks, 1, 0, 0, 4 * splits * numbers)


def _share(tiles: int, split: int, splits: int) -> int:
    """Return how many of the tiles one of several thread blocks visits, or 1: share_of of csrc/cuda/problem.cuh."""
    return max(1, tiles // splits + (split < tiles % splits))


def cross_splits(shape: CrossShape) -> int:
    """Return how many thread blocks share the rows of a key block in the backward."""
    key_heads = shape.num_kv_heads or shape.num_heads
    key_blocks = shape.rows * shape.num_media * -(-shape.num_latents // _TILE)
    tiles = shape.length // shape.num_media // _TILE
    return max(1, min(_wanted_splits(key_blocks * key_heads, tiles * (shape.num_heads // key_heads)), tiles))


def resampler_splits(shape: ResamplerShape) -> int:
    """Return how many thread blocks share the keys of a row tile."""
    tiles = -(-shape.num_latents // _TILE)
    return _wanted_splits(shape.num_media * tiles * shape.num_heads, shape.num_features // _TILE + tiles)


def _wanted_splits(blocks: int, visits: int) -> int:
    """Return what csrc/cuda/params.h decides."""
    if blocks == 0 or blocks >= _ENOUGH_BLOCKS:
        return 1
    return max(1, min(-(-_ENOUGH_BLOCKS // blocks), visits // _FEWEST_VISITS))


def find_kernel(launch: Launch, kernels: Sequence[sass.Kernel]) -> sass.Kernel:
    """Return the kernel of a launch."""
    flags = "".join(f"Lb{int(flag)}E" for flag in launch.flags)
    [found] = [kernel for kernel in kernels if launch.kernel in kernel.name and flags in kernel.name]
    return found


def _seconds(launch: Launch) -> float:
    kernel = find_kernel(launch, _kernels(launch.op, launch.head_dim))
    shared = block_bytes(launch.kernel, launch.head_dim)
    resident = multiprocessor_model.resident_blocks(kernel, shared, ARCHITECTURE)
    first, second = (len(_path(launch.op, kernel, launch.head_dim, n)) for n in (1, 2))

    def slots(visits: int) -> int:
        return first + (visits - 1) * (second - first)

    visits = busiest(launch.block_visits(), resident, slots)
    sample = [min(n, _MOST_VISITS) for n in visits[: _MOST_WAVES * resident]]
    paths = [_path(launch.op, kernel, launch.head_dim, n) for n in sample]
    tiles = sum(launch.owned + 2 * launch.passes * n for n in launch.block_visits())
    copied = tiles * _TILE * launch.head_dim * _BYTES
    share = min(1.0, launch.input_bytes / copied) if copied else 0.0
    seconds = multiprocessor_model.seconds(kernel, paths, resident, share)
    total, played = (sum(slots(n) for n in counts) for counts in (visits, sample))
    # A sum reads the parts from the L2 cache, where they have just been written.
    least = 0.0 if copied else launch.input_bytes / _L2_BYTES_PER_SECOND
    return max(seconds * total / played, least)


def busiest(visits: Sequence[int], resident: int, slots: Callable[[int], int]) -> list[int]:
    """Return the tiles of the blocks that the busiest multiprocessor gets.

    Args:
        visits: Tiles of each block, in the order of the grid. A block starts where one ends first.
        resident: Blocks that a multiprocessor holds.
        slots: Instructions of a block by its tiles.
    """
    count = multiprocessor_model.MULTIPROCESSORS
    places = [(0, place) for place in range(count * resident)]  # when they are free
    found: list[list[int]] = [[] for _ in range(count)]
    for n in visits:
        free, place = heapq.heappop(places)
        found[place % count].append(n)
        heapq.heappush(places, (free + slots(n), place))
    return max(found, key=lambda blocks: sum(map(slots, blocks)))


def block_bytes(kernel: str, head_dim: int) -> int:
    """Return the shared memory of a block: csrc/cuda/attention_forward.cuh and attention_backward.cuh."""
    pitch = 128 if head_dim == 96 else head_dim
    if kernel in (COMBINE, SUM_ROWS, SUM_KEYS):
        return 0
    forward = (5 if head_dim == 64 else 4) * pitch * _TILE * _BYTES
    return forward if kernel.startswith(FORWARD) else shared_bytes(head_dim)


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
