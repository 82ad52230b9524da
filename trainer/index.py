"""Scan tar shards and write their indices and the manifest: ``python -m trainer.index --output MANIFEST URL...``.

Urls are paths, ``file:``, http(s) and fsspec urls (``s3://``, ``gs://``, ...). They may contain braces
(``{000000..000999}.tar``) and, except over http, glob patterns.

The index of a local shard goes into a sidecar beside it (``SHARD.index``; with ``--require``, ``SHARD.HASH.index``). If
the shard is remote or its folder read-only, the sidecar goes into the folder ``MANIFEST.index/``. A sidecar is reused
while the shard's size, its time or version, and ``--require`` stay the same, so an interrupted run continues where it
stopped. Under ``mpirun -n N`` and with mpi4py, the ranks share the shards.

``MANIFEST.rejected.json`` lists rejected samples and shards (shard, offset, reason, key, detail). If there are any, the
manifest is only written with ``--allow-rejected``. The exit code is 1 if no manifest was written, and 2 for wrong
arguments.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from trainer.data.errors import ShardError
from trainer.data.shards.manifest_builder import (
    ManifestEntry,
    build_manifest,
    expand_urls,
    find_copies,
    index_shard,
)
from trainer.data.shards.remote_store import RemoteStore
from trainer.data.shards.sidecar import is_sidecar
from trainer.runtime.files import write_atomically

# Variables in which Open MPI, MPICH, MVAPICH and Slurm's srun give the number of processes.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 30.0  # between two lines of progress
_SHOWN_REJECTIONS = 5
_EXTENSION = re.compile(r"[^/\\:*?\[\]{}\s]+")


class Communicator(Protocol):
    """The part of an mpi4py communicator that indexing needs."""

    @property
    def rank(self) -> int:
        """This process, counted from 0."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def bcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""

    def gather(self, value: Any) -> list[Any] | None:
        """Return the values of all ranks on rank 0, and None on the others."""


class OneProcess:
    """The communicator of a process that was started without MPI."""

    rank = 0
    size = 1

    def bcast(self, value: Any) -> Any:
        """Return the value."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return a list of the one value."""
        return [value]


