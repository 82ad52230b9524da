"""Compare the settings of a run with those that its checkpoint was written with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoint.layout import CONFIG

_NOT_A_SETTING_OF_TRAINING = "run_dir"


def changed_settings(checkpoint: Path, settings: str) -> dict[str, tuple[Any, Any]]:
    """Return old and new value of every setting that differs, by dotted name.

    Args:
        checkpoint: Folder of the checkpoint.
        settings: The run's settings as YAML.
    """
    old = dict(_leaves(yaml.safe_load((checkpoint / CONFIG).read_text(encoding="utf-8"))))
    new = dict(_leaves(yaml.safe_load(settings)))
    names = sorted((old.keys() | new.keys()) - {_NOT_A_SETTING_OF_TRAINING})
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of each setting; the items of a list of mappings are numbered."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
