"""Settings of contrastive pretraining that contradict each other, or name missing files, are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import WriteYaml, problems_of, run_values
from trainer.config.deepspeed_json import deepspeed_json
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig

HF_TEXT = {"embed_dim": 4, "vision_cfg": {"timm_model_name": "test_nfnet"}, "text_cfg": {"hf_model_name": "bert"}}

PAIRS = run_values()["data"]["sources"][0]


def contrastive_values(**more: Any) -> dict[str, Any]:
    values = run_values()
    del values["model"], values["data"]["sources"][1]
    return values | more


@pytest.mark.parametrize(
    ("settings", "path", "message"),
    [
        ({"loss": {"kind": "sigmoid", "label_smoothing": 0.1}}, "loss.label_smoothing", "softmax loss alone"),
        ({"clip_towers": {"image": {"adaptive": 0.01}}}, "optimizer.clip_grad_norm", "set it to none"),
        ({"architecture": {"embed_dim": 4, "vision_cfg": {}}}, "architecture", "needs text_cfg"),
        ({"architecture": HF_TEXT}, "tokenizer", "the text tower's own tokenizer"),
        ({"optimizer": {"clip_grad_norm": "off"}}, "optimizer.clip_grad_norm", "none"),
        (
            {"data": {"sources": [PAIRS | {"micro_batch_tokens": 99}]}},
            "data.sources.0.micro_batch_tokens",
            "tokens of rows",
        ),
        ({"training": {"steps": 100, "combine": "sometimes"}}, "training.combine", "round_robin"),
        (
            {"zero_shot": {"classification": [{"name": "a", "folder": "x", "templates": ["a photo"]}]}},
            "zero_shot.classification.0.templates.0",
            "has no {}",
        ),
        (
            {
                "zero_shot": {
                    "classification": [{"name": "a", "folder": "x"}],
                    "retrieval": [{"name": "a", "captions": "x", "images": "x"}],
                }
            },
            "zero_shot",
            "2 are named 'a'",
        ),
    ],
)
def test_rules(write_yaml: WriteYaml, settings: dict[str, Any], path: str, message: str) -> None:
    found = {
        p.path: p.message for p in problems_of(write_yaml(contrastive_values(**settings)), schema=ContrastiveRunConfig)
    }
    assert message in found[path]


def test_merged_sources_have_no_weights(write_yaml: WriteYaml) -> None:
    values = contrastive_values(training={"steps": 100, "combine": "merged"})
    values["data"]["sources"][0]["weight"] = 0.5
    (problem,) = problems_of(write_yaml(values), schema=ContrastiveRunConfig)
    assert problem.path == "data.sources.0.weight"


def test_missing_files_are_named(write_yaml: WriteYaml, tmp_path: Path) -> None:
    tests = {
        "classification": [{"name": "a", "folder": "none", "class_names": "none.json"}],
        "retrieval": [{"name": "b", "captions": "none.json", "images": "none"}],
    }
    values = contrastive_values(tokenizer="none", start_from="none", zero_shot=tests)
    found = problems_of(write_yaml(values), schema=ContrastiveRunConfig, check_files=True)
    assert {problem.path for problem in found} == {
        "data.sources.0.manifest",
        "tokenizer",
        "start_from",
        "zero_shot.classification.0.folder",
        "zero_shot.classification.0.class_names",
        "zero_shot.retrieval.0.captions",
        "zero_shot.retrieval.0.images",
    }


@pytest.mark.parametrize(("given", "expected"), [("none", 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_clipping_that_is_off_is_off_in_deepspeed(write_yaml: WriteYaml, given: Any, expected: float) -> None:
    values = contrastive_values(optimizer={"clip_grad_norm": given})
    config = load_config(write_yaml(values), [], ContrastiveRunConfig, check_files=False)
    assert deepspeed_json(config)["gradient_clipping"] == expected


def test_only_the_vision_stage_augments_on_the_device(write_yaml: WriteYaml) -> None:
    values = run_values()
    values["data"]["augmentation"] = "device"
    (problem,) = problems_of(write_yaml(values))
    assert problem.path == "data.augmentation" and "trainer.pretrain_vision only" in problem.message
    values = contrastive_values()
    values["data"]["augmentation"] = "device"
    load_config(write_yaml(values), [], ContrastiveRunConfig, check_files=False)
