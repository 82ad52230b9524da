"""Check what nodes can only find out together: connections, their speed, and whether they share a folder."""

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
    """Join the process group of all nodes, with one process per node, over NCCL if there are GPUs, else gloo.

    Raises:
        RuntimeError: Not all nodes joined within a minute.
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
    """Return the reports of all ranks, with their clock skew relative to rank 0; a collective."""
    dist.barrier()  # all ranks read their clocks at the same moment
    report = replace(report, clock=time.time())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, report)
    return [replace(one, clock_skew=one.clock - gathered[0].clock) for one in gathered]


def network_report(name: str, run_dir: Path | None, token: str) -> NetworkReport:
    """Time an all-reduce and find out which nodes share the run folder; a collective with the same result on all nodes.

    Args:
        name: Name of this node.
        run_dir: Run folder; None checks no folder.
        token: Part of the names of this check's files, the same on all nodes.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    mebibytes = 256 if device.type == "cuda" else 16
    sees = _visible_nodes(name, run_dir, token) if run_dir else {}
    rate = _all_reduce_rate(torch.ones(mebibytes * 2**18, device=device))
    return NetworkReport("nccl" if device.type == "cuda" else "gloo", rate, mebibytes, sees)


def _all_reduce_rate(tensor: torch.Tensor) -> float:
    """Return the GB per second that each node sends and receives: 2 (n - 1) / n of the tensor, as in NCCL's tests."""
    dist.all_reduce(tensor)  # the first call connects
    dist.barrier()
    start = time.perf_counter()
    for _ in range(_REPEATS):
        dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / _REPEATS
    size = dist.get_world_size()
    return 2 * (size - 1) / size * tensor.numel() * tensor.element_size() / seconds / 1e9


def _visible_nodes(name: str, run_dir: Path, token: str) -> dict[str, list[str]]:
    """Return, for each node, the nodes whose files it sees in the run folder."""
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
