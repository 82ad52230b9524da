"""Build rows of interleaved documents in MMC4's layout (paper, appendix A.3.1).

A whole document is ``text <image>text <EOC><image>text ... <EOC>``: each image stands before its sentence. ``<EOC>``
stands before every ``<image>`` but the first, and at the end. A row is ``<BOS>`` and a window of the document.

Images follow the order of their sentences, not that of ``image_info``. Two images of one sentence follow each other in
the order of ``image_info``. The ``<EOC>`` between them is not trained on: the first image has no text, and the model
should not learn to say nothing about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.media_index import following, preceding
from trainer.config.data_config import InterleavedSource
from trainer.data.batch import RejectedSample, Row, SampleId
from trainer.data.errors import SampleError
from trainer.data.samples.filters import check_metadata, check_size, check_text, needs_sizes
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.image_file import image_size
from trainer.data.samples.mmc4_document import Damaged, Document, PlacedImage, image_bytes, parse_document
from trainer.data.samples.rows import make_row
from trainer.data.samples.sample_members import decode_json, is_visible
from trainer.data.samples.text_encoding import TextEncoding


class _Draws(NamedTuple):
    """Hold the draws of a document, each in [0, 1): whether text sees the next image, the space, the window's start."""

    next_image: float
    space: float
    start: float


@dataclass(frozen=True)
class _Tokens:
    """Hold the tokens of a document, or of a window of it.

    Attributes:
        ids: Token ids.
        untrained: Whether the loss leaves a token out.
        image_number: Place in the document's images at ``<image>`` tokens, -1 elsewhere.
        num_left_out: Images that ``max_images`` leaves out of a window.
    """

    ids: list[int]
    untrained: list[bool]
    image_number: list[int]
    num_left_out: int = 0

    def append(self, ids: Sequence[int], *, untrained: bool = False, image_number: int = -1) -> None:
        self.ids.extend(ids)
        self.untrained.extend([untrained] * len(ids))
        self.image_number.extend([image_number] * len(ids))

    def cut(self, start: int, stop: int) -> _Tokens:
        part = slice(start, stop)
        return replace(self, ids=self.ids[part], untrained=self.untrained[part], image_number=self.image_number[part])


