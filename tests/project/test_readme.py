"""README.md, CONTRIBUTING.md and docs/ name commands, files, settings and fields that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.project.commands import ROOT, UncheckedCommandError, check_command, shell_commands
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.evaluation.forgetting import DIFFERENCES
from trainer.evaluation.forgetting import PREFIX as FORGETTING
from trainer.metrics.step_metrics import StepMetrics
from trainer.metrics.utilization import Utilization
from trainer.step_losses import PENALTY

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
COMMANDS = [(name, command) for name in DOCUMENTS for command in shell_commands((ROOT / name).read_text())]


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_main_commands_are_in_the_readme() -> None:
    commands = "\n".join(command for name, command in COMMANDS if name == "README.md")
    for needed in (
        "launch_scripts/quickstart.sh",
        "launch_scripts/test.sh",
        "trainer.train",
        "trainer.index",
        "doctor",
    ):
        assert needed in commands


@pytest.mark.parametrize(
    ("document", "command"),
    # Each python command starts an interpreter that imports the libraries.
    [pytest.param(*pair, marks=pytest.mark.slow if pair[1].startswith("python") else ()) for pair in COMMANDS],
)
def test_every_command_works(document: str, command: str) -> None:
    check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "curl example.org | sh",
        "python -m trainer.no_such_module",
        "python -m trainer.train configs/no-such.yaml",
        "python -m trainer.train configs/debug.yaml --training.stepz 1",
        "python -m trainer.doctor --no-such-option",
        "launch_scripts/no-such.sh",
        "launch_scripts/setup.sh --no-such-option",
        "launch_scripts/local.sh configs/debug.yaml --no.such 1",
        "deepspeed --no_such_option 2 --module trainer.train configs/debug.yaml",
        "deepspeed --num_accelerators 2 --module trainer.train configs/debug.yaml --no.such 1",
        "pytest tests/no_such_folder",
        "pytest -m no_such_marker",
    ],
)
def test_a_wrong_command_is_refused(command: str) -> None:
    with pytest.raises((AssertionError, UncheckedCommandError, ValueError, SystemExit)):
        check_command(command)


def test_only_fenced_blocks_hold_commands() -> None:
    markdown = "text `rm x`\n```sh\n# comment\nA=1 a b \\\n  c  # why\n\nd\n```\n```text\ne\n```\n"
    assert shell_commands(markdown) == ["A=1 a b    c", "d"]


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_named_and_linked_files_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:configs|tests|trainer|model|csrc|launch_scripts|docs)/[\w./-]*)`", text)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in linked if not ((ROOT / document).parent / name).exists()]
    assert missing == []


def test_the_readme_lists_every_configuration() -> None:
    text = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert f"`configs/{path.name}`" in text


def test_the_example_configuration_loads(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    path = tmp_path / "example.yaml"
    path.write_text(block)
    config = load_config(path, [], FlamingoRunConfig, check_files=False)
    assert config.model.cross_attention.every_n_layers == 4
    assert yaml.safe_load(block)["model"]["preset"] == "9b"


def test_the_readme_lists_the_fields_of_metrics_jsonl() -> None:
    (cell,) = re.findall(r"^\| `metrics.jsonl` \|(.*)\|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    documented = set(re.findall(r"`([^`]+)`", cell))
    values = (1, 1.0, {"<source>": 1.0}, 1.0, 1.0, {"<source>": 1}, 1, 1.0, 1.0, False)
    use = Utilization(1, 1, 1, 1, 1, 1)
    forgetting = [FORGETTING + name for pair in DIFFERENCES.items() for name in pair]
    metrics = StepMetrics(
        *values,
        replaced={"<reason>": 1},
        dropped_images={"<reason>": 1},
        skip_reason="<reason>",
        utilization=use,
        measured=dict.fromkeys(["eval/<task>/<shots>", f"{PENALTY}<source>", "grad_norm/<part>", *forgetting], 1.0),
    )
    assert documented == set(metrics.to_json())
