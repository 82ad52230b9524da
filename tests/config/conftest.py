"""A small run that is right in everything, to be made wrong in one thing a test."""

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
    """A valid Flamingo run, but for its manifests, which do not exist."""
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
    """``write_yaml(values_or_text)`` -> the file's path."""

    def write(values: dict[str, Any] | str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def problems_of(
    path: Path, overrides: list[str] | None = None, schema: type = FlamingoRunConfig, **kw: Any
) -> list[Problem]:
    """Everything that loading reports; fails the test when it reports nothing."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides or [], schema, **{"check_files": False, **kw})
    return list(caught.value.problems)
