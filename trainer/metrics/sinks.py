"""Where an update's numbers go: metrics.jsonl always; the console, tensorboard and wandb as the run chooses."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trainer.config.run_config import LoggingConfig
from trainer.errors import ConfigError, Problem
from trainer.metrics.jsonl import JsonLinesWriter
from trainer.metrics.step_metrics import StepMetrics
from trainer.metrics.throughput import Rates, Throughput, format_count, format_duration


class Sink(Protocol):
    """Something that takes each update's numbers."""

    def write(self, metrics: StepMetrics, rates: Rates) -> None:
        """Take one update."""

    def close(self) -> None:
        """Flush and close."""


class MetricsWriter:
    """Hands each update to all sinks of a run. On other ranks than the main one it does nothing.

    resume_step: the last step that the checkpoint holds, 0 in a new run; what was written of later steps is dropped, so
        that each step stands in metrics.jsonl once.

    Raises: ConfigError when a sink that the run asks for is not installed.
    """

    def __init__(
        self, run_dir: Path, logging: LoggingConfig, total_steps: int, is_main: bool, resume_step: int = 0
    ) -> None:
        self._throughput = Throughput(total_steps)
        self._sinks: list[Sink] = []
        if not is_main:
            return
        self._sinks.append(JsonLinesSink(run_dir, resume_step))
        self._sinks.append(ConsoleSink(total_steps, logging.log_every, resume_step))
        if logging.tensorboard:
            self._sinks.append(TensorBoardSink(run_dir, resume_step))
        if logging.wandb_project is not None:
            self._sinks.append(WandbSink(run_dir, logging.wandb_project))

    def write(self, metrics: StepMetrics) -> None:
        """Record one update."""
        rates = self._throughput.update(metrics)
        for sink in self._sinks:
            sink.write(metrics, rates)

    def close(self) -> None:
        """Close all sinks; nothing may be written after."""
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class JsonLinesSink:
    """``metrics.jsonl``, one flushed line a step."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self._writer = JsonLinesWriter(run_dir / "metrics.jsonl", resume_step)

    def write(self, metrics: StepMetrics, rates: Rates) -> None:
        """Append the update."""
        self._writer.write([metrics.to_json()])

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def console_line(metrics: StepMetrics, rates: Rates, total_steps: int) -> str:
    """One update in one readable line."""
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
        parts.append(f"{metrics.replaced_samples} bad samples replaced")
    return "  ".join(parts)


class ConsoleSink:
    """A line every so many steps, and on a terminal a progress bar below.

    every: steps between lines; skipped updates and the last one always get theirs.
    """

    def __init__(self, total_steps: int, every: int, resume_step: int = 0, stream: TextIO | None = None) -> None:
        self._total_steps, self._every = total_steps, every
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
        """Show the update."""
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics.step, left=format_duration(rates.seconds_left))
        if metrics.step % self._every == 0 or metrics.step == self._total_steps or metrics.step_skipped:
            self._print(console_line(metrics, rates, self._total_steps))

    def close(self) -> None:
        """Take the progress bar off the terminal."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, line: str) -> None:
        if self._progress is None:
            print(line, file=self._stream, flush=True)
        else:
            self._progress.console.print(line, markup=False, highlight=False)


def scalars(metrics: StepMetrics, rates: Rates) -> dict[str, float]:
    """The numbers of an update that are worth a curve."""
    numbers = {key: value for key, value in metrics.to_json().items() if isinstance(value, int | float)}
    values = {key: float(value) for key, value in numbers.items() if key != "step"}
    speed = {"tokens": rates.tokens, "samples": rates.samples, "images": rates.images}
    return values | {f"per_second/{key}": value for key, value in speed.items()}


class TensorBoardSink:
    """Event files in ``run_dir/tensorboard``; curves of steps after ``resume_step`` are purged."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _not_installed("logging.tensorboard", "tensorboard") from error
        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, metrics: StepMetrics, rates: Rates) -> None:
        """Add a point to every curve."""
        for name, value in scalars(metrics, rates).items():
            self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run named after the run folder, which is also its id: a resumed run continues its curves."""

    def __init__(self, run_dir: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _not_installed("logging.wandb_project", "wandb") from error
        name = run_dir.resolve().name
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", dir=str(run_dir))

    def write(self, metrics: StepMetrics, rates: Rates) -> None:
        """Log the update's numbers."""
        self._run.log(scalars(metrics, rates), step=metrics.step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _not_installed(setting: str, package: str) -> ConfigError:
    return ConfigError([Problem(setting, f"{package} is not installed: pip install {package}, or leave this out")])
