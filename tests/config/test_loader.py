"""Load YAML and overrides into dataclasses, and report every mistake in them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.config.conftest import WriteYaml, problems_of, run_values
from trainer.config.data_config import InterleavedSource
from trainer.config.loader import config_to_yaml, load_config, schema_of
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, LanguageModelRunConfig
from trainer.errors import ConfigError


def load(path: Path, *overrides: str) -> FlamingoRunConfig:
    return load_config(path, overrides, FlamingoRunConfig, check_files=False)


def test_values_become_the_dataclasses(write_yaml: WriteYaml) -> None:
    config = load(write_yaml(run_values()))
    assert config.training.steps == 100
    assert config.run_dir == Path("runs/test")
    assert [source.name for source in config.data.sources] == ["pairs", "documents"]
    assert isinstance(config.data.sources[1], InterleavedSource)
    assert config.data.sources[0].max_tokens == 64  # the default of this type, not of the base class
    assert config.optimizer.betas == (0.9, 0.999)


def test_scientific_notation_is_a_number_everywhere(write_yaml: WriteYaml) -> None:
    values = run_values()
    values["model"] = {"language_model": {"tokenizer": "t", "architecture": {"model_type": "llama", "eps": "EPS"}}}
    text = yaml.safe_dump(values).replace("EPS", "1e-5")
    architecture = load(write_yaml(text)).model.language_model.architecture
    assert architecture is not None
    assert architecture["eps"] == pytest.approx(1e-5)


def test_the_resolved_yaml_gives_the_same_settings_again(write_yaml: WriteYaml) -> None:
    config = load(write_yaml(run_values()), "--deepspeed.offload_param.device", "cpu", "--data.ledger")
    again = load(write_yaml(config_to_yaml(config), "resolved.yaml"))
    assert again == config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--training.steps", "12"], lambda c: c.training.steps == 12),
        (["--training.steps=12"], lambda c: c.training.steps == 12),
        (["--optimizer.lr", "3e-4"], lambda c: c.optimizer.lr == 3e-4),
        (["--optimizer.betas", "0.8", "0.95"], lambda c: c.optimizer.betas == (0.8, 0.95)),
        (["--optimizer.betas", "[0.8, 0.95]"], lambda c: c.optimizer.betas == (0.8, 0.95)),
        (["--data.sources.0.batch-size", "32"], lambda c: c.data.sources[0].batch_size == 32),
        (["--data.sources.documents.p_next", "0.5"], lambda c: c.data.sources[1].p_next == 0.5),
        (["--data.ledger"], lambda c: c.data.ledger is True),
        (["--logging.tensorboard", "false"], lambda c: c.logging.tensorboard is False),
        (["--checkpoint.keep_every", "null"], lambda c: c.checkpoint.keep_every is None),
        (["--run_dir", "20261123"], lambda c: c.run_dir == Path("20261123")),
        (["--model.language_model.name", "7"], lambda c: c.model.language_model.name == "7"),
        (["--deepspeed.raw.wall_clock_breakdown", "true"], lambda c: c.deepspeed.raw == {"wall_clock_breakdown": True}),
        (["--data.sources.0.micro_batch_size", "4", "--data.num_lanes", "4"], lambda c: c.data.num_lanes == 4),
        (["--training.steps", "70", "--training.steps", "80"], lambda c: c.training.steps == 80),
        (
            [
                "--data.sources",
                "[{type: text, name: a, manifest: m, batch_size: 4}]",
                "--data.sources.a.batch_size",
                "2",
            ],
            lambda c: c.data.sources[0].batch_size == 2,
        ),
    ],
)
def test_overrides(write_yaml: WriteYaml, words: list[str], expected: Any) -> None:
    assert expected(load(write_yaml(run_values()), *words))


def test_an_override_may_supply_what_the_file_leaves_out(write_yaml: WriteYaml) -> None:
    values = run_values()
    del values["training"], values["run_dir"]
    config = load(write_yaml(values), "--training.steps", "50", "--run_dir", "runs/other")
    assert (config.training.steps, config.run_dir) == (50, Path("runs/other"))


def test_all_errors_come_at_once_with_place_and_suggestion(write_yaml: WriteYaml) -> None:
    values = run_values()
    values["training"] = {"stesp": 100, "dtype": "bf16"}
    values["data"]["sources"][0]["batchsize"] = values["data"]["sources"][0].pop("batch_size")
    values["data"]["sources"][1]["type"] = "interleave"
    values["lr"] = 1e-4
    path = write_yaml(values)
    found = {problem.path: problem for problem in problems_of(path, ["--optimizer.lr", "-1", "--optimzer.eps", "1"])}
    assert "did you mean training.steps?" in found["training.stesp"].message
    assert "required" in found["training.steps"].message
    assert "'float32'" in found["training.dtype"].message
    assert "did you mean data.sources.0.batch_size?" in found["data.sources.0.batchsize"].message
    assert "did you mean 'interleaved'?" in found["data.sources.1"].message
    assert "did you mean optimizer.lr?" in found["lr"].message  # the right name in the wrong section
    assert "greater than 0" in found["optimizer.lr"].message
    assert "did you mean optimizer?" in found["optimzer"].message
    assert found["optimizer.lr"].source == found["optimzer"].source == "command line"
    line = 1 + path.read_text().splitlines().index("lr: 0.0001")
    assert found["lr"].source == f"{path}:{line}"
    assert len(found) == 9


def test_errors_across_settings_come_together_with_misspelled_keys(write_yaml: WriteYaml) -> None:
    values = run_values()
    values["logging"] = {"tensorbord": False}
    values["deepspeed"] = {"zero_stage": 2, "offload_param": {"device": "cpu"}}
    paths = [problem.path for problem in problems_of(write_yaml(values))]
    assert paths == ["logging.tensorbord", "deepspeed.offload_param.device"]


def test_no_follow_up_errors_from_a_section_that_is_already_wrong(write_yaml: WriteYaml) -> None:
    values = run_values()
    values["schedule"] = {"warmup_stepz": 10}  # the default of 5000 would be more than 100 steps
    assert [problem.path for problem in problems_of(write_yaml(values))] == ["schedule.warmup_stepz"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir: a\nrun_dir: b\n", "first set on line 1"),
        ("training: {steps: 1, steps: 2}\n", "training.steps: stands here a second time"),
        ("run_dir: [unclosed\n", "is not valid YAML"),
        ("- a\n- list\n", "must be a mapping of settings, not a list"),
        ("run_dir: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ],
)
def test_broken_yaml(write_yaml: WriteYaml, text: str, message: str) -> None:
    path = write_yaml(text)
    assert message in str(problems_of(path)[0])
    assert str(problems_of(path)[0]).startswith(f"{path}:" if "mapping" not in message else str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in str(problems_of(tmp_path / "absent.yaml")[0])
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("run_dir: caf\xe9".encode("latin-1"))
    assert "not UTF-8" in str(problems_of(latin)[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps"], "unexpected 'steps'"),
        (["--data.sources.5.weight", "1"], "has no element '5'; it has 2 (named pairs, documents)"),
        (["--data.sources.x.weight", "1"], "has no element 'x'"),
        (["--optimizer.betas", "0.9", "0.99", "--optimizer.betas.0.x", "1"], "is 0.9, which has nothing named 'x'"),
        (["--training", "8"], "must be a mapping of settings"),
        (["--training.steps", "many"], "valid integer"),
        (["--training.steps"], "needs a number, not true"),
        (["--optimizer.betas", "0.9", "true"], "needs a number, not true"),
    ],
)
def test_bad_overrides(write_yaml: WriteYaml, words: list[str], message: str) -> None:
    found = [problem for problem in problems_of(write_yaml(run_values()), words) if message in problem.message]
    assert found
    assert found[0].source == "command line"


def test_wrong_settings_are_reported_without_loading_torch(write_yaml: WriteYaml) -> None:
    program = (
        "import pathlib, sys\n"
        "from trainer.config.loader import load_config\n"
        "from trainer.config.run_config import FlamingoRunConfig\n"
        f"path = pathlib.Path({str(write_yaml(run_values()))!r})\n"
        "load_config(path, [], FlamingoRunConfig, check_files=False)\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_which_schema_a_file_is_for(write_yaml: WriteYaml) -> None:
    assert schema_of(run_values()) is FlamingoRunConfig
    text = {"architecture": {}, "data": {"sources": [{"type": "text"}]}}
    pairs = {"architecture": "ViT-B-32", "data": {"sources": [{"type": "image_text"}]}}
    assert (schema_of(text), schema_of(pairs)) == (LanguageModelRunConfig, ContrastiveRunConfig)
    assert schema_of({**pairs, "task": "language_model"}) is LanguageModelRunConfig


def test_config_error_is_a_value_error_and_lists_everything() -> None:
    config_error = ConfigError([], title="x")
    assert isinstance(config_error, ValueError)
    assert config_error.exit_code == 2


def test_dataclasses_are_frozen(write_yaml: WriteYaml) -> None:
    config = load(write_yaml(run_values()))
    with pytest.raises(AttributeError):
        config.run_dir = Path("elsewhere")  # type: ignore[misc]
    assert replace(config, run_dir=Path("elsewhere")).run_dir == Path("elsewhere")
