"""Check that every mistake on the command line of ``trainer.generate`` gets a message of one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model.config import LanguageModelConfig
from model.factory import build_flamingo, build_tokenizer
from model.pretrained import save_flamingo
from tests.data.helpers import image_bytes
from tests.model.builders import FAMILIES, tiny_config, tiny_tokenizer
from trainer import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the export of a tiny model, an image, and a file that is none."""
    made = tmp_path_factory.mktemp("generate")
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(made / "tokenizer")
    language_model = LanguageModelConfig(architecture=FAMILIES["gpt2"], tokenizer=str(made / "tokenizer"))
    config = tiny_config(language_model=language_model)
    tokenizer = build_tokenizer(config)
    save_flamingo(made / "export", build_flamingo(config, tokenizer), tokenizer=tokenizer.tokenizer)
    (made / "a.png").write_bytes(image_bytes())
    (made / "text.png").write_text("no image")
    return made


def run(folder: Path, *arguments: str) -> int:
    """Return the exit code; relative files are those of the folder."""
    files = {"a.png", "text.png", "none.png", "export"}
    resolved = [str(folder / word) if word in files else word for word in arguments]
    try:
        return generate.main([str(folder / "export"), "--device", "cpu", *resolved])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-beams 0", "--num-beams: 0 must be at least 1"),
        ("--num-beams -1", "--num-beams"),
        ("--num-beams two", "'two' is not a whole number"),
        ("--max-new-tokens 0", "--max-new-tokens: 0 must be at least 1"),
        ("--max-new-tokens 1.5", "'1.5' is not a whole number"),
        ("--sample --top-p 0", "--top-p: 0 must be above 0 and at most 1"),
        ("--sample --top-p 1.5", "--top-p"),
        ("--sample --top-p nan", "--top-p"),
        ("--sample --temperature 0", "--temperature: 0 must be above 0"),
        ("--sample --temperature inf", "--temperature"),
        ("--seed -1", "--seed"),
        ("--seed 99999999999999999999", "--seed"),
        ("--image-tokens -1", "--image-tokens: -1 must be at least 0"),
        ("--num-frames 0", "--num-frames"),
        ("--frames-per-second 0", "--frames-per-second"),
        ("--device cuda:77", "--device: torch cannot compute on 'cuda:77'"),
        ("--device toaster", "--device: torch cannot compute on 'toaster'"),
        ("--device meta", "--device: torch cannot compute on 'meta'"),
        ("--image none.png", "none.png: no such file"),
        ("--image export", "export: a folder"),
        ("--video none.png", "none.png: no such file"),
    ],
)
def test_an_impossible_flag_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert run(folder, *arguments.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "<image>a red"], "--prompt has 1 <image>, but no file is given.*--image or --video"),
        (["--prompt", "<image><image>", "--image", "a.png"], "2 <image>, but 1 file is given"),
        (["--prompt", "a red", "--image", "a.png"], "no <image>, but 1 file is given.*write <image> in --prompt"),
        (["--prompt", "<image>", "--image", "a.png", "--image", "a.png"], "1 <image>, but 2 files are given"),
        (["--image", "text.png"], "--image .*text.png: corrupt_image"),
        (["--video", "a.png"], "--video .*a.png: unsupported_video"),
        (["--max-new-tokens", "5000", "--num-beams", "2"], "64 positions.*max_new_tokens is 5000"),
    ],
)
def test_a_mistake_in_the_prompt_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(folder, *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trainer.generate: ")
    assert re.search(message, error), error


def test_a_folder_that_is_no_export_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([str(tmp_path), "--device", "cpu"]) == 1
    assert f"{tmp_path} is not an exported Flamingo" in capsys.readouterr().err


def test_every_file_gets_an_image_token_without_a_prompt(folder: Path) -> None:
    assert run(folder, "--image", "a.png", "--image", "a.png", "--max-new-tokens", "2") == 0
    assert run(folder, "--max-new-tokens", "2") == 0


def test_settings_of_sampling_alone_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(folder, "--max-new-tokens", "2", "--top-p", "0.5") == 0
    assert "--top-p: no effect without --sample" in caplog.text
