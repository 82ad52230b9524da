"""Runs with packed sources have the same samples and losses on one and two processes and after a kill."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, read_metrics, run_settings
from tests.distributed.train_in_process import train_error, train_run

pytestmark = pytest.mark.distributed


def packed_run(assets: Path, run_dir: Path, **training: Any) -> dict[str, Any]:
    """Return settings of pairs, documents and texts packed to rows of 40 tokens; an epoch of pairs is about 3 steps."""
    settings = run_settings(assets, run_dir, **training)
    for source in settings["data"]["sources"]:
        source |= {"packing": True, "max_tokens": 40, "batch_size": 4}
    return settings


def read_ledger(run_dir: Path) -> Counter[tuple[Any, ...]]:
    """Count the samples that all ranks consumed.

    A step may hold a sample twice, in two epochs, because lanes reach the next epoch at different steps.
    """
    paths = sorted((run_dir / "ledger").glob("rank-*.jsonl"))
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return Counter(tuple(line[key] for key in ("step", "source", "shard", "index", "key")) for line in lines)


def test_one_process_two_processes_and_a_resumed_run_are_the_same(assets: Path, tmp_path: Path) -> None:
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
    assert consumed > 60, "the run must take more than an epoch"


def test_a_packed_run_does_not_resume_unpacked(assets: Path, tmp_path: Path) -> None:
    run_distributed(train_run, 1, packed_run(assets, tmp_path / "run", steps=2))
    settings = packed_run(assets, tmp_path / "run", steps=4)
    settings["data"]["sources"][0]["packing"] = False
    [error] = run_distributed(train_error, 1, settings)
    assert "pairs" in error and re.search(r"packed_to\b.*\b40\b.*\bNone\b", error)
