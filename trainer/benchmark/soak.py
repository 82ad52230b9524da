"""``python -m trainer.benchmark soak [--steps 5000]``: measure whether a long run needs ever more of the machine.

Two ranks with two loader processes each train a tiny model on generated data, under the ``deepspeed`` launcher and on
the CPU. All files go to the folder for temporary files, which ``TMPDIR`` names. Memory, threads and file descriptors
are measured from outside, once a second.

The first fifth of the steps is warm-up. The slope over the others is the median of the slopes between all pairs of
measurements (Theil-Sen), so a copy that lives as long as a checkpoint is written does not tilt it. A row shows the
level after 1,000 more steps, in percent. ``--check`` exits with 1 where a level grows by more than its limit.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from trainer.benchmark.process_samples import ProcessSample, sample_ranks_and_workers
from trainer.benchmark.result_file import Measurement, write_result
from trainer.benchmark.soak_run import CHECKPOINT_EVERY, RUN, WORKERS, write_soak_run
from trainer.runtime.run_folder import RunFolder
from trainer.runtime.stop_signals import EXIT_STOPPED, StoppedError, handling, stop_at_once

BENCHMARK = "soak"
RANKS = 2
WARM_UP = 0.2  # share of the steps
MIN_STEPS = 50
MIN_SAMPLES, MAX_SAMPLES = 5, 1000  # that are judged; more are thinned out, because all pairs are compared
# Most percent of the level after 1,000 more steps. Memory and descriptors vary with the batches on their way to a rank.
# A descriptor that each rank loses at each checkpoint makes 102 %.
LIMITS = {"memory": 101.0, "threads": 100.1, "descriptors": 101.0}
_UNITS = {"memory": ("MiB", 2.0**20), "threads": ("", 1.0), "descriptors": ("", 1.0)}
_INTERVAL_SECONDS = 1.0


class SoakError(RuntimeError):
    """The run of a soak failed, or was too short to judge."""


@dataclass(frozen=True)
class Reading:
    """Hold the measurements after one step.

    Attributes:
        step: Steps done.
        kinds: Measurements of "ranks" and "workers".
    """

    step: int
    kinds: dict[str, ProcessSample]


def main(argv: Sequence[str]) -> int:
    """Run ``trainer.benchmark soak`` and return the exit code: 1 if the run fails or ``--check`` finds growth."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.steps < MIN_STEPS:
        parser.error(f"--steps {options.steps} is less than {MIN_STEPS}")
    try:
        with handling(stop_at_once), tempfile.TemporaryDirectory(prefix="soak-") as folder:
            readings = soak(Path(folder), options.steps)
        rows = list(growth_rows(readings, options.steps))
    except SoakError as error:
        print(f"trainer.benchmark soak: {error}", file=sys.stderr)
        return 1
    except StoppedError:
        return EXIT_STOPPED
    for row in rows:
        limit = "" if row.met is None else f"   limit {row.baseline_value:g}: {'met' if row.met else 'MISSED'}"
        print(f"{row.case:12s} {row.measure:44s} {row.value:10.5g} {row.unit:4s}{limit}")
    if options.json is not None:
        described = {
            "benchmark": BENCHMARK,
            "processes": RANKS,
            "workers": WORKERS,
            "steps": options.steps,
            "checkpoint_every": CHECKPOINT_EVERY,
        }
        write_result(options.json, "cpu", described, rows)
    return 1 if options.check and any(row.met is False for row in rows) else 0


def soak(folder: Path, steps: int) -> list[Reading]:
    """Train the run in ``folder`` to its end and return what was measured meanwhile.

    Raises:
        SoakError: The run failed.
    """
    settings = write_soak_run(folder, steps)
    log = folder / "log.txt"
    with open(log, "w") as output:
        launcher = subprocess.Popen(
            _command(settings), env=_environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            readings = list(_read_until_end(launcher, RunFolder(folder / RUN).metrics))
        finally:
            _end(launcher)
    if launcher.returncode:
        raise SoakError(f"the run ended with exit code {launcher.returncode}:\n{log.read_text()[-4000:]}")
    return readings


def growth_rows(readings: Sequence[Reading], steps: int) -> Iterator[Measurement]:
    """Yield the level and the growth of each measure after the warm-up.

    Args:
        readings: Measurements of the whole run.
        steps: Steps of the run.

    Raises:
        SoakError: Too few measurements are left after the warm-up.
    """
    judged = [reading for reading in readings if reading.step >= WARM_UP * steps]
    if len(judged) < MIN_SAMPLES:
        raise SoakError(f"{len(judged)} measurements after the warm-up are too few to judge: raise --steps")
    judged = judged[:: -(-len(judged) // MAX_SAMPLES)]
    at = np.array([reading.step for reading in judged], dtype=float)
    for kind in judged[0].kinds:
        for measure, limit in LIMITS.items():
            values = np.array([getattr(reading.kinds[kind], measure) for reading in judged], dtype=float)
            level, (unit, scale) = float(np.median(values)), _UNITS[measure]
            yield Measurement(BENCHMARK, kind, measure, unit, level / scale)
            grown = 100 * (1 + 1000 * median_slope(at, values) / level)
            name = f"{measure} after 1,000 more steps"
            yield Measurement.compared(BENCHMARK, kind, name, "%", grown, "limit", limit, 1.0)


def median_slope(x: np.ndarray, y: np.ndarray) -> float:
    """Return the median of the slopes between all pairs of points with different x, or 0 without such a pair."""
    first, second = np.triu_indices(len(x), k=1)
    run = x[second] - x[first]
    apart = run != 0
    return float(np.median((y[second] - y[first])[apart] / run[apart])) if apart.any() else 0.0


def _read_until_end(launcher: subprocess.Popen[bytes], metrics: Path) -> Iterator[Reading]:
    """Yield a reading about once a second, while all ranks and loader processes live."""
    done = position = 0
    while launcher.poll() is None:
        time.sleep(_INTERVAL_SECONDS)
        if metrics.exists():
            with open(metrics, "rb") as lines:
                lines.seek(position)
                done += (new := lines.read()).count(b"\n")
                position += len(new)
        try:
            ranks, workers = sample_ranks_and_workers(launcher.pid)
        except psutil.NoSuchProcess:
            continue
        if done and ranks.processes == RANKS and workers.processes == RANKS * WORKERS:
            yield Reading(done, {"ranks": ranks, "workers": workers})


def _command(settings: Path) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(RANKS)]
    port = str(random.randrange(20_000, 30_000))
    return [*launcher, "--master_port", port, "--module", "trainer.train", str(settings)]


def _environment() -> dict[str, str]:
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    return os.environ | own | {"PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """End the launcher and all processes below it, if they still run."""
    if launcher.poll() is None:
        family = psutil.Process(launcher.pid).children(recursive=True)
        for process in [*family, launcher]:
            process.kill()
        launcher.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.benchmark soak")
    parser.add_argument("--steps", type=int, default=5000, help="steps of the run (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the measurements to")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is exceeded")
    return parser
