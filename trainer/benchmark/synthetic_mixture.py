"""Make a synthetic mixture like the one Flamingo trains on: documents with several images, and twice as many pairs.

Documents have 256 tokens and 1 to 6 images, 2.5 on average; captions have 8 to 40 tokens. Words and pixels are random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.tokens import SpecialTokenIds
from trainer.data.batch import Batch, BatchFormat, Row, SampleId, collate
from trainer.data.samples.rows import make_row, pack
from trainer.data.stream.packing import LanePosition, first_fit

DOCUMENT_TOKENS, PAIR_TOKENS, MOST_IMAGES = 256, 64, 6
_SHARES_OF_IMAGE_COUNTS = (0.30, 0.27, 0.20, 0.13, 0.06, 0.04)  # of documents with 1 to 6 images
_CAPTION_TOKENS = (8, 40)  # fewest and most
_SAMPLE = SampleId("synthetic", 0, "", 0, "")


@dataclass(frozen=True)
class Mixture:
    """Hold the samples of one step, one row each.

    Attributes:
        documents: Interleaved documents.
        pairs: Image-text pairs.
    """

    documents: list[Row]
    pairs: list[Row]


def make_mixture(documents: int, tokens: SpecialTokenIds, image_size: int, seed: int = 0) -> Mixture:
    """Make so many documents, and twice as many pairs. Ordinary words are ids below ``tokens.image_id``."""
    rng = np.random.default_rng(seed)
    return Mixture(
        [_document(rng, tokens, image_size) for _ in range(documents)],
        [_pair(rng, tokens, image_size) for _ in range(2 * documents)],
    )


def packed_rows(samples: list[Row], max_tokens: int = DOCUMENT_TOKENS) -> list[Row]:
    """Pack samples, in their order, into rows of up to ``max_tokens``."""
    rows, position = [], LanePosition()
    while position.ordinal < len(samples):
        chosen, position = first_fit(
            position, lambda i: len(samples[i].input_ids) if i < len(samples) else max_tokens + 1, max_tokens
        )
        rows.append(pack([samples[i] for i in chosen]))
    return rows


def packed_batches(mixture: Mixture, tokens: SpecialTokenIds, image_size: int) -> dict[str, Batch]:
    """Return the micro-batches of a step by source, as ``trainer.train`` makes them with ``packing: true``."""
    batch_format = BatchFormat(tokens.pad_id, image_size)
    return {
        name: collate(packed_rows(rows), batch_format, source=name)
        for name, rows in (("documents", mixture.documents), ("pairs", mixture.pairs))
    }


def padding_share(batches: list[Batch]) -> float:
    """Return the share of the positions that hold no token."""
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return 1 - tokens / sum(batch.attention_mask.numel() for batch in batches)


def _document(rng: np.random.Generator, tokens: SpecialTokenIds, image_size: int) -> Row:
    images = int(rng.choice(len(_SHARES_OF_IMAGE_COUNTS), p=_SHARES_OF_IMAGE_COUNTS)) + 1
    ids = rng.integers(3, tokens.image_id, DOCUMENT_TOKENS)
    ids[0] = tokens.bos_id
    # Each image is followed by its text, which ends with <EOC>.
    starts = 1 + np.sort(rng.choice((DOCUMENT_TOKENS - 1) // 4, images, replace=False)) * 4
    ids[starts] = tokens.image_id
    ids[[*(starts[1:] - 1), DOCUMENT_TOKENS - 1]] = tokens.end_of_chunk_id
    return _row(rng, ids, tokens, images, image_size)


def _pair(rng: np.random.Generator, tokens: SpecialTokenIds, image_size: int) -> Row:
    caption = rng.integers(3, tokens.image_id, int(rng.integers(*_CAPTION_TOKENS, endpoint=True)))
    ids = np.concatenate([[tokens.bos_id, tokens.image_id], caption, [tokens.end_of_chunk_id]])
    return _row(rng, ids, tokens, 1, image_size)


def _row(rng: np.random.Generator, ids: np.ndarray, tokens: SpecialTokenIds, images: int, image_size: int) -> Row:
    media = tuple(
        torch.from_numpy(rng.integers(0, 256, (1, 3, image_size, image_size), dtype=np.uint8)) for _ in range(images)
    )
    untrained = [token in (tokens.bos_id, tokens.image_id) for token in ids]
    return make_row(ids.tolist(), untrained, media, _SAMPLE, image_id=tokens.image_id)
