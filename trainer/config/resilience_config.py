"""Define the reactions of a long run to loss spikes, hung processes and slow ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Gt

from trainer.config.types import FORBID_UNKNOWN_KEYS, NonNegative, NonNegativeFloat, Positive, PositiveFloat


@dataclass(frozen=True)
class SpikeConfig:
    """Detect loss spikes: return to a checkpoint before the spike and skip its data.

    Attributes:
        action: "rewind" returns to a checkpoint, or warns and continues if there is none before the spike; "warn" only
            warns; "off" does not look.
        threshold: A step is suspect when its loss lies this many robust standard deviations (1.4826 times the median
            absolute deviation) above the median of the last ``window`` applied steps.
        min_rise: Least rise of the loss over that median, in nats, of a suspect step. Where a loss is near 0, one wrong
            answer lies many deviations above it.
        window: Applied steps that a loss is compared with.
        min_steps: Fewest applied steps to compare with; none is suspect before.
        patience: Consecutive suspect steps that make a spike.
        grad_norm: Whether the gradient norm is judged in the same way.
        skip_before: Steps before the first suspect one that are skipped too: the data of a step shows in the loss of
            the next one.
        max_rewinds: Rewinds of a run; it fails instead of rewinding once more.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    action: Literal["rewind", "warn", "off"] = "rewind"
    threshold: PositiveFloat = 10.0
    min_rise: NonNegativeFloat = 0.1
    window: Positive = 128
    min_steps: Annotated[int, Gt(1)] = 64
    patience: Positive = 3
    grad_norm: bool = False
    skip_before: NonNegative = 1
    max_rewinds: NonNegative = 5


@dataclass(frozen=True)
class WatchdogConfig:
    """End a hung job with exit code 124, after all processes wrote their stacks to ``run_dir/stacks``.

    Attributes:
        seconds: Longest time without progress between steps, in seconds. It must exceed the longest step and
            ``data.read_deadline_seconds``. None turns the watchdog off.
        startup_seconds: The same limit for the resume, the first two steps and each checkpoint, in seconds.
        grace_seconds: Seconds that the processes wait for each other's stacks.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    seconds: PositiveFloat | None = 600.0
    startup_seconds: PositiveFloat = 1800.0
    grace_seconds: PositiveFloat = 10.0


@dataclass(frozen=True)
class StragglerConfig:
    """Report slow ranks and their hosts, in ``events.jsonl`` and as a warning.

    Each check also writes the event ``rank_times``: least, median and largest time, and the slowest rank. It compares
    the wait for data and the time of a fixed computation.

    Attributes:
        every: Steps between two checks.
        factor: A rank is slow when its time exceeds the median of all ranks by this factor.
        least_seconds: Least excess of a slow rank's wait for data over the median, in seconds per step.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    every: Positive = 100
    factor: Annotated[float, Gt(1)] = 2.0
    least_seconds: NonNegativeFloat = 0.1


@dataclass(frozen=True)
class ResilienceConfig:
    """Hold the reactions of a long run to failures. ``run_dir/events.jsonl`` records each of them.

    Attributes:
        skip_steps: Ranges of steps to skip, each as [first, last], counted from 1 as in metrics.jsonl. Their data is
            not trained on.
        spikes: Loss spikes: return to a checkpoint before the spike and skip its data.
        watchdog: Hung processes: write the stacks of all processes to ``run_dir/stacks`` and exit with code 124.
        stragglers: Slow ranks: name them and their hosts in ``events.jsonl`` and in a warning.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    skip_steps: tuple[tuple[Positive, Positive], ...] = ()
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    stragglers: StragglerConfig = field(default_factory=StragglerConfig)
