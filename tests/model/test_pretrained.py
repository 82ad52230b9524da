"""Write and read exports, and import OpenFlamingo's checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import CrossAttentionConfig, LanguageModelConfig, PerceiverResamplerConfig, VisionEncoderConfig
from model.factory import build_flamingo, build_language_model, build_tokenizer
from model.flamingo import Flamingo
from model.imports.openflamingo import convert_openflamingo_state, load_openflamingo
from model.parameters import trainable_parameters
from model.presets import openflamingo
from model.pretrained import from_pretrained, save_flamingo
from model.processor import PROCESSOR_FILE, ProcessorConfig
from model.tower_statistics import OPENAI, with_statistics_of_old_exports
from tests.model.builders import (
    BEYOND,
    FAMILIES,
    VOCAB_SIZE,
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


def test_an_export_gives_the_same_model(tmp_path: Path) -> None:
    model = tiny_flamingo(gates=0.5, seed=7)
    save_flamingo(tmp_path, model, seed=7)
    assert load_file(tmp_path / "model.safetensors").keys() == trainable_parameters(model).keys()
    found = from_pretrained(tmp_path)
    assert torch.equal(logits(found), logits(model))
    assert not found.training
    assert found.tokens == model.tokens


def test_another_type_keeps_the_trained_weights_exactly(tmp_path: Path) -> None:
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
    """Build a model whose language model, tokenizer and tower are in sibling folders, with relative names."""
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


def test_an_export_keeps_pixels_and_statistics(tmp_path: Path) -> None:
    model = tiny_flamingo()
    save_flamingo(tmp_path, model, processor=ProcessorConfig.of(model.vision_encoder, image_fit="crop"))
    path = tmp_path / PROCESSOR_FILE
    assert json.loads(path.read_text())["image_fit"] == "crop"
    # Another version of open_clip may know other statistics of the same tower.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    assert from_pretrained(tmp_path).vision_encoder.mean == (0.1, 0.2, 0.3)


def test_an_older_export_keeps_the_statistics_that_it_was_trained_with(tmp_path: Path) -> None:
    save_flamingo(tmp_path, tiny_flamingo())
    (tmp_path / PROCESSOR_FILE).unlink()
    description = json.loads((tmp_path / "config.json").read_text())
    for name in ("mean", "std"):
        del description["model"]["vision"][name]
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert from_pretrained(tmp_path).vision_encoder.mean == (0.5, 0.4, 0.3)  # the tower's own
    weights = tmp_path / "weights.safetensors"
    save_file({}, weights)
    found = with_statistics_of_old_exports(VisionEncoderConfig("ViT-B-16-SigLIP", str(weights)))
    assert (found.mean, found.std) == OPENAI


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "llama"}'])
def test_a_damaged_description_is_named(tmp_path: Path, text: str) -> None:
    save_flamingo(tmp_path, tiny_flamingo())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        from_pretrained(tmp_path)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    save_flamingo(tmp_path, tiny_flamingo())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        from_pretrained(tmp_path)


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


def test_a_folder_that_is_no_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an exported Flamingo"):
        from_pretrained(tmp_path)
    save_flamingo(tmp_path, tiny_flamingo())
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99"):
        from_pretrained(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_flamingo(tmp_path, tiny_flamingo())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["extra"] = tensors.pop("resampler.latents")
    tensors["resampler.norm.bias"] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing \['resampler.latents'\], 1 unexpected \['extra'\], 1 of another"):
        from_pretrained(tmp_path)


def openflamingo_model(**architecture: Any) -> Flamingo:
    config = tiny_config("gpt_neox")
    language_model = LanguageModelConfig(architecture=FAMILIES["gpt_neox"] | {"num_hidden_layers": 4} | architecture)
    preset = openflamingo(language_model, every_n_layers=2)
    small = PerceiverResamplerConfig(
        **(preset.resampler.__dict__ | {"num_layers": 2, "num_heads": 2, "head_dim": 8, "num_latents": 4})
    )
    cross = CrossAttentionConfig(**(preset.cross_attention.__dict__ | {"num_heads": 2, "head_dim": 8}))
    vision = VisionEncoderConfig(name=config.vision.name, feature_norm=False)
    config = tiny_config(language_model=language_model, resampler=small, cross_attention=cross, vision=vision)
    return build_flamingo(config, BEYOND)


def openflamingo_checkpoint() -> dict[str, Tensor]:
    """Return random tensors with the public names of open_flamingo's state dict, for vision dim 24 and LM dim 32."""
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
    shapes["lang_encoder.gpt_neox.embed_in.weight"] = (VOCAB_SIZE + 3, 32)
    shapes["lang_encoder.embed_out.weight"] = (VOCAB_SIZE + 3, 32)
    return {f"module.{name}": torch.randn(shape) for name, shape in shapes.items()}


