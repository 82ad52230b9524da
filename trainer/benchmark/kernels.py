"""``python -m trainer.benchmark kernels``: measure the fused attentions of ``model.ops`` against other implementations.

They take turns in one process, and the median of the repeats counts. On CUDA the L2 cache is flushed before every
repeat, and three times are measured: between events, of the host until a call returns, and of the kernels alone,
replayed from a CUDA graph. On the CPU the processor time of one thread counts, which other processes influence less.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model import ops
from trainer.benchmark import cuda_clock, kernels_model
from trainer.benchmark.attention_baselines import (
    Attention,
    CrossShape,
    ResamplerShape,
    cross_baselines,
    resampler_baselines,
)
from trainer.benchmark.result_file import Measurement

BENCHMARK = "kernels"
H100_BYTES_PER_SECOND = 3.35e12
CPU_DTYPES, CUDA_DTYPES = (torch.float32, torch.bfloat16), (torch.bfloat16,)

CROSS_SHAPES = {
    "cpu": [
        CrossShape(1, 512, 8, 8, 64, leading_text=True),
        CrossShape(1, 512, 8, 8, 64, leading_text=True, uneven=True),
        CrossShape(1, 512, 8, 8, 64, leading_text=True, num_kv_heads=2),
        CrossShape(1, 64, 1, 8, 128, num_latents=6404, num_kv_heads=2),  # a medium of Llama 3.2 Vision
    ],
    "cuda": [
        *(CrossShape(8, 2048, media, *heads) for heads in ((16, 64), (32, 128)) for media in (5, 16, 32)),
        *(CrossShape(8, 2048, media, *heads, uneven=True) for heads in ((16, 64), (32, 128)) for media in (5, 16, 32)),
        CrossShape(8, 2048, 16, 32, 128, num_kv_heads=8),
        CrossShape(2, 2048, 1, 32, 128, num_latents=6404, num_kv_heads=8),
    ],
}
RESAMPLER_SHAPES = {
    "cpu": [ResamplerShape(8, 256, 8, 64)],
    "cuda": [ResamplerShape(media, features, 16, 64) for media, features in ((40, 256), (160, 1024), (320, 1024))],
}
# One medium a row, and videos: few blocks with much work. The model has them in addition.
LONG_SHAPES = ([CrossShape(8, 2048, 1, 16, 64)], [ResamplerShape(4, 2048, 16, 64)])
# Lowest wanted ratio by (device, op, measure, baseline), and by number of media where it depends on that.
TARGETS: dict[tuple[str, str, str, str], float | dict[int, float]] = {
    ("cpu", "cross", "forward + backward", "SDPA + dense mask"): 12.0,
    ("cpu", "resampler", "forward + backward", "SDPA on concatenated keys"): 1.0,
    ("cpu", "cross", "extra memory", "scores of the dense mask"): 20.0,
    ("cpu", "resampler", "extra memory", "concatenated keys"): 1.0,
    ("cuda", "cross", "forward", "SDPA + dense mask"): {5: 3.0, 16: 8.0, 32: 15.0},
    ("cuda", "cross", "forward", "varlen_attn"): 1.1,
    ("cuda", "cross", "backward", "varlen_attn"): 1.7,
    ("cuda", "cross", "backward", "SDPA + dense mask"): {5: 4.0},
    ("cuda", "resampler", "forward", "varlen_attn + concatenation"): 1.5,
    ("cuda", "resampler", "backward", "varlen_attn + concatenation"): 1.5,
    ("cuda", "resampler", "forward", "varlen_attn, features only"): 1.0,
    ("cuda", "resampler", "backward", "varlen_attn, features only"): 1.0,
}


def run(device: str, repeats: int = 30) -> list[Measurement]:
    """Measure every shape on "cpu" or "cuda", or model it for an H100 on "model".

    Raises:
        RuntimeError: The fused ops cannot be used there, or a tool is missing that the model needs.
    """
    if device == "model":
        return kernels_model.run([*CROSS_SHAPES["cuda"], *LONG_SHAPES[0]], [*RESAMPLER_SHAPES["cuda"], *LONG_SHAPES[1]])
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        rows: list[Measurement] = []
        for dtype in CPU_DTYPES if device == "cpu" else CUDA_DTYPES:
            for cross in CROSS_SHAPES[device]:
                rows += _cross_rows(cross, device, dtype, repeats)
            for resampler in RESAMPLER_SHAPES[device]:
                rows += _resampler_rows(resampler, device, dtype, repeats)
    finally:
        torch.set_num_threads(threads)
    return rows


def _cross_rows(shape: CrossShape, device: str, dtype: torch.dtype, repeats: int) -> list[Measurement]:
    queries = (shape.rows * shape.length, shape.num_heads, shape.head_dim)
    keys = (shape.rows * shape.num_media, shape.num_latents, shape.num_kv_heads or shape.num_heads, shape.head_dim)
    inputs = _leaves(device, dtype, [queries, keys, keys])
    index = shape.media_index(device)
    ranges = ops.find_token_ranges(index, None, keys[0], inputs[0])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.masked_cross_attention(q, k, v, index, token_ranges=ranges, backend="fused")

    name = f"cross {shape.rows}x{shape.length}, {shape.kind}, {_short(dtype)}"
    baselines = cross_baselines(shape, device)
    measured = _compare(
        name,
        "cross" if _has_targets(shape) else "",
        ours,
        baselines,
        inputs,
        shape.min_bytes(dtype.itemsize),
        repeats,
        shape.num_media,
    )
    if device == "cpu" and shape.num_kv_heads is not None:
        [(baseline, repeated)] = baselines.items()
        theirs = _extra_memory(repeated, inputs)
        measured.append(_memory_row(name, "", ours, inputs, baseline, theirs))
    elif device == "cpu":
        scores = shape.rows * shape.num_heads * shape.length * shape.num_media * shape.num_latents * 4
        op = "cross" if _has_targets(shape) else ""
        measured.append(_memory_row(name, op, ours, inputs, "scores of the dense mask", scores))
    return measured


def _has_targets(shape: CrossShape) -> bool:
    return not shape.uneven and shape.num_kv_heads is None


def _resampler_rows(shape: ResamplerShape, device: str, dtype: torch.dtype, repeats: int) -> list[Measurement]:
    features, latents = (shape.num_media * shape.num_features,), (shape.num_media, shape.num_latents)
    sizes = (latents, features, features, latents, latents)
    inputs = _leaves(device, dtype, [(*size, shape.num_heads, shape.head_dim) for size in sizes])
    cu_media = torch.arange(shape.num_media + 1, device=device) * shape.num_features

    def ours(q: Tensor, k_features: Tensor, v_features: Tensor, k_latents: Tensor, v_latents: Tensor) -> Tensor:
        return ops.resampler_attention(q, k_features, v_features, k_latents, v_latents, cu_media, backend="fused")

    heads = f"{shape.num_heads}x{shape.head_dim}"
    name = f"resampler {shape.num_media} media, {shape.num_features} features, {heads}, {_short(dtype)}"
    measured = _compare(
        name,
        "resampler",
        ours,
        resampler_baselines(shape, device),
        inputs,
        shape.min_bytes(dtype.itemsize),
        repeats,
        shape.num_media,
    )
    if device == "cpu":
        concatenated = sum(x.nbytes for x in inputs[1:])
        measured.append(_memory_row(name, "resampler", ours, inputs, "concatenated keys", concatenated))
    return measured


def _compare(
    case: str,
    op: str,
    ours: Attention,
    baselines: dict[str, Attention],
    inputs: Sequence[Tensor],
    min_bytes: tuple[int, int],
    repeats: int,
    num_media: int,
) -> list[Measurement]:
    """Compare an op with every baseline.

    Args:
        case: Case of the rows.
        op: Name of the op in ``TARGETS``; empty where the shape has none.
        ours: The fused op.
        baselines: Baselines by name.
        inputs: Inputs of all of them.
        min_bytes: Bytes that forward and backward read and write at least.
        repeats: Repetitions.
        num_media: Media of a row, on which some targets depend.
    """
    device = inputs[0].device.type
    grad = torch.randn_like(ours(*inputs))
    moved = {"forward": min_bytes[0], "backward": min_bytes[1], "forward + backward": sum(min_bytes)}
    measures = ("forward", "backward") if device == "cuda" else ("forward", "forward + backward")
    rows = []
    for measure in measures:
        calls = {name: _call(measure, f, inputs, grad) for name, f in {"ours": ours, **baselines}.items()}
        seconds = _medians(list(calls.values()), device, repeats)
        mine = seconds[0]
        for baseline, theirs in zip(baselines, seconds[1:], strict=True):
            target = TARGETS.get((device, op, measure, baseline))
            target = target.get(num_media) if isinstance(target, dict) else target
            rows.append(
                Measurement.compared(BENCHMARK, case, measure, "ms", mine * 1e3, baseline, theirs * 1e3, target)
            )
        rows.append(Measurement(BENCHMARK, case, f"{measure}, bandwidth", "GB/s", moved[measure] / mine / 1e9))
        if device == "cuda":
            shortest = moved[measure] / H100_BYTES_PER_SECOND
            rows.append(Measurement(BENCHMARK, case, f"{measure}, share of H100's bandwidth", "1", shortest / mine))
            peak, *peaks = [cuda_clock.peak_bytes(call) / 1e6 for call in calls.values()]
            rows += [
                Measurement.compared(BENCHMARK, case, f"{measure}, peak memory", "MB", peak, baseline, theirs)
                for baseline, theirs in zip(baselines, peaks, strict=True)
            ]
            host = [
                statistics.median(cuda_clock.host_seconds(call) for _ in range(10)) * 1e3 for call in calls.values()
            ]
            rows += [
                Measurement.compared(BENCHMARK, case, f"{measure}, host", "ms", host[0], baseline, theirs)
                for baseline, theirs in zip(baselines, host[1:], strict=True)
            ]
    return rows + (_graph_rows(case, ours, inputs, grad, moved, repeats) if device == "cuda" else [])


def _graph_rows(
    case: str, ours: Attention, inputs: Sequence[Tensor], grad: Tensor, moved: dict[str, int], repeats: int
) -> list[Measurement]:
    """Measure the kernels alone, without the host. The backward is the difference to the forward."""
    measures = ("forward", "forward + backward")
    replays = [cuda_clock.captured(_call(measure, ours, inputs, grad)) for measure in measures]
    forward, both = _medians(replays, "cuda", repeats)
    rows = []
    for measure, seconds in (("forward", forward), ("backward", both - forward)):
        share = moved[measure] / H100_BYTES_PER_SECOND / seconds
        rows.append(Measurement(BENCHMARK, case, f"{measure}, CUDA graph", "ms", seconds * 1e3))
        rows.append(Measurement(BENCHMARK, case, f"{measure}, CUDA graph, share of H100's bandwidth", "1", share))
    return rows


def _call(measure: str, attention: Attention, inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    if measure == "forward":
        detached = [x.detach() for x in inputs]
        return lambda: attention(*detached)
    if measure == "forward + backward":
        return lambda: torch.autograd.grad(attention(*inputs), inputs, grad, allow_unused=True)
    out = attention(*inputs)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True, allow_unused=True)


def _medians(calls: Sequence[Callable[[], object]], device: str, repeats: int) -> list[float]:
    """Return the median seconds of each call.

    The calls take turns of six repeats. The first two of a turn do not count, because they bring the allocator and the
    caches into the state of repeating this call.
    """
    times: list[list[float]] = [[] for _ in calls]
    flush = torch.empty(256 * 2**20 if device == "cuda" else 0, dtype=torch.int8, device=device)
    while len(times[-1]) < repeats:
        for call, seconds in zip(calls, times, strict=True):
            for turn in range(6):
                flush.zero_()
                elapsed = cuda_clock.event_seconds(call) if device == "cuda" else _cpu_seconds(call)
                if turn >= 2:
                    seconds.append(elapsed)
    return [statistics.median(seconds) for seconds in times]


def _cpu_seconds(call: Callable[[], object]) -> float:
    """Return processor time, which for one thread is the wall time without the share of other processes."""
    started = time.process_time()
    call()
    return time.process_time() - started


def _memory_row(
    case: str, op: str, ours: Attention, inputs: Sequence[Tensor], baseline: str, baseline_bytes: int
) -> Measurement:
    """Compare the extra memory of an op with a baseline's."""
    extra = _extra_memory(ours, inputs)
    target = TARGETS.get(("cpu", op, "extra memory", baseline))
    assert not isinstance(target, dict)
    return Measurement.compared(
        BENCHMARK, case, "extra memory", "KB", extra / 1e3, baseline, baseline_bytes / 1e3, target
    )


def _extra_memory(attention: Attention, inputs: Sequence[Tensor]) -> int:
    """Return the bytes that forward and backward need at their peak beyond the output and the gradients."""
    grad = torch.randn_like(attention(*inputs))
    returned = grad.nbytes + sum(x.nbytes for x in inputs)
    return max(_cpu_peak(_call("forward + backward", attention, inputs, grad)) - returned, 1)


def _cpu_peak(call: Callable[[], object]) -> int:
    """Return the bytes of resident memory that a call adds at its peak (Linux only).

    Memory that the allocator or the kernels keep would hide the need of a call, so it is released first.
    """
    call()
    peaks = []
    for _ in range(5):
        gc.collect()
        torch.ops.flamingo.release_cpu_scratch()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
        before = _status_bytes("VmRSS")
        call()
        peaks.append(_status_bytes("VmHWM") - before)
    return int(statistics.median(peaks))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _leaves(device: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
