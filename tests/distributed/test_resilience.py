"""A run of two processes recovers by itself from damaged weights, kill -9, and processes that hang or are slow."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import read_events, read_ledger, read_metrics, run_settings, without_measured
from tests.distributed.train_in_process import as_config, train_error
from trainer.deepspeed_engine.engine import Engine
from trainer.loop import train
from trainer.observers.step_observer import StepObserver
from trainer.resilience.skipped_windows import SkippedWindow
from trainer.runtime.distributed import World
from trainer.tasks.flamingo import build_flamingo_task

pytestmark = pytest.mark.distributed
STEPS = 14
DAMAGED = 8  # the step that damages the weights; the loss rises from the next one on


def settings_of(assets: Path, run_dir: Path, **resilience: Any) -> dict[str, Any]:
    settings = run_settings(assets, run_dir, steps=STEPS)
    settings["optimizer"]["lr"] = 0.002
    spikes = {"window": 6, "min_steps": 4, "patience": 2, "threshold": 4.0}
    settings["resilience"] = {"spikes": spikes, **resilience}
    return settings


def train_with_damage(world: World, settings: dict[str, Any], killed_at: str = "") -> str:
    """Train; apply step ``DAMAGED`` with 5000 times its learning rate. Return the error, or an empty string.

    Args:
        world: This process.
        settings: Of the run.
        killed_at: "noted" kills all processes once the window to skip is in the run folder; "skipping" kills them
            before they skip the second step of the window; an empty string kills nobody.
    """

    class Damage(StepObserver):
        def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
            if killed_at == "skipping" and skip_reason is not None and step > DAMAGED:
                os.kill(os.getpid(), signal.SIGKILL)
            multiplier = 5000 if step == DAMAGED else 1
            engine.step = lambda factor: Engine.step(engine, multiplier * factor)

        def rewind(self, window: SkippedWindow) -> None:
            if killed_at == "noted":
                os.kill(os.getpid(), signal.SIGKILL)

    return train_error(world, settings, [Damage()])


def comparable_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without the fields that differ between two equal runs."""
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [{key: value for key, value in line.items() if key != "skip_reason"} for line in without_measured(lines)]


