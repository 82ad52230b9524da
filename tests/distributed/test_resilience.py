"""What a run does by itself: two real processes, real weights gone bad, real kill -9, processes that really hang."""

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
import torch

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import (
    read_ledger,
    read_metrics,
    run_settings,
    without_measured,
    write_settings,
)
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.runtime.distributed import World

pytestmark = pytest.mark.distributed
STEPS = 14
DAMAGED = 8  # the update that damages the weights; the loss shows it from the next one on


def settings_of(assets: Path, run_dir: Path, **resilience: Any) -> dict[str, Any]:
    settings = run_settings(assets, run_dir, steps=STEPS)
    settings["optimizer"]["lr"] = 0.002
    spikes = {"window": 6, "min_steps": 4, "patience": 2, "threshold": 4.0}
    settings["resilience"] = {"spikes": spikes, **resilience}
    return settings


def as_config(settings: dict[str, Any]) -> FlamingoRunConfig:
    run_dir = Path(settings["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / f"settings-{torch.distributed.get_rank()}.yaml"
    return load_config(write_settings(path, settings), [], FlamingoRunConfig)


def train_with_damage(world: World, settings: dict[str, Any], killed_at: str = "") -> str:
    """Train; update ``DAMAGED`` is applied with a learning rate of several thousand times its own.

    killed_at: end all processes by SIGKILL after "noted" (the window is in the run folder, nothing was done yet), or at
        "passing" (an update of the window is passed over).
    """
    from trainer import loop
    from trainer.tasks.flamingo import build_flamingo_task

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    run_step, add_window, passed_over = loop._run_step, loop.add_window, loop._passed_over

    def damaging(engine: Any, update: Any, *rest: Any) -> Any:
        step = engine.step
        if update.step + 1 == DAMAGED:
            engine.step = lambda factor: step(5000 * factor)
        try:
            return run_step(engine, update, *rest)
        finally:
            engine.step = step

    def noting(*arguments: Any) -> None:
        add_window(*arguments)
        if killed_at == "noted":
            kill()

    def passing(*arguments: Any) -> Any:
        if killed_at == "passing" and arguments[0] > DAMAGED:
            kill()
        return passed_over(*arguments)

    loop._run_step, loop.add_window, loop._passed_over = damaging, noting, passing
    config = as_config(settings)
    try:
        loop.train(build_flamingo_task(config, world), config, world)
    except Exception as error:  # noqa: BLE001  the test looks at what it was
        return f"{type(error).__name__}: {error}"
    return "complete"


def train_plainly(world: World, settings: dict[str, Any]) -> None:
    """As ``trainer.train`` does, without its export."""
    from trainer import loop
    from trainer.tasks.flamingo import build_flamingo_task

    config = as_config(settings)
    loop.train(build_flamingo_task(config, world), config, world)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl less what no two runs have in common."""
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [{key: value for key, value in line.items() if key != "skip_reason"} for line in without_measured(lines)]


@pytest.fixture(scope="module")
def skipping(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that passes the window over from its beginning."""
    run_dir = tmp_path_factory.mktemp("runs") / "skipping"
    settings = settings_of(assets, run_dir, skip_steps=[[DAMAGED, DAMAGED + 2]])
    assert run_distributed(train_with_damage, 2, settings) == ["complete"] * 2
    return run_dir


@pytest.mark.parametrize("killed_at", ["", "noted", "passing"])
def test_after_a_spike_the_run_is_the_one_that_skips_its_data_from_the_beginning(
    assets: Path, skipping: Path, tmp_path: Path, killed_at: str
) -> None:
    run_dir = tmp_path / "run"
    settings = settings_of(assets, run_dir)
    if killed_at:
        with pytest.raises(AssertionError, match="died without an answer"):
            run_distributed(train_with_damage, 2, settings, killed_at)
    assert run_distributed(train_with_damage, 2, settings) == ["complete"] * 2
    assert without_times(run_dir) == without_times(skipping), "bit for bit"
    assert read_ledger(run_dir) == read_ledger(skipping)
    skipped = [line for line in read_metrics(run_dir) if line["step_skipped"]]
    assert [line["step"] for line in skipped] == [DAMAGED, DAMAGED + 1, DAMAGED + 2]
    assert all(line["skip_reason"].startswith("spike: loss") and line["loss"] is None for line in skipped)
    assert not {line["step"] for line in skipped} & {sample[0] for sample in read_ledger(run_dir)}
    assert [(event["first"], event["last"]) for event in events(run_dir, "spike")] == [(DAMAGED, DAMAGED + 2)]


def test_a_run_that_goes_back_too_often_ends(assets: Path, tmp_path: Path) -> None:
    settings = settings_of(assets, tmp_path / "run")
    settings["resilience"]["spikes"]["max_rewinds"] = 0
    for result in run_distributed(train_with_damage, 2, settings):
        assert result.startswith("TrainingDivergedError") and "resilience.spikes.max_rewinds" in result


def test_without_a_checkpoint_from_before_the_run_goes_on_with_a_warning(assets: Path, tmp_path: Path) -> None:
    settings = settings_of(assets, tmp_path / "run")
    settings["checkpoint"]["every"] = STEPS
    assert run_distributed(train_with_damage, 2, settings) == ["complete"] * 2
    assert not any(line["step_skipped"] for line in read_metrics(tmp_path / "run"))
    assert events(tmp_path / "run", "spike") and not events(tmp_path / "run", "rewind")


def hang(world: World, settings: dict[str, Any], how: str) -> None:
    """Rank 1 hangs at its fourth update: "stopped" from outside, in a "worker" of its loader, or "locked" in C."""
    from trainer import loop
    from trainer.tasks.flamingo import build_flamingo_task

    config = as_config(settings)
    task = build_flamingo_task(config, world)
    run_step = loop._run_step

    def hanging(engine: Any, update: Any, *rest: Any) -> Any:
        if world.rank == 1 and update.step == 3 and how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if world.rank == 1 and update.step == 3 and how == "locked":
            ctypes.PyDLL(None).sleep(1000)  # keeps the interpreter's lock
        return run_step(engine, update, *rest)

    if world.rank == 1 and how == "worker":
        multiprocessing.set_start_method("fork", force=True)  # as in a process that no fork server made
        builder, made = task.builders["texts"], []

        def sleep_at_the_twelfth(*arguments: Any) -> Any:
            made.append(1)
            if len(made) == 12:
                time.sleep(1000)
            return builder(*arguments)

        task.builders["texts"] = sleep_at_the_twelfth
    loop._run_step = hanging
    loop.train(task, config, world)


@pytest.mark.parametrize("how", ["stopped", "worker", "locked"])
def test_a_hanging_process_is_found_and_the_stacks_of_all_are_written(assets: Path, tmp_path: Path, how: str) -> None:
    watchdog = {"seconds": 4, "startup_seconds": 100, "grace_seconds": 2}
    settings = settings_of(assets, tmp_path / "run", watchdog=watchdog)
    settings["data"] |= {"read_deadline_seconds": 3, "num_workers": 1 if how == "worker" else 0}
    with pytest.raises(AssertionError, match=r"exit code 124"):
        run_distributed(hang, 2, settings, how)
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "stacks").rglob("rank-*.txt")}
    assert sorted(stacks) == ["rank-00000.txt", "rank-00001.txt"]
    waits, hangs = ("step_totals", "sleep_at_the_twelfth") if how == "worker" else ("forward_backward", "in hanging")
    assert "made no progress" in stacks["rank-00000.txt"] and waits in stacks["rank-00000.txt"]
    assert hangs in stacks["rank-00001.txt"]
    [event] = events(tmp_path / "run", "hung")
    assert event["what"] == ("update 6" if how == "worker" else "update 4")
    [records] = (tmp_path / "run" / "stacks").rglob("collectives-rank-00000.json")
    assert json.loads(records.read_text())["entries"], "the flight recorder is on"


