"""An evaluation during training changes no loss, and its scores reach metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, make_assets, read_metrics, run_settings
from tests.distributed.train_in_process import as_config, train_run
from trainer.checkpoint.catalog import complete_steps
from trainer.evaluation.live import evaluation_observers
from trainer.loop import train
from trainer.runtime.distributed import World
from trainer.tasks.flamingo import build_flamingo_task

pytestmark = pytest.mark.distributed


def train_with_evaluation(world: World, settings: dict[str, Any]) -> None:
    config = as_config(settings)
    observers = evaluation_observers(config, world)
    train(build_flamingo_task(config, world), config, world, observers)


def test_an_evaluation_does_not_disturb_the_run(tmp_path: Path) -> None:
    make_assets(tmp_path / "assets")
    manifest = str(tmp_path / "assets" / "data" / "pairs" / "manifest.npz")
    plain, scored = (run_settings(tmp_path / "assets", tmp_path / name, steps=4) for name in ("plain", "scored"))
    task = {"name": "pairs", "type": "shards", "manifest": manifest, "num_queries": 5, "support_manifest": manifest}
    scored["evaluation"] = {
        "every": 1,
        "tasks": [{**task, "controls": ["shuffled_query"]}],
        "shots": [0, 1],
        "prompt_style": "plain",
        "zero_shot_examples": 1,
        "batch_size": 2,
        "max_new_tokens": 3,
    }
    scored["checkpoint"] |= {"every": 1, "keep_last": 1, "keep_best": 1, "best_metric": "eval/pairs/1"}
    run_distributed(train_run, 2, plain)
    run_distributed(train_with_evaluation, 2, scored)
    assert losses(tmp_path / "scored") == losses(tmp_path / "plain")
    names = {f"eval/pairs/{shots}{control}" for shots in (0, 1) for control in ("", "/shuffled_query")}
    found = read_metrics(tmp_path / "scored")
    assert all({name for name in line if name.startswith("eval/")} == names for line in found)
    assert all(0 <= line[name] <= 1 for line in found for name in names)
    best = max(found, key=lambda line: (line["eval/pairs/1"], line["step"]))["step"]
    assert complete_steps(tmp_path / "scored" / "checkpoints") == sorted({best, 4})
