"""What nodes can only find out together: whether they reach each other, how fast, and whether they share a folder."""

from __future__ import annotations

import datetime
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.resilience.node_checks import NetworkReport, NodeReport
from trainer.runtime.network import choose_interface

_REPEATS = 4
_TIMEOUT_SECONDS = 60


def join(rank: int, size: int, master_address: str, port: int) -> None:
    """Join the other nodes' processes, one a node: over NCCL where there are GPUs, else gloo.

    Raises: RuntimeError of torch when they do not come within a minute.
    """
    choose_interface(master_address)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://{master_address}:{port}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=_TIMEOUT_SECONDS),
    )


def gather_reports(report: NodeReport) -> list[NodeReport]:
    """Everyone's report by rank, with clocks compared to rank 0's. A collective."""
    dist.barrier()  # now is the same moment for all
    report = replace(report, clock=time.time())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, report)
    return [replace(one, clock_skew=one.clock - gathered[0].clock) for one in gathered]


def network_report(name: str, run_dir: Path | None, token: str) -> NetworkReport:
    """Time an all-reduce and look for each other's files. A collective; all nodes get the same report.

    token: what this check's files are called by, the same on all nodes.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    mebibytes = 256 if device.type == "cuda" else 16
    sees = _who_shares(name, run_dir, token) if run_dir else {}
    rate = _all_reduce_rate(torch.ones(mebibytes * 2**18, device=device))
    return NetworkReport("nccl" if device.type == "cuda" else "gloo", rate, mebibytes, sees)


def _all_reduce_rate(tensor: torch.Tensor) -> float:
    """GB that each node sends and receives in a second: 2 (n - 1) / n of the tensor, as NCCL's tests count it."""
    dist.all_reduce(tensor)  # the first one connects
    dist.barrier()
    start = time.perf_counter()
    for _ in range(_REPEATS):
        dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / _REPEATS
    size = dist.get_world_size()
    return 2 * (size - 1) / size * tensor.numel() * tensor.element_size() / seconds / 1e9


def _who_shares(name: str, run_dir: Path, token: str) -> dict[str, list[str]]:
    """For each node, of which nodes it sees the files in its run folder."""
    own = run_dir / f".preflight-{token}-{name}"
    own.touch()
    try:
        dist.barrier()
        prefix = f".preflight-{token}-"
        seen = sorted(path.name.removeprefix(prefix) for path in run_dir.glob(f"{prefix}*"))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (name, seen))
    finally:
        own.unlink()
    return dict(gathered)
