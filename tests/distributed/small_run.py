"""A whole run in small: shards, a frozen language model and tower on disk, and a YAML, as a user would have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.data.helpers import build_manifest, image_bytes, mmc4, write_shard
from tests.model.builders import FAMILIES, write_tower
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.runtime.distributed import World

WORDS = "red green blue dark light".split()


def make_assets(folder: Path, seed: int = 0) -> None:
    """``lm/``, ``tower/`` and ``data/{pairs,documents,texts}`` in the folder."""
    _write_language_model(folder / "lm", seed)
    (folder / "tower").mkdir()
    write_tower(folder / "tower", seed)
    _write_data(folder / "data")


def _write_language_model(folder: Path, seed: int) -> None:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS, "a", "and", "sky"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # No pad token on purpose: many tokenizers have none.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    architecture = {**FAMILIES["llama"], "vocab_size": 16}
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture)).save_pretrained(folder)


def _write_data(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def caption() -> str:
        return " ".join(rng.choice([*WORDS, "a", "and", "sky"], size=int(rng.integers(2, 7))))

    def picture() -> bytes:
        return image_bytes(tuple(int(level) for level in rng.integers(0, 256, 3)), size=(16, 16))

    for shard in range(3):
        pairs = [(f"p{i}", {"png": picture(), "txt": caption().encode()}) for i in range(20)]
        write_shard(folder / "pairs" / f"{shard}.tar", pairs)
        documents = []
        for i in range(12):
            images = int(rng.integers(1, 4))
            documents.append((f"d{i}", mmc4([caption() for _ in range(images)], list(range(images)))))
        write_shard(folder / "documents" / f"{shard}.tar", documents)
        write_shard(folder / "texts" / f"{shard}.tar", [(f"t{i}", {"txt": caption().encode()}) for i in range(20)])
    for kind in ("pairs", "documents", "texts"):
        build_manifest(folder / kind)


def run_settings(assets: Path, run_dir: Path, **training: Any) -> dict[str, Any]:
    """Settings of a run on the assets: pairs, documents and texts in one update; ZeRO-3, everything partitioned."""

    def source(name: str, kind: str, batch_size: int, **more: Any) -> dict[str, Any]:
        manifest = str(assets / "data" / name / "manifest.npz")
        return {"name": name, "type": kind, "manifest": manifest, "batch_size": batch_size, "max_tokens": 24, **more}

    return {
        "run_dir": str(run_dir),
        "model": {
            "vision": {"name": f"local-dir:{assets / 'tower'}"},
            "resampler": {"num_layers": 1, "dim": 20, "num_heads": 2, "head_dim": 8, "num_latents": 4, "num_frames": 1},
            "cross_attention": {"num_heads": 2, "head_dim": 8},
            "language_model": {"name": str(assets / "lm")},
        },
        "data": {
            "sources": [
                source("pairs", "image_text", 8),
                source("documents", "interleaved", 4, weight=0.5, p_next=0.5),
                source("texts", "text", 4, weight=0.1),
            ],
            "read_block": 5,
            "shuffle_window": 4,
            "ledger": True,
        },
        "training": {"steps": 6, "dtype": "float32", "threads": 1, **training},
        "optimizer": {"lr": 0.02, "gate_lr_multiplier": 5},
        "schedule": {"warmup_steps": 2, "decay": "cosine"},
        "deepspeed": {
            "zero_stage": 3,
            "offload_param": {"device": "cpu"},
            "timeout_seconds": 120,
            "raw": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        },
        "checkpoint": {"every": 2, "keep_last": 2},
        "logging": {"tensorboard": False},
    }


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    """The YAML of a run."""
    path.write_text(yaml.safe_dump(settings))
    return path


def train_here(world: World, path: Path) -> None:
    """The run of a YAML without a launcher, on processes of this machine (for ``run_distributed``)."""
    from trainer.loop import train
    from trainer.tasks.flamingo import build_flamingo_task

    config = load_config(path, [], FlamingoRunConfig)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    train(build_flamingo_task(config, world), config, world)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# What no two runs have in common.
MEASURED = {
    "step_seconds",
    "data_seconds",
    "tokens_per_second",
    "samples_per_second",
    "images_per_second",
    "tflops",
    "mfu",
    "hfu",
    "device_memory_gib",
    "host_memory_gib",
}


def without_measured(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as far as they are the same in every run of the same settings."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def losses(run_dir: Path) -> list[float]:
    """The loss of each step, in order; every step stands there once."""
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def read_ledger(run_dir: Path) -> set[tuple[Any, ...]]:
    """What all ranks together consumed, each sample once."""
    lines = [
        json.loads(line) for path in (run_dir / "ledger").glob("rank-*.jsonl") for line in path.read_text().splitlines()
    ]
    samples = [tuple(line[key] for key in ("step", "source", "shard", "index", "key")) for line in lines]
    assert len(samples) == len(set(samples)), "a sample stands in the ledger twice"
    return set(samples)
