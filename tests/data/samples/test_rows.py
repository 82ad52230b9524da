"""Check the layout, labels and media_index of pair, text and contrastive rows, and of batches of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.helpers import DECODER, FORMAT, NO_MANIFEST, SAMPLE, image_bytes, pair_builder, text_builder, text_of
from trainer.config.data_config import ImageTextSource
from trainer.data.batch import SampleId, collate
from trainer.data.errors import SampleError
from trainer.data.samples.contrastive_rows import ContrastiveBuilder
from trainer.data.samples.rows import join, pack, sample_rng

PAIR = {"png": image_bytes((9, 8, 7)), "txt": b"a cat"}


def rng(index: int = 0) -> np.random.Generator:
    return sample_rng(0, SampleId("source", 0, "a.tar", index, "k"))


def trained(labels: torch.Tensor) -> str:
    return "".join("." if label < 0 else text_of([int(label)]) for label in labels)


def test_pair() -> None:
    row = pair_builder()(PAIR, SAMPLE, rng())
    assert text_of(row.input_ids) == "B#a cat|"
    assert trained(row.labels) == "..a cat|"
    assert row.media_index.tolist() == [-1, 0, 0, 0, 0, 0, 0, 0]
    assert [medium.shape for medium in row.media] == [(1, 3, 8, 8)]
    assert row.media[0][0, :, 0, 0].tolist() == [9, 8, 7]
    assert row.samples == (SAMPLE,)


def test_end_of_sequence_and_cut() -> None:
    row = pair_builder(end_of_sequence=True)(PAIR, SAMPLE, rng())
    assert (text_of(row.input_ids), trained(row.labels)) == ("B#a cat|E", "..a cat|E")
    cut = pair_builder(max_tokens=5)(PAIR, SAMPLE, rng())
    assert (text_of(cut.input_ids), trained(cut.labels)) == ("B#a c", "..a c")


def test_space_prefix_is_drawn_for_each_sample() -> None:
    builder = pair_builder(space_prefix_probability=0.5)
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
        pair_builder()(members, SAMPLE, rng())
    assert caught.value.reason == reason


def test_text_rows() -> None:
    builder = text_builder(max_tokens=9)
    parts = [builder({"txt": text}, SAMPLE, rng()) for text in (b"one", b"three")]
    row = join(parts, 9)
    assert text_of(row.input_ids) == "BoneBthre"
    assert trained(row.labels) == ".oneBthre"  # the second BOS tells that "one" has ended
    assert row.media_index.tolist() == [-1] * 9
    assert len(row.samples) == 2
    assert text_of(builder({"txt": b"0123456789"}, SAMPLE, rng()).input_ids) == "B01234567"


def test_join_renumbers_media() -> None:
    row = pair_builder()(PAIR, SAMPLE, rng())
    joined = join([row, row], 100)
    assert joined.media_index.tolist() == [-1, *[0] * 7, -1, *[1] * 7]
    assert len(joined.media) == 2


def test_contrastive() -> None:
    def tokenize(text: str) -> torch.Tensor:
        return torch.tensor([len(text), 0, 0])

    row = ContrastiveBuilder(ImageTextSource("pairs", NO_MANIFEST, 1), tokenize, DECODER)(PAIR, SAMPLE, rng())
    assert row.input_ids.tolist() == [5, 0, 0]
    assert row.labels.tolist() == [-100] * 3
    assert row.media_index.tolist() == [-1] * 3
    assert len(row.media) == 1


def test_each_sample_has_its_own_generator() -> None:
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


def test_media_of_a_batch_are_flat_and_a_batch_without_media_has_a_dummy() -> None:
    pair = pair_builder()(PAIR, SAMPLE, rng())
    text = join([text_builder()({"txt": b"only text"}, SAMPLE, rng())], 64)
    batch = collate([text, pair, pair], FORMAT, source="s")
    assert batch.media.shape == (2, 1, 3, 8, 8)
    assert batch.media_index[1].tolist() == [-1, 0, 0, 0, 0, 0, 0, 0, -1, -1]
    assert batch.media_index[2].max() == 1
    assert batch.input_ids[1, 8:].tolist() == [3, 3]
    assert batch.labels[1, 8:].tolist() == [-100, -100]
    alone = collate([text], FORMAT, source="s")
    assert alone.media.shape == (1, 1, 3, 8, 8)
    assert alone.media_index.max() == -1


def test_packed_rows_have_positions_only_where_documents_need_them() -> None:
    one, other = (
        join([text_builder()({"txt": text}, SAMPLE, rng())], 64) for text in (b"only text", b"and more of it")
    )
    batch = collate([pack([one, other]), pack([one])], FORMAT, source="s")
    assert batch.position_ids is not None and batch.document_offsets is not None
    lengths = [len(one.input_ids), len(other.input_ids)]
    assert batch.document_offsets.diff().tolist() == [*lengths, lengths[0], lengths[1]]  # the last one is padding
    assert batch.longest_document == max(lengths)
    assert {"position_ids", "document_offsets", "longest_document"} <= batch.inputs.keys()
    single = collate([pack([one]), pack([one])], FORMAT, source="s")
    assert (single.position_ids, single.document_offsets, single.num_documents) == (None, None, 2)
    assert "attention_mask" not in batch.inputs.keys() | single.inputs.keys()
