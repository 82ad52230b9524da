"""Packed sources through whole runs: the same samples and losses for every number of processes and after a kill."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, read_metrics, run_settings
from tests.distributed.test_training import resume_error, train_run

pytestmark = pytest.mark.distributed


def packed_run(assets: Path, run_dir: Path, **training: Any) -> dict[str, Any]:
    """Pairs, documents and texts, each packed to rows of 40 tokens; 60 pairs last for about three updates."""
    settings = run_settings(assets, run_dir, **training)
    for source in settings["data"]["sources"]:
        source |= {"packing": True, "max_tokens": 40, "batch_size": 4}
    return settings


def read_ledger(run_dir: Path) -> Counter[tuple[Any, ...]]:
    """Lanes get to the next epoch at different times, so an update may have a sample once in each of two epochs."""
    paths = sorted((run_dir / "ledger").glob("rank-*.jsonl"))
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return Counter(tuple(line[key] for key in ("step", "source", "shard", "index", "key")) for line in lines)


def test_one_process_two_and_a_resumed_run_are_the_same(assets: Path, tmp_path: Path) -> None:
    run_distributed(train_run, 2, packed_run(assets, tmp_path / "two"))
    one = packed_run(assets, tmp_path / "one")
    one["data"]["sources"][0]["micro_batch_size"] = 2
    run_distributed(train_run, 1, one)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    stopped = packed_run(assets, tmp_path / "stopped")
    run_distributed(train_run, 2, stopped, 3)
    run_distributed(train_run, 2, stopped)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "two"), "bit for bit"
    assert read_ledger(tmp_path / "stopped") == read_ledger(tmp_path / "two")
    assert read_ledger(tmp_path / "one") == read_ledger(tmp_path / "two")
    lines = read_metrics(tmp_path / "two")
    assert all(0 < line["padding"] < 0.25 for line in lines)
    consumed = sum(line["samples/pairs"] for line in lines)
    assert consumed == sum(n for sample, n in read_ledger(tmp_path / "two").items() if sample[1] == "pairs")
    assert consumed > 60, "more than an epoch"


def test_a_run_that_was_packed_does_not_go_on_unpacked(assets: Path, tmp_path: Path) -> None:
    run_distributed(train_run, 1, packed_run(assets, tmp_path / "run", steps=2))
    settings = packed_run(assets, tmp_path / "run", steps=4)
    settings["data"]["sources"][0]["pack"] = False
    [error] = run_distributed(resume_error, 1, settings)
    assert "source 'pairs'" in error and "packed_to was 40, is None" in error
