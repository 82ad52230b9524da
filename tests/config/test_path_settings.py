"""Take what is typed: paths with ``~`` and variables, text with characters of YAML, paths relative to a caller."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import WriteYaml, problems_of, run_values
from trainer.config.caller_paths import absolute_arguments
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.loader import load_config
from trainer.config.path_settings import path_settings
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig
from trainer.config.yaml_file import parse_scalar

# Text that YAML would cut, change, or read as something else.
ODD_TEXTS = [
    "runs/try #2",
    "#2",
    "a & b",
    "&x y",
    "*x",
    "@laion",
    "!laion",
    "! x",
    "> x",
    "| x",
    "%x",
    "a: b",
    "- a",
    "[a]",
    "null # x",
    "no",
    "010",
    "1:30",
    "2026-11-23",
    "it's",
    "'a' # 'b'",
    " x ",
    "a\nb",
    "...",
    "naïve",
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)


def load(path: Path, *overrides: str) -> FlamingoRunConfig:
    return load_config(path, overrides, FlamingoRunConfig, check_files=False)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_text_on_the_command_line_is_taken_as_it_is_typed(write_yaml: WriteYaml, text: str) -> None:
    words = ["--run_dir", text, "--logging.wandb_project", text, f"--model.language_model.revision={text}"]
    config = load(write_yaml(run_values()), *words)
    assert str(config.run_dir) == text
    assert config.logging.wandb_project == config.model.language_model.revision == text


def test_words_of_a_list_are_taken_as_they_are_typed(write_yaml: WriteYaml) -> None:
    config = load(write_yaml(run_values()), "--data.sources.0.filters.languages", "no", "en", "#x")
    assert config.data.sources[0].filters.languages == ("no", "en", "#x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("010", 10),
        ("-0x1f", -31),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ('"8"', "8"),
        ("'null'", "null"),
        ("[0.9, 1e-3]", [0.9, 1e-3]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_values_that_are_no_text(text: str, value: Any) -> None:
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)


def test_numbers_and_dates_in_a_file_mean_what_they_say(write_yaml: WriteYaml) -> None:
    text = write_yaml(run_values()).read_text().replace("runs/test", "2026-11-23").replace("steps: 100", "steps: 0100")
    config = load(write_yaml(text))
    assert (str(config.run_dir), config.training.steps) == ("2026-11-23", 100)


@pytest.mark.parametrize("value", ["@laion", "!laion", "*laion", "`x`", "%x"])
def test_text_that_yaml_cannot_read_is_refused_with_advice(write_yaml: WriteYaml, value: str) -> None:
    (problem,) = problems_of(write_yaml(f"run_dir: {value}\n"))
    assert problem.source.endswith("run.yaml:1")
    assert "quotes" in problem.message


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("~/out", "/people/me/out"),
        ("~", "/people/me"),
        ("$SCRATCH/out", "/scratch/out"),
        ("${SCRATCH}/out", "/scratch/out"),
        ("a/${SCRATCH}b", "a//scratchb"),
        ("costs $5/~x", "costs $5/~x"),
    ],
)
def test_home_and_variables_are_expanded_in_every_path(write_yaml: WriteYaml, typed: str, expected: str) -> None:
    values = run_values()
    values["run_dir"] = typed
    values["data"] |= {"cache_dir": typed}
    values["data"]["sources"][0]["manifest"] = typed
    values["model"] = {
        "language_model": {"name": typed, "tokenizer": typed},
        "vision": {"name": f"local-dir:{typed}", "pretrained": typed},
    }
    values["deepspeed"] = {"offload_param": {"device": "nvme", "path": typed}}
    config = load(write_yaml(values), "--logging.wandb_project", typed)
    path = Path(expected)
    assert config.run_dir == config.data.cache_dir == config.data.sources[0].manifest == path
    assert config.deepspeed.offload_param.path == path
    language, vision = config.model.language_model, config.model.vision
    assert language.name == language.tokenizer == vision.pretrained == expected
    assert vision.name == f"local-dir:{expected}"
    assert config.logging.wandb_project == typed  # no path


def test_other_schemas_expand_too(write_yaml: WriteYaml) -> None:
    task = {"name": "a", "type": "shards", "manifest": "~/m.npz"}
    values = {"model": "$SCRATCH/export", "output": "~/results", "tasks": [task]}
    config = load_config(write_yaml(values), [], EvaluationConfig, check_files=False)
    paths = (config.model, config.output, config.tasks[0].manifest)
    assert paths == (Path("/scratch/export"), Path("/people/me/results"), Path("/people/me/m.npz"))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("$UNSET/out", "UNSET is not set"),
        ("${UNSET}/out", "UNSET is not set"),
        ("$EMPTY/out", "EMPTY is not set, or it is empty"),
        ("${SCRATCH:-x}/out", "cannot be expanded"),
        ("~nobody-of-this-name/out", "no user"),
    ],
)
def test_what_cannot_be_expanded_is_refused_with_its_setting(write_yaml: WriteYaml, typed: str, message: str) -> None:
    values = run_values()
    values["run_dir"] = values["data"]["sources"][1]["manifest"] = typed
    found = [problem for problem in problems_of(write_yaml(values), check_files=True) if typed in problem.message]
    assert [problem.path for problem in found] == ["run_dir", "data.sources.1.manifest"]
    assert all(message in problem.message for problem in found)


def test_all_settings_that_are_paths_are_known() -> None:
    assert {name for name in path_settings(FlamingoRunConfig) if not name.startswith(("data.", "evaluation."))} == {
        "run_dir",
        "deepspeed.raw",
        "deepspeed.offload_param.path",
        "deepspeed.offload_optimizer.path",
        "forgetting.manifest",
        "forgetting.task_folder",
    }
    assert {"data.cache_dir", "data.sources.0.manifest"} <= set(path_settings(FlamingoRunConfig))
    assert "tokenizer" in set(path_settings(ContrastiveRunConfig))


def test_paths_of_a_caller_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "lm").mkdir()
    words = ["mine.yaml", "--run_dir", "try #2", "--data.sources.pairs.manifest=m.npz", "--data.cache-dir", "/a"]
    words += ["--model.language_model.name", "lm", "--model.language_model.tokenizer", "owner/name"]
    words += [
        "--model.vision.name",
        "local-dir:lm",
        "--training.steps",
        "4",
        "--deepspeed.raw",
        "{a: 1}",
        "--data.ledger",
    ]
    words += ["--data.sources.0.name", "lm", "--checkpoint.keep_every", "null", "--deepspeed.offload_param.path", "~/x"]
    expected = [
        str(tmp_path / "mine.yaml"),
        *("--run_dir", str(tmp_path / "try #2"), f"--data.sources.pairs.manifest={tmp_path}/m.npz"),
        *("--data.cache-dir", "/a", "--model.language_model.name", str(tmp_path / "lm")),
        *("--model.language_model.tokenizer", "owner/name", "--model.vision.name", f"local-dir:{tmp_path}/lm"),
        *("--training.steps", "4", "--deepspeed.raw", "{a: 1}", "--data.ledger", "--data.sources.0.name", "lm"),
        *("--checkpoint.keep_every", "null", "--deepspeed.offload_param.path", "~/x"),
    ]
    assert absolute_arguments(words, tmp_path) == expected
    assert absolute_arguments(["configs/debug.yaml"], tmp_path) == ["configs/debug.yaml"]


def test_a_script_can_read_the_paths_of_a_caller(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.config.caller_paths", str(tmp_path), "x.yaml", "--run_dir", "try\n#2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0") == ["x.yaml", "--run_dir", f"{tmp_path}/try\n#2", ""]