@pytest.fixture(scope="module")
def skipping(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose settings skip the window of the spike."""
    run_dir = tmp_path_factory.mktemp("runs") / "skipping"
    settings = settings_of(assets, run_dir, skip_steps=[[DAMAGED, DAMAGED + 2]])
    assert run_distributed(train_with_damage, 2, settings) == ["", ""]
    return run_dir


@pytest.mark.parametrize("killed_at", ["", pytest.param("noted", marks=pytest.mark.long), "skipping"])
def test_a_run_after_a_spike_equals_one_that_skips_those_steps_from_the_beginning(
    assets: Path, skipping: Path, tmp_path: Path, killed_at: str
) -> None:
    run_dir = tmp_path / "run"
    settings = settings_of(assets, run_dir)
    if killed_at:
        with pytest.raises(AssertionError, match=r"rank \d died"):
            run_distributed(train_with_damage, 2, settings, killed_at)
    assert run_distributed(train_with_damage, 2, settings) == ["", ""]
    assert comparable_metrics(run_dir) == comparable_metrics(skipping), "bit for bit"
    assert read_ledger(run_dir) == read_ledger(skipping)
    skipped = [line for line in read_metrics(run_dir) if line["step_skipped"]]
    assert [line["step"] for line in skipped] == [DAMAGED, DAMAGED + 1, DAMAGED + 2]
    assert all(line["skip_reason"].startswith("spike: loss") and line["loss"] is None for line in skipped)
    assert not {line["step"] for line in skipped} & {sample[0] for sample in read_ledger(run_dir)}
    assert [(event["first"], event["last"]) for event in read_events(run_dir, "spike")] == [(DAMAGED, DAMAGED + 2)]


def test_a_run_that_rewinds_too_often_ends(assets: Path, tmp_path: Path) -> None:
    settings = settings_of(assets, tmp_path / "run")
    settings["resilience"]["spikes"]["max_rewinds"] = 0
    for result in run_distributed(train_with_damage, 2, settings):
        assert result.startswith("TrainingDivergedError") and "resilience.spikes.max_rewinds" in result


def test_a_spike_with_no_checkpoint_before_it_does_not_rewind_the_run(assets: Path, tmp_path: Path) -> None:
    settings = settings_of(assets, tmp_path / "run")
    settings["checkpoint"]["every"] = STEPS
    assert run_distributed(train_with_damage, 2, settings) == ["", ""]
    assert not any(line["step_skipped"] for line in read_metrics(tmp_path / "run"))
    assert read_events(tmp_path / "run", "spike") and not read_events(tmp_path / "run", "rewind")


def hang(world: World, settings: dict[str, Any], how: str) -> None:
    """Let rank 1 hang at its fourth step: "stopped" from outside, in a "worker" of its loader, or "locked" in C."""
    config = as_config(settings)
    task = build_flamingo_task(config, world)

    def hang_here(*arguments: Any, **more: Any) -> Any:
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the interpreter's lock

    class Hang(StepObserver):
        def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
            if world.rank == 1 and step == 4 and how != "worker":
                engine.forward_backward = hang_here

    if world.rank == 1 and how == "worker":
        # These ranks inherit the fork server's start method; under the launcher, loader workers are forked.
        multiprocessing.set_start_method("fork", force=True)
        builder, built = task.builders["texts"], []

        def sleep_at_the_twelfth(*arguments: Any) -> Any:
            built.append(1)
            if len(built) == 12:
                time.sleep(1000)
            return builder(*arguments)

        task.builders["texts"] = sleep_at_the_twelfth
    train(task, config, world, [Hang()])


@pytest.mark.parametrize("how", [pytest.param("stopped", marks=pytest.mark.long), "worker", "locked"])
def test_the_watchdog_ends_a_hanging_run_and_writes_the_stacks_of_all_ranks(
    assets: Path, tmp_path: Path, how: str
) -> None:
    watchdog = {"seconds": 4, "startup_seconds": 100, "grace_seconds": 2}
    settings = settings_of(assets, tmp_path / "run", watchdog=watchdog)
    settings["data"] |= {"read_deadline_seconds": 3, "num_workers": 1 if how == "worker" else 0}
    with pytest.raises(AssertionError, match=r"exit code 124"):
        run_distributed(hang, 2, settings, how)
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "stacks").rglob("rank-*.txt")}
    assert sorted(stacks) == ["rank-00000.txt", "rank-00001.txt"]
    waits, hangs = ("step_totals", "sleep_at_the_twelfth") if how == "worker" else ("forward_backward", "in hang_here")
    assert waits in stacks["rank-00000.txt"]
    assert hangs in stacks["rank-00001.txt"]
    [event] = read_events(tmp_path / "run", "hung")
    assert event["activity"] == ("step 6" if how == "worker" else "step 4")
    [records] = (tmp_path / "run" / "stacks").rglob("collectives-rank-00000.json")
    assert json.loads(records.read_text())["entries"], "the flight recorder must be on"


def wait_for_data_on_rank_1(world: World, settings: dict[str, Any]) -> None:
    """Train; let rank 1 wait 0.3 s for the data of each step."""
    config = as_config(settings)
    task = build_flamingo_task(config, world)
    builder, rows = task.builders["texts"], config.data.sources[2].batch_size // world.size

    def build_slowly(*arguments: Any) -> Any:
        time.sleep(0.3 / rows * world.rank)
        return builder(*arguments)

    task.builders["texts"] = build_slowly
    train(task, config, world)


def test_a_rank_that_waits_for_its_data_is_reported(assets: Path, tmp_path: Path) -> None:
    stragglers = {"every": 5, "factor": 3, "least_seconds": 0.2}
    run_distributed(wait_for_data_on_rank_1, 2, settings_of(assets, tmp_path / "run", stragglers=stragglers))
    reported = [event for event in read_events(tmp_path / "run", "straggler") if event["cause"] == "data"]
    assert [(event["step"], event["rank"], event["host"]) for event in reported] == [
        (step, 1, socket.gethostname()) for step in (5, 10)
    ]
    reports = read_events(tmp_path / "run", "rank_times")
    assert [(report["step"], report["data"]["slowest_rank"]) for report in reports] == [(5, 1), (10, 1)]
    assert all(report["data"]["max"] - report["data"]["min"] > 0.2 for report in reports)


def test_a_healthy_run_leaves_no_stacks(skipping: Path) -> None:
    assert list((skipping / "stacks").rglob("*")) == []
