"""Check that no text is encoded to special tokens."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.data.helpers import BOS, EOC, IMAGE, SAMPLE, image_bytes, pair_builder
from trainer.data.errors import SampleError
from trainer.data.samples.rows import sample_rng
from trainer.data.samples.text_encoding import PlainTextEncoder, TextEncoding


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
