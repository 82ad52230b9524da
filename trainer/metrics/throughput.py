"""How fast training goes, smoothed, and how long it will still take."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from trainer.metrics.step_metrics import StepMetrics


@dataclass(frozen=True)
class Rates:
    """Per second, over the last steps, all ranks together. data_fraction: share of the time spent waiting for data.

    seconds_left: to the last step at this speed. mfu: 0 to 1, None where it is not known.
    """

    tokens: float
    samples: float
    images: float
    data_fraction: float
    seconds_left: float
    mfu: float | None = None


class Throughput:
    """Rates over a window of steps.

    The first step after a start is left out as soon as there is another: it pays for compilation and allocation.

    total_steps: where the run ends. window: steps the rates are taken over.
    """

    def __init__(self, total_steps: int, window: int = 50) -> None:
        self._total_steps = total_steps
        self._steps: deque[StepMetrics] = deque(maxlen=window)
        self._first_is_warmup = True

    def update(self, metrics: StepMetrics) -> Rates:
        """The rates with one more step."""
        if self._first_is_warmup and len(self._steps) == 1:
            self._steps.clear()
            self._first_is_warmup = False
        self._steps.append(metrics)
        seconds = max(sum(step.step_seconds for step in self._steps), 1e-9)
        return Rates(
            tokens=sum(step.tokens for step in self._steps) / seconds,
            samples=sum(sum(step.samples.values()) for step in self._steps) / seconds,
            images=sum(step.images for step in self._steps) / seconds,
            data_fraction=sum(step.data_seconds for step in self._steps) / seconds,
            seconds_left=seconds / len(self._steps) * max(0, self._total_steps - metrics.step),
            mfu=self._mfu(),
        )

    def _mfu(self) -> float | None:
        """Of the updates that were trained on, each by its duration."""
        known = [(step.speed.mfu, step.step_seconds) for step in self._steps if step.speed and step.speed.mfu]
        return sum(mfu * seconds for mfu, seconds in known) / sum(seconds for _, seconds in known) if known else None


def format_duration(seconds: float) -> str:
    """ "4s", "3m 20s", "2h 05m", "3d 04h": two units at most."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    if hours:
        return f"{hours}h {minute:02d}m"
    return f"{minutes}m {second:02d}s" if minutes else f"{second}s"


def format_count(value: float) -> str:
    """ "950", "12.3k", "4.56M": three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
