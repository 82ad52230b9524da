"""Write the metrics of each step to metrics.jsonl, the console, tensorboard and wandb."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trainer.config.run_config import LoggingConfig
from trainer.errors import ConfigError, Problem
from trainer.metrics.jsonl import JsonLinesWriter
from trainer.metrics.step_metrics import StepMetrics
from trainer.metrics.throughput import Rates, Throughput, format_count, format_duration
from trainer.metrics.wandb_account import own_wandb_id, wandb_obstacle
from trainer.runtime.run_folder import RunFolder

_log = logging.getLogger(__name__)

_OF_EACH_STEP = ("kl/", "grad_norm/")  # measured at every step, and not printed


class Sink(Protocol):
    """Take the metrics of each step."""

    def write(self, metrics: StepMetrics, rates: Rates) -> None:
        """Write one step."""

    def close(self) -> None:
        """Flush and close; no write may follow."""


class MetricsWriter:
    """Pass the metrics of each step to all sinks of the run; only the main process writes.

    metrics.jsonl must hold every step. Any other sink that fails is left out with a warning, and training goes on.

    Args:
        run_folder: Folder of the run.
        logging: Sinks besides metrics.jsonl.
        total_steps: Last step of the run.
        is_main: Whether this process writes.
        resume_step: Last step that the checkpoint holds, 0 in a new run. Records of later steps are removed, so that
            metrics.jsonl holds each step once.

    Raises:
        ConfigError: The library of a requested sink is not installed.
        RecordError: metrics.jsonl cannot be written; so does ``write``.
    """

    def __init__(
        self, run_folder: RunFolder, logging: LoggingConfig, *, total_steps: int, is_main: bool, resume_step: int = 0
    ) -> None:
        self._throughput = Throughput(total_steps)
        self._record: JsonLinesSink | None = None
        self._sinks: dict[str, Sink] = {}
        if not is_main:
            return
        self._record = JsonLinesSink(run_folder, resume_step)
        self._add("the console", lambda: ConsoleSink(total_steps, logging.log_every, resume_step))
        if logging.tensorboard:
            self._add(str(run_folder.tensorboard), lambda: TensorBoardSink(run_folder, resume_step))
        if (project := logging.wandb_project) is not None:
            self._add("wandb", lambda: WandbSink(run_folder, project))

    def _add(self, place: str, build: Callable[[], Sink]) -> None:
        try:
            self._sinks[place] = build()
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001  each library has its own errors
            _warn(place, error)

    def write(self, metrics: StepMetrics) -> None:
        """Write one step."""
        rates = self._throughput.add(metrics)
        if self._record is not None:
            self._record.write(metrics, rates)
        for place, sink in list(self._sinks.items()):
            try:
                sink.write(metrics, rates)
            except Exception as error:  # noqa: BLE001  each library has its own errors
                _warn(place, error)
                del self._sinks[place]
                with suppress(Exception):
                    sink.close()

    def close(self) -> None:
        """Close all sinks; no write may follow."""
        if self._record is not None:
            self._record.close()
            self._record = None
        for place, sink in self._sinks.items():
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001  each library has its own errors
                _warn(place, error)
        self._sinks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _warn(place: str, error: Exception) -> None:
    message = "metrics go no longer to %s: %s: %s; training goes on, and metrics.jsonl holds every step"
    _log.warning(message, place, type(error).__name__, error)


class JsonLinesSink:
    """Write metrics.jsonl: one line a step, flushed at once."""

    def __init__(self, run_folder: RunFolder, resume_step: int) -> None:
        self._writer = JsonLinesWriter(run_folder.metrics, resume_step)

    def write(self, metrics: StepMetrics, rates: Rates) -> None:
        """Append the step."""
        self._writer.write([metrics.to_json()])

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def console_line(metrics: StepMetrics, rates: Rates, total_steps: int) -> str:
    """Format one step as one readable line."""
    width = len(str(total_steps))
    parts = [f"step {metrics.step:>{width}}/{total_steps}", f"loss {metrics.loss:.4f}"]
    if len(metrics.losses) > 1:
        parts[-1] += f" ({', '.join(f'{name} {value:.4f}' for name, value in metrics.losses.items())})"
    parts += [
        f"lr {metrics.lr:.2e}",
        f"grad norm {metrics.grad_norm:.3g}",
        f"{format_count(rates.tokens)} tokens/s",
        f"{format_count(rates.samples)} samples/s",
        f"data wait {rates.data_fraction:.0%}",
        f"{format_duration(rates.seconds_left)} left",
    ]
    if rates.mfu is not None:
        parts.insert(-2, f"MFU {rates.mfu:.1%}")
    if metrics.step_skipped:
        parts.append(f"SKIPPED ({metrics.skip_reason or 'gradient not finite'})")
    if metrics.replaced_samples:
        parts.append(f"{metrics.replaced_samples} samples replaced")
    return "  ".join(parts)


def scores_line(metrics: StepMetrics, total_steps: int) -> str:
    """Format what was measured after a step, such as scores of an evaluation; empty where nothing was."""
    parts = [f"{name} {value:.4f}" for name, value in metrics.measured.items() if not name.startswith(_OF_EACH_STEP)]
    return "  ".join([f"step {metrics.step:>{len(str(total_steps))}}/{total_steps}", *parts]) if parts else ""


def adapted_log_every(total_steps: int) -> int:
    """Return the steps between console lines for a run of that length: about 100 lines, but at most 100 steps."""
    return next((steps for steps in (1, 2, 5, 10, 20, 50) if total_steps <= 100 * steps), 100)


class ConsoleSink:
    """Print a line every so many steps, and on a terminal a progress bar below.

    Args:
        total_steps: Last step of the run.
        log_every: Steps between lines; None takes ``adapted_log_every``, and prints the first step of a start too.
            Skipped steps and the last step are always printed.
        resume_step: Step at which the progress bar starts.
        stream: Where to print; None takes standard error.
    """

    def __init__(
        self, total_steps: int, log_every: int | None, resume_step: int = 0, stream: TextIO | None = None
    ) -> None:
        self._total_steps = total_steps
        self._first_step = resume_step + 1 if log_every is None else None
        self._log_every = log_every or adapted_log_every(total_steps)
        self._stream = stream or sys.stderr
        self._progress: Progress | None = None
        if self._stream.isatty():
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]} left"),
            )
            self._progress = Progress(*columns, console=Console(file=self._stream))
            self._task = self._progress.add_task("training", total=total_steps, completed=resume_step, left="?")
            self._progress.start()

    def write(self, metrics: StepMetrics, rates: Rates) -> None:
        """Show the step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics.step, left=format_duration(rates.seconds_left))
        is_due = metrics.step % self._log_every == 0 or metrics.step in (self._first_step, self._total_steps)
        if is_due or metrics.step_skipped:
            self._print(console_line(metrics, rates, self._total_steps))
        if scores := scores_line(metrics, self._total_steps):
            self._print(scores)

    def close(self) -> None:
        """Remove the progress bar from the terminal."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, line: str) -> None:
        if self._progress is None:
            print(line, file=self._stream, flush=True)
        else:
            self._progress.console.print(line, markup=False, highlight=False)


def scalars(metrics: StepMetrics, rates: Rates) -> dict[str, float]:
    """Return the metrics of a step that are plotted as curves, by name."""
    numbers = {key: value for key, value in metrics.to_json().items() if isinstance(value, int | float)}
    values = {key: float(value) for key, value in numbers.items() if key != "step"}
    per_second = {"tokens": rates.tokens, "samples": rates.samples, "images": rates.images}
    return values | {f"per_second/{key}": value for key, value in per_second.items()}


class TensorBoardSink:
    """Write event files to ``tensorboard/`` of the run folder; points after ``resume_step`` are purged."""

    def __init__(self, run_folder: RunFolder, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _not_installed("logging.tensorboard", "tensorboard") from error
        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(run_folder.tensorboard), purge_step=purge)

    def write(self, metrics: StepMetrics, rates: Rates) -> None:
        """Add a point to every curve."""
        for name, value in scalars(metrics, rates).items():
            self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """Log to the Weights & Biases run of this run folder, so that a resume continues its curves.

    Without a key or a connection, wandb writes to the run folder (``wandb sync`` uploads it later): it would ask for a
    key on a terminal, and raise elsewhere.
    """

    def __init__(self, run_folder: RunFolder, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _not_installed("logging.wandb_project", "wandb") from error
        name = run_folder.path.resolve().name
        start = partial(
            wandb.init,
            project=project,
            name=name,
            id=own_wandb_id(run_folder),
            resume="allow",
            dir=str(run_folder.path),
        )
        obstacle = wandb_obstacle(os.environ)
        if obstacle is None:
            try:
                self._run = start()
                return
            except Exception as error:  # noqa: BLE001  wandb has errors of many kinds
                obstacle = f"{type(error).__name__}: {error}"
        _log.warning(
            "logging.wandb_project: wandb works offline (%s). To upload later: wandb sync %s/wandb/offline-run-*",
            obstacle,
            run_folder.path,
        )
        self._run = start(mode="offline")

    def write(self, metrics: StepMetrics, rates: Rates) -> None:
        """Log the metrics of the step."""
        self._run.log(scalars(metrics, rates), step=metrics.step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _not_installed(setting: str, package: str) -> ConfigError:
    return ConfigError([Problem(setting, f"{package} is not installed: pip install {package}, or remove this setting")])
