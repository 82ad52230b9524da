"""docs/evaluation.md: its configurations load, its episode is read, and its tables name all there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import yaml

from tests.config.conftest import run_values
from tests.evaluation.layouts import write_image
from tests.project.commands import ROOT
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.evaluation_tasks import Control, EpisodesTask
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.evaluation.readers import READERS, read_task
from trainer.evaluation.tasks.findings import Findings

PAGE = (ROOT / "docs" / "evaluation.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_its_configurations_load(tmp_path: Path) -> None:
    alone, section = blocks("yaml")
    path = tmp_path / "config.yaml"
    path.write_text(alone)
    config = load_config(path, [], EvaluationConfig, check_files=False)
    assert [task.name for task in config.tasks] == ["coco", "vqav2", "hateful_memes"]
    path.write_text(yaml.safe_dump({**run_values(), **yaml.safe_load(section)}))
    run = load_config(path, [], FlamingoRunConfig, check_files=False)
    assert run.evaluation.tasks
    assert run.evaluation.every == run.checkpoint.every


def test_its_episode_is_read(tmp_path: Path) -> None:
    (line,) = blocks("json")
    (tmp_path / "episodes.jsonl").write_text(line)
    for name in "abc":
        write_image(tmp_path / f"{name}.png", 0)
    findings = Findings("tasks.0")
    (query,) = read_task(EpisodesTask(name="e", episodes=tmp_path / "episodes.jsonl"), findings).queries
    assert not findings
    assert query.exchange == (1, 0)


def test_its_tables_name_every_task_and_control() -> None:
    first_cells = " ".join(re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", first_cells))
    kinds = {kind.type for kind in READERS}  # type: ignore[attr-defined]  # every task but the base has a type
    assert kinds | set(get_args(Control)) - {"none"} <= named
