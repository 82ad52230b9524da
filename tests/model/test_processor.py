"""Check that prompts and training encode the same text to the same ids, and that exports keep the settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model.config import SpecialTokensConfig, VisionEncoderConfig
from model.processor import (
    PROCESSOR_FILE,
    PlainTextEncoder,
    ProcessorConfig,
    Special,
    TextError,
    TextLayout,
    VideoSampling,
    encode_prompt,
    load_processor_config,
    read_processor_config,
)
from model.tokens import FlamingoTokenizer, add_special_tokens
from model.vision_encoder import VisionEncoder, build_tower
from tests.data.helpers import DECODER, SAMPLE, image_bytes, mmc4
from tests.model.builders import tower_folder
from trainer.config.data_config import DataConfig, ImageTextSource, InterleavedSource, VideoTextSource
from trainer.data.samples.interleaved_rows import InterleavedBuilder
from trainer.data.samples.pair_rows import PairBuilder
from trainer.data.samples.rows import sample_rng
from trainer.data.samples.tower_decoder import trained_processor
from trainer.tasks.row_builders import flamingo_encoding

TEXTS = ["a red square", "a blue circle with  two spaces", "the <image> of a </s> letter", "été <|endofchunk|> x"]
PLAIN = [text for text in TEXTS if "<" not in text]


def byte_level(*, add_prefix_space: bool) -> Tokenizer:
    """Build a tokenizer like GPT-2's, or with a space before each text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    return made


def metaspace(prepend_scheme: str) -> Tokenizer:
    """Build a tokenizer like Llama's or Mistral's, which mark the beginning of a text or of every piece."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False))
    return made


def sentencepiece_legacy() -> Tokenizer:
    """Build a tokenizer like the conversions of Llama's first one, whose normalizer prepends the mark."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    )
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_level(add_prefix_space=False),
    "prefix_space": lambda: byte_level(add_prefix_space=True),
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_always": lambda: metaspace("always"),
    "sentencepiece_legacy": sentencepiece_legacy,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> FlamingoTokenizer:
    backend = KINDS[request.param]()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return add_special_tokens(fast, SpecialTokensConfig())


def pair_ids(tokenizer: FlamingoTokenizer, text: str, space: float = 0.0) -> list[int]:
    """Return the ids that training makes of an image and a caption."""
    source = ImageTextSource("pairs", Path("m.npz"), 1, max_tokens=500, space_prefix_probability=space)
    build = PairBuilder(source, flamingo_encoding(tokenizer), DECODER)
    return build({"png": image_bytes(), "txt": text.encode()}, SAMPLE, sample_rng(0, SAMPLE)).input_ids.tolist()


@pytest.mark.parametrize("text", PLAIN)
def test_a_prompt_has_the_ids_of_a_training_pair(tokenizer: FlamingoTokenizer, text: str) -> None:
    assert encode_prompt(tokenizer, f"<image>{text}<|endofchunk|>") == pair_ids(tokenizer, text)
    with_space = pair_ids(tokenizer, text, space=1.0)
    assert encode_prompt(tokenizer, f"<image> {text}<|endofchunk|>") == with_space
    assert encode_prompt(tokenizer, f"<image>{text}<|endofchunk|>", space_after_image=True) == with_space
    assert encode_prompt(tokenizer, f"<image> {text}<|endofchunk|>", space_after_image=True) == with_space


def test_a_prompt_has_the_ids_of_a_training_document(tokenizer: FlamingoTokenizer) -> None:
    source = InterleavedSource("documents", Path("m.npz"), 1, max_tokens=500)
    build = InterleavedBuilder(source, flamingo_encoding(tokenizer), DECODER)
    members = mmc4(["first words", *PLAIN, "more of it"], [1, 2])
    row = build(members, SAMPLE, sample_rng(0, SAMPLE)).input_ids.tolist()
    prompt = f"first words<image>{PLAIN[0]}<|endofchunk|><image>{PLAIN[1]} more of it<|endofchunk|>"
    assert encode_prompt(tokenizer, prompt) == row


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_data_never_become_special_tokens(tokenizer: FlamingoTokenizer, text: str) -> None:
    ids = TextLayout(tokenizer).encode_parts([Special.IMAGE, text, Special.END_OF_CHUNK])
    assert ids == pair_ids(tokenizer, text)
    assert ids.count(tokenizer.image_id) == ids.count(tokenizer.end_of_chunk_id) == 1
    assert tokenizer.eos_id not in ids


