"""Provide a valid small run, in which each test breaks one setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.errors import ConfigError, Problem

WriteYaml = Callable[..., Path]


def run_values() -> dict[str, Any]:
    """Return the settings of a Flamingo run that are valid, except that its manifests do not exist."""
    return {
        "run_dir": "runs/test",
        "model": {"language_model": {"name": "owner/model"}},
        "data": {
            "sources": [
                {"type": "image_text", "name": "pairs", "manifest": "pairs.npz", "batch_size": 16},
                {"type": "interleaved", "name": "documents", "manifest": "documents.npz", "batch_size": 8},
            ]
        },
        "training": {"steps": 100},
        "schedule": {"warmup_steps": 10},
    }


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    """Return a function that writes settings or text to a YAML file and returns its path."""

    def write(values: dict[str, Any] | str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def problems_of(
    path: Path, overrides: list[str] | None = None, schema: type = FlamingoRunConfig, **kw: Any
) -> list[Problem]:
    """Return all problems that loading reports; fail the test if it reports none."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides or [], schema, **{"check_files": False, **kw})
    return list(caught.value.problems)
