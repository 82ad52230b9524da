"""Every command of the documentation has a test that runs it, or a reason why none does; every block has its test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.project.command_runs import BLOCKS, ELSEWHERE, NOT_RUN, ONLY_CHECKED
from tests.project.commands import ROOT, shell_commands
from tests.project.test_docs import PAGES
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "tests/verification/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}
COMMANDS = sorted({" ".join(command.split()) for text in TEXTS.values() for command in shell_commands(text)})
PATTERNS = (*ONLY_CHECKED, *ELSEWHERE, *NOT_RUN)


def test_a_test_runs_each_command_or_there_is_a_reason() -> None:
    entries = {command: [one for one in PATTERNS if re.fullmatch(one, command)] for command in COMMANDS}
    assert {command: found for command, found in entries.items() if len(found) != 1} == {}, (
        "tests/project/command_runs.py must say once which test runs a command, or why none does"
    )
    assert set(PATTERNS) - {one for found in entries.values() for one in found} == set(), "these match no command"


def test_the_named_tests_run_the_programs() -> None:
    lacking = [path for path, word in ELSEWHERE.values() if word not in (ROOT / path).read_text(encoding="utf-8")]
    assert lacking == []


@pytest.mark.parametrize("name", ["easy_vqa.md", "fine_tuning.md"])
def test_the_settings_of_a_page_load(name: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", TEXTS[f"docs/{name}"], flags=re.DOTALL | re.MULTILINE)
    shown = yaml.safe_load(block)
    model = {"preset": "debug", "language_model": {"tokenizer": "tokenizer"}}
    run_settings = {"run_dir": "run", "model": model, "training": {"steps": 10000}}
    values = run_settings | (shown if "data" in shown else {"data": shown})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "run.yaml", [], FlamingoRunConfig, check_files=False)
    assert config.data.sources


def test_every_block_of_code_or_settings_has_its_test() -> None:
    found = {
        (name, language)
        for name, text in TEXTS.items()
        for language in re.findall(r"^```(\w+)", text, flags=re.MULTILINE)
        if language not in ("sh", "text")  # sh: the tests above; text: what a command prints
    }
    by_test_docs = {(f"docs/{page}.md", "python") for page in PAGES}
    assert found - by_test_docs == set(BLOCKS)
    for (name, _), path in BLOCKS.items():
        assert Path(name).name in (ROOT / path).read_text(encoding="utf-8"), f"{path} does not read {name}"
