"""Test the switch of each part: what trains, what stays, adapters, and what an export holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import AutoModelForCausalLM

from model.config import FlamingoConfig, LanguageModelConfig, LoraConfig, TrainableConfig
from model.factory import build_flamingo
from model.flamingo import Flamingo
from model.lora import LORA, merge_adapters, save_adapter
from model.parameters import frozen_digests, trainable_parameters
from model.pretrained import from_pretrained, kept_tensors, save_flamingo, save_pretrained, start_from_export
from model.processor import ProcessorConfig
from model.trainable_parts import PARTS, part_of
from tests.model.builders import (
    BEYOND,
    FAMILIES,
    IMAGE_SIZE,
    random_media,
    text_with_media,
    tiny_config,
    tiny_flamingo,
    tower_folder,
    wake,
)

ROWS: dict[str, TrainableConfig] = {
    "the paper's": TrainableConfig(),
    "tower too": TrainableConfig(vision="full"),
    "LM too": TrainableConfig(language_model="full"),
    "adapters": TrainableConfig(vision="lora", language_model="lora"),
    "from random": TrainableConfig(language_model="from_random"),
    "adapters alone": TrainableConfig(
        language_model="lora", resampler="frozen", cross_attention="frozen", new_tokens="frozen"
    ),
}


def build(trainable: TrainableConfig, family: str = "llama", **changes: Any) -> Flamingo:
    model = tiny_flamingo(family, trainable=trainable, **changes)
    wake(model, 0.5)
    return model


def step(model: Flamingo, lr: float = 0.1) -> float:
    """Take a step of plain gradient descent and return the loss before it."""
    ids, media = text_with_media()
    model.train()
    loss = model(ids, labels=ids, media=media).loss
    loss.backward()
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter -= lr * parameter.grad / 24
            parameter.grad = None
    return float(loss.detach())


@pytest.mark.parametrize("row", ROWS)
def test_exactly_the_chosen_parts_change(row: str) -> None:
    model = build(ROWS[row])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    digests = frozen_digests(model)
    losses = [step(model) for _ in range(3)]
    assert losses[2] < losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    for part in PARTS:
        mode = getattr(ROWS[row], part)
        names = {name for name in before if part_of(name) == part}
        if mode == "frozen":
            assert not names & changed, part
        elif mode == "lora":
            assert names & changed == {name for name in names if LORA in name}, part
        else:  # nothing of this batch reaches the last norms of the tower's unused features
            assert len(names & changed) > 0.8 * len(names), part
    assert frozen_digests(model) == digests
    assert digests.keys() == before.keys() - trainable_parameters(model).keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_adapters_start_as_nothing(family: str) -> None:
    ids, media = text_with_media()
    plain, language_model, both = (
        build(ROWS[row], family).eval()(ids, media=media).logits
        for row in ("the paper's", "adapters alone", "adapters")
    )
    assert torch.equal(language_model, plain)
    # torch's attention takes another path where a graph is built, so the tower's features are rounded otherwise.
    torch.testing.assert_close(both, plain)


def test_dropout_is_that_of_a_trained_part() -> None:
    ids, media = text_with_media()

    def draws(trainable: TrainableConfig, **changes: Any) -> bool:
        model = build(trainable, "gpt2", **changes).train()
        return not torch.equal(model(ids, media=media).logits, model(ids, media=media).logits)

    assert not draws(ROWS["the paper's"]) and draws(ROWS["LM too"])
    assert not draws(ROWS["adapters"])
    model = build(ROWS["adapters"], "gpt2", language_model_lora=LoraConfig(dropout=0.5))
    step(model)  # B is no longer 0
    model.train()
    assert not torch.equal(model(ids, media=media).logits, model(ids, media=media).logits)
    model.eval()
    assert torch.equal(model(ids, media=media).logits, model(ids, media=media).logits)


@pytest.mark.parametrize("row", ["LM too", "adapters"])
def test_recomputed_blocks_give_the_same_gradient_with_dropout(row: str) -> None:
    ids, media = text_with_media()
    gradients = []
    for recompute in (False, True):
        model = build(ROWS[row], "gpt2", language_model_lora=LoraConfig(dropout=0.3)).train()
        model.set_activation_checkpointing(recompute)
        torch.manual_seed(0)
        model(ids, labels=ids, media=media).loss.backward()
        gradients.append([parameter.grad for parameter in trainable_parameters(model).values()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_targets_choose_layers() -> None:
    model = build(ROWS["adapters"], language_model_lora=LoraConfig(rank=2, targets=("q_proj", "down_proj")))
    adapted = {name.partition(LORA)[0].rpartition(".")[2] for name in trainable_parameters(model) if ".lm." in name}
    assert {name for name in adapted if name.endswith("proj")} == {"q_proj", "down_proj"}
    shapes = {tuple(p.shape) for name, p in trainable_parameters(model).items() if "q_proj.lora_A" in name}
    assert shapes == {(2, 32)}


@pytest.mark.parametrize("targets", [("no_such_layer",), ("lm_head",), ("embed_tokens",), ()])
def test_targets_that_match_no_layer_of_the_blocks_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"language_model_lora\.targets.*q_proj"):
        build(ROWS["adapters"], language_model_lora=LoraConfig(targets=targets))


def test_freezing_everything_is_refused() -> None:
    nothing = TrainableConfig(resampler="frozen", cross_attention="frozen", new_tokens="frozen")
    with pytest.raises(ValueError, match=r"model\.trainable freezes every part"):
        build(nothing)


@pytest.mark.parametrize("row", ROWS)
def test_an_export_holds_what_trained(row: str, tmp_path: Path) -> None:
    model = tiny_flamingo(trainable=ROWS[row])
    step(model)
    save_flamingo(tmp_path / "export", model)
    loaded = from_pretrained(tmp_path / "export")
    ids, media = text_with_media()
    assert torch.equal(loaded(ids, media=media).logits, model.eval()(ids, media=media).logits)
    assert loaded.config.trainable == ROWS[row]


def test_parts_that_are_frozen_now_keep_what_an_earlier_run_trained(tmp_path: Path) -> None:
    earlier = build(ROWS["the paper's"])
    step(earlier)
    save_flamingo(tmp_path / "earlier", earlier)
    model = tiny_flamingo(trainable=ROWS["adapters alone"])
    start_from_export(model, tmp_path / "earlier")
    step(model)
    state = dict(trainable_parameters(model))
    kept = kept_tensors(tmp_path / "earlier", state)
    save_pretrained(
        tmp_path / "later",
        state | kept,
        model.config,
        tokens=model.tokens,
        dtype="float32",
        frozen=frozen_digests(model),
        processor=ProcessorConfig.of(model.vision_encoder),
    )
    ids, media = text_with_media()
    loaded = from_pretrained(tmp_path / "later")
    assert torch.equal(loaded(ids, media=media).logits, model.eval()(ids, media=media).logits)


def test_a_trained_tower_goes_on_with_larger_images(tmp_path: Path) -> None:
    earlier = build(ROWS["tower too"])
    step(earlier)
    save_flamingo(tmp_path / "earlier", earlier)
    table = earlier.vision_encoder.tower.positional_embedding
    same = tiny_flamingo(trainable=ROWS["tower too"])
    start_from_export(same, tmp_path / "earlier")
    assert torch.equal(same.vision_encoder.tower.positional_embedding, table)
    larger = tiny_flamingo(trainable=ROWS["tower too"], vision=replace(tiny_config().vision, image_size=2 * IMAGE_SIZE))
    start_from_export(larger, tmp_path / "earlier")
    resized = larger.vision_encoder.tower.positional_embedding
    assert resized.shape == (1 + 16, 24) and torch.equal(resized[0], table[0])
    reference = open_clip.create_model(f"local-dir:{tower_folder()}").visual
    reference.grid_size = (4, 4)
    state = {"visual.positional_embedding": table.detach().clone()}
    holder = torch.nn.Module()
    holder.visual = reference
    open_clip.model.resize_pos_embed(state, holder)
    torch.testing.assert_close(resized, state["visual.positional_embedding"])
    ids, _ = text_with_media()
    assert larger(ids, labels=ids, media=random_media(3, size=2 * IMAGE_SIZE)).loss.isfinite()


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    tied = {**FAMILIES["llama"], "tie_word_embeddings": True}
    model = tiny_flamingo(trainable=ROWS["LM too"], language_model=LanguageModelConfig(architecture=tied))
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if "vision" not in name}
    assert {f"language_model.lm.{name}.weight" for name in ("lm_head", "model.embed_tokens")} <= state.keys()
    processor = ProcessorConfig.of(model.vision_encoder)
    save_pretrained(tmp_path, state, model.config, tokens=model.tokens, dtype="float32", frozen={}, processor=processor)
    ids, media = text_with_media()
    loaded = from_pretrained(tmp_path, verify_frozen=False)
    assert torch.equal(loaded(ids, media=media).logits, model.eval()(ids, media=media).logits)


def named_lm(folder: Path) -> FlamingoConfig:
    """Return the config of a model around a language model that is saved in a folder."""
    config = tiny_config(trainable=ROWS["adapters alone"])
    model = build_flamingo(replace(config, trainable=TrainableConfig()), BEYOND)
    model.language_model.lm.config.vocab_size = FAMILIES["llama"]["vocab_size"]
    model.language_model.lm.save_pretrained(folder)
    return replace(config, language_model=replace(config.language_model, name=str(folder), architecture=None))


def test_peft_loads_the_adapter_over_the_plain_language_model(tmp_path: Path) -> None:
    from peft import PeftModel

    config = named_lm(tmp_path / "lm")
    model = build_flamingo(config, BEYOND)
    step(model)
    save_flamingo(tmp_path / "export", model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    ids = text_with_media()[0].clamp(max=40)
    expected = model.eval()(ids).logits[..., :48]
    assert not torch.allclose(plain(ids).logits, expected, atol=1e-4)
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "export" / "adapter"))
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-6)
    description = json.loads((tmp_path / "export" / "adapter" / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == str(tmp_path / "lm")


def test_merged_equals_unmerged() -> None:
    model = build(ROWS["adapters"])
    step(model)
    ids, media = text_with_media()
    expected = model.eval()(ids, media=media).logits
    merge_adapters(model)
    torch.testing.assert_close(model(ids, media=media).logits, expected, rtol=0, atol=1e-5)


def test_an_untrained_or_empty_adapter_is_an_error(tmp_path: Path) -> None:
    model = build(ROWS["adapters alone"])
    with pytest.raises(ValueError, match="never trained"):
        save_flamingo(tmp_path / "export", model)
    with pytest.raises(ValueError, match="empty"):
        save_adapter(tmp_path / "adapter", {}, LoraConfig(), None)
