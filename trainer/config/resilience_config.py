"""Settings of what a long run does about spikes of the loss, processes that hang, and slow ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Gt

from trainer.config.types import FORBID_UNKNOWN_KEYS, NonNegative, NonNegativeFloat, Positive, PositiveFloat


@dataclass(frozen=True)
class SpikeConfig:
    """A loss far above what it was: the run goes back to a checkpoint from before, and passes these data over.

    action: "rewind", or only "warn", or "off". Without a checkpoint from before the spike, "rewind" warns and goes on.
    threshold: an update is suspect when its loss is that many robust standard deviations (1.4826 x the median absolute
        deviation) above the median of the last ``window`` applied updates.
    min_steps: the fewest applied updates that are judged by.
    patience: suspect updates one after another that make a spike.
    grad_norm: judge the gradient's norm as well as the loss.
    skip_before: updates before the first suspect one that are passed over too; a bad update shows in the next one's
        loss.
    max_rewinds: a run that would go back more often ends with an error.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    action: Literal["rewind", "warn", "off"] = "rewind"
    threshold: PositiveFloat = 10.0
    window: Positive = 128
    min_steps: Annotated[int, Gt(1)] = 64
    patience: Positive = 3
    grad_norm: bool = False
    skip_before: NonNegative = 1
    max_rewinds: NonNegative = 5


@dataclass(frozen=True)
class WatchdogConfig:
    """A process that hangs: stacks of all processes go to ``run_dir/stacks``, and the job ends with exit code 124.

    seconds: without progress, between updates; longer than the longest update and than ``data.read_deadline_seconds``.
        None watches nothing.
    startup_seconds: the same for the resume, the first two updates, and each checkpoint.
    grace_seconds: how long the processes wait for one another to write their stacks.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    seconds: PositiveFloat | None = 600.0
    startup_seconds: PositiveFloat = 1800.0
    grace_seconds: PositiveFloat = 10.0


@dataclass(frozen=True)
class StragglerConfig:
    """Ranks that hold up the others, named with their hosts in events.jsonl and in a warning.

    At every look events.jsonl also gets ``rank_times``: the least, median and most of all ranks, and who is slowest.

    every: updates between two looks. factor: how many times the median a rank's own time has to be; looked at are its
        waiting for data (also at least ``least_seconds`` an update above the median) and a fixed piece of arithmetic.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    every: Positive = 100
    factor: Annotated[float, Gt(1)] = 2.0
    least_seconds: NonNegativeFloat = 0.1


@dataclass(frozen=True)
class ResilienceConfig:
    """What a long run does by itself; everything it did stands in ``run_dir/events.jsonl``.

    skip_steps: updates that are passed over, each as [first, last] counted from 1 as in metrics.jsonl: their data are
        not trained on, and they change nothing.
    """

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    skip_steps: tuple[tuple[Positive, Positive], ...] = ()
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    stragglers: StragglerConfig = field(default_factory=StragglerConfig)