def test_an_openflamingo_checkpoint_is_loaded(tmp_path: Path) -> None:
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
    assert torch.equal(end.weight[0], state["lang_encoder.gpt_neox.embed_in.weight"][VOCAB_SIZE])
    assert torch.equal(image.weight[0], state["lang_encoder.gpt_neox.embed_in.weight"][VOCAB_SIZE + 1])
    image, end = model.language_model.output_rows
    assert torch.equal(end.weight[0], state["lang_encoder.embed_out.weight"][VOCAB_SIZE])
    assert not model.resampler.time_embeddings.any()
    assert model(text_with_media()[0], media=random_media(3)).logits.isfinite().all()


def test_unknown_openflamingo_names_are_named() -> None:
    model, checkpoint = openflamingo_model(), openflamingo_checkpoint()
    moved = {name.replace("layers.3.a", "layers.2.a"): tensor for name, tensor in checkpoint.items()}
    with pytest.raises(ValueError, match=r"gated_cross_attn_layers\.2.*cross_attention\.offset"):
        convert_openflamingo_state(model, moved)
    with pytest.raises(ValueError, match=r"perceiver\.media_time_embs"):
        convert_openflamingo_state(model, checkpoint | {"perceiver.media_time_embs": torch.zeros(1)})
    del checkpoint["module.perceiver.latents"]
    with pytest.raises(ValueError, match=r"1 missing \['resampler.latents'\]"):
        load_openflamingo(model, checkpoint)


