"""docs/vision_stage.md is true: its code runs, its settings load, its commands work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project.commands import ROOT, check_command, shell_commands
from trainer.config.loader import load_config
from trainer.config.run_config import ContrastiveRunConfig

TEXT = (ROOT / "docs/vision_stage.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


def test_the_code_runs() -> None:
    (code,) = blocks("python")
    exec(code, {})


@pytest.mark.parametrize("block", blocks("yaml"))
def test_the_settings_load(block: str, tmp_path: Path) -> None:
    source = {"type": "image_text", "name": "pairs", "manifest": "pairs.npz", "batch_size": 8}
    values: dict[str, Any] = {"run_dir": "runs/test", "data": {"sources": [source]}, "training": {"steps": 10000}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values | yaml.safe_load(block)))
    load_config(path, [], ContrastiveRunConfig, check_files=False)


@pytest.mark.parametrize("command", shell_commands(TEXT))
def test_the_commands_work(command: str) -> None:
    check_command(command)


def test_files_exist() -> None:
    named = re.findall(r"`(configs/[\w./-]+)`", TEXT)
    assert len(named) > 3 and all((ROOT / name).exists() for name in named)
