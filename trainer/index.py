"""``python -m trainer.index --output MANIFEST URL...``: scans tar shards and writes their indices and the manifest.

Urls are paths, ``file:``, http(s) and fsspec urls (``s3://``, ``gs://``, ...) with brace expansion
(``{000000..000999}.tar``), and with patterns where there are listings (not over http). A local shard gets a sidecar
(``SHARD.index``), a remote one or one in a folder that cannot be written a file in ``MANIFEST.index/``. What is there
and has not changed since (size, time or version, ``--require``) is reused, so an interrupted run goes on where it was.
Under ``mpirun -n N`` the shards are split over the ranks with mpi4py.

What was rejected stands in ``MANIFEST.rejected.json`` (shard, offset, reason, key, detail). When there is anything, the
manifest is only written with ``--allow-rejected``; the exit code is 1 without it, and 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from trainer.data.errors import ShardError
from trainer.data.shards.remote import RemoteStore
from trainer.data.shards.shard_scan import IndexEntry, build_manifest, expand, index_shard
from trainer.runtime.files import write_atomically

# How many processes Open MPI, MPICH, MVAPICH and Slurm's srun say they started.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_PROGRESS_SECONDS = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    communicator = _mpi_communicator()
    if communicator is None:
        return _run(arguments, 0, 1, lambda value: value, lambda value: [value])
    try:
        return _run(arguments, communicator.rank, communicator.size, communicator.bcast, communicator.gather)
    except BaseException:
        traceback.print_exc()
        communicator.Abort(1)  # the other ranks wait in a collective and would never end
        raise


def _run(
    arguments: argparse.Namespace,
    rank: int,
    size: int,
    broadcast: Callable[[Any], Any],
    gather: Callable[[Any], list[list[IndexEntry]] | None],
) -> int:
    """One rank's part: shards rank, rank + size, ...; rank 0 lists the shards, gathers and writes."""
    store = RemoteStore()
    shards: list[str] | None = None
    code = 2
    if rank == 0:
        try:
            shards = expand(arguments.urls, store)
        except (ValueError, ShardError) as error:
            print(f"trainer.index: {error}", file=sys.stderr)
            code = 2 if isinstance(error, ValueError) else 1
    shards = broadcast(shards)
    if shards is None:
        return int(broadcast(code))
    processes = arguments.processes or (1 if size > 1 else len(os.sched_getaffinity(0)))
    own = shards[rank::size]
    progress = _Progress(len(own), quiet=rank > 0)
    entries = index_shards(own, arguments.output, tuple(arguments.require), store, processes)
    parts = gather(list(progress.follow(entries)))
    code = 0
    if parts is not None:
        code = _finish(arguments, [parts[number % size][number // size] for number in range(len(shards))])
    return int(broadcast(code))


def index_shards(
    shards: Sequence[str], manifest: Path, required: Sequence[str], store: RemoteStore, processes: int
) -> Iterator[IndexEntry]:
    """Indexes shards in parallel; the results come in the order of ``shards``."""
    work = partial(index_shard, manifest=manifest, required=required, store=store)
    if processes <= 1 or len(shards) <= 1:
        yield from map(work, shards)
        return
    with ProcessPoolExecutor(min(processes, len(shards))) as pool:
        yield from pool.map(work, shards, chunksize=max(1, min(32, len(shards) // (4 * processes))))


def _finish(arguments: argparse.Namespace, entries: Sequence[IndexEntry]) -> int:
    """Writes report and manifest."""
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    rejected = [{"shard": entry.url, **asdict(one)} for entry in entries for one in entry.rejected]
    report = output.with_name(output.name + ".rejected.json")
    if rejected:
        write_atomically(report, json.dumps(rejected, indent=1, ensure_ascii=True).encode())
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(one["reason"] for one in rejected).items())
        print(f"{len(rejected)} rejected ({reasons}): see {report}", file=sys.stderr)
        for one in rejected[:5]:
            # Member names come from the shard: !a keeps control characters and broken utf-8 off the terminal.
            print(f"  {one['shard']!a} at byte {one['offset']}: {one['reason']}: {one['detail']!a}", file=sys.stderr)
    else:
        report.unlink(missing_ok=True)
    used = [entry for entry in entries if entry.samples]
    if not used:
        print("no samples: no manifest written", file=sys.stderr)
        return 1
    if rejected and not arguments.allow_rejected:
        print("no manifest written: mend the shards, or accept the loss with --allow-rejected", file=sys.stderr)
        return 1
    manifest = build_manifest(output, entries)
    manifest.save()
    reused = sum(entry.reused for entry in used)
    print(
        f"{output}: {len(used):,} shards ({reused:,} unchanged), {manifest.total_samples:,} samples, "
        f"{int(manifest.shard_bytes.sum()) / 1e9:.3f} GB, sha256 {manifest.sha256[:12]}"
    )
    return 0


def _mpi_communicator() -> Any | None:
    """MPI's world when a launcher started several processes; otherwise mpi4py is not even imported."""
    if all(os.environ.get(name, "1") == "1" for name in _MPI_SIZES):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        sizes = ", ".join(f"{name}={os.environ[name]}" for name in _MPI_SIZES if name in os.environ)
        raise SystemExit(
            f"trainer.index: an MPI launcher started this ({sizes}), but mpi4py does not work: {error}\n"
            "Install it (pip install flamingo-trainer[mpi], and an MPI), or start one process without the launcher."
        ) from error
    return MPI.COMM_WORLD if MPI.COMM_WORLD.size > 1 else None


class _Progress:
    """One line that is rewritten on a terminal, and printed now and then elsewhere."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet = total, quiet
        self._terminal = sys.stderr.isatty()
        self._seconds = _PROGRESS_SECONDS if self._terminal else 30.0

    def follow(self, entries: Iterable[IndexEntry]) -> Iterator[IndexEntry]:
        """Passes entries on."""
        start = last = time.monotonic()
        samples = rejected = 0
        for done, entry in enumerate(entries, 1):
            samples, rejected = samples + entry.samples, rejected + len(entry.rejected)
            now = time.monotonic()
            if not self._quiet and (now - last > self._seconds or (self._terminal and done == self._total)):
                last = now
                left = (now - start) / done * (self._total - done)
                text = f"{done:,}/{self._total:,} shards, {samples:,} samples, {rejected:,} rejected, {left:.0f} s left"
                end = "\r" if self._terminal and done < self._total else "\n"
                print(text, end=end, file=sys.stderr, flush=True)
            yield entry


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.index", description=__doc__.split("\n")[0])
    parser.add_argument("urls", nargs="+", metavar="URL", help="tar shards: paths and urls, braces, patterns")
    parser.add_argument("--output", type=Path, required=True, metavar="MANIFEST", help="the manifest to write (.npz)")
    parser.add_argument("--processes", type=int, help="in parallel; every core, or 1 per MPI rank")
    parser.add_argument(
        "--require", nargs="+", default=[], metavar="EXT", help="members of every sample; jpg,png is one of the two"
    )
    parser.add_argument("--allow-rejected", action="store_true", help="write the manifest without what was rejected")
    return parser


if __name__ == "__main__":
    sys.exit(main())