@pytest.mark.parametrize(
    "layers",
    ["gpt_neox.layers", "old_decoder_blocks", "transformer.blocks", "transformer.h", "model.decoder.layers"],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_names_that_openflamingos_training_writes_are_loaded(layers: str, prefix: str) -> None:
    model, released, trained = openflamingo_model(), openflamingo_model(), {}
    for name, tensor in openflamingo_checkpoint().items():
        plain = name.removeprefix("module.")
        moved = re.sub(r"gated_cross_attn_layers\.(\d+)", rf"{layers}.\1.gated_cross_attn_layer", plain)
        trained[prefix + moved] = tensor
    trained[f"{prefix}lang_encoder.{layers}.0.decoder_layer.mlp.weight"] = torch.zeros(3)
    load_openflamingo(model, trained)
    load_openflamingo(released, openflamingo_checkpoint())
    expected = trainable_parameters(released)
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(parameter, expected[name]), name


def test_names_of_wrapped_modules_are_loaded() -> None:
    model, checkpoint = openflamingo_model(), openflamingo_checkpoint()
    wrapped = {
        name.replace("layers.3.", "layers.3._checkpoint_wrapped_module.").replace(
            "perceiver.", "perceiver._fsdp_wrapped_module."
        ): tensor
        for name, tensor in checkpoint.items()
    }
    load_openflamingo(model, wrapped)
    gate = checkpoint["module.lang_encoder.gated_cross_attn_layers.3.attn_gate"]
    assert torch.equal(model.blocks_with_cross_attention()[3].attention_gate, gate)


def test_two_names_of_one_tensor_must_agree() -> None:
    model, checkpoint = openflamingo_model(), openflamingo_checkpoint()
    second = "module.lang_encoder.old_decoder_blocks.3.gated_cross_attn_layer.attn_gate"
    gate = checkpoint["module.lang_encoder.gated_cross_attn_layers.3.attn_gate"]
    load_openflamingo(model, checkpoint | {second: gate.clone()})
    with pytest.raises(ValueError, match=r"old_decoder_blocks\.3\.gated_cross_attn_layer\.attn_gate"):
        load_openflamingo(model, checkpoint | {second: gate + 1})


def test_added_tokens_keep_their_start_without_a_table(caplog: pytest.LogCaptureFixture) -> None:
    model = openflamingo_model()
    start = model.language_model.input_rows[0].weight.clone()
    load_openflamingo(model, {n: t for n, t in openflamingo_checkpoint().items() if "embed" not in n})
    assert torch.equal(model.language_model.input_rows[0].weight, start)
    assert "no lang_encoder.gpt_neox.embed_in.weight" in caplog.text
    assert "no lang_encoder.lm_head.weight" in caplog.text


def test_a_missing_head_is_not_taken_from_the_input_embeddings(caplog: pytest.LogCaptureFixture) -> None:
    model, checkpoint = openflamingo_model(), openflamingo_checkpoint()
    start = model.language_model.output_rows[0].weight.clone()
    del checkpoint["module.lang_encoder.embed_out.weight"]
    load_openflamingo(model, checkpoint)
    assert torch.equal(model.language_model.output_rows[0].weight, start)
    assert not torch.equal(model.language_model.input_rows[0].weight, start)
    assert "no lang_encoder.lm_head.weight" in caplog.text
    assert "<|endofchunk|> and <image> keep their start" in caplog.text


def test_tied_embeddings_are_taken_from_the_one_table_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model, checkpoint = openflamingo_model(tie_word_embeddings=True), openflamingo_checkpoint()
    del checkpoint["module.lang_encoder.embed_out.weight"]
    load_openflamingo(model, checkpoint)
    table = checkpoint["module.lang_encoder.gpt_neox.embed_in.weight"]
    for rows in (model.language_model.input_rows, model.language_model.output_rows):
        image, end = rows
        assert torch.equal(end.weight[0], table[VOCAB_SIZE])
        assert torch.equal(image.weight[0], table[VOCAB_SIZE + 1])
    (record,) = caplog.records
    assert f"{VOCAB_SIZE} of {VOCAB_SIZE} rows" in record.getMessage()


def lm_tables(model: Flamingo) -> tuple[Tensor, Tensor]:
    """Return the language model's input and output embeddings with three rows for added tokens."""
    lm = model.language_model.lm
    added = torch.ones(3, model.language_model.dim)
    tables = (lm.get_input_embeddings().weight, lm.get_output_embeddings().weight)
    inputs, outputs = (torch.cat([table.detach()[:VOCAB_SIZE], added]) for table in tables)
    return inputs, outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_rows_than_the_frozen_ones_are_counted(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model, checkpoint = openflamingo_model(), openflamingo_checkpoint()
    inputs, outputs = lm_tables(model)
    names = ("module.lang_encoder.gpt_neox.embed_in.weight", "module.lang_encoder.embed_out.weight")
    load_openflamingo(model, checkpoint | dict(zip(names, (inputs.to(dtype), outputs.to(dtype)), strict=True)))
    assert caplog.text == ""
    outputs[[2, 5], 0] += 0.5
    load_openflamingo(model, checkpoint | dict(zip(names, (inputs.to(dtype), outputs.to(dtype)), strict=True)))
    (record,) = caplog.records
    assert f"2 of {VOCAB_SIZE} rows of lang_encoder.embed_out.weight differ" in record.getMessage()
    assert "by up to 0.5" in record.getMessage()


@pytest.mark.parametrize(
    ("shape", "message"),
    [((VOCAB_SIZE + 1, 32), f"has {VOCAB_SIZE + 1} rows"), ((VOCAB_SIZE + 2, 48), "has dim 48")],
)
def test_tables_of_another_language_model_are_named(shape: tuple[int, int], message: str) -> None:
    checkpoint = openflamingo_checkpoint() | {"module.lang_encoder.embed_out.weight": torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        load_openflamingo(openflamingo_model(), checkpoint)


def test_a_file_without_a_state_dict_is_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds a list"):
        load_openflamingo(openflamingo_model(), tmp_path / "list.pt")


def test_a_pickle_in_an_openflamingo_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"model_state_dict": Malicious()}, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_openflamingo(openflamingo_model(), tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()
