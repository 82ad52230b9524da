"""Test that a task whose library is not installed is refused before anything loads."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from tests.evaluation import layouts
from trainer.errors import ConfigError


def test_missing_libraries_are_named_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, find_spec = {"pycocoevalcap", "sklearn", "faiss"}, importlib.util.find_spec

    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in missing else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    coco, memes = layouts.write_coco(tmp_path / "coco"), layouts.write_memes(tmp_path / "memes")
    tasks = [{"name": "a", "type": "coco", **coco}, {"name": "b", "type": "hateful_memes", **memes}]
    (tmp_path / "export").mkdir()
    with pytest.raises(ConfigError) as error:
        layouts.evaluation(tmp_path, tmp_path / "export", tasks, demonstrations="rices")
    for part in ("tasks.0.type", "CIDEr needs pycocoevalcap", "tasks.1.type", "ROC-AUC", "faiss-cpu", "[evaluation]"):
        assert part in str(error.value)
    missing.clear()
    layouts.evaluation(tmp_path, tmp_path / "export", tasks)
