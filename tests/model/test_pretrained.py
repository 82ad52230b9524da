"""Exports, and OpenFlamingo's checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import CrossAttentionConfig, LanguageModelConfig, PerceiverResamplerConfig, VisionEncoderConfig
from model.factory import build_flamingo, build_language_model, build_tokenizer
from model.flamingo import Flamingo
from model.imports.openflamingo import load_openflamingo, openflamingo_state
from model.parameters import trainable_parameters
from model.presets import openflamingo
from model.pretrained import from_pretrained, save_flamingo
from tests.model.builders import (
    BEYOND,
    FAMILIES,
    VOCABULARY,
    random_media,
    text_with_media,
    tiny_config,
    tiny_flamingo,
    tiny_tokenizer,
    wake,
    write_tower,
)


def logits(model: Flamingo) -> Tensor:
    ids, media = text_with_media()
    with torch.no_grad():
        return model(ids, media=media).logits


def test_round_trip(tmp_path: Path) -> None:
    model = tiny_flamingo(gates=0.5, seed=7)
    save_flamingo(tmp_path, model, seed=7)
    assert load_file(tmp_path / "model.safetensors").keys() == trainable_parameters(model).keys()
    found = from_pretrained(tmp_path)
    assert torch.equal(logits(found), logits(model))
    assert not found.training
    assert found.tokens == model.tokens


def test_another_type_is_exactly_the_trained_weights(tmp_path: Path) -> None:
    model = build_flamingo(tiny_config(), BEYOND, dtype="bfloat16")
    wake(model, 0.5)
    save_flamingo(tmp_path, model)
    wide = from_pretrained(tmp_path, dtype="float32")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert torch.equal(wide.get_parameter(name), parameter.float()), name
    narrow = from_pretrained(tmp_path, dtype=torch.bfloat16)
    rotary = narrow.language_model.lm.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    assert torch.equal(logits(narrow), logits(model))


def local_flamingo(folder: Path) -> Flamingo:
    """A model whose language model, tokenizer and tower lie in folders beside each other, named relatively."""
    lm = build_language_model(LanguageModelConfig(architecture=FAMILIES["llama"]), torch.float32)
    lm.save_pretrained(folder / "lm")
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "lm")
    (folder / "tower").mkdir()
    write_tower(folder / "tower")
    config = tiny_config(
        language_model=LanguageModelConfig(name="lm"), vision=VisionEncoderConfig(name="local-dir:tower")
    )
    return build_flamingo(config, build_tokenizer(config))


def test_relative_paths_move_with_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    model = local_flamingo(tmp_path / "a")
    wake(model, 0.5)
    save_flamingo("export", model, tokenizer=build_tokenizer(model.config).tokenizer)
    described = json.loads((tmp_path / "a/export/config.json").read_text())["model"]
    assert described["language_model"]["name"] == "../lm"
    assert described["vision"]["name"] == "local-dir:../tower"
    assert str(tmp_path) not in (tmp_path / "a/export/config.json").read_text()
    expected = logits(model)
    shutil.move(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    found = from_pretrained("b/export")
    assert torch.equal(logits(found), expected)
    shutil.rmtree(tmp_path / "b/lm/tokenizer.json", ignore_errors=True)
    assert build_tokenizer(found.config).ids == BEYOND


def test_other_frozen_weights_are_an_error_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_flamingo("export", local_flamingo(tmp_path))
    weights = load_file("lm/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, "lm/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 different: language_model\.lm\.model\.layers\.1\.mlp\.up_proj\.weight"):
        from_pretrained("export")
    assert isinstance(from_pretrained("export", verify_frozen=False), Flamingo)


def test_another_seed_for_random_frozen_parts_is_an_error(tmp_path: Path) -> None:
    save_flamingo(tmp_path, tiny_flamingo(seed=7), seed=8)
    with pytest.raises(ValueError, match="language_model"):
        from_pretrained(tmp_path)


def test_what_is_not_an_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an exported Flamingo"):
        from_pretrained(tmp_path)
    save_flamingo(tmp_path, tiny_flamingo())
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99"):
        from_pretrained(tmp_path)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    save_flamingo(tmp_path, tiny_flamingo())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["extra"] = tensors.pop("resampler.latents")
    tensors["resampler.norm.bias"] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing \['resampler.latents'\], 1 unexpected \['extra'\], 1 of another"):
        from_pretrained(tmp_path)


def openflamingo_model() -> Flamingo:
    config = tiny_config("gpt_neox")
    language_model = LanguageModelConfig(architecture=FAMILIES["gpt_neox"] | {"num_hidden_layers": 4})
    preset = openflamingo(language_model, every=2)
    small = PerceiverResamplerConfig(
        **(preset.resampler.__dict__ | {"num_layers": 2, "num_heads": 2, "head_dim": 8, "num_latents": 4})
    )
    cross = CrossAttentionConfig(**(preset.cross_attention.__dict__ | {"num_heads": 2, "head_dim": 8}))
    vision = VisionEncoderConfig(name=config.vision.name, feature_norm=False)
    config = tiny_config(language_model=language_model, resampler=small, cross_attention=cross, vision=vision)
    return build_flamingo(config, BEYOND)


def openflamingo_checkpoint() -> dict[str, Tensor]:
    """The public names of open_flamingo's state dict, with random tensors: 24 wide vision, 32 wide language model."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"perceiver.latents": (4, 24)}
    shapes |= {"perceiver.norm.weight": (24,), "perceiver.norm.bias": (24,)}
    for n in range(2):
        for norm in ("0.norm_media", "0.norm_latents", "1.0"):
            shapes |= {f"perceiver.layers.{n}.{norm}.{kind}": (24,) for kind in ("weight", "bias")}
        shapes[f"perceiver.layers.{n}.0.to_q.weight"] = (16, 24)
        shapes[f"perceiver.layers.{n}.0.to_kv.weight"] = (32, 24)
        shapes[f"perceiver.layers.{n}.0.to_out.weight"] = (24, 16)
        shapes[f"perceiver.layers.{n}.1.1.weight"] = (96, 24)
        shapes[f"perceiver.layers.{n}.1.3.weight"] = (24, 96)
    for n in (1, 3):
        prefix = f"lang_encoder.gated_cross_attn_layers.{n}."
        shapes |= {f"{prefix}attn_gate": (1,), f"{prefix}ff_gate": (1,)}
        for norm in ("attn.norm", "ff.0"):
            shapes |= {f"{prefix}{norm}.{kind}": (32,) for kind in ("weight", "bias")}
        shapes[f"{prefix}attn.to_q.weight"] = (16, 32)
        shapes[f"{prefix}attn.to_kv.weight"] = (32, 24)
        shapes[f"{prefix}attn.to_out.weight"] = (32, 16)
        shapes[f"{prefix}ff.1.weight"] = (128, 32)
        shapes[f"{prefix}ff.3.weight"] = (32, 128)
    shapes["lang_encoder.gpt_neox.embed_in.weight"] = (VOCABULARY + 3, 32)
    shapes["lang_encoder.embed_out.weight"] = (VOCABULARY + 3, 32)
    return {f"module.{name}": torch.randn(shape) for name, shape in shapes.items()}


