"""Measure the order of 2 billion samples in 2 million shards: start-up, memory, and the ids of a step."""

from __future__ import annotations

import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from trainer.benchmark.data_reading import BENCHMARK
from trainer.benchmark.result_file import Measurement
from trainer.config.data_config import DataConfig, ImageTextSource
from trainer.data.shards.manifest import Manifest, load_manifest
from trainer.data.stream.order import SourceOrder, lanes_of
from trainer.data.stream.shared_arrays import SharedArrays
from trainer.data.stream.stream_state import data_state

_SHARDS, _SAMPLES_PER_SHARD = 2_000_000, 1000
_NUM_LANES = 2048
_WORKERS_PER_RANK = 2
_RANKS_OF_A_NODE = (4, 8)


def scale_rows() -> Iterator[Measurement]:
    """Yield the measurements, each made in a fresh process. Those of one rank are the better of two."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "manifest.npz"
        urls = [f"s3://bucket/some/dataset/part-{shard:07d}.tar" for shard in range(_SHARDS)]
        counts = [_SAMPLES_PER_SHARD] * _SHARDS
        Manifest.create(path, urls, counts, [25_000_000] * _SHARDS, list(range(_SHARDS)), [False] * _SHARDS).save()
        del urls, counts
        context = multiprocessing.get_context("spawn")
        found: dict[int, dict[str, float]] = {}
        for step in (0, 10**9) * 2:
            once = _in_fresh_process(context, measure_rank, path, step)
            found[step] = {name: min(value, found.get(step, once)[name]) for name, value in once.items()}
        few = Path(name) / "few.npz"
        Manifest.create(few, ["s3://bucket/0.tar"], [10 * _NUM_LANES], [1], [0], [False]).save()
        nodes = {ranks: _in_fresh_process(context, measure_node, path, ranks) for ranks in _RANKS_OF_A_NODE}
        without_data = {ranks: _in_fresh_process(context, measure_node, few, ranks) for ranks in _RANKS_OF_A_NODE}
    yield from _rank_rows(found[0], found[10**9])
    for ranks, node in nodes.items():
        yield from _node_rows(ranks, node, without_data[ranks])


def _rank_rows(start: dict[str, float], far: dict[str, float]) -> Iterator[Measurement]:
    yield _row("ready for the first batch", "s", start["ready"], 10.0)
    yield _row("memory, rank and 4 workers", "MB", start["memory"], 400.0)
    yield _row("sample ids of a step, same epoch", "s", start["ids"], 1.0)
    yield _row("sample ids of a step, other epoch", "s", start["other"], 1.0)
    yield _row("ready at step 10^9", "s", far["ready"], start["ready"], 0.8, baseline="ready at step 0")
    yield _row("saved state of a source", "B", start["state"], 1024.0)


def _node_rows(ranks: int, node: dict[str, float], without_data: dict[str, float]) -> Iterator[Measurement]:
    where = f"a node of {ranks} ranks with {_WORKERS_PER_RANK} workers each"
    yield _row(f"memory, {where}", "MB", node["memory"], 400.0)
    # The rest is what forked processes with hardly any data take for torch and Python.
    yield _row(f"memory for the data, {where}", "MB", node["memory"] - without_data["memory"], 400.0, None)
    yield _row(f"ready for the first batch, {where}", "s", node["ready"], 10.0)


def _row(
    measure: str, unit: str, value: float, limit: float, target: float | None = 1.0, baseline: str = "limit"
) -> Measurement:
    case = f"{_SHARDS * _SAMPLES_PER_SHARD:,} samples in {_SHARDS:,} shards"
    return Measurement.compared(BENCHMARK, case, measure, unit, value, baseline, limit, target)


def _in_fresh_process(context: Any, measure: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """Return what ``measure(*arguments, connection)`` sends."""
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=partial(measure, *arguments, send))
    process.start()
    found: dict[str, float] = receive.recv()
    process.join()
    return found


def measure_rank(path: Path, step: int, send: Any) -> None:
    """Measure what a rank does before its first batch, without reading, and send it as a dict.

    Args:
        path: The manifest.
        step: First step of the rank.
        send: Connection to send through.
    """
    process = psutil.Process()
    before = process.memory_full_info().pss
    start = time.process_time()
    manifest = load_manifest(path)
    data = DataConfig((ImageTextSource("pairs", path, _NUM_LANES),))
    state = len(json.dumps(data_state(data, [manifest], step)["sources"]["pairs"]))
    order = SourceOrder("pairs", manifest.samples, seed=0, num_lanes=_NUM_LANES, samples_per_step=_NUM_LANES)
    order.prepare(step)
    order.samples_of(step)
    ready = time.process_time() - start
    memory = _memory_with_workers(order, process) - before
    start = time.process_time()
    order.samples_of(step + 400_000)
    ids = time.process_time() - start
    start = time.process_time()
    order.samples_of(step + 5_000_000)
    other = time.process_time() - start
    send.send({"ready": ready, "memory": memory / 1e6, "ids": ids, "other": other, "state": state})


def _memory_with_workers(order: SourceOrder, process: psutil.Process, workers: int = 4) -> int:
    """Return the bytes of this process and its loader processes, with shared pages counted once."""
    context = multiprocessing.get_context("fork")
    ready, finish = context.Semaphore(0), context.Event()

    def work(worker: int) -> None:
        order.samples_of(worker + 1)
        ready.release()
        finish.wait()

    children = [context.Process(target=work, args=(worker,)) for worker in range(workers)]
    for child in children:
        child.start()
    for _ in children:
        ready.acquire()
    total = sum(psutil.Process(child.pid).memory_full_info().pss for child in children)
    total += process.memory_full_info().pss
    finish.set()
    for child in children:
        child.join()
    return int(total)


def measure_node(path: Path, ranks: int, send: Any) -> None:
    """Measure the start of a node without cached arrays, in a process of its own, and send it as a dict.

    "memory" is that of all ranks and their loader processes together, with shared pages counted once. "ready" is the
    seconds until all of them have their first samples.

    Args:
        path: The manifest.
        ranks: Ranks of the node.
        send: Connection to send through.
    """
    gc.disable()  # otherwise the collector of each fork copies the interpreter's heap
    context = multiprocessing.get_context("fork")
    started, ready = context.Semaphore(0), context.Semaphore(0)
    begin, finish = context.Event(), context.Event()

    def work(order: SourceOrder, lanes: range) -> None:
        order.samples_of(1, lanes)
        ready.release()
        finish.wait()

    def rank_main(rank: int, cache_dir: Path) -> None:
        started.release()
        begin.wait()
        manifest, lanes = load_manifest(path), lanes_of(rank, ranks, _NUM_LANES)
        order = SourceOrder(
            "pairs",
            manifest.samples,
            seed=0,
            num_lanes=_NUM_LANES,
            samples_per_step=_NUM_LANES,
            shared=SharedArrays(cache_dir),
        )
        order.prepare(0)
        workers = [context.Process(target=work, args=(order, lanes)) for _ in range(_WORKERS_PER_RANK)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    with tempfile.TemporaryDirectory() as name:
        processes = [context.Process(target=rank_main, args=(rank, Path(name))) for rank in range(ranks)]
        for process in processes:
            process.start()
        for _ in processes:
            started.acquire()
        before, start = _pss_of(processes), time.monotonic()
        begin.set()
        for _ in range(ranks * _WORKERS_PER_RANK):
            ready.acquire()
        seconds = time.monotonic() - start
        memory = _pss_of(processes) - before
        finish.set()
        for process in processes:
            process.join()
    send.send({"memory": memory / 1e6, "ready": seconds})


def _pss_of(processes: Sequence[Any]) -> int:
    """Return the bytes of the processes and their children; a page that n processes share counts 1/n in each."""
    known = [psutil.Process(process.pid) for process in processes]
    return sum(process.memory_full_info().pss for each in known for process in (each, *each.children(recursive=True)))
