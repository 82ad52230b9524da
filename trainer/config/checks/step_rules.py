"""Check settings that count or name steps: schedule, checkpoints, profiler, spikes and watchdog."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.run_config import RunConfig
from trainer.errors import Problem


def length_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of ``schedule`` and ``checkpoint``."""
    steps, warmup = config.training.steps, config.schedule.warmup_steps
    if warmup > steps:
        message = f"{warmup} is more than training.steps {steps}: the run would end during the warm-up"
        yield Problem("schedule.warmup_steps", message, related=("training.steps",))
    if config.schedule.decay == "exponential" and config.schedule.final_lr_ratio == 0:
        message = "an exponential never reaches 0; set it above 0 (the paper's fine-tuning: 0.1)"
        yield Problem("schedule.final_lr_ratio", message, related=("schedule.decay",))
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if keep_every is not None and keep_every % every:
        yield Problem("checkpoint.keep_every", f"{keep_every} is not a multiple of checkpoint.every {every}")


def profiler_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of ``logging.profile_steps``."""
    if config.logging.profile_steps is not None:
        first, last = config.logging.profile_steps
        if first > last:
            yield Problem("logging.profile_steps", f"goes from {first} to {last}; write [first, last]")


def resilience_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of ``resilience``."""
    spikes = config.resilience.spikes
    if spikes.min_steps > spikes.window:
        message = f"{spikes.min_steps} is more than spikes.window {spikes.window}, so no step would ever be judged"
        yield Problem("resilience.spikes.min_steps", message, related=("resilience.spikes.window",))
    watchdog, deadline = config.resilience.watchdog, config.data.read_deadline_seconds
    if watchdog.seconds is not None and watchdog.seconds <= deadline:
        message = (
            f"{watchdog.seconds:g} must be more than data.read_deadline_seconds {deadline:g}: a read may take that long"
        )
        yield Problem("resilience.watchdog.seconds", message, related=("data.read_deadline_seconds",))
    if watchdog.seconds is not None and watchdog.seconds > watchdog.startup_seconds:
        message = f"{watchdog.startup_seconds:g} must not be less than watchdog.seconds {watchdog.seconds:g}"
        yield Problem("resilience.watchdog.startup_seconds", message, related=("resilience.watchdog.seconds",))
    for index, (first, last) in enumerate(config.resilience.skip_steps):
        if first > last:
            message = f"goes from {first} to {last}; write the smaller number first"
            yield Problem(f"resilience.skip_steps.{index}", message)
