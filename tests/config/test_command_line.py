"""Read command lines of entry points, with and without mistakes."""

from __future__ import annotations

import pytest

from tests.config.conftest import WriteYaml, run_values
from trainer.config.command_line import parse_arguments, without_local_rank
from trainer.config.run_config import FlamingoRunConfig


def test_the_launchers_local_rank_is_ignored() -> None:
    assert without_local_rank(["--local_rank=1", "a.yaml", "--local_rank", "0", "--x", "1"]) == ["a.yaml", "--x", "1"]


def test_wrong_settings_exit_with_2(write_yaml: WriteYaml, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(FlamingoRunConfig, ["--local_rank=0", str(write_yaml(run_values())), "--training.step", "8"])
    assert caught.value.code == 2
    assert "did you mean training.steps?" in capsys.readouterr().err


def test_one_process_of_a_node_prints(
    write_yaml: WriteYaml, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as caught:
        parse_arguments(FlamingoRunConfig, [str(write_yaml("{}"))])
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_a_missing_yaml_argument_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(FlamingoRunConfig, [])
    assert caught.value.code == 2
    assert "first argument" in capsys.readouterr().err


def test_help_shows_every_section_and_the_values_of_the_file(
    write_yaml: WriteYaml, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(FlamingoRunConfig, [str(write_yaml(run_values())), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in ("--training.steps INT", "(default: 100)", "--data.sources.1.p_next", "--model.resampler.num_latents"):
        assert words in text