def main(
    argv: Sequence[str] | None = None, *, communicator: Communicator | None = None, store: RemoteStore | None = None
) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.
        communicator: Ranks that share the work; None asks MPI if a launcher started this process.
        store: Reads remote shards; None takes the default retries.

    Returns:
        The exit code.
    """
    arguments = _parse(argv)
    logging.basicConfig(format="%(message)s")  # retries of reads
    store = store or RemoteStore()
    if communicator is not None:
        return _index(arguments, communicator, store)
    world = _mpi_world()
    if world is None:
        return _index(arguments, OneProcess(), store)
    try:
        return _index(arguments, world, store)
    except BaseException:
        traceback.print_exc()
        world.Abort(1)  # the other ranks would wait in a collective for ever
        raise


def index_shards(
    shards: Sequence[str], manifest: Path, required: Sequence[str], store: RemoteStore, processes: int
) -> Iterator[ManifestEntry]:
    """Index shards in parallel and yield their entries in order; see ``index_shard``."""
    work = partial(index_shard, manifest=manifest, required=required, store=store)
    if processes <= 1 or len(shards) <= 1:
        yield from map(work, shards)
        return
    try:
        pool = ProcessPoolExecutor(min(processes, len(shards)))
        entries = pool.map(work, shards, chunksize=max(1, min(32, len(shards) // (4 * processes))))
    except OSError as error:  # /dev/shm has no room for the pool's locks, or ulimit -u for its processes
        print(f"indexing in one process, because others cannot be started: {error}", file=sys.stderr)
        yield from map(work, shards)
        return
    with pool:
        try:
            yield from entries
        except BrokenProcessPool as error:
            raise ShardError(
                "a process that indexed shards ended, perhaps killed for memory: run the command again (it goes on "
                "where it stopped) with fewer --processes"
            ) from error


def _index(arguments: argparse.Namespace, communicator: Communicator, store: RemoteStore) -> int:
    """Index the shards rank, rank + size, ...; rank 0 expands the urls, gathers the entries and writes the manifest."""
    rank, size = communicator.rank, communicator.size
    shards: list[str] | None = None
    code = 2
    if rank == 0:
        try:
            shards = _shards(arguments, store)
        except (ValueError, ShardError, OSError) as error:
            print(f"trainer.index: {error}", file=sys.stderr)
            code = 2 if isinstance(error, ValueError) else 1
    shards = communicator.bcast(shards)
    if shards is None:
        return int(communicator.bcast(code))
    processes = arguments.processes or (1 if size > 1 else len(os.sched_getaffinity(0)))
    share = shards[rank::size]
    progress = _Progress(len(share), quiet=rank > 0)
    entries = index_shards(share, arguments.output, tuple(arguments.require), store, processes)
    try:
        found = list(progress.follow(entries))
    except ShardError as error:
        if size > 1:
            raise
        print(f"trainer.index: {error}", file=sys.stderr)
        return 1
    parts = communicator.gather(found)
    code = 0
    if parts is not None:
        try:
            code = _write_manifest(arguments, [parts[number % size][number // size] for number in range(len(shards))])
        except OSError as error:
            print(f"trainer.index: {arguments.output} cannot be written: {error}", file=sys.stderr)
            code = 1
    return int(communicator.bcast(code))


def _shards(arguments: argparse.Namespace, store: RemoteStore) -> list[str]:
    """Return the shards to index, and prepare the manifest's folder before anything is scanned.

    Raises:
        ValueError: The arguments do not fit.
        ShardError: The storage gave no listing.
        OSError: The folder cannot be made.
    """
    output: Path = arguments.output
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file in it, {output}/manifest.npz")
    shards = expand_urls(arguments.urls, store)
    written = (str(output), f"{output}.rejected.json", f"{output}.index")
    own = {one for one in shards if os.path.normpath(one) in written or is_sidecar(Path(one))}
    if own:
        print(f"passed over {len(own)} files that trainer.index wrote: {min(own)}", file=sys.stderr)
    if len(own) == len(shards):
        raise ValueError("no shards: name tar files")
    output.parent.mkdir(parents=True, exist_ok=True)
    return [one for one in shards if one not in own]


def _write_manifest(arguments: argparse.Namespace, entries: Sequence[ManifestEntry]) -> int:
    """Write the report of rejections and the manifest; return the exit code."""
    output: Path = arguments.output
    rejected = _report_rejections(output.with_name(output.name + ".rejected.json"), entries)
    used = [entry for entry in entries if entry.samples]
    if not used:
        print("no samples: no manifest written", file=sys.stderr)
        return 1
    if rejected and not arguments.allow_rejected:
        print("no manifest written: repair the shards, or accept the loss with --allow-rejected", file=sys.stderr)
        return 1
    manifest = build_manifest(output, entries, arguments.require)
    manifest.save()
    reused = sum(entry.reused for entry in used)
    beside = sum(entry.beside for entry in used)
    print(
        f"{output}: {len(used):,} shards ({reused:,} unchanged), {manifest.total_samples:,} samples, "
        f"{int(manifest.shard_bytes.sum()) / 1e9:.3f} GB, content sha256 {manifest.content_sha256[:12]}"
    )
    places = [f"{beside:,} beside their shards"] if beside else []
    places += [f"{len(used) - beside:,} in {output}.index"] if beside < len(used) else []
    print(f"indices: {', '.join(places)}")
    copies = find_copies(used)
    if copies:
        one, other = copies[0]
        print(
            f"warning: {len(copies):,} shards have the headers of another one, for instance {other} those of {one}: "
            "the samples of copies count double",
            file=sys.stderr,
        )
    return 0


def _report_rejections(report: Path, entries: Sequence[ManifestEntry]) -> int:
    """Write and print what was rejected; return how many rejections there are."""
    rejected = [{"shard": entry.url, **asdict(one)} for entry in entries for one in entry.rejected]
    if not rejected:
        report.unlink(missing_ok=True)
        return 0
    write_atomically(report, json.dumps(rejected, indent=1, ensure_ascii=True).encode())
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(one["reason"] for one in rejected).items())
    print(f"{len(rejected)} rejected ({reasons}): see {report}", file=sys.stderr)
    first_of_reason = {str(one["reason"]): one for one in reversed(rejected)}
    shown = [*first_of_reason.values(), *(one for one in rejected if one is not first_of_reason[str(one["reason"])])]
    for one in shown[: max(_SHOWN_REJECTIONS, len(first_of_reason))]:
        # Member names come from the shard: !a keeps control characters and broken UTF-8 off the terminal.
        print(f"  {one['shard']!a} at byte {one['offset']}: {one['reason']}: {one['detail']!a}", file=sys.stderr)
    return len(rejected)


def _mpi_world() -> Any | None:
    """Return MPI's world if a launcher started several processes. Otherwise mpi4py is not imported."""
    if all(os.environ.get(name, "1") == "1" for name in _MPI_SIZES):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        sizes = ", ".join(f"{name}={os.environ[name]}" for name in _MPI_SIZES if name in os.environ)
        raise SystemExit(
            f"trainer.index: an MPI launcher started this process ({sizes}), but mpi4py does not work: {error}\n"
            "Install it (pip install flamingo-trainer[mpi], and an MPI), or start one process without the launcher."
        ) from error
    return MPI.COMM_WORLD if MPI.COMM_WORLD.size > 1 else None


class _Progress:
    """Print progress: one line that is rewritten on a terminal, a new line now and then elsewhere."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet = total, quiet
        self._terminal = sys.stderr.isatty()
        self._seconds = _TERMINAL_SECONDS if self._terminal else _LOG_SECONDS

    def follow(self, entries: Iterable[ManifestEntry]) -> Iterator[ManifestEntry]:
        """Yield the entries and print how many there were."""
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


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; ``--require`` takes extensions up to the first argument that is none."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    given = arguments.require
    count = next((n for n, one in enumerate(given) if not _is_extension(one)), len(given))
    arguments.require = [one.lower().lstrip(".") for one in given[:count]]
    arguments.urls = [*given[count:], *arguments.urls]
    if not arguments.urls:
        parser.error("no shards: name tar files, urls or patterns")
    return arguments


def _is_extension(text: str) -> bool:
    return _EXTENSION.fullmatch(text) is not None and not text.lower().endswith(".tar")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("urls", nargs="*", metavar="URL", help="tar shards: paths, urls, braces or glob patterns")
    parser.add_argument("--output", type=Path, required=True, metavar="MANIFEST", help="manifest to write (.npz)")
    parser.add_argument(
        "--processes", type=_positive, metavar="N", help="parallel processes (default: one per core; one per MPI rank)"
    )
    parser.add_argument(
        "--require",
        nargs="+",
        action="extend",
        default=[],
        metavar="EXT",
        help="members that every sample must have; jpg,png accepts either (default: none)",
    )
    parser.add_argument(
        "--allow-rejected", action="store_true", help="write the manifest without the rejected samples and shards"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


if __name__ == "__main__":
    sys.exit(main())
