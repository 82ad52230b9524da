"""Try out families of causal language models: each trains, or is refused with its name when the model is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

from model import lm_probes
from model.activations import MicroBatch, count_activations
from model.config import LanguageModelConfig, SpecialTokensConfig
from model.factory import build_architecture, build_flamingo, build_language_model, build_tokenizer
from model.tiny_language_model import build_tiny
from model.tokens import add_special_tokens
from tests.model.builders import (
    BEYOND,
    FAMILIES,
    VOCAB_SIZE,
    text_with_media,
    tiny_config,
    tiny_flamingo,
    tiny_tokenizer,
)
from tests.model.language_models import LANGUAGE_MODELS, build, starts_as_language_model, step_loss, table_row, try_out
from trainer.config.data_config import DataConfig, ImageTextSource, TextSource
from trainer.errors import ConfigError
from trainer.tasks.language_model_fit import check_language_model

DOCUMENT = Path(__file__).parents[2] / "docs" / "language_models.md"


def documented_rows() -> dict[str, str]:
    """Return the rows of the tables of docs/language_models.md by the name of the family."""
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    by_name = {line.split("|")[1].strip(): line for line in rows}
    return {name: line for name, line in by_name.items() if not name.startswith(("Family", "---"))}


def test_the_document_lists_the_families_of_the_sweep() -> None:
    assert sorted(documented_rows()) == sorted(LANGUAGE_MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_family_does_what_the_document_says(family: str) -> None:
    assert table_row(family, try_out(family)) == documented_rows()[family]


@pytest.mark.parametrize("family", ["mamba", "bert", "gemma4_text"])
def test_unusual_families_train_in_bfloat16(family: str) -> None:
    """Check float32 hidden states (mamba), a module before the head (bert), embeddings of each block (gemma4_text)."""
    assert starts_as_language_model(family)
    in_float32, in_bfloat16 = float(step_loss(family, "float32")), float(step_loss(family, "bfloat16"))
    assert in_bfloat16 == pytest.approx(in_float32, rel=0.01)


def test_hidden_states_keep_their_type() -> None:
    """Check that the first block of an LM with float32 hidden states gets them unrounded at the start."""
    model = build("mamba", "bfloat16")
    seen: list[torch.Tensor] = []
    for block in model.language_model.decoder_blocks():
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids, media = text_with_media()
    with torch.no_grad():
        model(ids, media=media)
    assert seen[-1].dtype == torch.float32
    assert not torch.equal(seen[-1], seen[-1].bfloat16().float())


def test_added_tokens_use_the_row_of_id_0_in_further_tables() -> None:
    model = build("gemma4_text")
    table = model.language_model.lm.model.embed_tokens_per_layer
    ids = torch.tensor([[BEYOND.image_id, BEYOND.end_of_chunk_id, 5]])
    assert torch.equal(table(ids), table(torch.tensor([[0, 0, 5]])))
    assert not torch.equal(table(ids)[0, 1], table(ids)[0, 2])


@pytest.mark.parametrize("family", ["gemma3n_text", "deepseek_v4"])
def test_several_streams_are_refused_by_name(family: str) -> None:
    with pytest.raises(ValueError, match=r"ForCausalLM passes hidden states of 4 dimensions.*choose another"):
        build(family)


def test_hidden_states_are_checked_where_no_tiny_model_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(lm: Any) -> Any:
        raise KeyError("no tiny model")

    monkeypatch.setattr(lm_probes, "build_tiny", fail)
    ids, media = text_with_media()
    with pytest.raises(ValueError, match="DeepseekV4ForCausalLM passes hidden states of 4 dimensions"):
        build("deepseek_v4")(ids, media=media)
    plain = tiny_flamingo()
    assert not plain.language_model.fuses_loss
    assert torch.allclose(plain(ids, labels=ids, media=media).loss, tiny_flamingo()(ids, labels=ids, media=media).loss)


def on_meta(architecture: dict[str, Any]) -> Any:
    settings = dict(architecture)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))


@pytest.mark.parametrize("vocab_size", [2, 5, 15, 16, 31])
def test_small_vocabularies_are_probed(vocab_size: int) -> None:
    small = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    assert lm_probes.separates_packed_documents(on_meta({**FAMILIES["llama"], **small}))
    assert not lm_probes.separates_packed_documents(on_meta({**FAMILIES["opt"], **small}))
    assert lm_probes.probe_behavior(on_meta({**FAMILIES["llama"], **small})).gives_logits_unchanged


def test_probes_run_on_the_cpu_while_a_model_is_built_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = set()

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        devices.update(value.device.type for value in kwargs.values() if isinstance(value, torch.Tensor))

    def watched(lm: Any, **settings: int) -> Any:
        tiny = build_tiny(lm, **settings)
        tiny.register_forward_pre_hook(look, with_kwargs=True)
        return tiny

    monkeypatch.setattr(lm_probes, "build_tiny", watched)
    lm = on_meta(FAMILIES["llama"])
    with torch.device("meta"):
        assert lm_probes.probe_behavior(lm).gives_logits_unchanged
        assert lm_probes.separates_packed_documents(lm)
    assert devices == {"cpu"}


def test_any_failure_of_a_probe_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_probes, "_run", lambda *_: torch.empty(0, 0, 0))
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be probed"):
        lm_probes.separates_packed_documents(on_meta(FAMILIES["llama"]))


@pytest.mark.parametrize(
    ("architecture", "takes"),
    [
        (FAMILIES["llama"], True),
        (FAMILIES["gpt2"], False),
        (FAMILIES["opt"], False),
        (LANGUAGE_MODELS["gptj"], False),
        (LANGUAGE_MODELS["modernbert-decoder"], True),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_rows_longer_than_the_positions(architecture: dict[str, Any], takes: bool) -> None:
    lm = on_meta(architecture)
    assert lm_probes.takes_rows_beyond_positions(lm) == takes
    fits = DataConfig((ImageTextSource("a", Path("a"), 1, max_tokens=64),))
    check_language_model(fits, lm)
    beyond = DataConfig((*fits.sources, TextSource("b", Path("b"), 1, max_tokens=65, packing=True)))
    if takes:
        check_language_model(beyond, lm)
        return
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.max_tokens: 65 is more than the 64 positions"):
        check_language_model(beyond, lm)


def test_every_setting_that_does_not_suit_is_named_at_once() -> None:
    sources = (
        TextSource("a", Path("a"), 1, max_tokens=65, packing=True),
        TextSource("b", Path("b"), 1, max_tokens=99, packing=True),
    )
    with pytest.raises(ConfigError) as caught:
        check_language_model(DataConfig(sources), on_meta(FAMILIES["opt"]))
    assert [problem.path for problem in caught.value.problems] == [
        f"data.sources.{number}.{setting}" for setting in ("max_tokens", "packing") for number in (0, 1)
    ]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["bos_id", "eos_id", "pad_id"])
def test_special_tokens_beyond_the_embedding_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"language_model\.tokenizer: {name[:3]}_token \(id 48\).*48 tokens"):
        build_flamingo(tiny_config(), replace(BEYOND, image_id=49, end_of_chunk_id=50, **{name: VOCAB_SIZE}))


def test_a_tokenizer_beyond_the_embedding_is_refused() -> None:
    tokenizer = add_special_tokens(tiny_tokenizer(eos_token="</s>"), SpecialTokensConfig())
    small = LanguageModelConfig(architecture={**FAMILIES["llama"], "vocab_size": VOCAB_SIZE - 2})
    with pytest.raises(
        ValueError, match=r"language_model\.tokenizer has 2 tokens beyond .*46 tokens.*'w43' with id 47"
    ):
        build_flamingo(tiny_config(language_model=small), tokenizer)
    tokenizer.tokenizer.add_tokens(["<never in a text>"], special_tokens=True)  # texts give no special tokens
    assert build_flamingo(tiny_config(), tokenizer).language_model.vocab_size == VOCAB_SIZE + 2


def test_a_tokenizer_in_pure_python_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    folder = str(tmp_path)
    for setting, model in (
        ("tokenizer", LanguageModelConfig(tokenizer=folder)),
        ("name", LanguageModelConfig(name=folder)),
    ):
        with pytest.raises(ValueError, match=rf"language_model\.{setting} .*ByT5Tokenizer.*backend_tokenizer"):
            build_tokenizer(tiny_config(language_model=model))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no such type"}', '{"tokenizer_class": "Nowhere"}'])
def test_unreadable_files_are_refused_with_the_setting(tmp_path: Path, content: str) -> None:
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text(content)
    model = LanguageModelConfig(name=str(tmp_path), revision="v2")
    with pytest.raises(ValueError, match=r"language_model\.name .*language_model\.revision 'v2'.*cannot be loaded"):
        build_language_model(model, torch.float32)
    with pytest.raises(ValueError, match=r"language_model\.tokenizer .*cannot be loaded"):
        build_tokenizer(tiny_config(language_model=LanguageModelConfig(tokenizer=str(tmp_path))))


@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({"model_type": "no such type"}, None),
        ({"hidden_act": "no such activation"}, None),
        ({"num_attention_heads": 5}, None),
        ({"num_hidden_layers": "three"}, None),
        ({}, "no such attention"),
    ],
)
def test_an_impossible_architecture_is_refused_with_the_setting(changes: dict[str, Any], attention: str | None) -> None:
    config = LanguageModelConfig(architecture={**FAMILIES["llama"], **changes}, attention=attention)
    expected = r"language_model\.architecture .*" + ("" if attention is None else r"language_model\.attention .*")
    with pytest.raises(ValueError, match=expected):
        build_flamingo(tiny_config(language_model=config), BEYOND)


def test_running_out_of_memory_is_not_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", exhaust)
    with pytest.raises(torch.OutOfMemoryError):
        build_architecture("architecture", FAMILIES["llama"], torch.float32)


def test_activations_that_cannot_be_counted_say_what_to_set() -> None:
    model = build("jetmoe")  # its router asks for values, which fake tensors do not have
    with pytest.raises(ValueError, match=r"JetMoeForCausalLM cannot be counted.*training\.activation_checkpointing"):
        count_activations(model, MicroBatch(1, 8, 1), torch.float32)
