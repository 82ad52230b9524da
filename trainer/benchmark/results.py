"""Reading what ``trainer.benchmark --json`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HEAD = {"benchmark", "hardware", "versions"}
_ROW = {"case", "measure", "unit", "value", "baseline", "baseline_value", "ratio", "target", "met"}


def read_result(path: Path) -> tuple[Any, list[Any]]:
    """Header and rows. Raises: ValueError for a file that is no result."""
    try:
        head, *rows = json.loads(path.read_text(encoding="utf-8"))
        if not head.keys() >= _HEAD or not all(row.keys() >= _ROW for row in rows):
            raise ValueError("keys are missing")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file that trainer.benchmark --json wrote") from error
    return head, rows


def differing(path: str, left: Any, right: Any) -> list[str]:
    """Dotted paths, below the given one, of what two headers or configurations differ in."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = sorted(left.keys() | right.keys())
        below = f"{path}." if path else ""
        return [name for key in keys for name in differing(f"{below}{key}", left.get(key), right.get(key))]
    return [] if left == right else [path]
