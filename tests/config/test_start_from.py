"""``model.start_from`` supplies the settings of an export, and the preset does where the export is not there yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from model.presets import get_preset
from model.pretrained import save_flamingo
from tests.model.builders import BEYOND, tiny_config, tiny_flamingo, tiny_tokenizer
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.errors import ConfigError


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tokenizer = tiny_tokenizer(eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    tokenizer.add_tokens(["<image>", "<|endofchunk|>"], special_tokens=True)
    save_flamingo(folder, tiny_flamingo(tokens=BEYOND), tokenizer=tokenizer)
    return folder


def write(path: Path, model: dict[str, Any], **source: Any) -> Path:
    values = {"name": "a", "type": "image_text", "manifest": "a.npz", "batch_size": 8, "max_tokens": 8, **source}
    settings = {"run_dir": "run", "model": model, "data": {"sources": [values]}, "training": {"steps": 2}}
    settings["schedule"] = {"warmup_steps": 1}
    path.write_text(yaml.safe_dump(settings))
    return path


def load(path: Path, *, check_files: bool = False) -> FlamingoRunConfig:
    return load_config(path, [], FlamingoRunConfig, check_files=check_files)


def test_the_export_supplies_what_the_yaml_leaves_out(exported: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", {"start_from": str(exported), "cross_attention": {"attend": "all"}})
    model = load(path).model
    assert model.resampler == tiny_config().resampler
    assert model.cross_attention.attend == "all"
    assert model.cross_attention.num_heads == tiny_config().cross_attention.num_heads
    assert model.language_model.tokenizer == str(exported / "tokenizer")
    assert model.start_from == str(exported)


def test_the_environment_is_expanded(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPORTS", str(exported.parent))
    path = write(tmp_path / "run.yaml", {"start_from": f"$IMPORTS/{exported.name}"})
    assert load(path).model.start_from == str(exported)


def test_without_the_folder_the_preset_counts(tmp_path: Path) -> None:
    model = {"preset": "idefics-9b", "start_from": str(tmp_path / "none"), "language_model": {"tokenizer": "a/b"}}
    path = write(tmp_path / "run.yaml", model)
    assert load(path).model.cross_attention == get_preset("idefics-9b").cross_attention
    with pytest.raises(ConfigError, match=r"model.start_from.*no such folder: .*none; trainer.import_model"):
        load(path, check_files=True)


def test_a_folder_that_is_no_export(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", {"start_from": str(tmp_path), "language_model": {"name": "a/b"}})
    with pytest.raises(ConfigError, match=r"model.start_from.*is not an exported Flamingo: it has no config.json"):
        load(path)


def test_the_leak_of_transformers_is_not_packed(exported: Path, tmp_path: Path) -> None:
    model = {"start_from": str(exported), "cross_attention": {"without_media": "all_media"}}
    path = write(tmp_path / "run.yaml", model, packing=True)
    with pytest.raises(ConfigError, match=r"data.sources.0.packing.*media of other documents"):
        load(path)
