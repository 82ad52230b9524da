"""Train in the processes of ``run_distributed``: to the end, up to a kill, or to an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.distributed.small_run import write_settings
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.deepspeed_engine.engine import Engine
from trainer.loop import train
from trainer.observers.step_observer import StepObserver
from trainer.runtime.distributed import World
from trainer.tasks.flamingo import build_flamingo_task


class KilledError(Exception):
    """The run was left as if by a kill."""


@dataclass(frozen=True)
class KillAfter(StepObserver):
    """Leave a run after a number of steps without saving, as if it was killed."""

    steps: int

    def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
        if step > self.steps:
            raise KilledError


def as_config(settings: dict[str, Any]) -> FlamingoRunConfig:
    """Write the settings into the run folder as this rank's YAML, and load it."""
    run_dir = Path(settings["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / f"settings-{torch.distributed.get_rank()}.yaml"
    return load_config(write_settings(path, settings), [], FlamingoRunConfig)


def train_run(
    world: World, settings: dict[str, Any], stop_after: int | None = None, observers: Sequence[StepObserver] = ()
) -> None:
    """Train as ``trainer.train`` does, without its export.

    Args:
        world: This process.
        settings: Of the run.
        stop_after: Leave after this many steps without saving; None trains to the end.
        observers: Observers of the steps.
    """
    config = as_config(settings)
    task = build_flamingo_task(config, world)
    if stop_after is None:
        train(task, config, world, observers)
        return
    try:
        train(task, config, world, [*observers, KillAfter(stop_after)])
    except KilledError:
        return
    raise AssertionError(f"the run ended before step {stop_after}")


def train_error(world: World, settings: dict[str, Any], observers: Sequence[StepObserver] = ()) -> str:
    """Train; return the error's type and message, or an empty string if the run completed."""
    try:
        train_run(world, settings, observers=observers)
    except Exception as error:  # noqa: BLE001  the test judges the error
        return f"{type(error).__name__}: {error}"
    return ""
