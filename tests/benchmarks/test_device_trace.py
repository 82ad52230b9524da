"""Test what is read from a GPU's trace in the format of torch profiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.benchmark.device_trace import read_device_trace


def event(category: str, name: str, start: float, seconds: float, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": 7, "ts": start, "dur": seconds} | {
        "args": {"device": 0, "stream": 7, **arguments}
    }


def test_exposed_times_and_bytes_over_the_host_link(tmp_path: Path) -> None:
    events = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
        event("cpu_op", "aten::mm", 0, 1000),
        event("kernel", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", 100, 100),
        event("kernel", "void at::native::reduce_kernel<512, 1>", 150, 100),  # not a collective, despite its name
        event("kernel", "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 50, 100),
        event("kernel", "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 60, 20),
        event("kernel", "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 160, 190),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 240, 30, bytes=4096),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 260, 30, bytes=1024),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 400, 30, bytes=10**9),
        event("gpu_memset", "Memset (Device)", 500, 1, bytes=10**9),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    found = read_device_trace(path)
    assert found.exposed == pytest.approx({"gather": 50e-6, "reduce": 100e-6, "offload transfers": 40e-6})
    assert (found.to_device, found.to_host) == (4096, 1024)
    assert found.link_seconds == pytest.approx(50e-6)