@dataclass(frozen=True)
class InterleavedBuilder:
    """Build the row of a ``.json`` member, whose images are members or base64 (``mmc4_document``).

    A random window starts anywhere in the document where it contains an image. The row ends before the first image
    beyond ``max_images``. The draws for ``p_next`` and the space are made once a document. Filters of text judge the
    whole document, filters of size each image; a document loses the images that they reject. Only the images of the
    window are decoded, so a damaged image outside of it does no harm. A damaged one inside of it is dropped, and the
    row is that of the document without the image, where another image is left.

    Attributes:
        source: Settings of the documents.
        encoding: Encoder of the sentences.
        decoder: Decoder of the images.
    """

    source: InterleavedSource
    encoding: TextEncoding
    decoder: ImageDecoder

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        """Build the row.

        Raises:
            SampleError: From ``parse_document``, images and filters; empty_text, no_images, special_token.
        """
        document, draws = self._open_document(members, sample, rng)
        tokens = self._draw_window(document, draws)
        decoded: dict[int, Tensor] = {}  # by the identity of an image's entry
        while damaged := self._decode_images(tokens, document, members, sample.key, rng, decoded):
            document = document.without(damaged)
            tokens = self._draw_again(document, draws, len(tokens.ids), damaged)
        media = tuple(decoded[id(document.images[number].info)] for number in tokens.image_number if number >= 0)
        image_id, _ = self.encoding.layout_ids()
        ids = torch.tensor([self.encoding.bos_id, *tokens.ids])
        index_of = following if draws.next_image < self.source.p_next else preceding
        dropped = [RejectedSample(error.reason, error.detail, sample) for error in document.dropped]
        left_out = f"images of a row after the first {self.source.max_images} (max_images)"
        dropped += [RejectedSample("filtered_max_images", left_out, sample)] * tokens.num_left_out
        return make_row(
            ids.tolist(),
            [True, *tokens.untrained],
            media,
            sample,
            image_id=image_id,
            media_index=index_of(ids, image_id),
            dropped_images=tuple(dropped),
        )

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Return the number of tokens of the row without decoding images.

        Raises:
            SampleError: As for the row, except that damaged images are not noticed.
        """
        return 1 + len(self._draw_window(*self._open_document(members, sample, rng)).ids)

    def _open_document(
        self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator
    ) -> tuple[Document, _Draws]:
        # Always three draws, so that no setting shifts the draws of another.
        draws = _Draws(*rng.random(3).tolist())
        if "json" not in members:
            raise SampleError("missing_json", f"members: {', '.join(sorted(members))}")
        check_metadata(members, self.source.filters)
        document = parse_document(decode_json(members["json"], strict=False), self.source.min_similarity)
        check_text(" ".join(document.sentences), self.source.filters)
        document = document.cut(self.source.max_document_characters)
        if needs_sizes(self.source.filters):
            document = self._filter_images(document, members, sample.key)
        return document, draws

    def _draw_window(self, document: Document, draws: _Draws) -> _Tokens:
        prefix = " " if draws.space < self.source.space_prefix_probability else ""
        return self._cut_window(self._encode(document, prefix), draws.start)

    def _draw_again(self, document: Document, draws: _Draws, longest: int, damaged: Damaged) -> _Tokens:
        """Draw the window of a document that has lost images, with the same draws.

        Raises:
            SampleError: The window has no image; the reason is that of the last damaged one.
        """
        try:
            tokens = self._draw_window(document, draws).cut(0, longest)  # packing has reserved no more
        except SampleError:
            tokens = _Tokens([], [], [])
        if max(tokens.image_number, default=-1) < 0:
            raise damaged[-1][1]
        return tokens

    def _decode_images(
        self,
        tokens: _Tokens,
        document: Document,
        members: Mapping[str, bytes],
        key: str,
        rng: np.random.Generator,
        decoded: dict[int, Tensor],
    ) -> Damaged:
        """Decode the images of a window that are not in ``decoded`` yet, and return those that fail."""
        damaged: Damaged = []
        for number in tokens.image_number:
            image = document.images[number]
            if number >= 0 and id(image.info) not in decoded:
                try:
                    decoded[id(image.info)] = self.decoder(image_bytes(image, members, key), rng)[None]
                except SampleError as error:
                    damaged.append((image, error))
        return damaged

    def _filter_images(self, document: Document, members: Mapping[str, bytes], key: str) -> Document:
        """Drop the images that the filters of size reject.

        Raises:
            SampleError: No image is left; the reason is that of the last one.
        """
        kept: list[PlacedImage] = []
        rejection = None
        for image in document.images:
            try:
                width, height = image_size(image_bytes(image, members, key))
            except SampleError:
                kept.append(image)  # a damaged image matters only if it lies in the window
                continue
            try:
                check_size(width, height, self.source.filters)
                kept.append(image)
            except SampleError as error:
                rejection = error
        if not kept and rejection is not None:
            raise rejection
        return replace(document, images=tuple(kept))

    def _encode(self, document: Document, prefix: str) -> _Tokens:
        """Encode the whole document; ``prefix`` stands before each text that follows an image."""
        image_id, end_of_chunk_id = self.encoding.layout_ids()
        tokens = _Tokens([], [], [])
        has_text = False  # whether any text stands after the last image
        for text, images in _chunks(document):
            for number in images:
                if number > 0:
                    tokens.append([end_of_chunk_id], untrained=not has_text)
                tokens.append([image_id], untrained=True, image_number=number)
                has_text = False
            ids = self.encoding.plain_ids((prefix if images else "") + text) if text else []
            has_text = has_text or bool(ids)
            tokens.append(ids)
        tokens.append([end_of_chunk_id], untrained=not has_text)
        return tokens

    def _cut_window(self, tokens: _Tokens, start_draw: float) -> _Tokens:
        length = self.source.max_tokens - 1
        image_positions = np.flatnonzero(np.array(tokens.image_number) >= 0)
        start = 0
        if self.source.subsequence == "random" and len(tokens.ids) > length:
            starts = _window_starts(tokens, image_positions, length, self.encoding.layout_ids()[1])
            start = int(starts[int(start_draw * len(starts))])
        inside = image_positions[(image_positions >= start) & (image_positions < start + length)]
        if not len(inside):
            detail = f"no image in the first {self.source.max_tokens} tokens (max_tokens)"
            raise SampleError("filtered_subsequence", detail)
        stop = start + length
        if len(inside) > self.source.max_images:
            # The <EOC> before this image closes the last chunk, so it stays.
            stop = int(inside[self.source.max_images])
        return replace(tokens.cut(start, stop), num_left_out=max(0, len(inside) - self.source.max_images))


def _window_starts(tokens: _Tokens, image_positions: np.ndarray, length: int, end_of_chunk_id: int) -> np.ndarray:
    """Return the starts of full windows that contain an image and do not begin with the ``<EOC>`` of another chunk."""
    starts = np.arange(len(tokens.ids) - length + 1)
    has_image = np.searchsorted(image_positions, starts) < np.searchsorted(image_positions, starts + length)
    after_chunk = np.array(tokens.ids)[starts] == end_of_chunk_id
    possible = starts[has_image & ~after_chunk]
    # If a document has hardly any text, every window may begin with an <EOC>.
    return possible if len(possible) else starts[has_image]


def _chunks(document: Document) -> list[tuple[str, list[int]]]:
    """Return (text, numbers of the images before it); sentences without an image between them are joined by spaces."""
    images_of: dict[int, list[int]] = {}
    for number, image in enumerate(document.images):
        images_of.setdefault(image.sentence, []).append(number)
    chunks: list[tuple[list[str], list[int]]] = []
    for number, sentence in enumerate(document.sentences):
        if number in images_of or not chunks:
            chunks.append(([], images_of.get(number, [])))
        if is_visible(sentence):
            chunks[-1][0].append(sentence.strip())
    return [(" ".join(sentences), images) for sentences, images in chunks]
