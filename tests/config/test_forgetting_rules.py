"""Test the rules of measuring and limiting forgetting, of norms of parts, and of an early end."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from tests.project.commands import ROOT
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig, RunConfig
from trainer.errors import ConfigError

DEBUG = ROOT / "configs" / "debug.yaml"
TASK = '--evaluation.tasks=[{"name": "a", "type": "shards", "manifest": "a.npz"}]'
EVALUATED = [TASK, "--evaluation.every=2", "--checkpoint.best_metric=eval/a/0"]


def problems(path: Path, overrides: list[str], schema: type[RunConfig]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, schema, check_files=False)
    return str(caught.value)


def debug_with_text(tmp_path: Path, kl_weight: float = 0.5) -> Path:
    values = yaml.safe_load(DEBUG.read_text())
    text = {"type": "text", "name": "text", "manifest": "text.npz", "batch_size": 4, "kl_weight": kl_weight}
    values["data"]["sources"].append(text)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--forgetting.every=5"], "forgetting.manifest: is needed by the other settings"),
        (["--forgetting.manifest=a.npz", "--forgetting.max_tokens=1"], "forgetting.max_tokens: 1 predicts nothing"),
        (["--forgetting.manifest=data/quickstart/train/pairs/manifest.npz"], "is trained on (data.sources.0.manifest)"),
        (["--forgetting.manifest=a.npz", "--forgetting.task_limit=3"], "3 has no effect without forgetting.tasks"),
        (["--checkpoint.patience=3"], "counts evaluations, but checkpoint.best_metric is loss"),
        ([*EVALUATED, "--checkpoint.patience=3"], "checkpoint.keep_best: 0 keeps no best checkpoint"),
        ([*EVALUATED, "--checkpoint.keep_best=1", "--checkpoint.patience=9"], "9 never ends a run of 20 steps"),
    ],
)
def test_bad_settings_are_refused(overrides: list[str], message: str) -> None:
    assert message in problems(DEBUG, overrides, FlamingoRunConfig)


def test_tasks_need_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    overrides = ["--forgetting.manifest=a.npz", '--forgetting.tasks=["a"]', f"--forgetting.task_folder={tmp_path}/none"]
    with pytest.raises(ConfigError) as caught:
        load_config(DEBUG, overrides, FlamingoRunConfig)
    assert "forgetting.tasks: needs lm_eval, which is not installed" in str(caught.value)
    assert "forgetting.task_folder: no such folder" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.trainable.language_model=full"], "language_model full keeps no copy of it; take lora"),
        (["--model.trainable.language_model=from_random"], "from_random keeps no copy"),
        (["--model.cross_attention.without_media=nothing"], "would always be 0: the language model is frozen"),
    ],
)
def test_a_penalty_needs_the_language_model_as_it_was(tmp_path: Path, overrides: list[str], message: str) -> None:
    found = problems(debug_with_text(tmp_path), overrides, FlamingoRunConfig)
    assert message in found and "data.sources.2.kl_weight" in found


@pytest.mark.parametrize("overrides", [[], ["--model.trainable.language_model=lora"]])
def test_a_penalty_is_allowed_where_it_can_be_computed(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(debug_with_text(tmp_path), overrides, FlamingoRunConfig, check_files=False)
    assert config.data.sources[2].kl_weight == 0.5  # type: ignore[union-attr]


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"forgetting\.manifest: no such file: nowhere\.npz"):
        load_config(DEBUG, ["--forgetting.manifest=nowhere.npz"], FlamingoRunConfig)


def test_only_a_flamingo_has_them(tmp_path: Path) -> None:
    vision, text = (ROOT / "configs" / "quickstart" / f"{name}.yaml" for name in ("vision", "language_model"))
    found = problems(vision, ["--logging.part_grad_norms=true"], ContrastiveRunConfig)
    assert "logging.part_grad_norms: only trainer.train has parts" in found
    values = yaml.safe_load(text.read_text())
    values["data"]["sources"][0]["kl_weight"] = 1
    (tmp_path / "text.yaml").write_text(json.dumps(values))
    found = problems(tmp_path / "text.yaml", [], LanguageModelRunConfig)
    assert "only trainer.train has a language model to stay close to" in found
