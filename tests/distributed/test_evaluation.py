"""An evaluation gives the same bytes on one, two and three ranks, partitioned or not, and goes on after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.processes import run_distributed
from tests.evaluation import layouts
from trainer.config.evaluation_config import EvaluationConfig
from trainer.runtime.distributed import World

pytestmark = pytest.mark.distributed


def evaluate_on_rank(world: World, config: EvaluationConfig, stop_after: int | None) -> int:
    """Evaluate as one rank; ``stop_after`` kills it after so many batches."""
    from trainer.evaluation import command
    from trainer.evaluation.predictions import PredictionLog
    from trainer.evaluation.ranks import Ranks

    append, appended = PredictionLog.append, 0

    def append_and_stop(self: PredictionLog, *arguments: object) -> None:
        nonlocal appended
        append(self, *arguments)  # type: ignore[arg-type]
        appended += 1
        if appended == stop_after:
            raise SystemExit(9)

    PredictionLog.append = append_and_stop  # type: ignore[method-assign]
    partitioned = config.deepspeed.zero_stage == 3
    try:
        return command.evaluate(config, lambda: Ranks(world, synced=partitioned))
    except SystemExit:
        return 9


def files(config: EvaluationConfig) -> list[bytes]:
    """Return the bytes of the results."""
    assert not (config.output / "parts").exists()
    return [(config.output / name).read_bytes() for name in ("report.json", "predictions.jsonl")]


def test_ranks_kills_and_partitions_change_no_byte(tmp_path: Path) -> None:
    export = layouts.write_export(tmp_path / "export")
    episodes = {"name": "episodes", "type": "episodes", **layouts.write_episodes(tmp_path / "e", 7)}
    classes = {"name": "classes", "type": "image_folder", **layouts.write_classes(tmp_path / "c"), "shots": [0]}
    episodes["controls"] = ["shuffled_query", "no_images"]  # ranks have different media in their caches
    tasks = [episodes, classes]
    config = layouts.evaluation(tmp_path, export, tasks, shots=[1], batch_size=2)
    assert run_distributed(evaluate_on_rank, 1, config, 3) == [9]
    parts = sorted((config.output / "parts").iterdir())
    assert [len(path.read_text().splitlines()) for path in parts] == [3]
    assert run_distributed(evaluate_on_rank, 3, config, None) == [0, 0, 0]  # it goes on with three
    alone = replace(config, output=tmp_path / "alone")
    assert run_distributed(evaluate_on_rank, 1, alone, None) == [0]
    assert files(config) == files(alone)
    offload = replace(config.deepspeed.offload_param, device="cpu")
    partitioned = replace(
        config,
        output=tmp_path / "partitioned",
        deepspeed=replace(config.deepspeed, zero_stage=3, offload_param=offload),
    )
    assert run_distributed(evaluate_on_rank, 2, partitioned, None) == [0, 0]
    assert files(partitioned) == files(alone)
