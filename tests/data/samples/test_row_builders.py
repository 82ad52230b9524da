"""Layouts, labels and media_index of pairs, text and contrastive samples."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from model.config import VisionEncoderConfig
from model.vision_encoder import VisionEncoder
from tests.data.helpers import BOS, EOC, IMAGE, SAMPLE, encoding, image_bytes, text_of
from trainer.config.data_config import DataConfig, ImageTextSource
from trainer.data.batch import SampleId, collate
from trainer.data.errors import SampleError
from trainer.data.samples.contrastive import ContrastiveBuilder
from trainer.data.samples.decode import ImageDecoder
from trainer.data.samples.pairs import ImageTextBuilder
from trainer.data.samples.row_builder import join, sample_rng
from trainer.data.samples.text import TextBuilder
from trainer.data.samples.text_encoding import PlainTextEncoder, TextEncoding
from trainer.tasks.row_builders import check_image_tokens

PAIR = {"png": image_bytes((9, 8, 7)), "txt": b"a cat"}
DECODER = ImageDecoder(8)


def rng(index: int = 0) -> np.random.Generator:
    return sample_rng(0, SampleId("source", 0, "a.tar", index, "k"))


def trained(labels: torch.Tensor) -> str:
    return "".join("." if label < 0 else text_of([int(label)]) for label in labels)


def test_pair() -> None:
    row = ImageTextBuilder(encoding(), DECODER)(PAIR, SAMPLE, rng())
    assert text_of(row.input_ids) == "B#a cat|"
    assert trained(row.labels) == "..a cat|"
    assert row.media_index.tolist() == [-1, 0, 0, 0, 0, 0, 0, 0]
    assert [medium.shape for medium in row.media] == [(1, 3, 8, 8)]
    assert row.media[0][0, :, 0, 0].tolist() == [9, 8, 7]
    assert row.samples == (SAMPLE,)


def test_pair_with_end_of_sequence_and_cut() -> None:
    row = ImageTextBuilder(encoding(), DECODER, end_of_sequence=True)(PAIR, SAMPLE, rng())
    assert (text_of(row.input_ids), trained(row.labels)) == ("B#a cat|E", "..a cat|E")
    cut = ImageTextBuilder(encoding(), DECODER, max_tokens=5)(PAIR, SAMPLE, rng())
    assert (text_of(cut.input_ids), trained(cut.labels)) == ("B#a c", "..a c")


def test_space_prefix_is_drawn_by_sample() -> None:
    builder = ImageTextBuilder(encoding(), DECODER, space_prefix_probability=0.5)
    drawn = [text_of(builder(PAIR, SAMPLE, rng(i)).input_ids)[2] == " " for i in range(200)]
    assert 70 < sum(drawn) < 130
    assert drawn == [text_of(builder(PAIR, SAMPLE, rng(i)).input_ids)[2] == " " for i in range(200)]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"a"}, "missing_image"),
        ({**PAIR, "txt": b""}, "empty_text"),
        ({**PAIR, "txt": b"\xff"}, "invalid_utf8"),
        ({**PAIR, "png": PAIR["png"][:50]}, "truncated_image"),
        ({"png": PAIR["png"]}, "missing_text"),
    ],
)
def test_bad_pairs(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        ImageTextBuilder(encoding(), DECODER)(members, SAMPLE, rng())
    assert caught.value.reason == reason


def test_text_rows() -> None:
    builder = TextBuilder(encoding(), max_tokens=9)
    parts = [builder({"txt": text}, SAMPLE, rng()) for text in (b"one", b"three")]
    row = join(parts, 9)
    assert text_of(row.input_ids) == "BoneBthre"
    assert trained(row.labels) == ".oneBthre"  # the second BOS says that "one" is over
    assert row.media_index.tolist() == [-1] * 9
    assert len(row.samples) == 2
    assert text_of(builder({"txt": b"0123456789"}, SAMPLE, rng()).input_ids) == "B01234567"


def test_join_counts_media_on() -> None:
    row = ImageTextBuilder(encoding(), DECODER)(PAIR, SAMPLE, rng())
    joined = join([row, row], 100)
    assert joined.media_index.tolist() == [-1, *[0] * 7, -1, *[1] * 7]
    assert len(joined.media) == 2


def test_contrastive() -> None:
    def tokenize(text: str) -> torch.Tensor:
        return torch.tensor([len(text), 0, 0])

    row = ContrastiveBuilder(tokenize, DECODER)(PAIR, SAMPLE, rng())
    assert row.input_ids.tolist() == [5, 0, 0]
    assert row.labels.tolist() == [-100] * 3
    assert row.media_index.tolist() == [-1] * 3
    assert len(row.media) == 1


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
    assert 257 in made.encode("a<image>b").ids  # what would happen
    safe = TextEncoding(PlainTextEncoder(made), 256, 256, 256, 257, 258)
    text = "a<image>b<|endofchunk|> <|endoftext|>"
    ids = safe.plain(text)
    assert max(ids) < 256
    assert len(ids) == len(text)  # neither truncated nor padded
    assert made.decode(ids, skip_special_tokens=False).replace("Ġ", " ").replace(" ", "") == text.replace(" ", "")
    assert made.encode("a<image>b").ids[1] == 257  # the tokenizer itself is left alone
    assert pickle.loads(pickle.dumps(safe)).plain(text) == ids


def test_an_encoder_that_gives_special_tokens_is_refused() -> None:
    unsafe: Any = TextEncoding(lambda text: [20, IMAGE, 21], BOS, 2, 3, IMAGE, EOC)
    with pytest.raises(SampleError, match="special_token"):
        unsafe.plain("a<image>b")


def test_images_need_their_tokens() -> None:
    without = TextEncoding(PlainTextEncoder(tokenizer()), 256, 256, 256)
    with pytest.raises(ValueError, match=r"model\.tokens\.image"):
        ImageTextBuilder(without, DECODER)(PAIR, SAMPLE, rng())


def test_rng_is_the_samples_own() -> None:
    base = SampleId("s", 0, "a.tar", 0, "k")
    others = [
        SampleId("t", 0, "a.tar", 0, "k"),
        SampleId("s", 1, "a.tar", 0, "k"),
        SampleId("s", 0, "b.tar", 0, "k"),
        SampleId("s", 0, "a.tar", 1, "k"),
    ]
    draws = [sample_rng(0, sample).random() for sample in [base, *others]] + [sample_rng(1, base).random()]
    assert len(set(draws)) == 6
    assert sample_rng(0, base).random() == draws[0]


def test_collated_media_are_flat_and_a_batch_without_media_has_a_dummy() -> None:
    pair = ImageTextBuilder(encoding(), DECODER)(PAIR, SAMPLE, rng())
    text = join([TextBuilder(encoding())({"txt": b"only text"}, SAMPLE, rng())], 64)
    batch = collate([text, pair, pair], source="s", pad_id=3, media_shape=(1, 3, 8, 8))
    assert batch.media.shape == (2, 1, 3, 8, 8)
    assert batch.media_index[1].tolist() == [-1, 0, 0, 0, 0, 0, 0, 0, -1, -1]
    assert batch.media_index[2].max() == 1
    assert batch.input_ids[1, 8:].tolist() == [3, 3]
    assert batch.labels[1, 8:].tolist() == [-100, -100]
    alone = collate([text], source="s", pad_id=3, media_shape=(1, 3, 8, 8))
    assert alone.media.shape == (1, 1, 3, 8, 8)
    assert alone.media_index.max() == -1


def test_a_tower_that_takes_squares_only_is_refused_by_name() -> None:
    tower = open_clip.create_model("RN50", load_weights=False, device="meta").visual
    encoder = VisionEncoder(tower, VisionEncoderConfig("RN50"))
    squares, shapes = (ImageTextSource("pairs", Path("m.npz"), 4, image_tokens=tokens) for tokens in (None, 100))
    check_image_tokens(DataConfig((squares,)), encoder)
    with pytest.raises(ValueError, match=r"data.sources.1.image_tokens: the tower 'RN50' takes squares only"):
        check_image_tokens(DataConfig((squares, shapes)), encoder)
