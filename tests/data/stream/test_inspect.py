"""Run ``trainer.inspect`` on real shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.data.helpers import build_manifest, text_shards, write_shard
from trainer import inspect
from trainer.data.shards.manifest import load_manifest
from trainer.data.stream.order import SourceOrder


def test_describe_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "a.tar", [("k\x1b[2J", {"txt": b"caf\xe9 \x1b[31m", "jpg": b"12345"})])
    manifest = build_manifest(tmp_path)
    capsys.readouterr()
    assert inspect.main([str(manifest)]) == 0
    out = capsys.readouterr().out
    assert load_manifest(manifest).sha256 in out
    assert "jpg 5 bytes, txt 'caf" in out
    assert "\x1b" not in out  # no control sequence from the data reaches the terminal


def test_describe_a_step_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = text_shards(tmp_path, [20, 30])
    source = {"type": "text", "name": "prose", "manifest": str(manifest), "batch_size": 4}
    data = {"sources": [source], "seed": 3, "read_block": 5}
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "run_dir": str(tmp_path / "run"),
                "architecture": {"model_type": "llama"},
                "data": data,
                "training": {"steps": 10},
                "schedule": {"warmup_steps": 0},
                "deepspeed": {"zero_stage": 2},
            }
        )
    )
    capsys.readouterr()
    assert inspect.main([str(config), "--step", "7"]) == 0
    order = SourceOrder("prose", [20, 30], seed=3, num_lanes=4, samples_per_step=4, read_block=5)
    lines = capsys.readouterr().out.splitlines()[1:]
    for (place,), line in zip(order.samples_of(7), lines, strict=True):
        assert line.endswith(
            f"{place.shard:04d}.tar[{place.index}] 'k{place.index}': txt '{place.shard}/{place.index}'"
        )
    assert inspect.main([str(config), "--step", "7", "--data.seed", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] != lines
    assert inspect.main([str(config), "--data.sead", "4"]) == 2


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(tmp_path / "gone.npz")]) == 1
    assert inspect.main([str(tmp_path / "gone.yaml")]) == 1
    assert capsys.readouterr().err.count("gone") >= 2
