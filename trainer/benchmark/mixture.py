"""A mixture like the one Flamingo trains on, made up: documents with several images, and twice as many pairs.

Documents have 256 tokens and 1 to 6 images, 2.5 on average; captions have 8 to 40 tokens. Words and pixels are random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.tokens import SpecialTokenIds
from trainer.data.batch import Batch, Row, SampleId, collate
from trainer.data.samples.row_builder import make_row, pack
from trainer.data.stream.packing import LanePosition, first_fit

DOCUMENT_TOKENS, PAIR_TOKENS, MOST_IMAGES = 256, 64, 6
_SHARE_OF_IMAGES = (0.30, 0.27, 0.20, 0.13, 0.06, 0.04)  # 1 to 6 of them; 2.5 on average
_CAPTION = (8, 40)
_SAMPLE = SampleId("made up", 0, "", 0, "")


@dataclass(frozen=True)
class Mixture:
    """The samples of one update, one row each."""

    documents: list[Row]
    pairs: list[Row]


def make_mixture(documents: int, tokens: SpecialTokenIds, image_size: int, seed: int = 0) -> Mixture:
    """That many documents, and twice as many pairs. Ordinary words are ids below ``tokens.image_id``."""
    rng = np.random.default_rng(seed)
    return Mixture(
        [_document(rng, tokens, image_size) for _ in range(documents)],
        [_pair(rng, tokens, image_size) for _ in range(2 * documents)],
    )


def packed_rows(sequences: list[Row], max_tokens: int = DOCUMENT_TOKENS) -> list[Row]:
    """The rows that packing makes of these samples in their order."""
    rows, position = [], LanePosition()
    while position.ordinal < len(sequences):
        chosen, position = first_fit(
            position, lambda i: len(sequences[i].input_ids) if i < len(sequences) else max_tokens + 1, max_tokens
        )
        rows.append(pack([sequences[i] for i in chosen]))
    return rows


def packed_batches(mixture: Mixture, tokens: SpecialTokenIds, image_size: int) -> dict[str, Batch]:
    """The micro-batches of an update as ``trainer.train`` makes them with ``pack: true``, by source."""
    shape = (1, 3, image_size, image_size)
    return {
        name: collate(packed_rows(rows), source=name, pad_id=tokens.pad_id, media_shape=shape)
        for name, rows in (("documents", mixture.documents), ("pairs", mixture.pairs))
    }


def padding_share(batches: list[Batch]) -> float:
    """Share of the positions that hold no token."""
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return 1 - tokens / sum(batch.attention_mask.numel() for batch in batches)


def _document(rng: np.random.Generator, tokens: SpecialTokenIds, image_size: int) -> Row:
    images = int(rng.choice(len(_SHARE_OF_IMAGES), p=_SHARE_OF_IMAGES)) + 1
    ids = rng.integers(3, tokens.image_id, DOCUMENT_TOKENS)
    ids[0] = tokens.bos_id
    # Each image stands before its part of the text, which ends with <EOC>.
    starts = 1 + np.sort(rng.choice((DOCUMENT_TOKENS - 1) // 4, images, replace=False)) * 4
    ids[starts] = tokens.image_id
    ids[[*(starts[1:] - 1), DOCUMENT_TOKENS - 1]] = tokens.end_of_chunk_id
    return _sequence(rng, ids, tokens, images, image_size)


def _pair(rng: np.random.Generator, tokens: SpecialTokenIds, image_size: int) -> Row:
    caption = rng.integers(3, tokens.image_id, int(rng.integers(*_CAPTION, endpoint=True)))
    ids = np.concatenate([[tokens.bos_id, tokens.image_id], caption, [tokens.end_of_chunk_id]])
    return _sequence(rng, ids, tokens, 1, image_size)


def _sequence(rng: np.random.Generator, ids: np.ndarray, tokens: SpecialTokenIds, images: int, image_size: int) -> Row:
    media = tuple(
        torch.from_numpy(rng.integers(0, 256, (1, 3, image_size, image_size), dtype=np.uint8)) for _ in range(images)
    )
    untrained = [token in (tokens.bos_id, tokens.image_id) for token in ids]
    return make_row(ids.tolist(), untrained, media, _SAMPLE, image_id=tokens.image_id)
