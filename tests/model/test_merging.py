"""Test that an export with merged adapters computes what the export with adapters computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.config import FlamingoConfig, TrainableConfig
from model.factory import build_flamingo
from model.flamingo import Flamingo
from model.lora import LORA
from model.pretrained import from_pretrained, save_flamingo
from model.tokens import SpecialTokenIds
from tests.model.builders import EOS, FAMILIES, text_with_media, tiny_config, tiny_tokenizer, wake
from trainer import export

TOKENIZER = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def trained(tmp_path: Path, trainable: TrainableConfig) -> Flamingo:
    """Write an export of a model whose adapters have moved from their start, and return the model."""
    tiny_tokenizer(**TOKENIZER).save_pretrained(tmp_path / "tokenizer")
    config = tiny_config(trainable=trainable)
    # With weights of a usual size, logits are of order 1, and 1e-6 is a few roundings.
    architecture = {**FAMILIES["llama"], "initializer_range": 0.02}
    named = replace(config.language_model, architecture=architecture, tokenizer=str(tmp_path / "tokenizer"))
    model = build(replace(config, language_model=named))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    tokenizer = tiny_tokenizer(**TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|endofchunk|>"]})
    save_flamingo(tmp_path / "export", model, tokenizer=tokenizer)
    return model.eval()


def build(config: FlamingoConfig) -> Flamingo:
    tokens = SpecialTokenIds(image_id=48, end_of_chunk_id=49, bos_id=1, eos_id=EOS, pad_id=0)
    model = build_flamingo(config, tokens)
    wake(model, 0.5)
    return model


@pytest.mark.parametrize(
    "trainable",
    [TrainableConfig(language_model="lora"), TrainableConfig(language_model="lora", vision="lora", resampler="frozen")],
)
def test_merged_equals_unmerged(tmp_path: Path, trainable: TrainableConfig) -> None:
    model = trained(tmp_path, trainable)
    assert export.main([str(tmp_path / "export"), "--merge-adapters", "--output", str(tmp_path / "merged")]) == 0
    merged = from_pretrained(tmp_path / "merged")
    ids, media = text_with_media()
    with torch.no_grad():
        expected = model(ids, media=media).logits
        torch.testing.assert_close(merged(ids, media=media).logits, expected, rtol=0, atol=1e-6)
    assert merged.config.trainable.language_model == "full"
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert not [name for name in names if LORA in name or "base_layer" in name]
    assert not (tmp_path / "merged" / "adapter").exists()


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert export.main([str(tmp_path / "export"), "--merge-adapters", "--output", str(tmp_path / "merged")]) == 1
    assert not (tmp_path / "merged").exists()
    return capsys.readouterr().err


def test_an_export_without_adapters_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, TrainableConfig())
    assert "has no adapters to merge: model.trainable.language_model is frozen" in refused(tmp_path, capsys)


def test_quantized_weights_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, TrainableConfig(language_model="lora"))

    def quantized(config: FlamingoConfig, *arguments: object, **settings: object) -> Flamingo:
        model = build(config)
        model.language_model.lm.config.quantization_config = type("Quantized", (), {"quant_method": "gptq"})()
        return model

    monkeypatch.setattr("model.merging.build_flamingo", quantized)
    assert "the language model is quantized (gptq)" in refused(tmp_path, capsys)


def test_only_a_flamingo_has_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("task: language_model\n")
    assert export.main([str(tmp_path), "--merge-adapters"]) == 1
    assert "--merge-adapters: only a Flamingo has adapters" in capsys.readouterr().err
