"""Read from torch profiler's trace what a GPU did in a step: exposed communication, and bytes over the host link."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from trainer.benchmark.part_clock import GATHER, REDUCE

TRANSFERS = "offload transfers"
_Spans = list[tuple[float, float]]


@dataclass(frozen=True)
class DeviceTrace:
    """Hold what a GPU did in a step.

    Attributes:
        exposed: Seconds by kind (gather, reduce, offload transfers) in which the kind ran and nothing computed. Where
            two kinds ran at once, both count.
        to_device: Bytes copied from the host.
        to_host: Bytes copied to the host.
        link_seconds: Seconds in which the host link was busy.
    """

    exposed: dict[str, float]
    to_device: float
    to_host: float
    link_seconds: float


def read_device_trace(path: Path) -> DeviceTrace:
    """Read a trace in Chrome's format with a GPU's kernels and copies, as torch profiler exports it."""
    spans: dict[str, _Spans] = defaultdict(list)
    size = {"HtoD": 0.0, "DtoH": 0.0}
    for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
        category, name = event.get("cat"), event.get("name", "")
        if category not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        kind = _kind(category, name)
        spans[kind].append((event["ts"], event["ts"] + event["dur"]))
        if kind == TRANSFERS:
            size["HtoD" if "HtoD" in name else "DtoH"] += event["args"]["bytes"]
    computing = _union(spans["computing"])
    exposed = {
        kind: (_length(_union(spans[kind] + computing)) - _length(computing)) / 1e6
        for kind in (GATHER, REDUCE, TRANSFERS)
    }
    return DeviceTrace(exposed, size["HtoD"], size["DtoH"], _length(_union(spans[TRANSFERS])) / 1e6)


def _kind(category: str, name: str) -> str:
    if "HtoD" in name or "DtoH" in name:
        return TRANSFERS
    if category == "kernel" and name.lower().startswith("nccl"):
        return GATHER if "gather" in name.lower() or "broadcast" in name.lower() else REDUCE
    return "computing"


def _union(spans: _Spans) -> _Spans:
    """Return the same times as sorted spans that do not overlap."""
    merged: _Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(spans: _Spans) -> float:
    return sum(end - start for start, end in spans)
