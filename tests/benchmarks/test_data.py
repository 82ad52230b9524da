"""The measurements of ``trainer.benchmark data``, in small: that they run and give rows, not what they find."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.benchmark import data
from trainer.data.shards.manifest import Manifest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_rivals_take_turns_and_every_row_has_its_target() -> None:
    decoding, iteration = list(data._decoding(1)), list(data._iteration(1))
    assert [row.target for row in [*decoding, *iteration]] == [4.0, 4.0, 8.0, 8.0]
    assert all(row.ratio == row.baseline_value / row.value and row.value > 0 for row in [*decoding, *iteration])


def test_scale_in_small(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []

    class Pipe:
        send = staticmethod(sent.append)

    shards = 3000
    urls = [f"s3://bucket/{shard}.tar" for shard in range(shards)]
    Manifest.create(tmp_path / "m.npz", urls, [1000] * shards, [1] * shards, range(shards), [False] * shards).save()
    data._measure_scale(tmp_path / "m.npz", "far", Pipe)
    assert set(sent[0]) == {"ready", "memory", "ids", "other", "state"}
    assert sent[0]["state"] <= 1024
    data._measure_node(tmp_path / "m.npz", 2, Pipe)
    assert set(sent[1]) == {"ready", "memory"} and sent[1]["memory"] > 0
