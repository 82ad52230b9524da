"""docs/architecture.md is true: its code runs, and the files and names that it gives exist."""

from __future__ import annotations

import re
from typing import Any

from tests.project.commands import ROOT

TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_code_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)


def test_files_and_folders_exist() -> None:
    named = re.findall(r"`((?:configs|tests|trainer|model|csrc|launch_scripts)/[\w./-]*)`", TEXT)
    drawn = re.findall(r"(?:trainer|model)/[\w/]*(?:\.py)?", TEXT)
    assert len(named) > 20
    assert [name for name in [*named, *drawn] if not (ROOT / name).exists()] == []


def test_names_exist() -> None:
    sources = "".join(
        path.read_text(encoding="utf-8") for room in ("model", "trainer") for path in (ROOT / room).rglob("*.py")
    )
    names = set(re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)+\b", TEXT)) - {"DeepSpeed"}
    assert len(names) > 8
    assert {name for name in names if not re.search(rf"\b(?:class|def) {name}", sources)} == set()
