"""``python -m trainer.index --output MANIFEST URL...``: scans tar shards and writes their indices and the manifest.

Urls are paths or ``file:`` urls with brace expansion (``{000000..000999}.tar``) and globs. Every shard gets a sidecar
(``SHARD.index``); where one is there and the shard has not changed since (size, time, ``--require``), it is reused, so
an interrupted run goes on where it was. Under ``mpirun -n N`` the shards are split over the ranks with mpi4py.

What was rejected stands in ``MANIFEST.rejected.json`` (shard, offset, reason, key, detail). When there is anything, the
manifest is only written with ``--allow-rejected``; the exit code is 1 without it, and 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from trainer.data.errors import ShardError
from trainer.data.files import local_path, write_atomically
from trainer.data.manifest import Manifest
from trainer.data.tar_index import Rejection, ShardIndex, load_sidecar, save_sidecar, scan_shard, sidecar_path

# How many processes Open MPI, MPICH, MVAPICH and Slurm's srun say they started.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class _Entry:
    """What the manifest needs of a shard; ``index`` without its offsets stays in the sidecar."""

    path: str
    samples: int
    tar_bytes: int
    checksum: int
    rejected: tuple[Rejection, ...]
    reused: bool


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
    gather: Callable[[Any], list[list[_Entry]] | None],
) -> int:
    """One rank's part: shards rank, rank + size, ...; rank 0 lists the shards, gathers and writes."""
    paths: list[Path] | None = None
    if rank == 0:
        try:
            paths = expand(arguments.urls)
        except ValueError as error:
            print(f"trainer.index: {error}", file=sys.stderr)
    paths = broadcast(paths)
    if paths is None:
        return 2
    processes = arguments.processes or (1 if size > 1 else len(os.sched_getaffinity(0)))
    own = paths[rank::size]
    progress = _Progress(len(own), quiet=rank > 0)
    parts = gather(list(progress.follow(index_shards(own, tuple(arguments.require), processes))))
    code = 0
    if parts is not None:
        code = _finish(arguments, [parts[number % size][number // size] for number in range(len(paths))])
    return int(broadcast(code))


def expand(urls: Iterable[str]) -> list[Path]:
    """The shards that urls mean, in their order; globs sorted. Raises ValueError: a scheme, nothing found, twice."""
    paths: list[Path] = []
    for url in urls:
        for expanded in braceexpand(url):
            path = local_path(expanded)
            if not glob.has_magic(str(path)) or path.exists():
                paths.append(path)
                continue
            found = sorted(glob.glob(str(path), recursive=True))
            if not found:
                raise ValueError(f"nothing matches {url!r}")
            paths += map(Path, found)
    counts = Counter(path.absolute() for path in paths)
    if counts and counts.most_common(1)[0][1] > 1:
        raise ValueError(f"the shard {counts.most_common(1)[0][0]} is named more than once")
    return paths


def index_shards(paths: Sequence[Path], required: tuple[str, ...], processes: int) -> Iterator[_Entry]:
    """Indexes shards in parallel; the results come in the order of ``paths``."""
    work = partial(_index_shard, required=required)
    if processes <= 1 or len(paths) <= 1:
        yield from map(work, paths)
        return
    with ProcessPoolExecutor(min(processes, len(paths))) as pool:
        yield from pool.map(work, paths, chunksize=max(1, min(32, len(paths) // (4 * processes))))


def _index_shard(path: Path, required: tuple[str, ...]) -> _Entry:
    index = _unchanged_index(path, required)
    reused = index is not None
    try:
        if index is None:
            index = scan_shard(path, required)
            save_sidecar(index, sidecar_path(path))
    except (ShardError, OSError) as error:
        reason = "unreadable" if isinstance(error, ShardError) else "index_not_written"
        return _Entry(str(path), 0, 0, 0, (Rejection(reason, 0, str(error)),), reused=False)
    return _Entry(str(path), len(index.offsets), index.tar_bytes, index.checksum, index.rejected, reused)


def _unchanged_index(path: Path, required: tuple[str, ...]) -> ShardIndex | None:
    try:
        status = path.stat()
        index = load_sidecar(sidecar_path(path))
    except (OSError, ShardError):
        return None
    same = (index.tar_bytes, index.mtime_ns, index.required)
    return index if same == (status.st_size, status.st_mtime_ns, tuple(sorted(required))) else None


def _finish(arguments: argparse.Namespace, entries: Sequence[_Entry]) -> int:
    """Writes report and manifest."""
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    rejected = [{"shard": entry.path, **asdict(one)} for entry in entries for one in entry.rejected]
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
    manifest = Manifest.create(
        output,
        [_manifest_url(Path(entry.path), output.parent) for entry in used],
        [entry.samples for entry in used],
        [entry.tar_bytes for entry in used],
        [entry.checksum for entry in used],
    )
    manifest.save()
    reused = sum(entry.reused for entry in used)
    print(
        f"{output}: {len(used):,} shards ({reused:,} unchanged), {manifest.total_samples:,} samples, "
        f"{int(manifest.shard_bytes.sum()) / 1e9:.3f} GB, sha256 {manifest.sha256[:12]}"
    )
    return 0


def _manifest_url(path: Path, folder: Path) -> str:
    """Relative to the manifest where the shard was given so or lies below it: then the folder can move as a whole."""
    absolute, base = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    if not path.is_absolute() or absolute.is_relative_to(base):
        return Path(os.path.relpath(absolute, base)).as_posix()
    return absolute.as_posix()


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

    def follow(self, entries: Iterable[_Entry]) -> Iterator[_Entry]:
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
    parser.add_argument("urls", nargs="+", metavar="URL", help="tar shards: paths, file: urls, braces, globs")
    parser.add_argument("--output", type=Path, required=True, metavar="MANIFEST", help="the manifest to write (.npz)")
    parser.add_argument("--processes", type=int, help="in parallel; every core, or 1 per MPI rank")
    parser.add_argument(
        "--require", nargs="+", default=[], metavar="EXT", help="members of every sample; jpg,png is one of the two"
    )
    parser.add_argument("--allow-rejected", action="store_true", help="write the manifest without what was rejected")
    return parser


if __name__ == "__main__":
    sys.exit(main())
