"""Test that the measurements of ``trainer.benchmark data`` run at a small size; their values are not checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.benchmark.data_reading import decoding_rows, iteration_rows
from trainer.benchmark.data_scale import measure_node, measure_rank
from trainer.data.shards.manifest import Manifest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_every_row_has_its_baseline_and_target() -> None:
    decoding, iteration = list(decoding_rows(1)), list(iteration_rows(1))
    assert [row.target for row in [*decoding, *iteration]] == [4.0, 4.0, 8.0, 8.0]
    assert all(row.ratio == row.baseline_value / row.value and row.value > 0 for row in [*decoding, *iteration])


@pytest.mark.slow
def test_start_of_a_rank_and_of_a_node(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []

    class Pipe:
        send = staticmethod(sent.append)

    shards = 3000
    urls = [f"s3://bucket/{shard}.tar" for shard in range(shards)]
    Manifest.create(tmp_path / "m.npz", urls, [1000] * shards, [1] * shards, range(shards), [False] * shards).save()
    measure_rank(tmp_path / "m.npz", 10**9, Pipe)
    assert set(sent[0]) == {"ready", "memory", "ids", "other", "state"}
    assert sent[0]["state"] <= 1024
    measure_node(tmp_path / "m.npz", 2, Pipe)
    assert set(sent[1]) == {"ready", "memory"} and sent[1]["memory"] > 0
