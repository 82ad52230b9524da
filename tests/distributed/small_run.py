"""Write the parts of a small run (shards, a frozen language model, a tower, a YAML) and read its results."""

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
from tests.data.videos import video_bytes
from tests.model.builders import FAMILIES, write_tower

WORDS = "red green blue dark light".split()


def make_assets(folder: Path, seed: int = 0) -> None:
    """Write ``lm/``, ``tower/`` and ``data/{pairs,documents,texts}`` into the folder."""
    _write_language_model(folder / "lm", seed)
    (folder / "tower").mkdir()
    write_tower(folder / "tower", seed)
    _write_data(folder / "data")


def _write_language_model(folder: Path, seed: int) -> None:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS, "a", "and", "sky"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # It has no pad token, because many tokenizers have none.
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


def write_videos(folder: Path) -> None:
    """Write two shards of short videos of one color each; video 5 of a shard is truncated."""
    rng = np.random.default_rng(0)
    for shard in range(2):
        samples = []
        for number in range(12):
            color = tuple(int(level) for level in rng.integers(0, 256, 3))
            video = video_bytes(3, rate=5, size=(24, 16), color=lambda _, color=color: color)  # type: ignore[misc]
            caption = " ".join(rng.choice(WORDS, size=3))
            samples.append((f"v{number}", {"mp4": video[:-100] if number == 5 else video, "txt": caption.encode()}))
        write_shard(folder / f"{shard}.tar", samples)


def run_settings(assets: Path, run_dir: Path, **training: Any) -> dict[str, Any]:
    """Return settings of a run whose steps visit pairs, documents and texts; ZeRO-3 partitions every parameter."""

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
    """Write the YAML of a run and return its path."""
    path.write_text(yaml.safe_dump(settings))
    return path


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# Measurements, which differ from run to run.
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
    """Return the lines of metrics.jsonl without the fields that differ between runs of the same settings."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def losses(run_dir: Path) -> list[float]:
    """Return the loss of each step; metrics.jsonl must hold every step once and in order."""
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def read_ledger(run_dir: Path) -> set[tuple[Any, ...]]:
    """Return the samples that all ranks consumed; none may be in the ledgers twice."""
    lines = [
        json.loads(line) for path in (run_dir / "ledger").glob("rank-*.jsonl") for line in path.read_text().splitlines()
    ]
    samples = [tuple(line[key] for key in ("step", "source", "shard", "index", "key")) for line in lines]
    assert len(samples) == len(set(samples)), "the ledgers hold a sample twice"
    return set(samples)


def read_events(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of events.jsonl, of one kind or of all."""
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]
