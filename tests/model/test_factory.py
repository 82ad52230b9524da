"""Build models: tokens, types, seeds, and partitioning contexts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from model.config import FlamingoConfig, LanguageModelConfig, SpecialTokensConfig
from model.factory import build_flamingo, build_language_model, build_tokenizer
from model.parameters import frozen_digests, trainable_parameters
from model.processor import encode_prompt
from model.tokens import add_special_tokens
from tests.model.builders import BEYOND, BOS, EOS, FAMILIES, VOCAB_SIZE, text_with_media, tiny_config, tiny_tokenizer


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_seed_alone_decides_the_start() -> None:
    torch.manual_seed(1)
    first = build_flamingo(tiny_config(), BEYOND, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert equal(first, build_flamingo(tiny_config(), BEYOND, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    other = build_flamingo(tiny_config(), BEYOND, seed=4)
    assert not torch.equal(first.resampler.latents, other.resampler.latents)
    assert not torch.equal(
        first.cross_attention[0].attention.query.weight, other.cross_attention[0].attention.query.weight
    )


def test_low_precision_starts_at_the_rounded_values() -> None:
    wide = trainable_parameters(build_flamingo(tiny_config("gpt2"), BEYOND))
    narrow = build_flamingo(tiny_config("gpt2"), BEYOND, dtype="bfloat16")
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for name, parameter in trainable_parameters(narrow).items():
        if "_rows" not in name:  # these start at an embedding of a language model that was drawn in bfloat16
            assert torch.equal(parameter, wide[name].bfloat16()), name
    assert torch.get_default_dtype() == torch.float32


def test_added_tokens_start_at_the_end_of_sequence_token() -> None:
    model = build_flamingo(tiny_config("gemma3"), BEYOND)
    lm = model.language_model.lm
    scaled = lm.get_input_embeddings().weight[EOS] * 32**0.5  # Gemma scales inside its embedding
    for row in model.language_model.input_rows:
        torch.testing.assert_close(row.weight[0], scaled)
    for row in model.language_model.output_rows:
        assert torch.equal(row.weight[0], lm.lm_head.weight[EOS])


class Partitioned:
    """Imitate ZeRO-3: hide parameters as soon as the module that owns them is made."""

    def __init__(self) -> None:
        self.hidden: dict[nn.Parameter, torch.Tensor] = {}

    @contextlib.contextmanager
    def partition(self) -> Iterator[None]:
        classes: list[Any] = []

        def wrap(cls: Any) -> None:
            original = cls.__init__

            def init(module: nn.Module, *args: Any, **kwargs: Any) -> None:
                original(module, *args, **kwargs)
                if type(module) is cls:
                    self.hide(module.parameters(recurse=False))

            classes.append((cls, original))
            cls.__init__ = init

        for cls in _all_subclasses(nn.Module):
            if "__init__" in vars(cls):
                wrap(cls)
        try:
            yield
        finally:
            for cls, original in classes:
                cls.__init__ = original

    def hide(self, parameters: Any) -> None:
        for parameter in parameters:
            if parameter not in self.hidden:
                parameter.ds_shape = parameter.shape
                self.hidden[parameter] = parameter.data
                parameter.data = parameter.data.new_empty(0)

    @contextlib.contextmanager
    def gather(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        inside = [p for p in parameters if p in self.hidden]
        for parameter in inside:
            parameter.data = self.hidden[parameter]
        yield
        for parameter in inside:
            parameter.data = parameter.data.new_empty(0)


def _all_subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_all_subclasses(sub) for sub in cls.__subclasses__()))


def test_partitioning_changes_neither_the_start_nor_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build_flamingo(tiny_config(), BEYOND)
    zero = Partitioned()

    def partitioned_lm(*args: Any, **options: Any) -> Any:
        lm = build_language_model(*args, **options)
        zero.hide(lm.parameters())
        return lm

    monkeypatch.setattr("model.factory.build_language_model", partitioned_lm)
    model = build_flamingo(tiny_config(), BEYOND, gather=zero.gather, partition=zero.partition)
    partitioned = {name for name, p in model.named_parameters() if p in zero.hidden}
    assert partitioned == {n for n, _ in model.named_parameters() if not n.startswith("vision_encoder")}
    for name, parameter in expected.named_parameters():
        with zero.gather([model.get_parameter(name)]):
            assert torch.equal(model.get_parameter(name), parameter), name
    assert frozen_digests(model, zero.gather) == frozen_digests(expected)


def test_a_language_model_from_a_folder(tmp_path: Path) -> None:
    lm = build_language_model(tiny_config("opt").language_model, torch.float32)
    lm.save_pretrained(tmp_path)
    config = tiny_config(language_model=LanguageModelConfig(name=str(tmp_path)))
    found = build_flamingo(config, BEYOND).language_model.lm
    assert type(found) is type(lm)
    assert equal(found, lm)


def test_pickled_weights_of_a_language_model_are_refused(tmp_path: Path) -> None:
    lm = build_language_model(tiny_config().language_model, torch.float32)
    lm.config.save_pretrained(tmp_path)
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), nn.Module)  # Hugging Face would load them
    with pytest.raises(ValueError, match=r"language_model\.name.*safetensors"):
        build_language_model(LanguageModelConfig(name=str(tmp_path)), torch.float32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LanguageModelConfig(), "one of language_model.name and language_model.architecture"),
        (LanguageModelConfig(name="x", architecture=FAMILIES["llama"]), "one of language_model.name"),
        (LanguageModelConfig(architecture={"hidden_size": 8}), "model_type"),
    ],
)
def test_wrong_settings_of_a_language_model_are_named(config: LanguageModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_language_model(config, torch.float32)


def test_a_tokenizer_gets_the_added_tokens(tmp_path: Path) -> None:
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(tmp_path)
    config = tiny_config(language_model=LanguageModelConfig(name=None, tokenizer=str(tmp_path)))
    tokenizer = build_tokenizer(config)
    assert tokenizer.ids == BEYOND
    assert encode_prompt(tokenizer, "w0 <image>w1<|endofchunk|>") == [BOS, 4, VOCAB_SIZE, 5, VOCAB_SIZE + 1]
    assert tokenizer.decode([4, VOCAB_SIZE, 5, VOCAB_SIZE + 1, EOS]) == "w0 w1"
    # a model with these tokens runs
    model = build_flamingo(replace(tiny_config(), tokens=config.tokens), tokenizer)
    ids, media = text_with_media()
    assert model(ids, labels=ids, media=media).loss.isfinite()


def test_missing_special_tokens_fall_back_to_the_end_of_sequence() -> None:
    found = add_special_tokens(tiny_tokenizer(eos_token="</s>"), SpecialTokensConfig())
    assert (found.bos_id, found.eos_id, found.pad_id) == (EOS, EOS, EOS)
    with pytest.raises(ValueError, match="end-of-sequence"):
        add_special_tokens(tiny_tokenizer(), SpecialTokensConfig())


def test_a_token_that_the_tokenizer_already_has_keeps_its_id() -> None:
    found = add_special_tokens(tiny_tokenizer(eos_token="</s>"), SpecialTokensConfig(image="w7"))
    assert (found.image_id, found.end_of_chunk_id) == (11, VOCAB_SIZE)
    again = add_special_tokens(found.tokenizer, SpecialTokensConfig(image="w7"))
    assert again.ids == found.ids


def test_unusable_tokens_and_tokenizers_are_named() -> None:
    with pytest.raises(ValueError, match="same token"):
        add_special_tokens(tiny_tokenizer(eos_token="</s>"), SpecialTokensConfig(image="<x>", end_of_chunk="<x>"))
    with pytest.raises(ValueError, match=r"language_model\.tokenizer"):
        build_tokenizer(tiny_config())


def test_the_config_survives_a_round_trip() -> None:
    config = tiny_config("opt", preset="x")
    assert FlamingoConfig.from_dict(config.to_dict()) == config
    assert FlamingoConfig.from_dict({}) == FlamingoConfig()
    with pytest.raises(ValueError, match=r"resampler\.latent\b"):
        FlamingoConfig.from_dict({"resampler": {"latent": 3}})
    with pytest.raises(ValueError, match=r"visoin"):
        FlamingoConfig.from_dict({"visoin": {}})