def test_openflamingo_checkpoint(tmp_path: Path) -> None:
    model, checkpoint = openflamingo_model(), openflamingo_checkpoint()
    torch.save({"model_state_dict": checkpoint, "epoch": 3}, tmp_path / "checkpoint.pt")
    load_openflamingo(model, tmp_path / "checkpoint.pt")
    state = {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
    layer = model.resampler.layers[1]
    assert torch.equal(layer.attention.norm_features.weight, state["perceiver.layers.1.0.norm_media.weight"])
    assert torch.equal(layer.attention.key_value.weight, state["perceiver.layers.1.0.to_kv.weight"])
    assert torch.equal(layer.feed_forward.down.weight, state["perceiver.layers.1.1.3.weight"])
    block = model.blocks_with_cross_attention()[3]
    assert torch.equal(block.attention_gate, state["lang_encoder.gated_cross_attn_layers.3.attn_gate"])
    assert torch.equal(block.feed_forward.norm.bias, state["lang_encoder.gated_cross_attn_layers.3.ff.0.bias"])
    # OpenFlamingo adds <|endofchunk|> first
    image, end = model.language_model.input_rows
    assert torch.equal(end.weight[0], state["lang_encoder.gpt_neox.embed_in.weight"][VOCABULARY])
    assert torch.equal(image.weight[0], state["lang_encoder.gpt_neox.embed_in.weight"][VOCABULARY + 1])
    image, end = model.language_model.output_rows
    assert torch.equal(end.weight[0], state["lang_encoder.embed_out.weight"][VOCABULARY])
    assert not model.resampler.time_embeddings.any()
    assert model(text_with_media()[0], media=random_media(3)).logits.isfinite().all()


def test_openflamingo_names_that_have_no_place() -> None:
    model, checkpoint = openflamingo_model(), openflamingo_checkpoint()
    moved = {name.replace("layers.3.a", "layers.2.a"): tensor for name, tensor in checkpoint.items()}
    with pytest.raises(ValueError, match=r"gated_cross_attn_layers\.2.*cross_attention\.offset"):
        openflamingo_state(model, moved)
    with pytest.raises(ValueError, match=r"perceiver\.frame_embs"):
        openflamingo_state(model, checkpoint | {"perceiver.frame_embs": torch.zeros(1)})
    del checkpoint["module.perceiver.latents"]
    with pytest.raises(ValueError, match=r"1 missing \['resampler.latents'\]"):
        load_openflamingo(model, checkpoint)


def test_openflamingo_rows_keep_their_start_without_a_table() -> None:
    model = openflamingo_model()
    start = model.language_model.input_rows[0].weight.clone()
    load_openflamingo(model, {n: t for n, t in openflamingo_checkpoint().items() if "embed" not in n})
    assert torch.equal(model.language_model.input_rows[0].weight, start)


def test_a_pickle_in_an_openflamingo_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"model_state_dict": Malicious()}, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_openflamingo(openflamingo_model(), tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()