def test_a_users_prompt_has_only_the_two_added_tokens(tokenizer: FlamingoTokenizer) -> None:
    ids = encode_prompt(tokenizer, "</s><s><image><image>")
    plain = PlainTextEncoder(tokenizer.tokenizer.backend_tokenizer)
    assert ids == [tokenizer.bos_id, *plain("</s><s>"), tokenizer.image_id, tokenizer.image_id]
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_id]


def test_other_names_of_the_added_tokens_are_found() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(add_prefix_space=False), eos_token="</s>")
    fast.add_tokens(["</s>"], special_tokens=True)
    named = add_special_tokens(fast, SpecialTokensConfig(image="<img>", end_of_chunk="<img><end>"))
    ids = encode_prompt(named, "<img>a<img><end><image>")
    assert ids[:2] == [named.bos_id, named.image_id]
    assert ids[3] == named.end_of_chunk_id
    assert named.image_id not in ids[2:]


def test_a_text_that_the_vocabulary_holds_as_a_special_token_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(TextError, match="special_token"):
        encode_prompt(add_special_tokens(fast, SpecialTokensConfig()), "a </s>")


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    config = VisionEncoderConfig(name=f"local-dir:{tower_folder()}")
    with torch.device("meta"):
        return VisionEncoder(build_tower(config), config)


def test_the_settings_come_back(encoder: VisionEncoder, tmp_path: Path) -> None:
    video = VideoSampling(8, 2.0, 64)
    settings = {"image_fit": "crop", "image_tokens": 12, "video": video, "space_after_image": True}
    config = ProcessorConfig.of(encoder, image_tokens_of_sources={"a": 12, "b": None}, **settings)
    config.save(tmp_path)
    assert read_processor_config(tmp_path) == config == load_processor_config(tmp_path, encoder)
    assert (config.image_size, config.image_mean, config.patch_size) == (16, (0.5, 0.4, 0.3), 8)


def test_an_older_export_is_named(encoder: VisionEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_processor_config(tmp_path, encoder) == ProcessorConfig.of(encoder)
    assert f"{tmp_path} has no {PROCESSOR_FILE}" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format"),
        ({"unknown": 1}, "unknown"),
        ({"image_mean": None}, "cannot be used"),
        ({"video": {"num_frames": 2}}, "cannot be used"),
        ({"image_size": 32}, "image_size is 32, but the model's tower has 16"),
        ({"patch_size": 14}, "patch_size is 14, but the model's tower has 8"),
    ],
)
def test_a_damaged_file_is_named(
    encoder: VisionEncoder, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    ProcessorConfig.of(encoder).save(tmp_path)
    path = tmp_path / PROCESSOR_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"{PROCESSOR_FILE}.*{message}"):
        load_processor_config(tmp_path, encoder)
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=PROCESSOR_FILE):
        load_processor_config(tmp_path, encoder)


def test_a_run_describes_its_sources(encoder: VisionEncoder) -> None:
    pairs = ImageTextSource("pairs", Path("m.npz"), 4, image_tokens=12, space_prefix_probability=1.0)
    documents = InterleavedSource("documents", Path("m.npz"), 4, image_tokens=12, space_prefix_probability=1.0)
    found = trained_processor(DataConfig((pairs, documents), image_fit="stretch"), encoder)
    assert found == ProcessorConfig.of(encoder, image_fit="stretch", image_tokens=12, space_after_image=True)
    videos = VideoTextSource("videos", Path("m.npz"), 4, num_frames=3, frames_per_second=0.5, image_tokens=4)
    found = trained_processor(DataConfig((pairs, replace(documents, image_tokens=None), videos)), encoder)
    assert found.image_tokens == 12
    assert found.image_tokens_of_sources == {"pairs": 12, "documents": None}
    assert found.video == VideoSampling(3, 0.5, 4)
    assert not found.space_after_image
