"""The two pretrainers give the same losses on one and two processes, and their exports load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import WORDS, losses, write_settings
from tests.model.builders import FAMILIES
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, LanguageModelRunConfig
from trainer.runtime.distributed import World

pytestmark = pytest.mark.distributed


def common_settings(assets: Path, run_dir: Path, source: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that both pretrainers share."""
    name = source["name"]
    return {
        "run_dir": str(run_dir),
        "data": {
            "sources": [{"manifest": str(assets / "data" / name / "manifest.npz"), **source}],
            "read_block": 5,
            "shuffle_window": 4,
        },
        "training": {"steps": 8, "dtype": "float32", "threads": 1},
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 1},
        "deepspeed": {"zero_stage": 2, "timeout_seconds": 120},
        "checkpoint": {"every": 8},
        "logging": {"tensorboard": False},
    }


def language_model_settings(assets: Path, run_dir: Path) -> dict[str, Any]:
    source = {"type": "text", "name": "texts", "batch_size": 4, "max_tokens": 16, "samples_per_row": 3}
    architecture = {key: value for key, value in FAMILIES["llama"].items() if "token_id" not in key}
    return {
        **common_settings(assets, run_dir, source),
        "architecture": {**architecture, "tie_word_embeddings": True},
        "tokenizer": {"vocab_size": 270, "num_samples": 30},
    }


def contrastive_settings(assets: Path, run_dir: Path, **more: Any) -> dict[str, Any]:
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "head_width": 12},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1, "pool_type": "last"},
    }
    source = {"type": "image_text", "name": "pairs", "batch_size": 8}
    settings = {
        **common_settings(assets, run_dir, source),
        "architecture": architecture,
        "tokenizer": str(assets / "lm"),
    }
    return settings | more


def pretrain(world: World, kind: str, settings: dict[str, Any]) -> None:
    """Pretrain a "language_model" or the "contrastive" towers, and export."""
    from trainer import export, loop
    from trainer.tasks import language_model
    from trainer.tasks.contrastive.task import build_contrastive_task

    Path(settings["run_dir"]).mkdir(parents=True, exist_ok=True)
    path = write_settings(Path(settings["run_dir"]) / f"settings-{world.rank}.yaml", settings)
    if kind == "language_model":
        config = load_config(path, [], LanguageModelRunConfig)
        loop.train(language_model.build_language_model_task(config, world), config, world)
        if world.is_main:
            export.export_language_model(config, config.run_dir / "export")
    else:
        towers = load_config(path, [], ContrastiveRunConfig)
        loop.train(build_contrastive_task(towers, world), towers, world)
        if world.is_main:
            export.export_contrastive(towers, towers.run_dir / "export")


def test_the_language_model_trains_alike_on_one_and_two_processes_and_its_export_loads(
    assets: Path, tmp_path: Path
) -> None:
    for size in (1, 2):
        run_distributed(pretrain, size, "language_model", language_model_settings(assets, tmp_path / str(size)))
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert two == pytest.approx(one, rel=1e-4)
    assert two[-1] < 0.9 * two[0]
    export = tmp_path / "2" / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer(" ".join(WORDS), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == " ".join(WORDS) and tokenizer.eos_token_id not in ids
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(), (
        "the export must keep the embeddings tied"
    )
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_the_towers_train_alike_on_one_and_two_processes_and_their_export_loads(assets: Path, tmp_path: Path) -> None:
    for size in (1, 2):
        run_distributed(pretrain, size, "contrastive", contrastive_settings(assets, tmp_path / str(size)))
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert two == pytest.approx(one, rel=1e-4), "each process must use the other's negatives and their gradients"
    assert two[-1] < two[0]
    clip = open_clip.create_model(f"local-dir:{tmp_path / '2' / 'export'}")
    assert clip.logit_scale.shape == () and clip.encode_image(torch.zeros(1, 3, 16, 16)).shape == (1, 16)
