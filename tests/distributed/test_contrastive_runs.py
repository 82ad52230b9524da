"""Whole runs of NFNet and BERT: any number of processes, stage and micro-batches gives the losses of one full batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from tests.distributed.contrastive_steps import nfnet_and_bert, write_bert
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, read_events, read_metrics, write_settings
from tests.tasks.test_contrastive_architecture import write_tokenizer
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig
from trainer.runtime.distributed import World

pytestmark = pytest.mark.distributed
STEPS = 4


def run_settings(assets: Path, run_dir: Path, stage: int, micro_batch_size: int, **training: Any) -> dict[str, Any]:
    """Return settings with the paper's loss, clipping and schedule, and two data sets."""
    common = {"type": "image_text", "manifest": str(assets / "data" / "pairs" / "manifest.npz"), "batch_size": 16}
    common |= {"micro_batch_size": micro_batch_size, "augment": {"horizontal_flip": 0.5, "hue": 0.02}}
    weights = {} if training.get("combine") == "merged" else {"weight": 0.5}
    return {
        "run_dir": str(run_dir),
        "architecture": nfnet_and_bert(assets / "bert"),
        "tokenizer": str(assets / "tokenizer"),
        "data": {
            "sources": [{"name": "web", **common}, {"name": "books", **common, **weights}],
            "read_block": 5,
            "shuffle_window": 4,
            "ledger": True,
        },
        "training": {"steps": STEPS, "dtype": "float32", "threads": 1, **training},
        "loss": {"label_smoothing": 0.1, "rows_per_chunk": 3},
        "clip_towers": {"image": {"adaptive": 0.01}, "text": {"norm": 0.5}},
        # Adam would turn the rounding of gradients near 0 into whole steps; this eps keeps it small.
        "optimizer": {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.0, "clip_grad_norm": "none"},
        "schedule": {"warmup_steps": 0, "decay": "linear"},
        "deepspeed": {"zero_stage": stage, "timeout_seconds": 120},
        "checkpoint": {"every": 2, "keep_last": 2},
        "logging": {"tensorboard": False},
        "zero_shot": {
            "every": 2,
            "batch_size": 8,
            "classification": [{"name": "colors", "folder": str(assets / "classes")}],
        },
    }


def pretrain_all(world: World, every: list[dict[str, Any]]) -> None:
    """Train and export one run after the other."""
    from trainer import loop
    from trainer.export import export_contrastive
    from trainer.tasks.contrastive.task import build_contrastive_task
    from trainer.tasks.contrastive.zero_shot_observer import zero_shot_observers

    for settings in every:
        folder = Path(settings["run_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        path = write_settings(folder / f"settings-{world.rank}.yaml", settings)
        config = load_config(path, [], ContrastiveRunConfig)
        loop.train(build_contrastive_task(config, world), config, world, zero_shot_observers(config, world))
        if world.is_main:
            export_contrastive(config, config.run_dir / "export")


def write_more_assets(assets: Path) -> None:
    from tests.data.helpers import image_bytes

    write_bert(assets / "bert")
    write_tokenizer(assets / "tokenizer")
    for name, color in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (assets / "classes" / name).mkdir(parents=True)
        for number in range(3):
            (assets / "classes" / name / f"{number}.png").write_bytes(image_bytes(color, size=(16, 16 + number)))


def without_last_checkpoint(run_dir: Path, copy: Path) -> None:
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns(f"step-{STEPS:08}", "latest", "export", "complete"))


def test_runs_equal_that_of_one_process_and_one_batch(assets: Path, tmp_path: Path) -> None:
    write_more_assets(assets)
    combinations = ("accumulate", "round_robin", "merged")
    one = [run_settings(assets, tmp_path / f"one-{name}", 2, 16, combine=name) for name in combinations]
    run_distributed(pretrain_all, 1, one)
    # Two processes with four micro-batches of two pairs for each data set.
    two = [run_settings(assets, tmp_path / f"two-{stage}", stage, 2) for stage in (1, 2, 3)]
    two += [run_settings(assets, tmp_path / f"two-{name}", 2, 2, combine=name) for name in combinations[1:]]
    run_distributed(pretrain_all, 2, two)
    expected = losses(tmp_path / "one-accumulate")
    assert expected[-1] < expected[0]
    for stage in (1, 2, 3):
        assert losses(tmp_path / f"two-{stage}") == pytest.approx(expected, rel=1e-4), stage
    for name in combinations[1:]:
        assert losses(tmp_path / f"two-{name}") == pytest.approx(losses(tmp_path / f"one-{name}"), rel=1e-4), name
    check_turns(tmp_path / "two-round_robin")
    check_export(tmp_path / "two-3", assets)

    without_last_checkpoint(tmp_path / "two-2", tmp_path / "resumed")
    without_last_checkpoint(tmp_path / "two-round_robin", tmp_path / "resumed-turns")
    resumed = [
        run_settings(assets, tmp_path / "resumed", 2, 16),
        run_settings(assets, tmp_path / "resumed-turns", 2, 16, combine="round_robin"),
    ]
    run_distributed(pretrain_all, 1, resumed)
    assert [event["step"] for event in read_events(tmp_path / "resumed", "resumed")] == [2]
    assert losses(tmp_path / "resumed") == pytest.approx(expected, rel=1e-4)
    assert losses(tmp_path / "resumed-turns") == pytest.approx(losses(tmp_path / "one-round_robin"), rel=1e-4)


def check_turns(run_dir: Path) -> None:
    """Each step has one source, and its second visit has new samples."""
    lines = read_metrics(run_dir)
    assert [(line["samples/web"], line["samples/books"]) for line in lines] == [(16, 0), (0, 16)] * (STEPS // 2)
    assert ["loss/web" in line for line in lines] == [True, False, True, False]
    taken = [json.loads(line) for line in (run_dir / "ledger" / "rank-0.jsonl").read_text().splitlines()]
    web = [(sample["shard"], sample["index"]) for sample in taken if sample["source"] == "web"]
    assert len(web) == len(set(web)) == STEPS // 2 * 8


def check_export(run_dir: Path, assets: Path) -> None:
    """open_clip and a Flamingo's tower load the export; training tested the towers."""
    from model.config import VisionEncoderConfig
    from model.vision_encoder import build_tower

    clip = open_clip.create_model(f"local-dir:{run_dir / 'export'}").eval()
    tower = build_tower(VisionEncoderConfig(name=f"local-dir:{run_dir / 'export'}"))
    assert torch.equal(tower.head.proj.weight, clip.visual.head.proj.weight)
    lines = read_metrics(run_dir)
    assert ["zero_shot/colors/top_1" in line for line in lines] == [False, True, False, True]
    assert lines[-1]["zero_shot/colors/top_5"] == 1.0
