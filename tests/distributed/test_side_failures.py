"""Two ranks: a record that one of them cannot write ends both with its path; other failures beside training do not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, read_events, read_ledger, run_settings
from tests.distributed.train_in_process import train_error, train_run
from trainer.checkpoint.catalog import complete_steps
from trainer.deepspeed_engine.engine import Engine
from trainer.observers.step_observer import StepObserver
from trainer.runtime.distributed import World

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def undisturbed(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    run_distributed(train_run, 2, run_settings(assets, run_dir, steps=8))
    return run_dir


def train_until_full(world: World, settings: dict[str, Any], rank: int, name: str) -> str:
    """Train; from step 5 on, let a record of one rank meet a full disk."""

    class Fill(StepObserver):
        def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
            if world.rank == rank and step == 5:
                path = Path(settings["run_dir"]) / name
                [descriptor] = [entry for entry in Path("/proc/self/fd").iterdir() if entry.resolve() == path]
                os.dup2(os.open("/dev/full", os.O_WRONLY), int(descriptor.name))

    return train_error(world, settings, [Fill()])


@pytest.mark.parametrize(
    ("rank", "name"), [pytest.param(0, "metrics.jsonl", marks=pytest.mark.long), (1, "ledger/rank-1.jsonl")]
)
def test_a_record_that_one_rank_cannot_write_ends_all_ranks_with_its_path(
    assets: Path, undisturbed: Path, tmp_path: Path, rank: int, name: str
) -> None:
    settings = run_settings(assets, tmp_path / "run", steps=8)
    errors = run_distributed(train_until_full, 2, settings, rank, name)
    for error in errors:
        assert (
            f"cannot write {tmp_path / 'run' / name}: [Errno 28]" in error and "start the same command again" in error
        )
    assert errors[rank].startswith("RecordError") and errors[1 - rank].startswith("RankFailedError: rank")
    # Step 6 was trained but has no record, so no checkpoint holds it.
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2, 4]

    assert run_distributed(train_error, 2, settings) == ["", ""]
    assert losses(tmp_path / "run") == losses(undisturbed), "bit for bit"
    assert read_ledger(tmp_path / "run") == read_ledger(undisturbed)


def test_what_fails_beside_training_does_not_change_it(assets: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "events.jsonl").mkdir()
    for name in ("tensorboard", "traces", "stacks"):
        (run_dir / name).touch()
    settings = run_settings(assets, run_dir, steps=8)
    settings["logging"] = {"tensorboard": True, "profile_steps": [2, 3]}
    assert run_distributed(train_error, 2, settings) == ["", ""]
    assert losses(run_dir) == losses(undisturbed), "bit for bit"


def test_a_folder_that_rank_0_cannot_write_is_an_error_of_all_ranks(assets: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    errors = run_distributed(train_error, 2, settings)
    assert errors[0].startswith("RecordError") and errors[1].startswith("RankFailedError: rank 0")
    assert all(str(tmp_path / "run" / "metrics.jsonl") in error for error in errors)


def test_a_resume_tells_which_settings_changed(assets: Path, tmp_path: Path) -> None:
    settings = run_settings(assets, tmp_path / "run", steps=2)
    settings["schedule"]["decay"] = "constant"
    run_distributed(train_run, 2, settings)
    settings["training"]["steps"] = 4
    settings["optimizer"] |= {"weight_decay": 0.25, "betas": [0.8, 0.95]}
    settings["deepspeed"]["zero_stage"] = 2
    del settings["deepspeed"]["offload_param"], settings["deepspeed"]["raw"]
    run_distributed(train_run, 2, settings)
    [event] = read_events(tmp_path / "run", "settings_changed")
    assert event["step"] == 2
    changed = {name: (pair["old"], pair["new"]) for name, pair in event["settings"].items()}
    assert changed["optimizer.weight_decay"] == (0.1, 0.25)
    assert changed["optimizer.betas"] == ([0.9, 0.999], [0.8, 0.95])
    assert changed["deepspeed.zero_stage"] == (3, 2) and changed["training.steps"] == (2, 4)
    assert "optimizer.lr" not in changed and "run_dir" not in changed
