"""Interleaved documents in MMC4's layout (paper, appendix A.3.1).

The whole document is ``text <image>text <EOC><image>text ... <EOC>``: each image stands before its sentence, an
``<EOC>`` before every ``<image>`` but the first and at the end. A row is ``<BOS>`` and a window of it. Images keep the
order of their sentences, not of ``image_info``; two images of one sentence stand one after the other, in the order of
``image_info``, and the ``<EOC>`` between them is not trained (nothing was said about the first, which is no reason to
learn to say nothing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from model.media_index import following, preceding
from trainer.config.data_config import FilterConfig
from trainer.data.batch import Row, SampleId
from trainer.data.errors import SampleError
from trainer.data.samples.decode import ImageDecoder, decode_json
from trainer.data.samples.filters import NO_FILTERS, check_metadata, check_size, check_text, looks_at_sizes
from trainer.data.samples.mmc4 import Document, PlacedImage, image_bytes, parse_document
from trainer.data.samples.row_builder import make_row
from trainer.data.samples.text_encoding import TextEncoding


@dataclass(frozen=True)
class _Tokens:
    """A document, or a window of it. ``image_number`` counts the document's images at ``<image>`` tokens, else -1."""

    ids: list[int]
    untrained: list[bool]
    image_number: list[int]

    def cut(self, start: int, stop: int) -> _Tokens:
        return _Tokens(self.ids[start:stop], self.untrained[start:stop], self.image_number[start:stop])


@dataclass(frozen=True)
class InterleavedBuilder:
    """A ``.json`` member, and the images as members or base64 (``trainer.data.samples.mmc4``).

    max_tokens: of a row, ``<BOS>`` included. max_images: the row ends before its next image. window: ``random`` draws
    the window's start among those with an image in it, ``start`` begins with the document. p_next: how often a
    document's text sees the image that follows instead of the one that precedes, drawn once a document.
    min_similarity: images below it are left out; None keeps all. space_prefix_probability: how often the texts after
    images get a space in front, drawn once a document. filters: of the whole text, and of each image: a document loses
    the images that they leave out.

    Only the images of the window are decoded, so only they can make a document fail.
    """

    encoding: TextEncoding
    decode_image: ImageDecoder
    max_tokens: int = 256
    max_images: int = 5
    subsequence: Literal["random", "start"] = "random"
    p_next: float = 0.0
    min_similarity: float | None = None
    space_prefix_probability: float = 0.0
    filters: FilterConfig = NO_FILTERS

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Raises SampleError: those of ``parse_document``, images and filters, empty_text, no_images, special_token."""
        tokens, document, next_draw = self._layout(members, sample, rng)
        placed = [document.images[number] for number in tokens.image_number if number >= 0]
        media = tuple(self.decode_image(image_bytes(image, members, sample.key), rng)[None] for image in placed)
        image_id, _ = self.encoding.layout_ids()
        ids = torch.tensor([self.encoding.bos_id, *tokens.ids])
        index_of = following if next_draw < self.p_next else preceding
        return make_row(
            ids.tolist(),
            [True, *tokens.untrained],
            media,
            sample,
            image_id=image_id,
            media_index=index_of(ids, image_id),
        )

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Tokens of the row, without decoding images. Raises SampleError like a call, but for damaged images."""
        return 1 + len(self._layout(members, sample, rng)[0].ids)

    def _layout(
        self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator
    ) -> tuple[_Tokens, Document, float]:
        """The window's tokens, the document that their images count in, and the draw for p_next."""
        next_draw, space_draw, start_draw = rng.random(3)  # always three, so that settings do not shift one another
        if "json" not in members:
            raise SampleError("missing_json", f"members: {', '.join(sorted(members))}")
        check_metadata(members, self.filters)
        document = parse_document(decode_json(members["json"]), self.min_similarity)
        check_text(" ".join(document.sentences), self.filters)
        if looks_at_sizes(self.filters):
            document = self._without_filtered_images(document, members, sample.key)
        prefix = " " if space_draw < self.space_prefix_probability else ""
        return self._window(self._tokenize(document, prefix), start_draw), document, next_draw

    def _without_filtered_images(self, document: Document, members: Mapping[str, bytes], key: str) -> Document:
        """Raises SampleError, the last image's reason, when no image is left."""
        kept: list[PlacedImage] = []
        error = None
        for image in document.images:
            try:
                width, height = self.decode_image.header_size(image_bytes(image, members, key))
            except SampleError:
                kept.append(image)  # damaged: it only matters if the window has it
                continue
            try:
                check_size(width, height, self.filters)
                kept.append(image)
            except SampleError as filtered:
                error = filtered
        if not kept and error is not None:
            raise error
        return Document(document.sentences, tuple(kept))

    def _tokenize(self, document: Document, prefix: str) -> _Tokens:
        image_id, end_of_chunk_id = self.encoding.layout_ids()
        tokens = _Tokens([], [], [])

        def add(ids: Sequence[int], *, untrained: bool = False, image: int = -1) -> None:
            tokens.ids.extend(ids)
            tokens.untrained.extend([untrained] * len(ids))
            tokens.image_number.extend([image] * len(ids))

        said = False
        for text, images in _chunks(document):
            for image in images:
                if image > 0:
                    add([end_of_chunk_id], untrained=not said)
                add([image_id], untrained=True, image=image)
                said = False
            ids = self.encoding.plain((prefix if images else "") + text) if text else []
            said = said or bool(ids)
            add(ids)
        add([end_of_chunk_id], untrained=not said)
        return tokens

    def _window(self, tokens: _Tokens, draw: float) -> _Tokens:
        length = self.max_tokens - 1
        at = np.flatnonzero(np.array(tokens.image_number) >= 0)
        start = 0
        if self.subsequence == "random" and len(tokens.ids) > length:
            possible = _window_starts(tokens, at, length, self.encoding.layout_ids()[1])
            start = int(possible[int(draw * len(possible))])
        inside = at[(at >= start) & (at < start + length)]
        if not len(inside):
            raise SampleError("no_images", f"no image in the first {self.max_tokens} tokens (max_tokens)")
        stop = start + length
        if len(inside) > self.max_images:
            # The end-of-chunk before the first image too many closes the last chunk and stays.
            stop = int(inside[self.max_images])
        return tokens.cut(start, stop)


def _window_starts(tokens: _Tokens, image_positions: np.ndarray, length: int, end_of_chunk_id: int) -> np.ndarray:
    """Starts of full windows with an image in them, not at an end-of-chunk whose chunk lies outside."""
    starts = np.arange(len(tokens.ids) - length + 1)
    has_image = np.searchsorted(image_positions, starts) < np.searchsorted(image_positions, starts + length)
    opens = np.array(tokens.ids)[starts] != end_of_chunk_id
    possible = starts[has_image & opens]
    # Only of end-of-chunks and images can every window open with an end-of-chunk.
    return possible if len(possible) else starts[has_image]


def _chunks(document: Document) -> list[tuple[str, list[int]]]:
    """(text, images before it): neighboring sentences without an image between them, joined by spaces."""
    images_of: dict[int, list[int]] = {}
    for number, image in enumerate(document.images):
        images_of.setdefault(image.sentence, []).append(number)
    chunks: list[tuple[list[str], list[int]]] = []
    for number, sentence in enumerate(document.sentences):
        if number in images_of or not chunks:
            chunks.append(([], images_of.get(number, [])))
        if sentence.strip():
            chunks[-1][0].append(sentence.strip())
    return [(" ".join(sentences), images) for sentences, images in chunks]
