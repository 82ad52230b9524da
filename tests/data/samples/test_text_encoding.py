"""Check that no text is encoded to special tokens."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from model.processor import PlainTextEncoder
from tests.data.helpers import BOS, EOC, IMAGE, SAMPLE, image_bytes, pair_builder
from trainer.data.errors import SampleError
from trainer.data.samples.rows import sample_rng
from trainer.data.samples.text_encoding import TextEncoding, first_ids


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.model = models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[])
    made.add_special_tokens(["<|endoftext|>", "<image>", "<|endofchunk|>"])
    made.enable_truncation(6)
    made.enable_padding(length=6, pad_token="<|endoftext|>", pad_id=256)
    return made


def test_text_never_becomes_a_special_token() -> None:
    made = tokenizer()
    assert 257 in made.encode("a<image>b").ids  # without the encoder
    safe = TextEncoding(PlainTextEncoder(made), 256, 256, 256, 257, 258)
    text = "a<image>b<|endofchunk|> <|endoftext|>"
    ids = safe.plain_ids(text)
    assert max(ids) < 256
    assert len(ids) == len(text)  # neither truncated nor padded
    assert made.decode(ids, skip_special_tokens=False).replace("Ġ", " ").replace(" ", "") == text.replace(" ", "")
    assert made.encode("a<image>b").ids[1] == 257  # the tokenizer itself does not change
    assert pickle.loads(pickle.dumps(safe)).plain_ids(text) == ids


def test_special_ids_from_an_encoder_are_refused() -> None:
    unsafe: Any = TextEncoding(lambda text: [20, IMAGE, 21], BOS, 2, 3, IMAGE, EOC)
    with pytest.raises(SampleError, match="special_token"):
        unsafe.plain_ids("a<image>b")


def test_sources_with_images_need_their_special_tokens() -> None:
    without = TextEncoding(PlainTextEncoder(tokenizer()), 256, 256, 256)
    builder = replace(pair_builder(), encoding=without)
    with pytest.raises(ValueError, match=r"model\.tokens\.image"):
        builder({"png": image_bytes(), "txt": b"a cat"}, SAMPLE, sample_rng(0, SAMPLE))


WORDS = [
    "cat",
    "dogs",
    "  ",
    "\n",
    "Hello,",
    "na\u00efve",
    "\u65e5\u672c\u8a9e",
    "12345",
    "the",
    "x-y_z",
    "!!!",
    "e\u0301",
    "<image>",
]


def trained_tokenizer(kind: str, texts: list[str]) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "byte-level":
        made, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet)
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "metaspace":  # Llama 1 and 2: the whole text is one word
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], max_token_length=16)
        texts = [word for text in texts for word in text.split(" ")]
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["<unk>"])
    trainer.show_progress = False
    made.train_from_iterator(texts, trainer)
    return made


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "wordpiece"])
def test_of_a_long_text_the_beginning_is_encoded_and_the_first_ids_are_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.samples.text_encoding._WHOLE_CHARACTERS", 100)
    draw = random.Random(0)

    def text(separator: str, count: int) -> str:
        return separator.join(draw.choice(WORDS) for _ in range(count))

    encoder = PlainTextEncoder(trained_tokenizer(kind, [text(" ", 100) for _ in range(50)]))
    shortened = 0
    for number in range(60):
        whole = text(draw.choice([" ", " ", "", "  ", "\n"]), draw.randint(50, 2000))
        if number % 10 == 0:
            whole = " " * draw.randint(10, 5000) + whole
        max_tokens = draw.choice([1, 8, 64])
        ids = first_ids(encoder, whole, max_tokens)
        shortened += len(ids) < len(encoder(whole))
        assert ids[:max_tokens] == encoder(whole)[:max_tokens]
    assert shortened > 30


def test_a_text_of_ten_million_characters_is_not_encoded_whole() -> None:
    seen: list[int] = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return [20] * (len(text) // 4)

    endless = replace(TextEncoding(encode, BOS, 2, 3, IMAGE, EOC))
    for text in ("many words " * 900_000, "x" * 10_000_000):
        assert endless.plain_ids(text, 256) == [20] * 256
    assert max(seen) < 100_000
    assert len(endless.plain_ids("a text " * 10, 256)) == 17


def test_a_text_that_has_no_tokens_is_a_bad_sample() -> None:
    made = Tokenizer(models.WordLevel({"cat": 0}, unk_token="missing"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    encoding = TextEncoding(PlainTextEncoder(made), 1, 2, 3)
    assert encoding.plain_ids("cat") == [0]
    with pytest.raises(SampleError, match="unencodable_text"):
        encoding.plain_ids("dog")
