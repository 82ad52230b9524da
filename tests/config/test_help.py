"""Require a help text of its own for every setting and every command-line option."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.config.data_config import VideoTextSource
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.help import example_settings, settings_help
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig
from trainer.config.validation import setting_paths

TRAINER = Path(__file__).parents[2] / "trainer"
SCHEMAS = (FlamingoRunConfig, LanguageModelRunConfig, ContrastiveRunConfig, EvaluationConfig)


@pytest.fixture(params=["80", "120"])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Print for terminals of two widths: tyro has a layout of its own for narrow ones."""
    monkeypatch.setenv("COLUMNS", request.param)


def options_in(text: str) -> dict[str, str]:
    """Return the text below each option, with its default."""
    # A list element like an earlier one names only other values; long choices go on in the next lines.
    text = re.sub(r"^  Same options as .*\n(?:  --.*\n?)*", "", text, flags=re.MULTILINE)
    found = re.findall(r"^  --([a-z]\S*)[^\n]*(?:\n  [^\s-][^\n]*)*((?:\n {8}.*)*)", text, flags=re.MULTILINE)
    return {name: " ".join(below.split()) for name, below in found}


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_has_a_help_text_and_a_default(schema: type[Any]) -> None:
    options = options_in(settings_help(example_settings(schema)))
    assert [name for name, text in options.items() if not re.fullmatch(r"\S.*\. \(default: .+\)", text)] == []


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_is_an_option(schema: type[Any]) -> None:
    shown = {re.sub(r"\.\d+\.", ".0.", name) for name in options_in(settings_help(example_settings(schema)))}
    expected = set(setting_paths(schema))
    if schema is FlamingoRunConfig:  # trainer.evaluate shows the settings of its tasks
        expected = {path for path in expected if not path.startswith("evaluation.tasks.")}
    if schema in (LanguageModelRunConfig, ContrastiveRunConfig):  # the example has only the sources that they take
        expected = {path for path in expected if not path.startswith("data.sources.")}
    assert expected - shown == set()


def test_each_option_is_printed_once() -> None:
    text = settings_help(example_settings(FlamingoRunConfig))
    names = re.findall(r"^  (--[a-z]\S*)", text, flags=re.MULTILINE)
    assert len(names) == len(set(names))
    assert "usage" not in text and "``" not in text


def test_a_source_like_an_earlier_one_shows_other_values_only() -> None:
    config = example_settings(FlamingoRunConfig)
    videos = [VideoTextSource(name=name, manifest=Path("m.npz"), batch_size=8) for name in ("first", "second")]
    text = settings_help(replace(config, data=replace(config.data, sources=tuple(videos))))
    section = text.partition(" data.sources.1 options\n")[2].partition("\n\n")[0]
    assert section.splitlines()[1:] == [
        "  Same options as data.sources.0, with other values:",
        "  --data.sources.1.name second",
    ]


def calls_of_add_argument() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(TRAINER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                yield f"{path.relative_to(TRAINER)}:{node.lineno} {ast.unparse(node.args[0])}", node


def test_every_option_of_a_command_has_a_help_text_with_its_default() -> None:
    lacking = []
    for name, call in calls_of_add_argument():
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        text = keywords.get("help", "")
        if len(text) < 8:
            lacking.append(f"{name}: help")
        # An option that may be left out says what happens then; a flag does so by itself.
        is_option = ast.unparse(call.args[0]).startswith(("'-", '"-'))
        is_free = is_option and "required" not in keywords and keywords.get("action") != "'store_true'"
        if is_free and "SUPPRESS" not in text and "default:" not in text and "default" in keywords:
            lacking.append(f"{name}: default")
    assert lacking == []
