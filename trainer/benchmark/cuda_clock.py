"""Time calls on a CUDA device: by events, by the host's clock, and replayed from a CUDA graph.

Events around a call include the time in which the device waits for the host to launch its kernels. The replay of a
graph launches them all at once, so it shows the kernels alone. The host's time shows whether launching is the limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Call = Callable[[], object]


def event_seconds(call: Call) -> float:
    """Return the seconds between events before and after a call, on the current stream."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def host_seconds(call: Call) -> float:
    """Return the seconds until a call returns, which is before its kernels have run; the device is idle before it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds


def captured(call: Call, warmups: int = 3) -> Call:
    """Return the replay of a call as a CUDA graph.

    Args:
        call: Work that waits for nothing, and that finds its inputs in the same memory each time. A backward needs its
            forward inside the call, since autograd runs it on the forward's stream.
        warmups: Calls before the capture, which fill caches and load kernels.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Call) -> int:
    """Return the device memory that a call adds at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