def wait_for_data_on_rank_1(world: World, settings: dict[str, Any]) -> None:
    from trainer import loop

    timed = loop._timed

    def slow(loader: Any) -> Any:
        for update, seconds in timed(loader):
            time.sleep(0.3 * world.rank)
            yield update, seconds + 0.3 * world.rank

    loop._timed = slow
    train_plainly(world, settings)


def test_a_rank_that_waits_for_its_data_is_named(assets: Path, tmp_path: Path) -> None:
    stragglers = {"every": 5, "factor": 3, "least_seconds": 0.2}
    run_distributed(wait_for_data_on_rank_1, 2, settings_of(assets, tmp_path / "run", stragglers=stragglers))
    named = [event for event in events(tmp_path / "run", "straggler") if event["what"] == "data"]
    assert [(event["step"], event["rank"], event["host"]) for event in named] == [
        (step, 1, socket.gethostname()) for step in (5, 10)
    ]
    looks = events(tmp_path / "run", "rank_times")
    assert [(look["step"], look["data"]["slowest_rank"]) for look in looks] == [(5, 1), (10, 1)]
    assert all(look["data"]["most"] - look["data"]["least"] > 0.2 for look in looks)


def test_a_healthy_run_leaves_no_stacks(skipping: Path) -> None:
    assert list((skipping / "stacks").rglob("*")) == []
