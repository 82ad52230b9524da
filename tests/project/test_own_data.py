"""docs/own_data.md: its images are written, its commands convert them, and its configurations read the result."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.project.commands import ROOT, shell_commands
from trainer import convert
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.shards.manifest import load_manifest

PAGE = (ROOT / "docs" / "own_data.md").read_text()
TRAIN = ROOT / "configs" / "own_data" / "flamingo.yaml"
EVALUATE = ROOT / "configs" / "own_data" / "evaluate.yaml"


@pytest.mark.slow
def test_the_images_are_written_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    exec(compile(block, "docs/own_data.md", "exec"), {})
    conversions = [command for command in shell_commands(PAGE) if "trainer.convert" in command]
    assert len(conversions) == 2
    for command in conversions:
        assert convert.main(shlex.split(command)[3:]) == 0
    (source,) = load_config(TRAIN, [], FlamingoRunConfig, check_files=False).data.sources
    assert load_manifest(source.manifest).total_samples == 1500
    for task in load_config(EVALUATE, [], EvaluationConfig, check_files=False).tasks:
        assert load_manifest(task.manifest).total_samples == 297


def test_the_configuration_follows_the_rules_of_the_page() -> None:
    config = load_config(TRAIN, [], FlamingoRunConfig, check_files=False)
    steps = config.training.steps
    assert config.optimizer.lr * config.optimizer.gate_lr_multiplier * steps == pytest.approx(3)
    assert config.schedule.warmup_steps == steps / 10
    assert config.checkpoint.every < steps
    (source,) = config.data.sources
    assert 3 <= steps * source.batch_size / 1500 <= 10
