"""docs/interop.md names settings and files that exist; tests/distributed/test_interop.py runs its commands."""

from __future__ import annotations

import re

from model.config import FlamingoConfig
from model.imports.convert import FAMILIES
from model.presets import PRESETS, get_preset
from tests.project.commands import ROOT, check_command, shell_commands
from trainer.export import FORMATS

PAGE = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
LLAMA, IDEFICS = get_preset("llama-3.2-11b-vision"), get_preset("idefics-9b")


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def test_its_commands_would_work() -> None:
    for command in shell_commands(PAGE):
        check_command(command)


def test_its_formats_exist() -> None:
    assert set(re.findall(r"--format (\w+)", PAGE)) <= set(FORMATS)
    assert set(FAMILIES) <= set(FORMATS)


def test_its_table_shows_the_presets() -> None:
    """The last two columns are the values of the presets, where a cell is one value or a pair."""
    settings = FlamingoConfig().to_dict()
    rows = re.findall(r"^\| `(\w+)\.(\w+)`(?:, `(\w+)`)? \|.*\| (.+?) \| (.*?) ?\|$", PAGE, flags=re.MULTILINE)
    assert len(rows) > 8
    for section, first, second, idefics, llama in rows:
        names = [name for name in (first, second) if name]
        assert all(name in settings[section] for name in names), (section, names)
        for cell, preset in ((idefics, IDEFICS), (llama, LLAMA)):
            if not cell or "`" in cell:
                continue
            shown = [value.strip() for value in re.split(r"[,;]", cell.split(" (")[0])]
            values = [getattr(getattr(preset, section), name) for name in names]
            words = [_word(value) for value in values]
            if section == "cross_attention" and names[-1] == "num_kv_heads":
                words[1] = words[0] if words[1] == "none" else words[1]
            assert shown == words, (section, names, cell)


def test_there_is_a_configuration_for_each_published_model() -> None:
    published = {name for name in PRESETS if "-" in name}
    assert {path.stem for path in (ROOT / "configs/continue").glob("*.yaml")} == {*published, "tiny"}
